"""The entry scripts and the command lines of 2024: `python src/train_bash.py …`, typed as they were then."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish import cli
from burnish.arguments.parse import parse_command

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "train.py": "train",
    "train_bash.py": "train",
    "api.py": "api",
    "api_demo.py": "api",
    "export_model.py": "export",
    "cli_demo.py": "chat",
}


def python(script: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Scripts beside a link to the package, in another place than the one that is installed."""
    shutil.copytree(ROOT / "src", tmp_path / "checkout" / "src", ignore=shutil.ignore_patterns("__pycache__", "*.args"))
    (tmp_path / "checkout" / "burnish").symlink_to(ROOT / "burnish")
    return tmp_path / "checkout"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder as those of 2024: a model, adapters, data with the names that were typed."""
    for name in ("Qwen-14B-Chat", "checkpoint/pt/checkpoint-12", "checkpoint/export"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "checkpoint/sft/checkpoint-51").mkdir(parents=True)
    (tmp_path / "checkpoint/sft/checkpoint-51/adapter_config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").write_text('[{"instruction": "hello", "output": "hi"}]')
    names = ("gongwen_writer", "id", "alpaca_gpt4_zh")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({n: {"file_name": "rows.json"} for n in names}))
    shutil.copytree(ROOT / "examples" / "deepspeed", tmp_path / "examples" / "deepspeed")
    return tmp_path


# ---- scripts -------------------------------------------------------------------------------------------------------


def test_every_script_stands_in_src() -> None:
    assert {path.name for path in (ROOT / "src").glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize(("script", "command"), SCRIPTS.items())
def test_a_script_is_its_command(script: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [script, "--stage", "sft"])
    monkeypatch.setattr(cli, "main", lambda words: given.append(words) or 2)
    runpy.run_path(str(ROOT / "src" / script), run_name="imported by a worker")
    assert given == [] and sys.path[0] == str(ROOT)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "src" / script), run_name="__main__")
    assert given == [[command, "--stage", "sft"]] and ended.value.code == 2


def test_a_script_runs_the_burnish_that_it_stands_beside(tmp_path: Path) -> None:
    """Also where none is installed: here its own is another than the installed one."""
    shutil.copytree(ROOT / "src", tmp_path / "checkout" / "src")
    (tmp_path / "checkout" / "burnish").mkdir()
    (tmp_path / "checkout" / "burnish" / "__init__.py").touch()
    (tmp_path / "checkout" / "burnish" / "cli.py").write_text("def main(words): print(words); return 3")
    run = python(tmp_path / "checkout" / "src" / "export_model.py", "--export_dir", "out", cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (3, "['export', '--export_dir', 'out']\n", "")


def test_a_script_reads_the_args_file_beside_it_and_those_that_are_named(checkout: Path, tmp_path: Path) -> None:
    (checkout / "src" / "train.args").write_text("--seed seven --cutoff_len long --lora_rank big --max_samples few")
    for name, text in {"one.args": "--cutoff_len 1e3 --lora_rank huge", "two.args": "--lora_rank huger"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "run.yaml").write_text("max_samples: 3\nlogging_steps: often\n")
    words = ("run.yaml", "--args_file", "one.args", "--args_file=two.args", "--logging_steps", "5")
    run = python(checkout / "src" / "train.py", *words, cwd=tmp_path)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[:2] == [
        f"{checkout / 'src' / 'train.args'}: --seed 'seven' is not a whole number; write a number such as 8",
        "two.args: --lora_rank 'huger' is not a whole number; write a number such as 8",
    ]
    assert "max_samples" not in run.stderr and "logging_steps" not in run.stderr and "cutoff_len" not in run.stderr


@pytest.mark.parametrize("script", ["train_bash.py", "cli_demo.py"])
def test_a_script_takes_a_file_of_settings_from_any_folder(script: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"model_name_or_path": "./gone"}')
    run = python(ROOT / "src" / script, "run.json", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith(
        f"run.json line 1: model_name_or_path './gone' is not there; looked for the folder {tmp_path}"
    )


# ---- command lines ---------------------------------------------------------------------------------------------------

PT = """--local_rank=0 --deepspeed examples/deepspeed/ds_z3_config.json --stage pt --do_train --do_eval
--val_size 0.2 --eval_steps 10 --evaluation_strategy steps --dataset gongwen_writer --model_name_or_path Qwen-14B-Chat
--finetuning_type freeze --num_layer_trainable 1 --template qwen --per_device_train_batch_size 2
--per_device_eval_batch_size 1 --gradient_accumulation_steps 2 --lr_scheduler_type cosine --logging_steps 10
--learning_rate 1e-5 --plot_loss --gradient_checkpointing --save_strategy epoch --num_train_epochs 4 --cutoff_len 8192
--bf16 --output_dir checkpoint/new --dataset_dir data"""
SFT = """--local_rank=0 --deepspeed examples/deepspeed/ds_z2_config.json --stage sft --do_train --do_eval
--val_size 0.2 --eval_steps 10 --evaluation_strategy steps --dataset id
--model_name_or_path checkpoint/pt/checkpoint-12 --finetuning_type lora --lora_rank 8 --lora_target c_proj,c_attn
--template qwen --per_device_train_batch_size 4 --per_device_eval_batch_size 2 --gradient_accumulation_steps 4
--lr_scheduler_type cosine --logging_steps 10 --learning_rate 1e-5 --plot_loss --gradient_checkpointing
--save_strategy epoch --num_train_epochs 8 --cutoff_len 2048 --overwrite_cache --overwrite_output_dir
--output_dir checkpoint/sft --dataset_dir data"""
FP16 = """--stage sft --do_train --model_name_or_path Qwen-14B-Chat --dataset alpaca_gpt4_zh --template default
--finetuning_type lora --lora_target q_proj,v_proj --output_dir out --overwrite_cache --per_device_train_batch_size 4
--gradient_accumulation_steps 4 --lr_scheduler_type cosine --logging_steps 10 --save_steps 1000 --learning_rate 5e-5
--num_train_epochs 3.0 --plot_loss --fp16"""
EXPORT = """--model_name_or_path checkpoint/pt/checkpoint-12 --adapter_name_or_path checkpoint/sft/checkpoint-51
--template qwen --finetuning_type lora --export_dir checkpoint/whole --export_size 2 --export_legacy_format False"""
API = "--model_name_or_path checkpoint/export --template qwen"

CASES = {
    PT: (
        "train",
        {
            "stage": "pt", "freeze_trainable_layers": 1, "eval_strategy": "steps", "bf16": True, "cutoff_len": 8192,
            "deepspeed": "examples/deepspeed/ds_z3_config.json", "gradient_checkpointing": True, "num_train_epochs": 4,
        },
        ["evaluation_strategy: steps", "num_layer_trainable: 1"],
    ),
    SFT: (
        "train",
        {"lora_target": ["c_proj", "c_attn"], "save_strategy": "epoch", "overwrite_output_dir": True, "val_size": 0.2},
        ["evaluation_strategy: steps"],
    ),
    FP16: ("train", {"fp16": True, "template": "default", "lora_target": ["q_proj", "v_proj"], "save_steps": 1000}, []),
    EXPORT: ("export", {"export_dir": "checkpoint/whole", "export_size": 2}, ["export_legacy_format"]),
    API: ("api", {"model_name_or_path": "checkpoint/export", "template": "qwen"}, []),
}  # fmt: skip


@pytest.mark.parametrize("line", CASES, ids=["pt", "sft", "fp16", "export", "api"])
def test_a_command_of_2024_is_taken_as_it_was_typed(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, expected, translated = CASES[line]
    monkeypatch.chdir(place)
    checks = [cli.wrong_template, *([cli.wrong_data_sets] if command == "train" else [])]
    settings = parse_command(command, line.split(), checks)
    assert {name: settings.value(name) for name in expected} == expected
    assert [old for old, _, _ in settings.translated] == translated


@pytest.mark.parametrize("line", [PT, SFT, FP16], ids=["pt", "sft", "fp16"])
def test_a_command_of_2024_gives_transformers_what_it_wants(
    line: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU too: --bf16 and --fp16 are never refused for the machine's sake."""
    monkeypatch.chdir(place)
    args: Any = parse_command("train", [w for w in line.split() if "deepspeed" not in w]).training()
    assert args.do_train and args.learning_rate > 0


def test_processes_that_a_script_starts_read_its_args_file_too(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "tune.py"
    script.with_suffix(".args").write_text("--seed 7")
    started: list[list[str]] = []

    def launch(words: list[str], devices: int) -> None:
        started.append(words)
        raise SystemExit

    monkeypatch.chdir(place)
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr("burnish.ranks.launch", launch)
    with pytest.raises(SystemExit):
        cli.main(["train", *FP16.split()])
    ((command, *words),) = started
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / "burnish" / "__main__.py"))
    assert command == "train" and parse_command("train", words).value("seed") == 7
