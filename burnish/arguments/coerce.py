"""Values by annotation: what was written becomes what the field holds, or a sentence about why it cannot.

>>> to_type("1e-5", float), to_type("q_proj,v_proj", list[str]), to_type("yes", bool)
(1e-05, ['q_proj', 'v_proj'], True)
"""

from __future__ import annotations

import json
import math
import os
import types
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from burnish.arguments.given import WORDS_OF_TRUTH, yaml_value


class Unfit(ValueError):
    """A value that a field cannot hold: the message continues "NAME VALUE ...", the remedy says what would."""

    def __init__(self, message: str, remedy: str):
        super().__init__(message)
        self.message, self.remedy = message, remedy


def is_optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def core_type(hint: Any) -> Any:
    """Optional[X] → X."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def choices(hint: Any) -> tuple[str, ...]:
    kind = core_type(hint)
    return get_args(kind) if get_origin(kind) is Literal else ()


def to_type(value: Any, hint: Any) -> Any:
    """Raises Unfit."""
    kind = core_type(hint)
    if {str, dict} <= set(get_args(hint)):
        return _path_or_dict(value)
    if get_origin(kind) is Literal:
        return _choice(value, get_args(kind))
    if get_origin(kind) is list:
        return [to_type(item, get_args(kind)[0]) for item in _items(value)]
    if is_optional(hint) and kind is not str and isinstance(value, str) and value.lower() in ("null", "none"):
        return None
    return {bool: _bool, int: _int, float: _float, str: _str, dict: _dict}[kind](value)


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if isinstance(value, str | int) and word in WORDS_OF_TRUTH:
        return WORDS_OF_TRUTH[word]
    raise Unfit("is neither true nor false", "write true or false")


def _int(value: Any) -> int:
    number = _number(value, "is not a whole number", "write a number such as 8")
    if number != int(number):
        raise Unfit("is not a whole number", f"write {math.floor(number)} or {math.ceil(number)}")
    return int(number)


def _float(value: Any) -> float:
    return float(_number(value, "is not a number", "write a number such as 0.1 or 1e-5"))


def _number(value: Any, message: str, remedy: str) -> int | float:
    if isinstance(value, str):
        for read in (int, float):
            try:
                value = read(value.strip())
                break
            except ValueError:
                continue
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise Unfit(message, remedy)
    except OverflowError:  # a whole number of hundreds of digits
        raise Unfit("is too large a number", remedy) from None
    return value


def _str(value: Any) -> str:
    if isinstance(value, list | dict):
        raise Unfit("is not a text", "write one word or one sentence")
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _choice(value: Any, allowed: tuple[str, ...]) -> str:
    text = _str(value)
    if text in allowed:
        return text
    if isinstance(value, bool):  # JSON's false for the word "no"
        for word in ("off", "no") if not value else ("on", "yes"):
            if word in allowed:
                return word
    near = get_close_matches(text.lower(), allowed, n=1, cutoff=0.5)
    listed = ", ".join(allowed) if len(allowed) <= 14 else f"{', '.join(allowed[:10])} … ({len(allowed)} in all)"
    raise Unfit(f"is not one of {listed}", f"did you mean {near[0]!r}?" if near else "choose one of these")


def _items(value: Any) -> list[Any]:
    """A list, or a text with commas; words of the command line may hold commas too."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            return _items(_flow(value))
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _dict(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _flow(value)
    if isinstance(value, dict):
        return value
    raise Unfit("is not a mapping", """write {"name": value}""")


def _path_or_dict(value: Any) -> str | dict[str, Any] | None:
    """`ds.json`, or the mapping itself; a word for "off" is neither."""
    if isinstance(value, dict) or (isinstance(value, str) and value.lstrip().startswith("{")):
        return _dict(value)
    off = value is False or (isinstance(value, str) and value.strip().lower() in ("", "none", "null", "false", "no"))
    return None if off else os.path.expanduser(_str(value))


def _flow(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return yaml_value(text)
    except yaml.YAMLError as error:
        what = getattr(error, "problem", None) or "it cannot be read"
        raise Unfit(f"is not JSON ({what})", "check its brackets and quotes") from None
