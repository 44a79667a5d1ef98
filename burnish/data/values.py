"""What a cell of a row holds (text, a list, JSON written as text), and the one way to say that it cannot be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class BadRow(Exception):
    """A row that cannot be used. Its text is the reason, the same for every row with this fault."""


def required(row: Mapping[str, Any], column: str | None) -> str:
    """The text of a column that must be there, and may be empty."""
    if column is None or column not in row:
        raise BadRow(f"has no column {column!r}")
    return text_of(row[column], column)


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
    return value


def filled(text: str | None, what: str) -> str:
    """The text, unless it is blank."""
    if not text or not text.strip():
        raise BadRow(f"{what} is empty")
    return text


def kind_of(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), type(value).__name__)


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
