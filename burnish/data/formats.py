"""A row of any format → an `Example`: messages in the shape of OpenAI's chat API.

    alpaca    {"instruction": "Add.", "input": "1 2", "output": "3"}               → user "Add.\\n1 2", assistant "3"
    sharegpt  {"conversations": [{"from": "human", "value": "hi"}, …]}             → user "hi", …
    openai    {"messages": [{"role": "user", "content": "hi"}, …], "tools": […]}   → as it is, checked
    stage pt  {"text": "…"}                                                        → one assistant message

A row that cannot be used raises `BadRow` with a short reason, the same for all rows with that fault, so that they can
be counted. Nothing is repaired by guessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from burnish.data.entry import OPENAI_TAGS, Columns, DatasetAttr
from burnish.data.turns import openai_turn, sharegpt_turn, tools_of
from burnish.data.values import BadRow, filled, json_list, no_column, optional, required, text_of
from burnish.types import Example, Message

_FOLLOWS = {  # role → roles that may come after it; "" is the beginning, after a system message
    "": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


def align_dataset(row: Mapping[str, Any], attr: DatasetAttr, *, stage: str = "sft", place: str = "") -> Example:
    """One row, in the format that `attr` names, → an Example. Raises BadRow."""
    if stage == "pt":
        return Example((Message(role="assistant", content=_document(row, attr.columns)),), place=place)
    messages = _alpaca(row, attr.columns) if attr.formatting == "alpaca" else _conversation(row, attr)
    check_turns(messages)
    return Example(tuple(messages), tuple(tools_of(row, attr.columns.tools)), place)


def detect_formatting(row: Mapping[str, Any], attr: DatasetAttr) -> DatasetAttr:
    """The format of a file that was named directly, told from its first row; where its turns say nothing, from the
    column's name.
    """
    found = {column: _first_turn(row, column) for column in ("messages", "conversations") if column in row}
    for column, turn in sorted(found.items(), key=lambda item: not item[1]):  # a column with turns goes first
        if not turn and attr.columns.prompt in row:
            break
        columns = replace(attr.columns, messages=column)
        if "role" in turn or (not turn and column == "messages"):
            return replace(attr, formatting="openai", columns=columns, tags=OPENAI_TAGS)
        return replace(attr, formatting="sharegpt", columns=columns)
    return replace(attr, formatting="alpaca")


def _first_turn(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    try:
        turns = json_list(row[column] or [], column)
    except BadRow:  # counted when the row is read
        return {}
    return turns[0] if turns and isinstance(turns[0], dict) else {}


def columns_read(attr: DatasetAttr, stage: str) -> set[str]:
    """The columns that this format looks at; any other column of a row is left unread."""
    columns = attr.columns
    if stage == "pt":
        names = {columns.prompt, columns.query, "text"}
    elif attr.formatting == "alpaca":
        names = {columns.prompt, columns.query, columns.response, columns.history, columns.system, columns.tools}
    else:
        names = {columns.messages, columns.system, columns.tools}
    return {name for name in names if name}


def _document(row: Mapping[str, Any], columns: Columns) -> str:
    """A text to train on as a whole: the prompt's columns, or `text`."""
    if columns.prompt in row or "text" not in row:
        if columns.prompt == Columns.prompt and columns.prompt not in row:  # nobody named a column
            raise no_column(row, "text")
        parts = [required(row, columns.prompt), optional(row, columns.query)]
        return filled("\n".join(part for part in parts if part), columns.prompt or "text")
    return filled(text_of(row["text"], "text"), "text")


def _alpaca(row: Mapping[str, Any], columns: Columns) -> list[Message]:
    if set(row) == {"text"} and columns.prompt != "text":
        raise BadRow("is a text without an answer")
    messages: list[Message] = []
    if system := optional(row, columns.system):
        messages.append(Message(role="system", content=system))
    history = row.get(columns.history) if columns.history else None
    for pair in json_list(history or [], "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("history is not a list of pairs")
        question, answer = (filled(text_of(text, "history"), "a turn of history") for text in pair)
        messages += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    asked = "\n".join(part for part in (required(row, columns.prompt), optional(row, columns.query)) if part)
    answer = filled(required(row, columns.response), columns.response or "")
    question = filled(asked, columns.prompt or "")
    return [*messages, Message(role="user", content=question), Message(role="assistant", content=answer)]


def _conversation(row: Mapping[str, Any], attr: DatasetAttr) -> list[Message]:
    column = attr.columns.messages
    if column is None or column not in row:
        raise no_column(row, column)
    turns = json_list(row[column] or [], column)
    if not turns:
        raise BadRow(f"{column} is empty")
    if not all(isinstance(turn, dict) for turn in turns):
        raise BadRow(f"{column} holds a turn that is not an object")
    read_turn = sharegpt_turn if attr.formatting == "sharegpt" else openai_turn
    messages = [read_turn(turn, attr) for turn in turns]
    if attr.formatting == "sharegpt" and messages[0]["role"] == "system" and not messages[0]["content"]:
        messages = messages[1:]  # an empty one means "as usual" there; in OpenAI's files it means "none"
    system = optional(row, attr.columns.system)
    if system and messages and messages[0]["role"] != "system":  # the turn wins over the column
        messages = [Message(role="system", content=system), *messages]
    return messages


def check_turns(messages: list[Message]) -> None:
    """The order of roles. Raises BadRow. What follows the last answer is allowed here and left out when encoding."""
    before = ""
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system":
            if index:
                raise BadRow("a system message is not the first")
            continue
        if role not in _FOLLOWS[before]:
            raise BadRow(
                f"roles do not alternate: {role} after {before}" if before else f"begins with {role}, not with the user"
            )
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("has no assistant turn")
