"""docs/from-2024.md is run: pre-training under DeepSpeed, LoRA, export, server and question, as they were typed then.

The commands are read from the page. What is changed in them stands in `SIZES`; the model is a small first Qwen with
random weights and the real vocabulary, the rows are the real ones of data/.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, environment, losses
from qwen1 import make_qwen1
from safetensors import safe_open

PAGE = ROOT / "docs" / "from-2024.md"

SIZES = {  # what a small model on two cores cannot do as it stands on the page; the rest is typed as it is
    "--cutoff_len 8192": "--cutoff_len 256",
    "--logging_steps 10": "--logging_steps 1",
    "--eval_steps 10": "--eval_steps 4",
    "checkpoint/sft/checkpoint-51": "checkpoint/sft/checkpoint-8",
}
DOCUMENTS = 14  # 3 steps an epoch at 256 tokens a row, so that the last checkpoint is checkpoint-12 as on the page

pytestmark = pytest.mark.slow


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [block.replace("\\\n", " ").strip() for block in blocks]


def with_sizes(command: str) -> str:
    for old, new in SIZES.items():
        command = command.replace(old, new)
    if command.startswith("deepspeed"):  # a port that no other run on this machine has
        command = re.sub(r" --master_port \d+|(?<=5\")(?= src)", f" --master_port {free_port()}", command)
    return command


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


PRETRAIN, FINETUNE, EXPORT, SERVE, ASK = (with_sizes(command) for command in commands())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, fixture_path: Callable[[str], Path]) -> Path:
    """The working folder of the page."""
    folder = tmp_path_factory.mktemp("from-2024")
    tiktoken = fixture_path("qwen-tiktoken") / "qwen.tiktoken"
    make_qwen1(folder / "Qwen-14B-Chat", hidden=32, vocabulary="real", tiktoken=tiktoken)
    for name in ("src", "examples"):
        (folder / name).symlink_to(ROOT / name)
    data = folder / "data"
    data.mkdir()
    names = re.search(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert names
    (data / "dataset_info.json").write_text(names[1])
    documents = (ROOT / "data" / "gongwen.jsonl").read_text(encoding="utf-8").splitlines()[:DOCUMENTS]
    (data / "gongwen.jsonl").write_text("\n".join(documents), encoding="utf-8")
    identity = json.loads((ROOT / "data" / "identity.json").read_text(encoding="utf-8"))[:30]
    pinyin = [json.loads(line) for line in (ROOT / "data" / "pinyin_hanzi.jsonl").read_text("utf-8").splitlines()[:24]]
    rows = [json.dumps(row, ensure_ascii=False) for row in [*identity, *pinyin]]  # 54
    (data / "id.jsonl").write_text("\n".join(rows).replace("{{name}}", "Beacon"), encoding="utf-8")
    return folder


def as_on_the_page(**more: str) -> dict[str, str]:
    """As after `source .venv/bin/activate` and `export LOCAL_SIZE=8`."""
    return environment(LOCAL_SIZE="8", **more)


def run(command: str, home: Path, **more: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=home, env=as_on_the_page(**more), capture_output=True, text=True, timeout=900,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def alone(command: str) -> str:
    """The same run in one process, whose batch is that of the three together."""
    command = re.sub(r"^deepspeed .* src/train.py --deepspeed \S+", "python src/train_bash.py", command)
    return command.replace("--per_device_train_batch_size 2", "--per_device_train_batch_size 6")


@pytest.fixture(scope="module")
def pretrained(home: Path) -> str:
    return run(PRETRAIN, home)


@pytest.fixture(scope="module")
def finetuned(home: Path, pretrained: str) -> str:
    return run(FINETUNE, home)


@pytest.fixture(scope="module")
def exported(home: Path, finetuned: str) -> str:
    return run(EXPORT, home)


def test_every_size_that_is_changed_stands_on_the_page() -> None:
    assert all(old in " ".join(commands()) for old in SIZES)


def test_pretraining_says_once_what_is_called_otherwise_and_leaves_whole_checkpoints(
    home: Path, pretrained: str
) -> None:
    assert pretrained.count("num_layer_trainable: 1") == 1 and "freeze_trainable_layers: 1" in pretrained
    assert "template is not used in stage pt" in pretrained and "trained blocks: 1 of 2" in pretrained
    assert "its .py files are not run" in pretrained
    out = home / "checkpoint" / "pt"
    assert {"training_loss.png", "training_eval_loss.png", "checkpoint-3", "checkpoint-12"} <= set(os.listdir(out))
    assert len(losses(out)) == 12 + 3
    with safe_open(out / "checkpoint-12" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    with safe_open(home / "Qwen-14B-Chat" / "model.safetensors", "pt") as file:
        assert names == set(file.keys())  # those of 2023, all of them


@pytest.mark.parametrize(("bf16", "rounding"), [("--bf16", 2e-2), ("", 1e-4)])
def test_three_processes_under_zero_3_have_the_losses_of_one(
    home: Path, pretrained: str, bf16: str, rounding: float
) -> None:
    divided = "checkpoint/pt"
    command = alone(PRETRAIN)
    if not bf16:  # an epoch of both in float32
        divided = "checkpoint/pt-float32"
        short = PRETRAIN.replace("--bf16", "").replace("--num_train_epochs 4", "--num_train_epochs 1")
        run(short.replace("checkpoint/pt", divided), home)
        command = alone(short)
    run(command.replace("checkpoint/pt", divided + "-alone"), home, OMP_NUM_THREADS="2")
    assert losses(home / divided) == pytest.approx(losses(home / (divided + "-alone")), rel=rounding)


def test_an_adapter_is_trained_on_the_checkpoint(home: Path, finetuned: str) -> None:
    assert "54 rows, 54 of them used" in finetuned and "train: 43 samples" in finetuned and "eval: 11" in finetuned
    folder = home / "checkpoint" / "sft" / "checkpoint-8"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        layers = {name.rpartition(".lora_")[0].partition(".h.")[2] for name in file.keys()}  # noqa: SIM118
    assert layers == {f"{block}.{layer}" for block in "01" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")}


def test_the_export_has_proved_itself(home: Path, exported: str) -> None:
    assert "weights are always safetensors" in exported
    report = json.loads((home / "checkpoint" / "export" / "export_report.json").read_text())
    assert report["differs_from_base"] is True
    assert json.loads((home / "checkpoint" / "export" / "config.json").read_text())["model_type"] == "qwen"


@pytest.fixture(scope="module")
def address(home: Path, exported: str) -> Iterator[str]:
    port = str(free_port())
    log = home / "api.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            ["bash", "-c", f"exec env {SERVE}"], cwd=home, env=as_on_the_page(API_PORT=port), stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + 120
        while server.poll() is None and time.monotonic() < deadline:
            if subprocess.run(["curl", "-sf", f"http://0.0.0.0:{port}/health"], capture_output=True).returncode == 0:
                break
            time.sleep(0.3)
        assert server.poll() is None, log.read_text()
        yield f"http://0.0.0.0:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_curl_gets_an_answer_in_openais_shape(home: Path, address: str) -> None:
    assert "http://0.0.0.0:8000" in ASK
    words = shlex.split(ASK.replace("http://0.0.0.0:8000", address))
    answer: dict[str, Any] = json.loads(subprocess.run(words, capture_output=True, text=True, timeout=120).stdout)
    assert answer["model"] == "qwen" and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length") and 1 <= answer["usage"]["completion_tokens"] <= 256
