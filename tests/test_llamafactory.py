"""LLaMA-Factory 0.9.5's own files: its YAML examples are taken as they are or refused by name, each for a reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import from_llamafactory
import pytest

from burnish import cli
from burnish.arguments.parse import parse_command
from burnish.arguments.settings import Settings
from burnish.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "train_lora/": ("train",),
    "train_full/": ("train",),
    "train_qlora/": ("train",),
    "merge_lora/": ("export",),
    "inference/": ("chat", "api"),
}
IMAGES = "of images and sounds, and burnish reads text only"
NOT_YET = "is not built yet"
REFUSED = {  # every example that does not run, and a piece of what is told
    "train_lora/qwen3_lora_dpo.yaml": "stage 'dpo' is not built yet",
    "train_lora/qwen3_lora_kto.yaml": "stage 'kto' is not built yet",
    "train_lora/qwen3_lora_reward.yaml": "stage 'rm' is not built yet",
    "train_lora/qwen3vl_lora_dpo.yaml": IMAGES,
    "train_lora/qwen3vl_lora_sft.yaml": IMAGES,
    "train_full/qwen3vl_full_sft.yaml": IMAGES,
    "merge_lora/qwen3_gptq.yaml": f"export_quantization_bit '4' {NOT_YET}",
    "merge_lora/qwen3vl_lora_sft.yaml": "template 'qwen3_vl_nothink' is neither a template of burnish nor a file",
    "inference/qwen3vl.yaml": "template 'qwen3_vl_nothink' is neither a template of burnish nor a file",
}


@pytest.fixture(scope="session")
def theirs(fixture_path) -> Path:
    return fixture_path("llamafactory-data")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that looks like a model, and one that looks like an adapter."""
    for name, file in {"model": "config.json", "adapter": "adapter_config.json"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    return tmp_path


def parsed(command: str, theirs: Path, example: str, place: Path) -> Settings:
    """The settings of `burnish COMMAND example.yaml`, at the data and a model that are here."""
    file = theirs / "examples" / example
    words = [str(file), f"model_name_or_path={place / 'model'}"]
    if "adapter_name_or_path:" in file.read_text(encoding="utf-8"):
        words.append(f"adapter_name_or_path={place / 'adapter'}")
    checks = [cli.wrong_template]
    if command == "train":
        words += [f"dataset_dir={theirs / 'data'}", f"output_dir={place / 'out'}"]
        checks.insert(0, cli.wrong_data_sets)
    return parse_command(command, words, checks)


def examples(theirs: Path) -> list[str]:
    folder = theirs / "examples"
    return sorted(str(p.relative_to(folder)) for start in COMMANDS for p in (folder / start).glob("*.yaml"))


def test_every_example_is_taken_or_refused_for_the_reason_that_is_listed(
    theirs: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # their `deepspeed: examples/deepspeed/ds_z3_config.json` finds burnish's
    monkeypatch.setattr("burnish.model.arguments.find_spec", lambda name: name)  # bitsandbytes, here or not
    refused: dict[str, list[str]] = {}
    for example in examples(theirs):
        for command in COMMANDS[example.partition("/")[0] + "/"]:
            try:
                parsed(command, theirs, example, place)
            except UserError as error:
                refused.setdefault(example, []).extend(str(problem) for problem in error.problems)
    assert len(examples(theirs)) == 25
    assert set(refused) == set(REFUSED), refused
    for example, reason in REFUSED.items():
        assert any(reason in line for line in refused[example]), refused[example]


def test_an_example_means_what_it_says(theirs: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = parsed("train", theirs, "train_full/qwen3_full_sft.yaml", place)
    expected = {
        "finetuning_type": "full", "deepspeed": "examples/deepspeed/ds_z3_config.json", "learning_rate": 1e-5,
        "dataset": ["identity", "alpaca_en_demo"], "template": "qwen3_nothink", "warmup_ratio": 0.1, "bf16": True,
        "ddp_timeout": 180000000, "report_to": ["none"], "resume_from_checkpoint": None, "max_samples": 1000,
    }  # fmt: skip
    assert {name: settings.value(name) for name in expected} == expected
    assert [old for old, _, _ in settings.translated] == ["preprocessing_num_workers"]
    settings = parsed("export", theirs, "merge_lora/qwen3_lora_sft.yaml", place)
    expected = {"export_dir": "saves/qwen3_sft_merged", "export_size": 5, "export_device": "cpu"}
    assert {name: settings.value(name) for name in expected} == expected


def test_the_same_settings_on_a_command_line_are_taken(
    theirs: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shell script, which says what qwen3_lora_sft.yaml says."""
    monkeypatch.chdir(theirs)
    script = (theirs / "examples/train_lora/qwen3_lora_sft.sh").read_text(encoding="utf-8")
    words = script.partition("llamafactory-cli train")[2].replace("\\\n", " ").split()
    words = [str(place / "model") if word == "${MODEL_PATH}" else word for word in words]
    typed = parse_command("train", words, [cli.wrong_data_sets, cli.wrong_template])
    written = parsed("train", theirs, "train_lora/qwen3_lora_sft.yaml", place)
    assert typed.changes_that_matter(written) == []


def test_a_file_that_spells_out_every_default_of_theirs_is_taken(theirs: Path, place: Path) -> None:
    """What burnish does not have is welcome where it asks for nothing."""
    own = {"model_name_or_path", "dataset", "dataset_dir", "output_dir"}
    arguments = from_llamafactory.arguments(theirs / "hparams").values()
    lines = [f"{a.name}: {a.default}" for a in arguments if a.name not in own]
    (place / "all.yaml").write_text("\n".join(lines), encoding="utf-8")
    (place / "rows.json").write_text(json.dumps([{"instruction": "hello", "output": "hi"}]))
    words = [f"model_name_or_path={place / 'model'}", f"dataset={place / 'rows.json'}", f"output_dir={place / 'out'}"]
    assert len(lines) > 170
    settings = parse_command("train", [str(place / "all.yaml"), *words])
    assert settings.value("gradient_checkpointing") is True  # disable_gradient_checkpointing: false


def test_every_argument_of_theirs_is_known(theirs: Path) -> None:
    for argument in from_llamafactory.arguments(theirs / "hparams").values():
        standing, why = from_llamafactory.fate(argument)
        assert standing in ("same", "translated", "told", "nothing to change", "refused"), argument
        assert why or standing == "same", argument


def test_the_table_of_the_page_is_what_its_script_writes(theirs: Path) -> None:
    page = from_llamafactory.PAGE.read_text(encoding="utf-8")
    assert page == from_llamafactory.page(theirs / "hparams"), "run python scripts/from_llamafactory.py"


# ---- runs ------------------------------------------------------------------------------------------------------------

SHORT = {"max_steps": 2, "max_samples": 20, "cutoff_len": 128, "logging_steps": 1, "gradient_accumulation_steps": 2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker:UserWarning")  # more than there are cores
@pytest.mark.parametrize(
    ("example", "more", "left"),
    [
        ("train_lora/qwen3_lora_sft.yaml", {}, {"adapter_model.safetensors", "adapter_config.json"}),
        ("train_lora/qwen3_lora_pretrain.yaml", {}, {"adapter_model.safetensors", "adapter_config.json"}),
        ("train_full/qwen3_full_sft.yaml", {"save_strategy": "no"}, {"model.safetensors"}),
    ],
)
def test_an_example_runs_to_the_end_on_a_real_model(
    example, more, left, theirs, fixture_path, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(ROOT)  # one of them divides the model by examples/deepspeed/ds_z3_config.json
    out = tmp_path / "out"
    given = {**SHORT, "model_name_or_path": fixture_path("smollm2"), "dataset_dir": theirs / "data", "output_dir": out}
    words = [f"{name}={value}" for name, value in {**given, **more}.items()]
    with mock.patch.dict(os.environ):  # for DeepSpeed the variables of a launcher are set
        assert cli.main(["train", str(theirs / "examples" / example), *words]) == 0
    assert left | {"trainer_log.jsonl", "training_loss.png", "train_results.json", "burnish.yaml"} <= {
        path.name for path in out.iterdir()
    }
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["current_steps"] for entry in log if "loss" in entry] == [1, 2]
