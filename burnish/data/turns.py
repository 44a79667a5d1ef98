"""One turn of a conversation, in the words of its file → a `Message` in the shape of OpenAI's chat API.

{"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}
    → {"role": "assistant", "content": None,
       "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from burnish.data.entry import DatasetAttr
from burnish.data.values import BadRow, encodable, filled, it_has, json_list, kind_of, parsed, text_of
from burnish.types import Message

FUNCTION_CALL = "function_call"  # a role of its own in sharegpt's files

_THOUGHT = re.compile(r"\s*(<think>.*?</think>)\s*", re.DOTALL)


def sharegpt_turn(turn: dict[str, Any], attr: DatasetAttr) -> Message:
    role = _role(turn, attr)
    may_be_empty = role in ("tool", "system")
    if attr.tags.content_tag not in turn and not may_be_empty:
        raise _no_key(turn, attr.tags.content_tag)
    text = text_of(turn.get(attr.tags.content_tag), f"a turn's {attr.tags.content_tag}")
    if role == FUNCTION_CALL:
        return _with_weight(_function_call(text), turn)
    return _with_weight(Message(role=role, content=text if may_be_empty else filled(text, f"{role} turn")), turn)


def openai_turn(turn: dict[str, Any], attr: DatasetAttr) -> Message:
    role = _role(turn, attr)
    content, extra = _content(turn.get(attr.tags.content_tag))
    if role == FUNCTION_CALL:
        return _with_weight(_function_call(content or ""), turn)
    calls = [*json_list(turn.get("tool_calls") or [], "tool_calls"), *extra["tool_calls"]]
    if turn.get("function_call"):  # as it was written before there were tool_calls
        calls.append(turn["function_call"])
    if calls and role != "assistant":
        raise BadRow(f"a {role} turn holds tool calls")
    if not calls and role in ("user", "assistant"):
        if attr.tags.content_tag not in turn:
            raise _no_key(turn, attr.tags.content_tag)
        filled(content, f"{role} turn")
    message = Message(role=role, content=content if role == "assistant" else content or "")
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
    if thought := turn.get("reasoning_content") or turn.get("reasoning") or extra["reasoning"]:
        message["reasoning_content"] = text_of(thought, "reasoning_content")
    for key in ("name", "tool_call_id"):
        if turn.get(key):
            message[key] = text_of(turn[key], key)
    return _with_weight(message, turn)


def tools_of(row: Mapping[str, Any], column: str | None) -> list[dict[str, Any]]:
    """The tools column, a JSON string or a list → schemas as in OpenAI's `tools`."""
    given = row.get(column) if column else None
    if not column or not given:
        return []
    tools = parsed(given, column)
    schemas = []
    for tool in [tools] if isinstance(tools, dict) else json_list(tools or [], column):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{column} holds a tool without a name")
        schemas.append(tool if "function" in tool else {"type": "function", "function": tool})
    return encodable(schemas, column)


def _role(turn: dict[str, Any], attr: DatasetAttr) -> str:
    """The role of a turn in OpenAI's words, or FUNCTION_CALL."""
    tags = attr.tags
    roles = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "tool",
        tags.function_tag: FUNCTION_CALL,
        tags.system_tag: "system",
    }
    if attr.formatting == "openai":
        roles = {"developer": "system", "function": "tool", **roles}
    word = turn.get(tags.role_tag)
    if word is None:
        raise _no_key(turn, tags.role_tag)
    if not isinstance(word, str) or word not in roles:
        raise BadRow(f"has a turn of unknown role {str(word)[:40]!r} (known: {', '.join(roles)})")
    return roles[word]


def _no_key(turn: dict[str, Any], key: str) -> BadRow:
    return BadRow(f"a turn has no {key!r}{it_has(turn, key)}")


def _function_call(text: str) -> Message:
    """`{"name": …, "arguments": {…}}`, or a list of them for calls side by side, after an optional thought."""
    thought = _THOUGHT.match(text)
    calls = parsed(text[thought.end() :] if thought else text, "a function call")
    message = Message(role="assistant", content=thought.group(1) if thought else None)
    message["tool_calls"] = [_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    if not message["tool_calls"]:
        raise BadRow("a function call is empty")
    return message


def _tool_call(call: Any) -> dict[str, Any]:
    """Any way to write a call → {"type": "function", "function": {"name", "arguments": dict}}, its id kept.

    `arguments` becomes a dict: templates render it as JSON, and a string would be encoded twice.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow("a tool call has no function name")
    arguments = parsed(function.get("arguments") or {}, "the argument text of a tool call")
    if not isinstance(arguments, dict):
        raise BadRow("the arguments of a tool call are not an object")
    made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return encodable({"id": call["id"], **made} if isinstance(call.get("id"), str) else made, "a tool call")


def _content(content: Any) -> tuple[str | None, dict[str, Any]]:
    """Text, or parts of it; thoughts and tool calls may stand among the parts (LLaMA-Factory's newer files)."""
    extra: dict[str, Any] = {"reasoning": "", "tool_calls": []}
    if content is None or isinstance(content, str):
        return (None if content is None else text_of(content, "content")), extra
    if not isinstance(content, list):
        raise BadRow(f"content is {kind_of(content)}, not text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        value = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if kind == "text" and isinstance(part, dict):
            texts.append(text_of(value, "a part of content"))
        elif kind == "reasoning":
            extra["reasoning"] += text_of(value, "a part of content")
        elif kind == "tool_call":
            extra["tool_calls"].append(parsed(value, "a tool call"))
        else:
            raise BadRow(f"content holds a part of type {kind!r}; only text is read")
    return ("".join(texts) if texts else None), extra


def _with_weight(message: Message, turn: dict[str, Any]) -> Message:
    """`train: false`, or a weight of 0 (`weight` in OpenAI's files, `loss_weight` in others), leaves a turn out."""
    for key in ("train", "weight", "loss_weight"):
        given = turn.get(key)
        if given is None:
            continue
        if given not in (0, 1):
            raise BadRow(f"{key} of a turn is neither 0 nor 1")
        if not given and message["role"] == "assistant":
            message["train"] = False
    return message
