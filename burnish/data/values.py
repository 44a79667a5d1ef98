"""What a cell of a row holds (text, a list, JSON written as text), and the one way to say that it cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

from burnish.data.broken import AROUND_ROWS

_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    Decimal: "a number",
    list: "a list",
    dict: "an object",
    str: "text",
    bytes: "bytes",
    **dict.fromkeys((date, datetime, time, timedelta), "a time"),
}


class BadRow(Exception):
    """A row that cannot be used. Its text is the reason, the same for every row with this fault."""


def required(row: Mapping[str, Any], column: str | None) -> str:
    """The text of a column that must be there, and may be empty."""
    if column is None or column not in row:
        raise no_column(row, column)
    return text_of(row[column], column)


def no_column(row: Mapping[str, Any], column: str | None) -> BadRow:
    """With what the row has instead; an object around all rows is known by the objects in a list of its."""
    for key, value in row.items():
        rows = value if isinstance(value, list) else []
        if rows and isinstance(rows[0], dict) and {column, "messages", "conversations"} & rows[0].keys():
            return BadRow(f"{AROUND_ROWS} {_short(key)}")
    return BadRow(f"has no column {column!r}{it_has(row, column)}")


def it_has(names: Iterable[Any], wanted: str | None) -> str:
    """The names that are there, or the nearest of them, for a person who looks for another."""
    given = sorted(map(str, names))
    if near := get_close_matches(wanted or "", [name for name in given if name != wanted], n=1, cutoff=0.75):
        return f" (did you mean {_short(near[0])}?)"
    told = ", ".join(map(_short, given[:5])) + (", …" if len(given) > 5 else "")
    return f" (it has {told})" if given else " (it is empty)"


def _short(name: Any) -> str:
    return repr(name if len(str(name)) <= 40 else f"{str(name)[:40]}…")


def optional(row: Mapping[str, Any], column: str | None) -> str:
    return text_of(row.get(column), column) if column else ""


def text_of(value: Any, what: str) -> str:
    """A string that a tokenizer takes; "" for None. A number is no text: whether it was 7 or 007 is lost."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{what} is {kind_of(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{what} holds half a surrogate pair") from None
    if "\0" in value:
        raise BadRow(f"{what} holds a null byte")
    return value


def encodable(value: Any, what: str) -> Any:
    """A value of JSON, as it is: its texts, names of keys among them, come to a tokenizer through a template."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRow(f"{what} holds half a surrogate pair") from None
    except RecursionError:
        raise BadRow(f"{what} is nested too deeply") from None
    return value


def filled(text: str | None, what: str) -> str:
    """The text, unless nothing of it can be seen."""
    if not text or not text.strip() or not text.strip(_INVISIBLE).strip():
        raise BadRow(f"{what} is empty")
    return text


def kind_of(value: Any) -> str:
    if isinstance(value, float) and value != value:
        return "NaN"
    return next((name for kind, name in _KINDS.items() if isinstance(value, kind)), type(value).__name__)


def parsed(value: Any, what: str) -> Any:
    """A JSON string → its value; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} is not JSON") from None


def json_list(value: Any, what: str) -> list[Any]:
    """A list, or a JSON string of one (a csv file has no other way to hold it)."""
    items = parsed(value, what)
    if not isinstance(items, list):
        raise BadRow(f"{what} is {kind_of(items)}, not a list")
    return items
