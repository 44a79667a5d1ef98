"""Writes docs/arguments.md: every setting of burnish, and what becomes of it.

    python scripts/arguments_table.py           write it
    python scripts/arguments_table.py --check   exit 1 when it is not what would be written

Which test shows that a setting is honoured stands in tests/honoured.toml.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from pages import write_or_check

from burnish.arguments import legacy, refused
from burnish.arguments.fields import Field, known_fields, rooms, standings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "arguments.md"
HONOURED = ROOT / "tests" / "honoured.toml"

HEAD = """\
# Every setting, and what becomes of it

Written by `python scripts/arguments_table.py`, with transformers {transformers}; what a setting means is told by
`burnish train --help`. A setting is *honoured* (the test that shows it is named), *translated* into another, changes
*nothing* (and why), or is *refused* unless it is left at its default.
"""
ROOM_TITLES = {
    "model": "ModelArguments (burnish/model/arguments.py)",
    "data": "DataArguments (burnish/data/arguments.py)",
    "training": "TrainingArguments (transformers' own, burnish/train/arguments.py)",
    "finetuning": "FinetuningArguments (burnish/tuning/arguments.py)",
    "generating": "GeneratingArguments (burnish/generate/arguments.py)",
}


def tests_of_settings() -> dict[str, str]:
    """{"cutoff_len": "tests/data/test_cutoff.py::test_…"}: the file names, for each test, what it shows."""
    by_test: dict[str, list[str]] = tomllib.loads(HONOURED.read_text(encoding="utf-8"))
    return {name: test for test, names in by_test.items() for name in names}


def page() -> str:
    tests = tests_of_settings()
    parts = [HEAD.format(transformers=version("transformers"))]
    for room in rooms():
        rows = [_row(field, tests) for field in known_fields().values() if field.room == room]
        parts += [
            f"\n## {ROOM_TITLES[room]}\n",
            _table(("setting", "default", "what becomes of it", "why, or shown by"), rows),
        ]
    parts += [
        "\n## Names of other years and other tools (burnish/arguments/legacy.py and refused.py)\n",
        _table(("given", "becomes", "why"), _old_names()),
    ]
    return "\n".join(parts)


def _row(field: Field, tests: dict[str, str]) -> tuple[str, ...]:
    standing, why = standings(field.name)[0]
    return (
        f"`{field.name}`",
        f"`{_plain(field.default)}`",
        standing,
        f"`{tests[field.name]}`" if field.name in tests else why,
    )


def _plain(value: object) -> str:
    """A default as one would write it in YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return ",".join(map(str, value)) if isinstance(value, list) else str(value) or "''"


def _old_names() -> list[tuple[str, ...]]:
    rows = [(f"`{old}`", f"`{new}`", "") for old, (new, _) in legacy.RENAMED.items()]
    rows += [(f"`{name}: {old}`", f"`{name}: {new}`", "") for (name, old), new in legacy.VALUES.items()]
    rows += [(f"`{name}`", "accepted", note) for name, note in legacy.TOLD.items()]
    rows += [(f"`{name}: {value}`", "accepted", note) for name, (value, note, _) in legacy.TOLD_AT.items()]
    by_reason: dict[str, list[str]] = {}
    for name, (reason, remedy) in refused.REFUSED.items():
        by_reason.setdefault(f"{reason}; {remedy}", []).append(f"`{name}`")
    rows += [(" ".join(names), "refused", reason) for reason, names in by_reason.items()]
    rows += [(f"`{name}: {value}`", "refused", "; ".join(why)) for (name, value), why in refused.REFUSED_VALUES.items()]
    return rows


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def main() -> int:
    return write_or_check(PAGE, page())


if __name__ == "__main__":
    sys.exit(main())
