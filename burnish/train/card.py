"""The model card of a run: what it learned from, how, and what came out.

Settings are shown by name from a fixed list, so no token gets into it. What is not known (the licence) is left out.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.arguments.fields import known_fields
from burnish.model.card import page, public, table, talk_with_it
from burnish.train.logs import SPEED, measure

if TYPE_CHECKING:
    from transformers import TrainerState

    from burnish.arguments.settings import Settings

STAGES = {"pt": "continued pre-training", "sft": "supervised fine-tuning"}
METHODS = {"lora": "a LoRA adapter", "full": "all weights", "freeze": "the weights of some layers, the others frozen"}
ALWAYS_SHOWN = (  # at their defaults too: who repeats the run needs them
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "optim"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "cutoff_len", "bf16", "seed"),
)
ALWAYS_SHOWN_WITH_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target")
SHOWN_WHERE_CHANGED = (
    *("lr_scheduler_kwargs", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "data_seed"),
    *("label_smoothing_factor", "train_on_prompt", "mask_history"),
    *("use_rslora", "use_dora", "loraplus_lr_ratio", "freeze_trainable_layers", "freeze_trainable_modules"),
)
PACKAGES = ("burnish", "torch", "transformers", "peft", "datasets")


@dataclass(frozen=True)
class Card:
    """What a run can say of itself."""

    base_model: str  # a name on a hub or a folder
    stage: str  # pt | sft
    finetuning_type: str  # lora | full | freeze
    datasets: Sequence[str] = ()
    template: str | None = None  # None: the model's own
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, float] = field(default_factory=dict)  # under the names of all_results.json

    @property
    def is_adapter(self) -> bool:
        return self.finetuning_type == "lora"


def write_card(output_dir: str | os.PathLike[str], settings: Settings, state: TrainerState) -> Path:
    """Write README.md into `output_dir`, whose name is the model's, in place of the one that peft leaves there."""
    path = Path(output_dir).resolve() / "README.md"
    path.write_text(render_card(path.parent, card_of(settings, state)), encoding="utf-8")
    return path


def card_of(settings: Settings, state: TrainerState) -> Card:
    tuning = settings.finetuning
    always = (*ALWAYS_SHOWN, *(ALWAYS_SHOWN_WITH_LORA if tuning.finetuning_type == "lora" else ()))
    changed = [name for name in SHOWN_WHERE_CHANGED if name in known_fields() and settings.differs_from_default(name)]
    return Card(
        base_model=settings.model.model_name_or_path or "",
        stage=tuning.stage,
        finetuning_type=tuning.finetuning_type,
        datasets=settings.data.dataset or (),
        template=settings.data.template,
        hyperparameters={name: settings.value(name) for name in (*always, *changed) if name in known_fields()},
        results={name: value for logs in state.log_history for name, value in logs.items()},  # the last of each
    )


def render_card(folder: Path, card: Card) -> str:
    """The text of the card, from top to bottom."""
    name, base = folder.name, public(card.base_model)
    parts = [
        f"# {name}",
        f"Made from **{base}** by {STAGES[card.stage]} of {METHODS[card.finetuning_type]} with burnish.",
        _list("Data", card.datasets),
        talk_with_it(name, _chat_command(name, card)),
        table("Settings", ("setting", "value"), _settings(card)),
        table("Results", ("measure", "value"), _measures(card.results)),
        "![training loss](training_loss.png)" if (folder / "training_loss.png").exists() else "",
        table("Made with", ("what", "version"), [*_versions(card), ("date", f"{datetime.now(UTC):%Y-%m-%d}")]),
    ]
    return page(_front_matter(card), parts)


def _front_matter(card: Card) -> dict[str, Any]:
    on_hub = [name for name in card.datasets if _is_hub_name(name)]
    fields: dict[str, Any] = {
        "base_model": public(card.base_model),
        "base_model_relation": "adapter" if card.is_adapter else "finetune",
        "library_name": "peft" if card.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["burnish", card.stage, card.finetuning_type],
    }
    return fields | ({"datasets": on_hub} if on_hub else {})


def _chat_command(name: str, card: Card) -> str:
    if card.is_adapter:
        model = ["--model_name_or_path", public(card.base_model), "--adapter_name_or_path", name]
    else:
        model = ["--model_name_or_path", name]
    return shlex.join(["burnish", "chat", *model, *(["--template", public(card.template)] if card.template else [])])


def _settings(card: Card) -> list[tuple[str, str]]:
    """Those that are on: no value, false and -1 are the words for off."""
    return [(k, _text(v)) for k, v in card.hyperparameters.items() if v is not None and v is not False and v != -1]


def _measures(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    numbers = {name: value for name, value in results.items() if isinstance(value, float)}
    measures = [name for name in sorted(numbers) if name.startswith(("train_", "eval_")) and not name.endswith(SPEED)]
    return [(name, measure(numbers[name])) for name in measures]


def _versions(card: Card) -> Iterable[tuple[str, str]]:
    yield "Python", platform.python_version()
    for package in PACKAGES:
        if package == "peft" and not card.is_adapter:
            continue
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:  # burnish run from a checkout that was never installed
            continue


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, list | tuple | set):
        return ", ".join(_text(part) for part in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return public(value) if isinstance(value, str) else f"{value}"


def _is_hub_name(name: str) -> bool:
    return "/" in name and public(name) == name


def _list(title: str, items: Iterable[str]) -> str:
    lines = [f"- {public(item)}" for item in items]
    return "\n".join([f"## {title}\n", *lines]) if lines else ""
