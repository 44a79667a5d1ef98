"""An answer as a client gets it: the engine's pieces, parted into thoughts, words and tool calls while they come.

A whole answer is read as a stream is and its parts joined, so that the two cannot differ. What a chat template makes of
the whole, `ChatTemplate.parse_text`, has the last word on calls and on white space at either end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from burnish.chat.template import ChatTemplate
from burnish.generate.stream import Piece, Token, overlap

_OPEN, _CLOSE = "<think>", "</think>"
_CALL = "<tool_call>"  # how calls begin inside an answer
_CALLS_ONLY = ("<|python_tag|>", "{")  # how an answer begins that is nothing but calls


@dataclass(frozen=True)
class Part:
    """What there is to tell of one choice. The last part of a choice has its finish reason, as OpenAI calls it."""

    index: int
    text: str = ""
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    tokens: tuple[Token, ...] = ()
    finish_reason: str = ""  # stop | length | tool_calls

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls or self.finish_reason)


class TextReader:
    """The answer to a text: words, and nothing in them means anything."""

    def __init__(self, index: int):
        self.index = index

    def read(self, piece: Piece) -> Part:
        return Part(self.index, piece.text, tokens=piece.tokens, finish_reason=_finish(piece))


class ChatReader:
    """The answer to a conversation. The engine must not leave special tokens out: some mark thoughts or calls.

    `opened`: the prompt has opened a thought already. `calls`: there are tools that the model may call.
    """

    def __init__(
        self, index: int, template: ChatTemplate, special: re.Pattern[str] | None, *, opened: bool, calls: bool
    ):
        self.index = index
        self._template, self._special, self._may_call = template, special, calls
        self._stage = "thoughts" if opened else "start"
        self._text = ""  # all that the model wrote, up to a stop string: its last token may go beyond
        self._left = ""  # of what the model wrote, not yet given out
        self._thought, self._said = "", ""  # given out
        self._tokens: tuple[Token, ...] = ()

    def read(self, piece: Piece) -> Part:
        self._text += piece.text
        self._left += piece.text
        last = bool(piece.finish_reason)
        reasoning = self._thoughts(last)
        text, calls = ("", ()) if self._stage != "words" else self._last_words(piece) if last else (self._words(), ())
        self._thought, self._said = self._thought + reasoning, self._said + text
        reason = "tool_calls" if calls and _finish(piece) == "stop" else _finish(piece)
        part = Part(self.index, text, reasoning, calls, self._tokens + piece.tokens, reason)
        self._tokens = () if part else part.tokens  # they wait for the words that they belong to
        return part

    # 1. Thoughts, if there are any

    def _thoughts(self, last: bool) -> str:
        thought = ""
        if self._stage == "start":
            self._start(last)
        if self._stage == "thoughts":
            thought = self._think(last)
        if self._stage == "between":
            self._left = self._left.lstrip("\n")
            self._stage = "words" if self._left or last else "between"
        return thought

    def _start(self, last: bool) -> None:
        begin = self._left.lstrip()
        if begin.startswith(_OPEN):
            self._stage, self._left = "thoughts", begin[len(_OPEN) :]
        elif last or not _OPEN.startswith(begin):
            self._stage = "words"
            # as the template has it: Mistral's drop a space
            own = self._template.parse_text(self._text)["content"] or ""
            self._left = own[: len(own) - len(own.lstrip())] + begin

    def _think(self, last: bool) -> str:
        left = self._left if self._thought else self._left.lstrip()
        thought, closed, behind = left.partition(_CLOSE)
        if closed:
            self._stage, self._left = "between", behind
            return self._shown(thought.rstrip())
        length = len(left) if last else len(left) - overlap(left, [_CLOSE])
        length = len(left[:length].rstrip())
        self._left = left[length:]
        return self._shown(left[:length])

    # 2. Words, and calls among them

    def _words(self) -> str:
        """What can be given out while more may come: no white space at the end, nothing that may be of a call."""
        if self._may_call and not self._said:
            self._left = self._left.lstrip("\n")
            if any(self._left.lstrip()[: len(begin)] == begin[: len(self._left.lstrip())] for begin in _CALLS_ONLY):
                return ""
        length = len(self._left)
        if self._may_call:
            at = self._left.find(_CALL)
            length = at if at >= 0 else length - overlap(self._left, [_CALL])
        length = len(self._left[:length].rstrip())
        text, self._left = self._left[:length], self._left[length:]
        return self._shown(text)

    def _last_words(self, piece: Piece) -> tuple[str, tuple[dict[str, Any], ...]]:
        parsed = self._template.parse_text(self._text)
        content, calls = parsed["content"] or "", parsed.get("tool_calls")
        if calls and self._may_call:
            return content[len(self._said) :] if content.startswith(self._said) else "", tuple(calls)
        left = self._left.lstrip("\n") if self._may_call and not self._said else self._left
        if piece.finish_reason == "end":  # white space before the end token may be the template's
            words = left.rstrip()
            left = words + left[len(words) :][: len(content) - len(content.rstrip())]
        return self._shown(left), ()

    def _shown(self, text: str) -> str:
        return self._special.sub("", text) if self._special else text


def special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds the texts of special tokens."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def _finish(piece: Piece) -> str:
    return {"": "", "end": "stop", "stop_string": "stop", "length": "length"}[piece.finish_reason]
