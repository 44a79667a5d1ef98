"""The model card: what the hub reads at its top, what a person reads below, and what nobody should."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerState

from burnish.arguments.parse import parse_command
from burnish.train.card import Card, render_card, write_card

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def settings_of(tmp_path: Path, *words: str) -> Any:
    model, rows = tmp_path / "annabel" / "models" / "SmolLM2", tmp_path / "annabel" / "pairs.json"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    rows.write_text('[{"instruction": "a", "output": "b"}]')
    given = (
        "--model_name_or_path",
        str(model),
        "--dataset",
        str(rows),
        "--output_dir",
        str(tmp_path / "out" / "beacon"),
    )
    return parse_command("train", ["--stage", "sft", "--do_train", *given, *words])


def test_an_adapters_card_is_what_the_hub_expects():
    card = render_card(Path("/runs/beacon"), Card(HUB_NAME, "sft", "lora", ["identity", "tatsu-lab/alpaca"]))
    assert front_matter(card) == {
        "base_model": HUB_NAME,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["burnish", "sft", "lora"],
        "datasets": ["tatsu-lab/alpaca"],
    }
    assert "# beacon" in card
    assert "- identity\n- tatsu-lab/alpaca" in card
    assert f"burnish chat --model_name_or_path {HUB_NAME} --adapter_name_or_path beacon\n" in card


def test_a_whole_models_card_asks_for_no_adapter():
    card = render_card(Path("/runs/beacon"), Card(HUB_NAME, "pt", "full", template="chatml"))
    matter = front_matter(card)
    assert matter["library_name"] == "transformers" and matter["base_model_relation"] == "finetune"
    assert "datasets" not in matter and "license" not in matter
    assert "burnish chat --model_name_or_path beacon --template chatml\n" in card
    assert "continued pre-training of all weights" in card
    assert "## Data" not in card and "| peft |" not in card


def test_a_run_writes_its_settings_and_its_last_results(tmp_path: Path):
    settings = settings_of(tmp_path, "--finetuning_type", "lora", "--learning_rate", "2e-4", "--weight_decay", "0.1")
    folder = tmp_path / "out" / "beacon"
    folder.mkdir(parents=True)
    (folder / "training_loss.png").touch()
    history = [
        {"loss": 3.0, "step": 1},
        {"eval_loss": 2.0, "eval_runtime": 1.0, "step": 1},
        {"eval_loss": 1.5, "eval_runtime": 1.0, "step": 2},
        {"train_loss": 2.5, "train_runtime": 9.0, "total_flos": 1e9, "step": 2},
    ]
    path = write_card(folder, settings, TrainerState(log_history=history))
    assert path == folder / "README.md"
    card = path.read_text(encoding="utf-8")
    for row in ("| learning_rate | 0.0002 |", "| weight_decay | 0.1 |", "| lora_rank | 8 |", "| eval_loss | 1.5000 |"):
        assert row in card
    assert "| train_loss | 2.5000 |" in card and "![training loss](training_loss.png)" in card
    assert "| max_steps |" not in card and "| adam_beta1 |" not in card  # off, and at its default
    assert "runtime" not in card and "total_flos" not in card


def test_a_card_tells_no_folder_of_this_machine(tmp_path: Path):
    jinja = tmp_path / "annabel" / "own.jinja"
    jinja.parent.mkdir()
    jinja.write_text("{{ messages }}")
    settings = settings_of(tmp_path, "--finetuning_type", "full", "--template", str(jinja))
    folder = tmp_path / "out" / "beacon"
    folder.mkdir(parents=True)
    card = write_card(folder, settings, TrainerState()).read_text(encoding="utf-8")
    assert "SmolLM2" in card and "- pairs.json" in card and "--template own.jinja" in card
    assert str(tmp_path) not in card and "annabel" not in card
    assert f"/{getpass.getuser()}" not in card


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/annabel/models/SmolLM2/", "SmolLM2"),
        ("~/models/SmolLM2", "SmolLM2"),
        ("../annabel/SmolLM2", "SmolLM2"),
        (r"C:\Users\annabel\SmolLM2", "SmolLM2"),
        ("saves/annabel/SmolLM2", "SmolLM2"),
        (HUB_NAME, HUB_NAME),
        ("gpt2", "gpt2"),
    ],
)
def test_a_base_model_is_shown_by_its_hub_name_or_the_last_part_of_its_folder(given: str, shown: str):
    card = render_card(Path("/runs/beacon"), Card(given, "sft", "lora"))
    assert front_matter(card)["base_model"] == shown
    assert "annabel" not in card


def test_a_setting_that_is_not_on_the_list_is_not_shown(tmp_path: Path):
    settings = settings_of(tmp_path, "--finetuning_type", "lora", "--run_name", "secret-name")
    folder = tmp_path / "out" / "beacon"
    folder.mkdir(parents=True)
    assert "secret-name" not in write_card(folder, settings, TrainerState()).read_text(encoding="utf-8")


def test_a_table_survives_a_bar_in_a_value():
    card = render_card(Path("/runs/beacon"), Card("gpt2", "sft", "lora", hyperparameters={"lora_target": ["a|b", "c"]}))
    assert r"| lora_target | a\|b, c |" in card
