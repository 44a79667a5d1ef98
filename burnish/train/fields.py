"""The fields of transformers' Seq2SeqTrainingArguments, read from its source, because importing it costs torch.

Every mistake in a configuration shall be told before torch is loaded. So the class bodies are parsed, and each
`name: annotation = field(...)` is evaluated by itself in a namespace where an enumeration of strings stands for its
values and a class that is not here stands for anything. What a version of transformers calls its fields is never
written down in burnish; a test compares what is read here with the class itself.
"""

from __future__ import annotations

import ast
import dataclasses
import types
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin

FILES = ("debug_utils.py", "trainer_utils.py", "training_args.py", "training_args_seq2seq.py")
CLASSES = ("TrainingArguments", "Seq2SeqTrainingArguments")


@dataclass(frozen=True)
class TransformersField:
    """One field of the class: `hint` is simplified to what a text can be turned into."""

    name: str
    hint: Any  # bool, int, float, str, dict, list[str], Literal[...] or Optional of one
    default: Any
    help: str


@cache
def transformers_fields() -> tuple[TransformersField, ...]:
    modules = [ast.parse((_source_folder() / name).read_text(encoding="utf-8")) for name in FILES]
    classes = {node.name: node for module in modules for node in module.body if isinstance(node, ast.ClassDef)}
    names = _Names(modules)
    return tuple(
        _read_field(statement, names)
        for name in CLASSES
        for statement in classes[name].body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Call)
    )


def reporters() -> tuple[str, ...]:
    """What `report_to` may name."""
    path = _source_folder() / "integrations" / "integration_utils.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and _assigns(node, "INTEGRATION_TO_CALLBACK"):
            return tuple(ast.literal_eval(key) for key in getattr(node.value, "keys", ()))
    return ()


def _source_folder() -> Path:
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("transformers is not installed")
    return Path(spec.submodule_search_locations[0])


def _read_field(statement: ast.AnnAssign, names: _Names) -> TransformersField:
    assert isinstance(statement.target, ast.Name) and statement.value is not None
    read = names.evaluate(statement.value)
    hint = simplified(names.evaluate(statement.annotation))
    if choices := read.metadata.get("choices"):
        literal = Literal[tuple(choices)]  # pyright: ignore[reportInvalidTypeForm]
        hint = Optional[literal] if type(None) in get_args(hint) else literal  # noqa: UP045
    default = read.default_factory() if read.default_factory is not dataclasses.MISSING else read.default
    return TransformersField(statement.target.id, hint, default, read.metadata.get("help", ""))


class _Names(dict[str, Any]):
    """What the names in the source stand for, found when they are asked for."""

    def __init__(self, modules: list[ast.Module]):
        from transformers.utils import logging

        known = (bool, int, float, str, list, dict)
        super().__init__({kind.__name__: kind for kind in known})
        self.update(Any=Any, Literal=Literal, field=dataclasses.field, logging=logging)
        nodes = (node for module in modules for node in ast.walk(module))
        self._nodes = [node for node in nodes if isinstance(node, ast.ClassDef | ast.Assign)]

    def evaluate(self, node: ast.expr) -> Any:
        return eval(compile(ast.Expression(node), "transformers", "eval"), {"__builtins__": {}}, self)

    def __missing__(self, name: str) -> Any:
        self[name] = found = self._look_up(name)
        return found

    def _look_up(self, name: str) -> Any:
        values = Any  # a class of which nothing is known
        for node in self._nodes:
            if isinstance(node, ast.ClassDef) and node.name == name and _is_enumeration(node):
                members = [s.value for s in node.body if isinstance(s, ast.Assign)]
                values = Literal[tuple(ast.literal_eval(m) for m in members)]  # pyright: ignore[reportInvalidTypeForm]
            elif isinstance(node, ast.Assign) and _assigns(node, name):
                values = self.evaluate(node.value)  # the last one holds: it is that of the newest torch
        return values


def _is_enumeration(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases)


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def simplified(hint: Any) -> Any:
    """Leaves of a union what a text can be turned into.

    >>> simplified(Literal["no", "steps"] | str), simplified(None | str | list[str])
    (typing.Literal['no', 'steps'], typing.Optional[list[str]])
    """
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [part for part in parts if part is not type(None)]
    kind = _kind(kinds)
    return Optional[kind] if len(kinds) < len(parts) else kind  # noqa: UP045


def _kind(kinds: list[Any]) -> Any:
    for kind in kinds:
        if get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)):
            return kind
    if any(get_origin(kind) is list for kind in kinds):
        return list[str]
    if any(dict in (kind, get_origin(kind)) for kind in kinds):
        return dict
    if str in kinds:
        return str
    return kinds[0] if kinds[0] in (bool, int, float) else str
