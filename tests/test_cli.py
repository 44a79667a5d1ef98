"""The command itself: its help, its refusals and its exit status. Commands run as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from burnish import cli
from burnish.arguments.fields import known_fields, used_by
from burnish.errors import Problem, RunStopped, UserError


def burnish(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "burnish", *words],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip


def test_help_fits_a_small_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for command in cli.COMMANDS:
        assert f"burnish {command}" in "\n".join(lines)


def test_no_command_shows_the_help_and_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().out == cli.HELP


def test_train_help_shows_every_setting_with_the_help_of_its_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in known_fields().items():
        assert (f"--{name} " in text) == (name in used_by("train")), name
        assert field.help, name
    assert known_fields()["lora_rank"].help in text
    for room in ("ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments"):
        assert f"{room}:" in text


@pytest.mark.parametrize("command", ["chat", "api", "export", "preview"])
def test_the_help_of_a_command_shows_what_it_reads(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "-h"]) == 0
    text = capsys.readouterr().out
    assert {name for name in known_fields() if f"--{name} " in text} == used_by(command)


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("trian", "did you mean 'train'?"),
        ("exprt", "did you mean 'export'?"),
        ("run.yaml", "did you mean `burnish train run.yaml`?"),
        ("xyzzy", "choose one of train, preview, plan, chat, api, export, env, version"),
    ],
)
def test_a_misspelt_command_is_told(word: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    assert capsys.readouterr().err == f"burnish: '{word}' is not a command; {remedy}\n"


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (
            UserError([Problem("a", "b", 1, "is x"), Problem("c", "", None, "is y", "z")]),
            2,
            "a: b 1 is x\nc: is y; z\n",
        ),
        (RunStopped("the loss is not a number", 3), 3, "the loss is not a number\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_ends_a_run_is_its_message_and_its_status(
    raised: BaseException, status: int, told: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fails(words: list[str]) -> None:
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "env", fails)
    assert cli.main(["env"]) == status
    assert capsys.readouterr().err == told


def test_env_prints_versions_and_devices() -> None:
    run = burnish("env")
    assert run.returncode == 0, run.stderr
    told = dict(line.split(maxsplit=1) for line in run.stdout.splitlines() if not line.startswith("cpu bf16"))
    for package in ("torch", "transformers", "peft", "datasets", "accelerate"):
        assert told[package] == version(package)
    assert {"python", "burnish", "cpu", "threads"} <= set(told) and "cpu bf16" in run.stdout


def test_version_is_one_line() -> None:
    run = burnish("version")
    assert (run.returncode, run.stdout.count("\n")) == (0, 1) and run.stdout.startswith("burnish ")


def test_what_was_translated_is_printed_once(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "hello", "output": "hi"}\n')
    started = []
    import burnish.workflow

    monkeypatch.setattr(burnish.workflow, "run_train", started.append)
    words = [f"model_name_or_path={tmp_path}", f"dataset={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'out'}"]
    assert cli.main(["train", *words, "--use_unsloth", "--evaluation_strategy", "no"]) == 0
    text = capsys.readouterr().out
    assert text.count("evaluation_strategy: no") == text.count("use_unsloth") == 1 and "the fused head" in text
    assert started[0].value("eval_strategy") == "no"
    assert cli.main(["train", *words]) == 0
    assert capsys.readouterr().out == ""


def test_mistakes_inside_dataset_info_are_told_with_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text('{"pairs": {"file_name": "gone.jsonl"}}')
    words = [f"model_name_or_path={tmp_path}", "dataset=pairs", f"dataset_dir={tmp_path}", "seed=x"]
    assert cli.main(["train", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "gone.jsonl" in "".join(lines) and "output_dir is missing" in "".join(lines)
