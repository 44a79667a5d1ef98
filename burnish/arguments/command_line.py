"""The words of a command line: options, overrides, args files and the name of the configuration file.

CONFIG.yaml   name=value   --name value   --name=value   --na-me value   --flag   --no_flag   --args_file FILE
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from burnish.arguments.given import WORDS_OF_TRUTH, Given, Sources, cannot_be_read, read_config
from burnish.errors import Problem

CONFIG_ENDINGS = (".yaml", ".yml", ".json")
OVERRIDE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)

# How many words an option takes: "flag" none or one of truth, "one", "many", "perhaps" (an old name: none or one),
# and None for a name nobody knows.
Takes = Callable[[str], str | None]


def gather(
    argv: Sequence[str],
    takes: Takes,
    *,
    args_file_flag: str | None,
    args_files: Sequence[str] = (),
    missing_is_wrong: bool = True,
) -> Sources:
    """Everything that was given, args files first, then the configuration file, then the command line."""
    words, files = _without_args_files(list(argv), args_file_flag)
    command_line = read_command_line(words, takes)
    config, rest = _config_among(command_line.remaining)
    parts = []
    for path in (*args_files, *files):
        if not path:
            problem = Problem(str(args_file_flag), "", None, "has no value", f"write {args_file_flag} FILE")
            parts.append(Sources(problems=[problem], unread=True))
        elif os.path.isfile(os.path.expanduser(path)):
            parts.append(read_args_file(path, takes))
        elif missing_is_wrong:
            missing = Problem(path, "", None, "is not there", "check the name of the args file")
            parts.append(Sources(problems=[missing], unread=True))
    if config:
        parts.append(read_config(config))
    parts.append(command_line)
    return Sources(
        given=[given for part in parts for given in part.given],
        problems=[problem for part in parts for problem in part.problems],
        remaining=[word for part in parts[:-1] for word in part.remaining] + rest,
        config=config,
        unread=any(part.unread for part in parts),
        valueless=[name for part in parts for name in part.valueless],
    )


def _without_args_files(words: list[str], flag: str | None) -> tuple[list[str], list[str]]:
    """The other words, and the files that the flag names: "" where it names none."""
    kept: list[str] = []
    files: list[str] = []
    spellings = {flag, flag.replace("_", "-")} if flag else set()
    at = 0
    while at < len(words):
        name, equals, value = words[at].partition("=")
        if name not in spellings:
            kept.append(words[at])
        elif equals or at + 1 == len(words) or words[at + 1].startswith("--"):
            files.append(value)
        else:
            at += 1
            files.append(words[at])
        at += 1
    return kept, files


def _config_among(words: list[str]) -> tuple[str | None, list[str]]:
    for word in words:
        if word.lower().endswith(CONFIG_ENDINGS):
            return word, [other for other in words if other is not word]
    return None, words


def args_file_of_script() -> str | None:
    """`<script>.args` beside the entry script, when it is there."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    path = Path(script).with_suffix(".args") if script else None
    return str(path) if path and path.is_file() else None


def read_args_file(path: str, takes: Takes) -> Sources:
    """Words as on the command line, separated by white space; there is no quoting (HfArgumentParser's rule)."""
    try:
        words = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        return Sources(problems=[cannot_be_read(path, error)], unread=True)
    sources = read_command_line(words, takes)
    sources.given = [Given(g.name, g.value, path, g.typed or g.name) for g in sources.given]
    return sources


def read_command_line(words: list[str], takes: Takes) -> Sources:
    """`--name value`, `--name=value`, `--na-me value`, `--flag`, `--no_flag`, `name=value`; the rest is remaining."""
    sources = Sources()
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word.startswith("--") and len(word) > 2:
            at = _read_option(word, words, at, takes, sources)
        elif (override := OVERRIDE.fullmatch(word)) and not word.startswith("-"):
            name, text = override[1], override[2]
            value = None if text in ("null", "~") else text
            sources.given.append(Given(name, value, "command line", on_command_line=True))
        else:
            sources.remaining.append(word)
    return sources


def _read_option(word: str, words: list[str], at: int, takes: Takes, sources: Sources) -> int:
    """Reads one option and its values, which begin at words[at]; gives the place after them."""
    option, equals, text = word.partition("=")
    name = option[2:].replace("-", "_")
    negative = name.startswith("no_") and takes(name) is None and takes(name[3:]) == "flag"
    name = name[3:] if negative else name
    kind = takes(name) or "perhaps"
    if equals:
        values = [text]
    else:
        values = _values(words[at:], kind, takes)
        at += len(values)
    value: Any = values[0] if len(values) == 1 else ",".join(values)
    if negative:
        value = "false"
    elif not values and kind in ("flag", "perhaps"):
        value = "true"
    elif not values:
        sources.problems.append(Problem(option, "", None, "has no value", f"write {option} VALUE"))
        sources.valueless.append(name)
        return at
    sources.given.append(Given(name, value, option, option, on_command_line=True))
    return at


def _values(words: list[str], kind: str, takes: Takes) -> list[str]:
    """The words after an option that belong to it."""
    values = []
    for word in words:
        override = OVERRIDE.fullmatch(word)
        if word.startswith("--") or (override and takes(override[1]) is not None):
            break
        if kind == "flag" and word.lower() not in WORDS_OF_TRUTH:
            break
        if kind == "perhaps" and word.lower().endswith(CONFIG_ENDINGS):
            break
        values.append(word)
        if kind != "many":
            break
    return values


def unknown_words(given: Given) -> list[str]:
    """An option nobody knows, as words again, for `return_remaining_strings`."""
    if not given.place.startswith("--"):
        return [f"{given.name}={given.value}"]
    return [given.place] if given.value == "true" else [given.place, str(given.value)]
