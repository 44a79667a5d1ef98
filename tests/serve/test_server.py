"""`burnish api` as a process: where it listens, what it says first, how it ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import here
from serving import small_engine
from transformers import AutoTokenizer

from burnish.cli import main
from burnish.errors import UserError
from burnish.serve import server
from burnish.serve.server import Address, open_place, start_lines


def test_the_environment_says_where_it_listens():
    assert Address.of({}) == Address("127.0.0.1", 8000, None, None)
    given = {"API_HOST": "0.0.0.0", "API_PORT": "81", "API_KEY": "k", "API_MODEL_NAME": "n"}
    assert Address.of(given) == Address("0.0.0.0", 81, "k", "n")


@pytest.mark.parametrize("port", ["http", "-1", "65536", "80.0"])
def test_a_port_that_is_none_is_told(port: str):
    with pytest.raises(UserError, match=f"API_PORT '{port}' is not a port"):
        Address.of({"API_PORT": port})


@pytest.mark.parametrize("host", ["203.0.113.1", "no..name"])
def test_a_host_that_is_none_of_this_machine_is_told(host: str):
    with pytest.raises(UserError, match=f"API_HOST '{host}' cannot be listened on"):
        open_place({"API_HOST": host, "API_PORT": "0"})


def test_a_port_in_use_is_one_line_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text("{}")  # loading this would fail
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("API_PORT", str(port))
        assert main(["api", "--model_name_or_path", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"burnish api: API_PORT {port} is in use; end the program that has it, or give another port: API_PORT=8001"
    ]


def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs starlette and uvicorn, not installed here; pip install 'burnish\[api\]'"
    ):
        open_place({})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "this machine alone; API_HOST=0.0.0.0 opens it to others"),
        ({"API_HOST": "0.0.0.0"}, "other machines too; anyone may ask: API_KEY=… asks for a key"),
        ({"API_HOST": "0.0.0.0", "API_KEY": "k"}, "other machines too)"),
    ],
)
def test_the_start_line_says_who_can_reach_it(environment: dict[str, str], words: str):
    place = open_place({"API_PORT": "0", **environment})
    with place.socket:
        port = place.url.rpartition(":")[2]
        first, example, _ = start_lines("a-model", place)
    assert first.startswith(f"a-model is served at http://127.0.0.1:{port} (")
    assert words in first
    assert ('-H "Authorization: Bearer $API_KEY"' in example) == ("API_KEY" in environment)


@pytest.fixture(scope="module")
def model(fixture_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model whose answers are long."""
    folder = tmp_path_factory.mktemp("model")
    engine = small_engine(AutoTokenizer.from_pretrained(fixture_path("smollm2")), positions=100_000)
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_ctrl_c_and_sigterm_end_it_cleanly_in_the_middle_of_an_answer(model: Path):
    """Two servers at once, since most of the time is the start."""
    signals = (signal.SIGINT, signal.SIGTERM)
    command = [
        sys.executable,
        "-m",
        "burnish",
        "api",
        "--model_name_or_path",
        str(model),
        "--use_cpu",
        "--infer_dtype=float32",
        "--max_new_tokens=4",
    ]
    environment = here() | {"API_PORT": "0", "API_MODEL_NAME": "tiny", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(subprocess.Popen(command, env=environment, **pipes)) for _ in signals]
        stack.callback(lambda: [process.kill() for process in started])
        for process, sent in zip(started, signals, strict=True):
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first.startswith("tiny is served at http://127.0.0.1:"), first + process.communicate()[1]
            curl = process.stdout.readline()
            asked = subprocess.run(
                curl.replace("Hello!", "xyzzy"), shell=True, capture_output=True, text=True, timeout=60
            )
            assert json.loads(asked.stdout)["usage"]["completion_tokens"] == 4
            body = json.dumps(
                {"messages": [{"role": "user", "content": "xyzzy"}], "max_tokens": 90_000, "stream": True}
            )
            url = first.split(" (")[0].rpartition(" ")[2]
            with urllib.request.urlopen(f"{url}/v1/chat/completions", body.encode(), timeout=60) as answer:
                answer.readline()
                before = time.monotonic()
                process.send_signal(sent)
                events = answer.read().decode()
            assert "The server is shutting down." in events
            said, complained = process.communicate(timeout=30)
            assert time.monotonic() - before < 10
            assert (process.returncode, complained) == (0, "")
            assert said.splitlines()[-1] == "ended"
            assert "POST /v1/chat/completions 200" in said
            assert "xyzzy" not in said
