"""Tool calls: into the shape that a template reads, and out of the text that a model wrote.

Two formats are read back: Hermes and Qwen (`<tool_call>{"name": …, "arguments": …}</tool_call>`) and Llama 3
(`{"name": …, "parameters": …}` as the whole answer). What a model of another format writes stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Calls = list[dict[str, Any]]  # as Message's tool_calls

_HERMES_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def calls_for_template(calls: Calls, *, as_text: bool) -> Calls:
    """`arguments` as the object that templates want (most print it with `tojson`), or as JSON text.

    Text arrives where a caller hands on what OpenAI's API gave it. It is parsed here once: a template would encode it
    a second time, as `"{\\"a\\": 1}"`. Raises ValueError where it is no JSON object.
    """
    shaped = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, dict):
            arguments = _object(arguments, function.get("name"))
        if as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        shaped.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
    return shaped


def _object(arguments: Any, name: Any) -> dict[str, Any]:
    try:
        parsed = json.loads(arguments) if arguments else {}
    except (TypeError, ValueError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(f"the arguments of a call of {name} are not a JSON object")
    return parsed


def hermes_calls(text: str) -> tuple[str, Calls]:
    """Text and calls. Text that only looks like a call stays text.

    >>> hermes_calls('Let me see.\\n<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>')
    ('Let me see.', [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}])
    """
    calls: Calls = []
    for found in _HERMES_CALL.finditer(text):
        call = _call(found[1], "arguments")
        if call is None:
            return text, []
        calls.append(call)
    return (_HERMES_CALL.sub("", text).strip("\n") if calls else text), calls


def llama3_calls(text: str) -> tuple[str, Calls]:
    """An answer that is nothing but calls, one or several divided by `;`.

    >>> llama3_calls('{"name": "add", "parameters": {"a": 1}}')
    ('', [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}])
    """
    calls: Calls = []
    rest = text.removeprefix("<|python_tag|>").strip()
    while rest:
        try:
            _, end = json.JSONDecoder().raw_decode(rest)
        except ValueError:
            return text, []
        call = _call(rest[:end], "parameters")
        if call is None:
            return text, []
        calls.append(call)
        rest = rest[end:].lstrip("; \n")
    return ("", calls) if calls else (text, [])


FORMATS: tuple[Callable[[str], tuple[str, Calls]], ...] = (hermes_calls, llama3_calls)


def no_calls(text: str) -> tuple[str, Calls]:
    return text, []


def _call(text: str, arguments_key: str) -> dict[str, Any] | None:
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get(arguments_key, {})
    if not isinstance(arguments, dict):
        return None
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
