"""Writes the table of docs/from-llamafactory.md: every argument of LLaMA-Factory 0.9.5, and what burnish makes of it.

    python scripts/from_llamafactory.py           write it
    python scripts/from_llamafactory.py --check   exit 1 when it is not what would be written

The arguments are read from the source of its dataclasses, which `make fixtures` fetches; nothing of it is imported.
What becomes of them stands in burnish's own tables. The text above the table is written by hand and left alone.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fixtures
from pages import write_or_check

from burnish.arguments import legacy, refused
from burnish.arguments.fields import known_fields, standings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "from-llamafactory.md"
MARK = "<!-- What follows is written by scripts/from_llamafactory.py -->\n"
FILES = {
    "model_args.py": "The model, its adapters, serving and export",
    "data_args.py": "Data",
    "finetuning_args.py": "Method and stage",
    "training_args.py": "Training, besides transformers' own arguments",
    "generating_args.py": "Generation",
}  # evaluation_args.py is of a command that burnish does not have


@dataclass(frozen=True)
class Argument:
    """One field of LLaMA-Factory's dataclasses; `default` as one would write it in YAML."""

    name: str
    file: str
    default: str


def arguments(folder: Path) -> dict[str, Argument]:
    """By name, in the order of the sources; the first class that has a name gives it."""
    found: dict[str, Argument] = {}
    for file in FILES:
        for name, default in _fields(ast.parse((folder / file).read_text(encoding="utf-8"))):
            found.setdefault(name, Argument(name, file, default))
    return found


def _fields(module: ast.Module) -> Iterator[tuple[str, str]]:
    """What a user can set: a field that is made by `field(default=…)` and not closed with `init=False`."""
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    for statement in (statement for node in classes for statement in node.body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.value, ast.Call):
            continue
        assert isinstance(statement.target, ast.Name)
        settings = {word.arg: word.value for word in statement.value.keywords}
        if "init" not in settings:
            yield statement.target.id, _written(settings["default"])


def _written(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):  # a member of an enumeration of words: AttentionFunction.AUTO
        return node.attr.lower()
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):  # 768 * 768
        return plain(ast.literal_eval(node.left) * ast.literal_eval(node.right))
    return plain(ast.literal_eval(node))


def plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def fate(argument: Argument) -> tuple[str, str]:
    """What becomes of it, in a word that the page explains, and why."""
    name = argument.name
    if name in legacy.TOLD:
        return "told", legacy.TOLD[name]
    if name in legacy.TOLD_AT:
        value, what, why_not = legacy.TOLD_AT[name]
        return "told", f"at `{value}`: {what}; refused otherwise: {why_not}"
    if name in legacy.RENAMED and legacy.RENAMED[name][0] not in refused.REFUSED:
        return "translated", f"`{legacy.RENAMED[name][0]}`"
    if name in refused.REFUSED or name in legacy.RENAMED:
        return "refused", "; ".join(refused.REFUSED[legacy.RENAMED.get(name, (name,))[0]])
    ((standing, why),) = standings(name)
    if standing != "honoured":
        return standing, why
    return "same", "; ".join(_differences(argument))


def _differences(argument: Argument) -> Iterator[str]:
    ours = plain(known_fields()[argument.name].default)
    if ours != argument.default:
        yield f"default: `{ours}`" if ours != "null" else "not set here unless you set it"
    words = [value for name, value in refused.REFUSED_VALUES if name == argument.name]
    if words:
        yield f"refused: {', '.join(f'`{word}`' for word in words)}"


def table(folder: Path) -> str:
    found = arguments(folder)
    parts = []
    for file, title in FILES.items():
        rows = [
            (f"`{a.name}`", f"`{a.default}`" if a.default else "", *fate(a)) for a in found.values() if a.file == file
        ]
        lines = [("argument", "its default", "here", "what, or why"), ("---",) * 4, *rows]
        parts.append(f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "".join(parts)


def page(folder: Path) -> str:
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return head + (mark or MARK) + table(folder)


def main() -> int:
    return write_or_check(PAGE, page(fixtures.fetch("llamafactory-data") / "hparams"))


if __name__ == "__main__":
    sys.exit(main())
