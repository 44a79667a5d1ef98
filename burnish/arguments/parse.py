"""Flags, YAML, JSON, args files and overrides become one checked table; every mistake in it is told at once.

    burnish train run.yaml learning_rate=2e-4 --output_dir out
        given.py   what was written, and where        (args files, then the file, then the command line: later wins)
        legacy.py  old names → today's; refused.py: what burnish does not have
        coerce.py  texts → the types of the fields
        */arguments.py: problems(settings)   what cannot go together, in each room

No torch here: a configuration is right or refused before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from burnish.arguments import legacy
from burnish.arguments.coerce import Unfit, core_type, to_type
from burnish.arguments.command_line import CONFIG_ENDINGS, args_file_of_script, gather, unknown_words
from burnish.arguments.fields import known_fields, used_by
from burnish.arguments.given import Given, Sources, as_given, read_config
from burnish.arguments.refused import OF_EXPORT, is_off
from burnish.arguments.settings import Settings
from burnish.arguments.tuned import for_inference
from burnish.data import arguments as data_room
from burnish.errors import Problem, UserError
from burnish.generate import arguments as generate_room
from burnish.model import arguments as model_room
from burnish.train import arguments as train_room
from burnish.tuning import arguments as tuning_room

__all__ = ["for_inference", "parse", "parse_command", "read_settings"]

ROOMS = {
    "train": (model_room, data_room, tuning_room, train_room, generate_room),
    "chat": (model_room, generate_room),
    "api": (model_room, generate_room),
    "export": (model_room,),
    "preview": (model_room, data_room),
}
# Old names that concern a command though they are no settings of today: they would change its answers, or its files.
CONCERN = {
    "chat": {"infer_backend"},
    "api": {"infer_backend"},
    "export": {"export_legacy_format", *OF_EXPORT},
    "preview": set(),
}

_ASKED = ("do_train", "do_eval", "do_predict")  # what a run may be asked to do

Check = Callable[[Settings], list[Problem]]


def parse_command(command: str, argv: Sequence[str], checks: Sequence[Check] = ()) -> Settings:
    """The settings of `burnish train`, `chat`, `api`, `export` or `preview`. Raises UserError with every mistake.

    `checks` look for more of them: those that need rooms above this floor (the catalog of data sets, the templates).
    """
    default = args_file_of_script()
    sources = gather(argv, _takes, args_file_flag="--args_file", args_files=[default] if default else [])
    resolved = resolve(command, sources)
    problems = [*resolved.problems, *(_no_setting(word) for word in sources.remaining)]
    return _checked(resolved.settings, problems, sources, checks)


def parse(
    args: Sequence[str] | Mapping[str, Any],
    *,
    return_remaining_strings: bool = False,
    look_for_args_file: bool = True,
    args_filename: str | Path | None = None,
    args_file_flag: str | None = None,
    allow_extra_keys: bool = False,
) -> tuple[Any, ...]:
    """For Python: words of a command line, or a dict, become the five dataclasses.

    The keywords mean what they mean to HfArgumentParser: `args_filename` takes the place of the script's own args file,
    files named by `args_file_flag` come after it, missing ones are passed over, and the words win over all files.
    With `return_remaining_strings` what is no setting comes last in the tuple; with `allow_extra_keys` unknown keys
    of a dict are passed over. Raises UserError. Imports torch: TrainingArguments is transformers' own.
    """
    remaining: list[str] = []
    if isinstance(args, Mapping):
        sources = Sources(given=as_given(args))
    else:
        default = args_filename or (args_file_of_script() if look_for_args_file else None)
        files = [str(default)] if default and Path(default).is_file() else []
        sources = gather(args, _takes, args_file_flag=args_file_flag, args_files=files, missing_is_wrong=False)
    resolved = resolve("train", sources)
    problems = resolved.problems
    if return_remaining_strings:
        remaining = sources.remaining + [word for g in resolved.unknown for word in unknown_words(g)]
    else:
        problems += [_no_setting(word) for word in sources.remaining]
    if return_remaining_strings or allow_extra_keys:
        problems = [problem for problem in problems if problem not in resolved.unknown_problems]
    settings = _checked(resolved.settings, problems, sources)
    built = (settings.model, settings.data, settings.training(), settings.finetuning, settings.generating)
    return (*built, remaining) if return_remaining_strings else built


def read_settings(path: str | Path) -> Settings:
    """The settings of an earlier run from its burnish.yaml. A folder that has moved since is no mistake."""
    sources = read_config(str(path))
    resolved = resolve("train", sources)
    if resolved.problems:
        raise UserError(resolved.problems)
    return resolved.settings


def _takes(name: str) -> str | None:
    """How many words the option `--name` takes."""
    today = legacy.same_setting(name)
    if (today, "true") in legacy.VALUES:
        return "perhaps"  # a switch once, a word today
    if today in known_fields():
        kind = core_type(known_fields()[today].hint)
        return "flag" if kind is bool else "many" if getattr(kind, "__origin__", None) is list else "one"
    return "perhaps" if name in legacy.ALL_NAMES else None


# ---- resolving ---------------------------------------------------------------------------------------------------


@dataclass
class Resolved:
    settings: Settings
    problems: list[Problem] = field(default_factory=list)
    unknown: list[Given] = field(default_factory=list)
    unknown_problems: list[Problem] = field(default_factory=list)


def resolve(command: str, sources: Sources) -> Resolved:
    """Old names → today's, the later over the earlier, texts → values. What cannot be is a problem."""
    chosen: dict[str, Given] = {}
    told: dict[tuple[str, str, str], None] = {}
    problems, unknown, unknown_problems = list(sources.problems), [], []
    refused = {legacy.same_setting(name) for name in sources.valueless}
    for given in sources.given:
        translation = legacy.translate(given, command)
        today = translation.given
        if not _concerns(command, given, today):
            if given.on_command_line:
                problems.append(given.problem(f"does nothing in burnish {command}", "leave it out"))
            continue
        if translation.problem:
            problems.append(translation.problem)
            refused.add(given.name)
        if translation.told:
            told[translation.told] = None
        if today is None:
            continue
        if today.name in known_fields():
            earlier = chosen.get(today.name)
            if today.value is None and given.value is not None:  # an old switch that is off takes back its own word
                if earlier and _old_name(earlier) == given.name:
                    del chosen[today.name]
                continue
            problems += _contradiction(earlier, today)
            chosen[today.name] = today
        else:
            unknown.append(given)
            unknown_problems.append(_not_a_setting(given, command))
    values, faulty, misfits = _coerce(command, chosen)
    settings = Settings(
        command, values, faulty=frozenset(faulty | refused), translated=tuple(told), config=sources.config
    )
    return Resolved(settings, problems + unknown_problems + misfits, unknown, unknown_problems)


def _concerns(command: str, given: Given, today: Given | None) -> bool:
    """What only training reads passes the other commands by; what nobody knows concerns every command."""
    if command == "train":
        return True
    if today is None:
        return given.name in CONCERN[command] or legacy.RENAMED.get(given.name, ("",))[0] in used_by(command)
    return today.name in used_by(command) or today.name not in known_fields()


def _old_name(given: Given) -> str:
    return (given.typed or given.name).removeprefix("--").replace("-", "_")


def _contradiction(earlier: Given | None, later: Given) -> list[Problem]:
    """One file that says a setting twice, under two names, in two ways."""
    if earlier is None or earlier.on_command_line or later.on_command_line or earlier.typed == later.typed:
        return []
    same_file = earlier.place.rpartition(" line ")[0] == later.place.rpartition(" line ")[0]
    if not same_file or str(earlier.value) == str(later.value):
        return []
    return [later.problem(f"says otherwise than {earlier.typed or earlier.name}", "keep one of the two")]


def _coerce(command: str, chosen: Mapping[str, Given]) -> tuple[dict[str, Given], set[str], list[Problem]]:
    values: dict[str, Given] = {}
    faulty: set[str] = set()
    problems: list[Problem] = []
    for name, given in chosen.items():
        if given.value is None:
            continue  # `name: null` is the default
        if name in train_room.REFUSED and is_off(given.value) and known_fields()[name].default is not True:
            continue
        try:
            values[name] = replace(given, value=to_type(given.value, known_fields()[name].hint))
        except Unfit as unfit:
            faulty.add(name)
            if name not in train_room.REFUSED:
                problems.append(given.problem(unfit.message, unfit.remedy))
        if name in train_room.REFUSED and (name in faulty or values[name].value != known_fields()[name].default):
            problems.append(given.problem(*train_room.REFUSED[name]))
            values.pop(name, None)
            faulty.add(name)
    if command == "train" and not any(name in values or name in faulty for name in _ASKED):
        values["do_train"] = Given("do_train", True, "default")  # `burnish train` with no more said trains
    return values, faulty, problems


def _not_a_setting(given: Given, command: str) -> Problem:
    place = "command line" if given.on_command_line else given.place
    remedy = _nearest(given.name, command)
    return Problem(place, given.typed or given.name, given.value, "is not a setting", remedy)


def _nearest(name: str, command: str) -> str:
    longer = [known for known in known_fields() if len(name) > 3 and known.startswith(name)]
    near = longer or get_close_matches(name, [*known_fields(), *legacy.ALL_NAMES], n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"`burnish {command} --help` lists them all"


def _no_setting(word: str) -> Problem:
    if word.lower().endswith(CONFIG_ENDINGS):
        remedy = "give one, and write name=value after it"
        return Problem("command line", "", word, "is a second file of settings", remedy)
    return Problem("command line", "", word, "is no setting", "write name=value, or --name value")


# ---- checking ----------------------------------------------------------------------------------------------------


def _checked(settings: Settings, problems: list[Problem], sources: Sources, checks: Sequence[Check] = ()) -> Settings:
    """The settings, when nothing is wrong with them. Raises UserError with every problem, in the order of the files.

    Where a file could not be read, nothing is said of the settings: most of them would be missing.
    """
    for check in () if sources.unread else (*(room.problems for room in ROOMS[settings.command]), *checks):
        problems = problems + check(settings)
    if problems:
        order: dict[str, int] = {}
        for given in sources.given:
            order.setdefault(given.place, len(order))
        once = [problem for at, problem in enumerate(problems) if problem not in problems[:at]]
        raise UserError(sorted(once, key=lambda problem: order.get(problem.place, len(order))))
    if settings.command in ("train", "preview"):
        settings.translated += data_room.idle(settings)
    return settings
