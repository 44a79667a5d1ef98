"""Writes the table of docs/templates.md: every chat template that can be had, and what burnish makes of it.

    python scripts/templates_table.py           write it (half a minute; `make fixtures` fetches the templates)
    python scripts/templates_table.py --check   exit 1 when it is not what would be written

The conversations, and the checks that each must pass before a cell is written, are those of the tests (tests/sweep.py).
Templates with equal cells share a row.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import fixtures  # noqa: E402
import sweep  # noqa: E402
from pages import write_or_check  # noqa: E402
from sweep import Outcome, Published  # noqa: E402

PAGE = ROOT / "docs" / "templates.md"
BEGIN = "<!-- What follows is written by scripts/templates_table.py -->\n"
END = "<!-- What stands before is written by scripts/templates_table.py -->\n"
HEAD = ("template", "system", "samples", "thoughts", "tool calls", "beside a call", "ends with", "refused; notes")
SOURCES = ("burnish", "tokenizer", *sweep.COLLECTIONS)

# What templates without a place for tools say of them, where they say it
TOLD = re.compile("leaves out a tool call|has no place|roles must alternate|roles are supported|Unexpected role")

Cells = tuple[str, ...]  # of one template: all of HEAD but the first


def cells(one: Published, outcomes: dict[str, Outcome]) -> Cells:
    template, tokenizer = sweep.load(one)
    found = {name: outcome for name, outcome in outcomes.items() if not outcome.refused}
    if not found:
        return ("",) * (len(HEAD) - 2) + (f"all: {_reason(outcomes['question'].refused)}",)
    return (
        _system(found),
        _samples(found, "system and turns", 3) or _samples(found, "without the last", 2),
        _samples(found, "thoughts", 2) or "no place",
        _calls(template, found),
        _beside(found),
        _end(template, tokenizer),
        "; ".join([*_refusals(outcomes, found), *_notes(template, found)]),
    )


def _system(found: dict[str, Outcome]) -> str:
    if not {"system", "tools that nobody calls"} & set(found):
        return "refused"
    return "anywhere" if "system in the middle" in found else "first"


def _samples(found: dict[str, Outcome], name: str, turns: int) -> str:
    """How many samples a conversation gives; "" where it is refused."""
    if name not in found:
        return ""
    return {1: "one", turns: "one a turn"}[found[name].samples]


def _calls(template: Any, found: dict[str, Outcome]) -> str:
    if not _takes_calls(found):
        return "no place"
    handed = "text" if template._renderer.call_shape.as_text else "object"
    return handed if "parallel calls" in found else f"{handed}, one a turn"


def _takes_calls(found: dict[str, Outcome]) -> bool:
    return "a call" in found or "ends in a call" in found


def _beside(found: dict[str, Outcome]) -> str:
    """Words beside a call."""
    if not _takes_calls(found):
        return ""
    if "words beside a call" not in found:
        return "refused"
    return "kept" if "Said7one" in found["words beside a call"].texts[0] else "dropped"


def _end(template: Any, tokenizer: Any) -> str:
    ending = template._ending
    if ending.marker:
        is_eos = ending.marker == tokenizer.eos_token and ending.marker not in template.jinja
        return "`eos_token`" if is_eos else _code(ending.marker)
    headers = " or ".join(map(_code, ending.headers))
    return f"{headers}; `eos_token` at the end" if headers else "`eos_token` at the end only"


def _refusals(outcomes: dict[str, Outcome], found: dict[str, Outcome]) -> list[str]:
    """What no other cell tells: conversations, by the reason why they are refused."""
    reasons: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        reason = _reason(outcome.refused)
        told = name in sweep.TOOLS and not _takes_calls(found) and TOLD.search(reason)
        told = told or ("thought" in name and reason == "leaves out the answer's reasoning")
        if outcome.refused and not told:
            reasons.setdefault(reason, []).append(name)
    return [f"{_together(names)}: {reason}" for reason, names in reasons.items()]


def _together(names: list[str]) -> str:
    if len(names) > 9 and set(names) <= set(sweep.TOOLS):
        return "tools"
    if len(names) > 9 and set(names) & set(sweep.TOOLS) <= {"a call of a tool that is not declared"}:
        return "without tools"
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} conversations with *{names[0]}*"


def _reason(text: str) -> str:
    """In a few words."""
    text = text.removeprefix("the chat template refuses it: ").removeprefix("the chat template ").rstrip(".!")
    text = re.sub(r"the template '\w+' has", "it has", text)
    text = "roles must alternate" if "roles must alternate" in text else text
    return text.replace("|", "\\|").replace("<", "&lt;")


def _notes(template: Any, found: dict[str, Outcome]) -> list[str]:
    asks = [name for name, outcome in found.items() if outcome.asks_otherwise]
    if any(name not in sweep.TOOLS for name in asks):
        return ["asks with other words"]
    return ["asks with other words before calls"] if asks else []


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


# ---- the page --------------------------------------------------------------------------------------------------------


def table(found: dict[Published, Cells]) -> str:
    groups: dict[Cells, list[Published]] = {}
    for one in sorted(found, key=lambda one: (SOURCES.index(one.source), one.name.lower())):
        groups.setdefault(found[one], []).append(one)
    rows = [HEAD, ("---",) * len(HEAD), *((_names(group), *row) for row, group in groups.items())]
    told = f"{len(found)} templates and {len(sweep.CASES)} conversations each; {len(groups)} ways to behave.\n\n"
    return told + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _names(group: list[Published]) -> str:
    parts = []
    for source in SOURCES:
        names = [one.name for one in group if one.source == source]
        parts += [f"*{source}*: {', '.join(names)}"] if names else []
    return "; ".join(parts)


def rows_of(page: str) -> dict[Published, Cells]:
    """What a page says: `table` the other way round."""
    text = page.partition(BEGIN)[2].partition(END)[0]
    found = {}
    for line in text.splitlines()[4:]:
        names, *row = (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1]))
        for part in names.split("; "):
            source, _, listed = part.partition("*: ")
            found |= {Published(source.strip("*"), name): tuple(row) for name in listed.split(", ")}
    return found


def page(found: dict[Published, Cells]) -> str:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return head + BEGIN + table(found) + END + rest.partition(END)[2]


def main() -> int:
    fetched = [*sweep.COLLECTIONS.values(), *(fixture for fixture, _ in sweep.TOKENIZERS.values())]
    missing = [fixture for fixture in fetched if not fixtures.is_fetched(fixture)]
    if missing:
        print(f"run `make fixtures` first: {', '.join(missing)} not fetched", file=sys.stderr)
        return 1
    return write_or_check(PAGE, page({one: cells(one, sweep.outcomes(one)) for one in sweep.published()}))


if __name__ == "__main__":
    sys.exit(main())
