"""Messages → text, by the jinja of a chat template, with the machinery that transformers itself renders with.

How a template wants tool calls to be handed over (arguments as an object or as text) is nowhere declared: the template
is asked, once, with a small conversation (`call_shape`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from burnish.chat.pieces import Rendered
from burnish.chat.tools import calls_for_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]  # messages as a template takes them
Tools = list[dict[str, Any]] | None

_OPEN, _CLOSE = "\U000f0100", "\U000f0101"  # private use: they stand around look-alikes while a template renders

# Small conversations to ask a template with
QUESTION = {"role": "user", "content": "A question?"}
RESULT = {"role": "tool", "content": "A result.", "tool_call_id": "call00001"}  # Mistral's want ids of nine letters
TOOL = {
    "type": "function",
    "function": {
        "name": "burnish7call",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"burnish7key": {"type": "string", "description": "A key."}}},
    },
}
_CALL_WORDS = ("burnish7call", "burnish7key", "burnish7value")
_PLAIN_KEYS = {"role", "content"}


class CannotRender(ValueError):
    """A conversation that the template refuses, or whose answer it would not write whole. The row is a bad row."""


@dataclass(frozen=True)
class CallShape:
    """How tool calls must be handed over. `sample`: what the template wrote for a call of one tool; "" for none."""

    as_text: bool = False
    no_content: Mapping[str, str | None] = field(default_factory=lambda: {"content": ""})  # of a turn that only calls
    sample: str = ""

    def turn(self) -> dict[str, Any]:
        """A turn that calls TOOL."""
        function = {"name": "burnish7call", "arguments": {"burnish7key": "burnish7value"}}
        calls = calls_for_template([{"id": "call00001", "function": function}], as_text=self.as_text)
        return {"role": "assistant", "tool_calls": calls, **self.no_content}


class Renderer:
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str | dict[str, str],
        *,
        default_system: str | None = None,
        enable_thinking: bool | None = None,
        mark_look_alikes: bool = False,
    ):
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        self._jinja: Any = render_jinja_template
        self._compiled: Any = _compile_jinja_template  # remembers
        self._source, self._default_system = source, default_system
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if enable_thinking is not None:
            self._variables["enable_thinking"] = enable_thinking
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._look_alike = _any_of(special) if mark_look_alikes and special else None

    def source(self, tools: Tools = None) -> str:
        """The jinja text. A tokenizer may hold two: one for conversations with tools."""
        if isinstance(self._source, str):
            return self._source
        name = "tool_use" if tools and "tool_use" in self._source else "default"
        return self._source[name] if name in self._source else next(iter(self._source.values()))

    def identity(self) -> dict[str, Any]:
        """All that decides what it renders."""
        return {
            "jinja": self._source,
            "variables": self._variables,
            "default_system": self._default_system,
            "look_alikes_are_text": self._look_alike is not None,
        }

    def chat(self, messages: list[Any]) -> Chat:
        """Messages as templates take them: a system message where one is wanted, no key that is None, no `train`."""
        chat = [self._message(message) for message in messages]
        if self._default_system is not None and not (chat and chat[0]["role"] == "system"):
            chat.insert(0, {"role": "system", "content": self._default_system})
        return [self._marked(message) for message in chat] if self._look_alike else chat

    def tools(self, tools: Tools) -> Tools:
        """No tools is None: some templates take an empty list for tools."""
        return [self._mark(tool) for tool in tools] if tools and self._look_alike else tools or None

    def render(self, chat: Chat, tools: Tools = None, *, generation: bool = False) -> Rendered:
        """`generation`: with the header of the answer that is asked for. Raises CannotRender."""
        try:
            text = self._text(chat, tools, {"add_generation_prompt": generation, **self._variables})
        except Exception as error:  # a template is a program of somebody else's: it can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CannotRender(f"the chat template refuses it: {reason}") from error
        return _unmarked(text) if self._look_alike else Rendered(text)

    def _text(self, chat: Chat, tools: Tools, variables: dict[str, Any]) -> str:
        if tools is None and all(_is_plain(message) for message in chat):
            # what `_jinja` comes to, which takes as long again to look for what is no plain text
            return self._compiled(self.source()).render(messages=chat, tools=None, documents=None, **variables)
        texts, _ = self._jinja([chat], tools=tools, chat_template=self.source(tools), **variables)
        return texts[0]

    def written(self, text: str) -> str:
        """A string of `chat`'s as the template's text holds it: without marks."""
        return text.replace(_OPEN, "").replace(_CLOSE, "") if self._look_alike else text

    def _message(self, message: Any) -> dict[str, Any]:
        if message.keys() == _PLAIN_KEYS and message["content"] is not None:
            return message
        shaped = {key: value for key, value in message.items() if value is not None and key != "train"}
        if shaped.get("reasoning_content"):  # gpt-oss reads it under another name, which only newer transformers adds
            shaped.setdefault("thinking", shaped["reasoning_content"])
        if not shaped.get("tool_calls"):
            shaped.pop("tool_calls", None)
            return {"content": "", **shaped}
        try:
            shaped["tool_calls"] = calls_for_template(shaped["tool_calls"], as_text=self.call_shape.as_text)
        except ValueError as error:
            raise CannotRender(str(error)) from error
        if not shaped.get("content"):
            shaped.pop("content", None)
            shaped.update(self.call_shape.no_content)
        return shaped

    @cached_property
    def call_shape(self) -> CallShape:
        for as_text in (False, True):
            shapes = [CallShape(as_text, no_content) for no_content in ({"content": ""}, {}, {"content": None})]
            shapes = [replace(shape, sample=sample) for shape in shapes if (sample := self._call_of(shape))]
            if shapes:  # DeepSeek R1's writes an empty answer behind the calls for content ""
                return min(shapes, key=lambda shape: len(shape.sample))
        return CallShape()

    def _call_of(self, shape: CallShape) -> str:
        """What the template writes for a call of this shape; "" where it does not write all of it."""
        try:
            text = self.render([QUESTION, shape.turn()], [TOOL]).text
            before = self.render([QUESTION], [TOOL], generation=True).text
        except CannotRender:
            return ""
        written = text[common_length(text, before) :]
        # 'key' in single quotes is how Python prints a dict: that template wants text
        return written if all(word in written for word in _CALL_WORDS) and "'burnish7key'" not in written else ""

    def _marked(self, message: dict[str, Any]) -> dict[str, Any]:
        return {key: value if key == "role" else self._mark(value) for key, value in message.items()}

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            assert self._look_alike is not None
            value = value.replace(_OPEN, "").replace(_CLOSE, "")
            return self._look_alike.sub(f"{_OPEN}\\g<0>{_CLOSE}", value)
        if isinstance(value, dict):
            return {key: self._mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mark(item) for item in value]
        return value


def _is_plain(message: dict[str, Any]) -> bool:
    return message.keys() == _PLAIN_KEYS and type(message["content"]) is str and type(message["role"]) is str


def _unmarked(text: str) -> Rendered:
    """Take the marks off again and note where the look-alikes stand."""
    parts, spans, length = [], [], 0
    for part in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if part == _OPEN:
            spans.append([length, length])
        elif part == _CLOSE:
            if spans and spans[-1][0] == spans[-1][1]:
                spans[-1][1] = length
        else:
            parts.append(part)
            length += len(part)
    return Rendered("".join(parts), tuple((start, end) for start, end in spans if start < end))


def _any_of(words: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))


def common_length(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
