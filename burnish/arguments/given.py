"""Where settings come from: a YAML or JSON file, args files, the command line. Each one with its place.

A value is kept as it was written: a text from YAML and the command line (`1e-5`, `no` and `007` are what the user
typed, not what YAML 1.1 makes of them), whatever JSON says from JSON. coerce.py turns it into the field's type.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from burnish.errors import Problem

WORDS_OF_TRUTH = {"true": True, "yes": True, "t": True, "y": True, "1": True, "on": True} | {
    "false": False, "no": False, "f": False, "n": False, "0": False, "off": False
}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """One setting as it was given. `typed` is its name there, `name` what it is called today."""

    name: str
    value: Any
    place: str  # "run.yaml line 7", "--stage", "command line"
    typed: str = ""
    on_command_line: bool = False

    def problem(self, message: str, remedy: str = "", value: Any = None) -> Problem:
        subject = "" if self.place.startswith("--") else self.typed or self.name
        return Problem(self.place, subject, self.value if value is None else value, message, remedy)


@dataclass
class Sources:
    """Everything that was given, in the order in which later wins, and what could not be read."""

    given: list[Given] = field(default_factory=list)
    remaining: list[str] = field(default_factory=list)  # words of the command line that are no setting
    problems: list[Problem] = field(default_factory=list)
    config: str | None = None  # the YAML or JSON file, as typed
    unread: bool = False  # a file gave nothing, so that what it would have said is not missing
    valueless: list[str] = field(default_factory=list)  # options without their value: told, and not missing besides


# ---- files -----------------------------------------------------------------------------------------------------


def read_config(path: str) -> Sources:
    """A YAML or JSON file of settings. A mistake of its grammar is one problem, with its line."""
    sources = Sources(config=path)
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        sources.problems.append(Problem(path, "", None, "is not there", _similar_file(path)))
    except (OSError, UnicodeDecodeError) as error:
        sources.problems.append(cannot_be_read(path, error))
    else:
        read = _read_json if path.lower().endswith(".json") else _read_yaml
        read(path, text, sources)
        if not sources.given and not sources.problems:
            sources.problems.append(Problem(path, "", None, "holds no settings", "write some, as in examples/"))
    sources.unread = not sources.given
    return sources


def cannot_be_read(path: str, error: OSError | UnicodeDecodeError) -> Problem:
    what = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
    return Problem(path, "", None, f"cannot be read: {what}", "give a text file in UTF-8")


def _similar_file(path: str) -> str:
    near = files_called_like(path)
    return f"did you mean {near[0]!r}?" if near else "check the name of the file"


def files_called_like(path: str) -> list[str]:
    """What stands in the folder of a path that is not there, and is called nearly so; the nearest first."""
    folder = Path(os.path.expanduser(path)).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = get_close_matches(Path(path).name, names, n=3)
    return [str(Path(path).with_name(name)) for name in near]


def _read_yaml(path: str, text: str, sources: Sources) -> None:
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="found no `name: value` lines", problem_mark=root.start_mark)
        sources.problems += _twice(path, [(key.value, key.start_mark.line + 1) for key, _ in root.value])
        loader.flatten_mapping(root)  # `<<: *anchor`
        for key, value in root.value:
            place = f"{path} line {key.start_mark.line + 1}"
            try:
                sources.given.append(Given(str(key.value), loader.as_written(value), place))
            except _NO_VALUE as error:
                remedy = "put it in quotes if it is a text"
                message = f"holds what YAML cannot read: {_reason(error)}"
                sources.problems.append(Problem(place, str(key.value), None, message, remedy))
    except yaml.reader.ReaderError as error:
        place = f"{path} line {text.count(chr(10), 0, error.position) + 1}"
        message = f"is not YAML: a control character (U+{error.character:04X}) stands in it"
        sources.problems.append(Problem(place, "", None, message, "take it out"))
    except RecursionError as error:
        sources.problems.append(Problem(path, "", None, f"cannot be read: {_reason(error)}", "write it flatter"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = f"{path} line {mark.line + 1}" if mark else path
        what = getattr(error, "problem", None) or str(error)
        sources.problems.append(Problem(place, "", None, f"is not YAML: {what}", "write one `name: value` a line"))
    finally:
        if loader:
            loader.dispose()


# What PyYAML raises, besides its own errors, at a value that its tag does not fit: 2024-13-45, `!!bool maybe`.
_NO_VALUE = (ValueError, KeyError, AttributeError, RecursionError)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).partition(";")[0] if isinstance(error, ValueError) else "it does not fit its tag"


class _Loader(yaml.SafeLoader):
    """YAML whose top-level values stay as they were written; deeper down, 1e-5 is a number."""

    def as_written(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return None if node.tag == "tag:yaml.org,2002:null" else node.value
        if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
            return [item.value for item in node.value]
        return self.construct_object(node, deep=True)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)?\.?\d+[eE][-+]?\d+$"), list("-+0123456789.")
)


def yaml_value(text: str) -> Any:
    """A list or mapping written in one line. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except _NO_VALUE as error:
        raise yaml.MarkedYAMLError(problem=_reason(error)) from None


def _read_json(path: str, text: str, sources: Sources) -> None:
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the outermost object comes last
        return dict(found)

    try:
        root = json.loads(text, object_pairs_hook=keep)
    except json.JSONDecodeError as error:
        place = f"{path} line {error.lineno}"
        sources.problems.append(Problem(place, "", None, f"is not JSON: {error.msg}", "correct this line"))
        return
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        remedy = "write it flatter" if isinstance(error, RecursionError) else "write that number shorter"
        sources.problems.append(Problem(path, "", None, f"cannot be read: {_reason(error)}", remedy))
        return
    if not isinstance(root, dict):
        sources.problems.append(Problem(path, "", None, "is not an object of settings", 'write {"name": value, …}'))
        return
    lines = _key_lines(text)
    placed = [(name, value, lines[name].pop(0) if len(lines[name]) > 1 else lines[name][0]) for name, value in pairs]
    sources.problems += _twice(path, [(name, line) for name, _, line in placed])
    sources.given += [Given(name, value, f"{path} line {line}") for name, value, line in placed]


def _key_lines(text: str) -> dict[str, list[int]]:
    """Line numbers of `"name":` in a JSON text; a name with escapes in it is taken to stand in the first."""
    lines: defaultdict[str, list[int]] = defaultdict(lambda: [1])
    for number, line in enumerate(text.splitlines(), start=1):
        for name in re.findall(r'"([^"\\]+)"\s*:', line):
            lines[name] = [*lines[name], number] if name in lines else [number]
    return lines


def _twice(path: str, keys: list[tuple[str, int]]) -> list[Problem]:
    first: dict[str, int] = {}
    found = []
    for key, line in keys:
        name = str(key)
        if name != "<<" and name in first:
            message = f"stands twice, first at line {first[name]}"
            found.append(Problem(f"{path} line {line}", name, None, message, "keep one of them"))
        first.setdefault(name, line)
    return found


def as_given(values: Mapping[str, Any]) -> list[Given]:
    """A dict from Python."""
    return [Given(str(name), value, "arguments") for name, value in values.items()]
