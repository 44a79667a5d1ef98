"""The fields of a JSON object that somebody sent: each is taken with its type and its range, and none is left unread.

>>> fields = Fields({"temperature": 0.5, "n": 0})
>>> fields.number("temperature", 0, 2)
0.5
>>> fields.integer("n", 1)
Traceback (most recent call last):
burnish.serve.fields.Refused: 'n' is 0; it must be at least 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_NAMES = {str: "a string", list: "an array", dict: "an object", bool: "true or false", int: "an integer"}
_SHOWN = 80  # characters of a value in a message


class Refused(Exception):
    """A request that is not answered, and why. `param` is the field, `code` a word for programs, `status` HTTP's."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class Fields:
    """An object's fields. null is as good as absent. `place` is where the object stands: "messages[0]."."""

    def __init__(self, values: Any, place: str = ""):
        if not isinstance(values, dict):
            name = place.removesuffix(".")
            raise Refused(f"{_quoted(name)} must be a JSON object.", name or None, "invalid_type")
        self.place = place
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, kind: type[T]) -> T | None:
        value = self._left.pop(name, None)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise self.refused(name, f"must be {_NAMES[kind]}, not {_shown(value)}", "invalid_type")
        return value

    def need(self, name: str, kind: type[T]) -> T:
        value = self.take(name, kind)
        if value is None:
            raise self.refused(name, "is missing", "missing_required_parameter")
        return value

    def integer(self, name: str, low: int, high: int | None = None) -> int | None:
        return self._in_range(name, self.take(name, int), low, high)

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self._left.pop(name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self.refused(name, f"must be a number, not {_shown(value)}", "invalid_type")
        value = self._in_range(name, value, low, high)
        return value if value is None else float(value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A string, or an array of up to `most` of them."""
        value = self._left.pop(name, None)
        values = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(values, list) or not all(isinstance(text, str) and text for text in values):
            raise self.refused(
                name, f"must be a string or an array of strings, none of them empty, not {_shown(value)}"
            )
        if len(values) > most:
            raise self.refused(name, f"has {len(values)} strings; {most} are the most")
        return tuple(values)

    def any(self, name: str) -> Any:
        return self._left.pop(name, None)

    def ignore(self, *names: str) -> None:
        """Fields that change nothing, whatever they hold."""
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, values: Sequence[Any], why: str) -> None:
        """A field that can be honoured only where it asks for what happens anyway."""
        value = self._left.pop(name, None)
        if value is not None and not any(type(value) is type(allowed) and value == allowed for allowed in values):
            raise self.refused(name, f"cannot be {_shown(value)}: {why}", "unsupported_parameter")

    def finish(self) -> None:
        if self._left:
            name = next(iter(self._left))
            raise self.refused(name, "is not known here", "unknown_parameter")

    def refused(self, name: str, message: str, code: str = "invalid_value") -> Refused:
        return Refused(f"{_quoted(self.place + name)} {message}.", self.place + name, code)

    def _in_range(self, name: str, value: Any, low: float, high: float | None) -> Any:
        if value is None or (low <= value and (high is None or value <= high)):
            return value
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise self.refused(name, f"is {_shown(value)}; it must be {bounds}")


def _quoted(name: str) -> str:
    return f"'{name[:_SHOWN]}'" if name else "The body"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
