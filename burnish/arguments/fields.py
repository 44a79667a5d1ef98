"""Every setting that burnish knows, by name: its room, type, default, choices and help.

HfArgumentParser reads them out of the five dataclasses, so that what `--help` prints and what is checked are one.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, get_type_hints

from burnish.data import arguments as data_room
from burnish.data.arguments import DataArguments
from burnish.generate import arguments as generate_room
from burnish.generate.arguments import GeneratingArguments
from burnish.model import arguments as model_room
from burnish.model.arguments import ModelArguments
from burnish.train import arguments as train_room
from burnish.tuning import arguments as tuning_room
from burnish.tuning.arguments import FinetuningArguments

if TYPE_CHECKING:
    from transformers import HfArgumentParser

ROOM_TABLES = (model_room, data_room, train_room, tuning_room, generate_room)

# Which model is meant, and how it is asked: what every command but train takes from a training file.
_OF_THE_TUNED = frozenset(
    {
        *({field.name for field in dataclasses.fields(ModelArguments)} - model_room.OF_EXPORT),
        *("template", "default_system", "enable_thinking", "finetuning_type", "create_new_adapter"),
        "cutoff_len",  # how far rope_scaling reaches
        *("output_dir", "use_cpu", "bf16", "fp16", "pure_bf16", "deepspeed"),
    }
)
# What an answer depends on: these are read by `burnish chat`, every other setting of a training file passes by.
USED_BY_CHAT = _OF_THE_TUNED | {field.name for field in dataclasses.fields(GeneratingArguments)}
USED_BY_API = USED_BY_CHAT
USED_BY_EXPORT = _OF_THE_TUNED | model_room.OF_EXPORT
# What tokens depend on: the data, the tokenizer, and which rows are set aside.
USED_BY_PREVIEW = frozenset(
    {
        *({field.name for field in dataclasses.fields(DataArguments)}),
        *("model_name_or_path", "cache_dir", "model_revision", "hf_hub_token", "use_fast_tokenizer"),
        *("split_special_tokens", "add_tokens", "add_special_tokens", "trust_remote_code", "rope_scaling"),
        *("stage", "seed", "data_seed"),
    }
)


@dataclass(frozen=True)
class Field:
    """One setting. `hint` is its annotation, `default` what it is when nobody says anything."""

    name: str
    room: str  # model, data, training, finetuning, generating
    hint: Any
    default: Any
    choices: tuple[str, ...]
    help: str


@cache
def rooms() -> dict[str, type]:
    return {
        "model": ModelArguments,
        "data": DataArguments,
        "training": train_room.make_training_fields(),
        "finetuning": FinetuningArguments,
        "generating": GeneratingArguments,
    }


@cache
def known_fields() -> dict[str, Field]:
    rooms_of = {field.name: room for room, kind in rooms().items() for field in dataclasses.fields(kind)}
    hints = {name: hint for kind in rooms().values() for name, hint in get_type_hints(kind).items()}
    found: dict[str, Field] = {}
    for action in _parser(rooms().values())._actions:
        name = action.dest
        if name in rooms_of and name not in found:  # a `--no_…` comes second
            help_text = (action.help or "").replace("%%", "%")
            choices = tuple(action.choices or ())
            found[name] = Field(name, rooms_of[name], hints[name], action.default, choices, help_text)
    return found


def used_by(command: str) -> frozenset[str]:
    """The settings that a command reads. What else a file holds is for other commands."""
    if command == "train":
        return frozenset(known_fields()) - model_room.OF_EXPORT
    return {
        "chat": USED_BY_CHAT, "api": USED_BY_API, "export": USED_BY_EXPORT, "preview": USED_BY_PREVIEW
    }[command]  # fmt: skip


def standings(name: str) -> list[tuple[str, str]]:
    """What burnish does with a setting, and why: honoured, translated, nothing to change, or refused.

    One standing when the tables of the rooms are in order; a test sees to it. A field that a newer transformers brings
    stands nowhere until somebody decides.
    """
    nothing = {name: why for room in ROOM_TABLES for name, why in room.NOTHING_TO_CHANGE.items()}
    found = []
    if name in train_room.HONOURED or (known_fields()[name].room != "training" and name not in nothing):
        found.append(("honoured", ""))
    if name in train_room.TRANSLATED:
        found.append(("translated", train_room.TRANSLATED[name]))
    if name in nothing:
        found.append(("nothing to change", nothing[name]))
    if name in train_room.REFUSED:
        found.append(("refused", "; ".join(train_room.REFUSED[name])))
    return found


def help_text(command: str) -> str:
    """What `burnish COMMAND --help` prints: every argument, by room."""
    kinds = [_only(kind, used_by(command)) for kind in rooms().values()]
    usage = f"burnish {command} [CONFIG.yaml] [name=value …] [--name value …] [--args_file FILE]"
    parser = _parser(kinds, prog=f"burnish {command}", usage=usage, formatter_class=_OneSpelling)
    return parser.format_help()


class _OneSpelling(argparse.ArgumentDefaultsHelpFormatter):
    """`--a_b` alone, though `--a-b` and `--no_a_b` work too; a default only where there is one."""

    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action, argparse._StoreFalseAction):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        option = action.option_strings[-1] if "-h" in action.option_strings else action.option_strings[0]
        is_truth = getattr(action.type, "__name__", "") == "string_to_bool"
        default = "true|false" if is_truth else self._get_default_metavar_for_optional(action).rpartition("_")[2]
        return f"{option} {self._format_args(action, default)}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser(kinds: Iterable[Any], **settings: Any) -> HfArgumentParser:
    from transformers import HfArgumentParser

    return HfArgumentParser([_titled(kind) for kind in kinds], allow_abbrev=False, **settings)


def _titled(kind: Any) -> Any:
    """The attribute from which HfArgumentParser takes the title of a group."""
    kind._argument_group_name = kind.__name__
    return kind


def _only(kind: type, names: frozenset[str]) -> type:
    hints = get_type_hints(kind)
    kept = [field for field in dataclasses.fields(kind) if field.name in names]
    return dataclasses.make_dataclass(kind.__name__, [(f.name, hints[f.name], _copy(f)) for f in kept])


def _copy(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory, metadata=field.metadata)
    return dataclasses.field(default=field.default, metadata=field.metadata)
