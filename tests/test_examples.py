"""Every recipe of examples/ is run for two steps on the real small model, and leaves the files that README lists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_readme import files_a_run_leaves

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))
TRAINING = [name for name in EXAMPLES if name.startswith("train_")]

SHORT = {  # what makes a recipe short; everything else stands as it is in the file
    "max_steps": 2,
    "max_samples": 24,
    "cutoff_len": 64,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
}
WHOLE_MODEL = {"model.safetensors", "config.json", "generation_config.json"}
ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}


def run(name: str, model: Path, output_dir: Path, **settings: object) -> Path:
    """`burnish train examples/<name>` with settings behind it, in this process."""
    from burnish.cli import main

    given = {**SHORT, "model_name_or_path": model, "output_dir": output_dir, **settings}
    status = main(["train", str(ROOT / "examples" / name), *(f"{key}={value}" for key, value in given.items())])
    assert status == 0
    return output_dir


@pytest.fixture(scope="module")
def lora_run(fixture_path, tmp_path_factory):
    settings = {"save_steps": 1, "eval_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the recipes say `dataset_dir: data`
        yield run("train_sft_lora.yaml", fixture_path("smollm2"), tmp_path_factory.mktemp("lora") / "out", **settings)


def test_the_issue_has_a_recipe_for_each_stage_and_method():
    assert set(TRAINING) == {f"train_{kind}.yaml" for kind in ("pt", "sft_full", "sft_lora", "sft_qlora", "sft_freeze")}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TRAINING) - {"train_sft_lora.yaml", "train_sft_qlora.yaml"}))
def test_a_recipe_that_trains_the_model_itself_leaves_a_whole_model(name, fixture_path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output_dir = run(name, fixture_path("smollm2"), tmp_path / "out", eval_strategy="no", save_strategy="no")
    left = {path.name for path in output_dir.iterdir()}
    expected = files_a_run_leaves() - ADAPTER - {"checkpoint-N", "eval_results.json", "training_eval_loss.png"}
    assert expected <= left
    shutil.rmtree(output_dir)  # half a gigabyte


def test_the_lora_recipe_leaves_every_file_that_the_readme_lists(lora_run):
    left = {path.name for path in lora_run.iterdir()}
    assert files_a_run_leaves() - WHOLE_MODEL - {"checkpoint-N"} <= left
    assert {"checkpoint-1", "checkpoint-2"} <= left
    log = [json.loads(line) for line in (lora_run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["current_steps"] for entry in log if "loss" in entry] == [1, 2]
    assert (lora_run / "training_loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_quantized_recipe_leaves_an_adapter_for_the_whole_model(fixture_path, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(ROOT)
    output_dir = run("train_sft_qlora.yaml", fixture_path("smollm2"), tmp_path / "out", eval_steps=1)
    left = {path.name for path in output_dir.iterdir()}
    assert left >= ADAPTER and not left & WHOLE_MODEL
    log = [json.loads(line) for line in (output_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum("loss" in entry for entry in log) == 2 and sum("eval_loss" in entry for entry in log) >= 2


def test_the_chat_recipe_answers_with_what_the_lora_recipe_left(lora_run, fixture_path):
    from burnish.arguments.parse import parse_command
    from burnish.workflow import load_engine

    recipe = str(ROOT / "examples" / "chat.yaml")
    given = [f"model_name_or_path={fixture_path('smollm2')}", f"adapter_name_or_path={lora_run}", "max_new_tokens=4"]
    engine = load_engine(parse_command("chat", [recipe, *given]))
    assert engine.generating.temperature == 0.7
    assert "".join(engine.chat([{"role": "user", "content": "What is the capital of France?"}], do_sample=False))


def test_the_training_recipe_serves_chat_as_it_is(lora_run, fixture_path):
    from burnish.arguments.parse import for_inference, parse_command

    recipe = str(ROOT / "examples" / "train_sft_lora.yaml")
    settings = parse_command(
        "chat", [recipe, f"model_name_or_path={fixture_path('smollm2')}", f"output_dir={lora_run}"]
    )
    model, _ = for_inference(settings)
    assert model.adapter_name_or_path == [str(lora_run)]


def test_the_list_of_recipes_is_whole():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [name for name in EXAMPLES if f"| `{name}` |" not in text] == []
