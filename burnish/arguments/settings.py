"""Settings: the one checked table of a command, from which the five dataclasses are built.

settings = parse_command("train", ["run.yaml", "learning_rate=2e-4"])
settings.data.cutoff_len           # dataclasses, built when they are asked for
settings.training()                # transformers' object: built last, imports torch
settings.dump("out/burnish.yaml")  # what repeats this run
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from burnish.arguments import given as sources
from burnish.arguments.fields import known_fields, rooms
from burnish.data import arguments as data_room
from burnish.errors import Problem
from burnish.generate.arguments import GeneratingArguments
from burnish.model import arguments as model_room
from burnish.train import arguments as train_room
from burnish.tuning import arguments as tuning_room

if TYPE_CHECKING:
    from burnish.train.training_args import TrainingArguments

Rule = tuple[Callable[[Any], bool], str, str]  # (what must hold, what is said when not, the remedy)

ESSENTIAL = (  # written even at their defaults, which another version may change
    *("stage", "finetuning_type", "dataset_dir", "cutoff_len", "learning_rate", "num_train_epochs", "optim"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "seed"),
)
FOLDERS = {"output_dir", "dataset_dir", "cache_dir", "logging_dir", "tokenized_path"}
PERHAPS_PATHS = {  # a name or a path: made absolute where something is there
    *("model_name_or_path", "adapter_name_or_path", "dataset", "eval_dataset", "template", "resume_from_checkpoint"),
    "deepspeed",
}
OF_THIS_START_ONLY = {"overwrite_output_dir", "local_rank"}  # said to one start of a run, not to the run


class Settings:
    """Every setting of one command: given values, coerced, with their places; defaults for the rest."""

    def __init__(
        self,
        command: str,
        given: Mapping[str, sources.Given],
        *,
        faulty: frozenset[str] = frozenset(),
        translated: tuple[tuple[str, str, str], ...] = (),
        config: str | None = None,
    ):
        self.command = command
        self.config = config
        self.translated = list(translated)  # (old, new, note): what old names became
        self._given = dict(given)
        self._faulty = faulty
        self._training: TrainingArguments | None = None
        self._folder = os.getcwd()  # what relative paths were relative to

    # ---- asking --------------------------------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        return self._given[name].value if name in self._given else known_fields()[name].default

    def given(self, name: str) -> bool:
        return name in self._given

    def on_command_line(self, name: str) -> bool:
        return name in self._given and self._given[name].on_command_line

    def is_faulty(self, *names: str) -> bool:
        """Whether one of them was given wrongly: then its value is the default, and checks should be silent."""
        return not self._faulty.isdisjoint(names)

    def differs_from_default(self, name: str) -> bool:
        return self.value(name) != known_fields()[name].default

    # ---- complaining ---------------------------------------------------------------------------------------------

    def problem(self, name: str, message: str, remedy: str, value: Any = None) -> Problem:
        """A problem with a setting, at the place where it was given."""
        if name in self._given:
            return self._given[name].problem(message, remedy, value)
        default = self.value(name) if value is None else value
        return Problem(self.config or "command line", name, default, message, remedy)

    def missing(self, name: str, remedy: str) -> Problem:
        return Problem(self.config or "command line", name, None, "is missing", remedy)

    def out_of_range(self, **rules: Rule) -> list[Problem]:
        """One problem for each given value that breaks its rule."""
        return [
            self.problem(name, message, remedy)
            for name, (holds, message, remedy) in rules.items()
            if self.given(name) and self.value(name) is not None and not holds(self.value(name))
        ]

    # ---- the five dataclasses ------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> model_room.ModelArguments:
        return model_room.ModelArguments(**self._of_room("model"))

    @cached_property
    def data(self) -> data_room.DataArguments:
        return data_room.DataArguments(**self._of_room("data"))

    @cached_property
    def finetuning(self) -> tuning_room.FinetuningArguments:
        return tuning_room.FinetuningArguments(**self._of_room("finetuning"))

    @cached_property
    def generating(self) -> GeneratingArguments:
        return GeneratingArguments(**self._of_room("generating"))

    def training(self) -> TrainingArguments:
        """transformers' arguments, built at the first call. Imports torch. Raises UserError."""
        if self._training is None:
            from burnish.train.training_args import build

            values = {**train_room.DEFAULTS, **self._of_room("training")}
            if self.value("early_stopping_steps") and not values.get("metric_for_best_model"):
                values["metric_for_best_model"] = "loss"
            self._training = build(values)
        return self._training

    def _of_room(self, room: str) -> dict[str, Any]:
        return {name: g.value for name, g in self._given.items() if known_fields()[name].room == room}

    # ---- the run's own file (A5) ---------------------------------------------------------------------------------

    def as_yaml(self) -> str:
        """What repeats this run: absolute paths, no tokens or keys, only what is not the default (or essential)."""
        parts = ["# Written by burnish: the settings of this run. `burnish train` on this file repeats it.\n"]
        for room in rooms():
            kept = {name: self._absolute(name) for name in self._names_to_keep(room)}
            if kept:
                text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=10_000)
                parts.append(f"\n### {room}\n{text}")
        return "".join(parts)

    def dump(self, path: str | Path) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.as_yaml(), encoding="utf-8")

    def _names_to_keep(self, room: str) -> list[str]:
        named = [name for name, field in known_fields().items() if field.room == room]
        return [
            name
            for name in named
            if (self.differs_from_default(name) or name in ESSENTIAL)
            and name not in OF_THIS_START_ONLY
            and not name.endswith(("_token", "_key"))
            and not (name == "resume_from_checkpoint" and self._resumes_itself())
        ]

    def _resumes_itself(self) -> bool:
        """A checkpoint of this very run: going on from it gives what the whole run gives."""
        own, asked = self.value("output_dir") or ".", self.value("resume_from_checkpoint") or "."
        if asked.lower() in ("true", "yes", "1"):
            return True
        return Path(self._path(asked)).is_relative_to(self._path(own))

    def _absolute(self, name: str) -> Any:
        value = self.value(name)
        if value is None or isinstance(value, dict) or name not in FOLDERS | PERHAPS_PATHS:
            return value
        if (name, value) == ("dataset_dir", "ONLINE"):  # a word, not a folder
            return value
        if isinstance(value, list):
            return [self._path(item) if self._is_place(name, item) else item for item in value]
        return self._path(value) if name in FOLDERS or self._is_place(name, value) else value

    def _is_place(self, name: str, item: str) -> bool:
        """A folder that happens to be called like a data set or a template does not make a path of that name."""
        path = self._path(item)
        if name == "template":
            return os.path.isfile(path)
        if name in ("dataset", "eval_dataset") and data_room.is_in_catalog(self, item):
            return False
        return os.path.exists(path)

    def _path(self, item: str) -> str:
        """Absolute and without `..`, so that two spellings of a path are one."""
        return os.path.normpath(os.path.join(self._folder, os.path.expanduser(item)))

    def changes_that_matter(self, other: Settings) -> list[str]:
        """Names of the settings that would make of this run another training than `other`'s."""
        evaluation_decides = any(
            run.value("load_best_model_at_end")
            or run.value("early_stopping_steps")
            or run.value("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
            for run in (self, other)
        )
        silent = model_room.DO_NOT_TRAIN | data_room.DO_NOT_TRAIN | tuning_room.DO_NOT_TRAIN
        if not evaluation_decides:
            silent |= {"eval_dataset"}
        loud = train_room.TRAINS | (train_room.TRAINS_BY_EVALUATION if evaluation_decides else frozenset())
        return [
            name
            for name, field in known_fields().items()
            if field.room != "generating"
            and (name in loud if field.room == "training" else name not in silent)
            and self._absolute(name) != other._absolute(name)
            and not (name == "dataset_dir" and self._names_files_only())
        ]

    def _names_files_only(self) -> bool:
        """Whether no data set is looked up in dataset_dir."""
        return all(os.path.exists(os.path.expanduser(name)) for name in self.value("dataset") or ())
