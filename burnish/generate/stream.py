"""The answer on its way: tokens from the thread that generates to the one that reads, and tokens into whole characters.

`TokenStream` is what `model.generate` fills, `TextPieces` what turns its ids into text, `AnswerPieces` what ends that
text at a stop string, `StopWhen` how the reader ends the generation early.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Token:
    """One token of an answer. `logprob` and `likeliest` are the model's own; None and () where nobody asks for them."""

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()  # (id, logprob), the likeliest first


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: whole characters and the tokens that they are of. The last one says why there is no more.

    The end token and what a stop string took away are in no `tokens`, but `num_generated` counts them.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    num_generated: int = 0  # tokens since the beginning of the answer
    finish_reason: Literal["", "end", "stop_string", "length"] = ""


class TextPieces:
    """Ids one by one → pieces of text whose sum is the text of all ids.

    A character may be spread over several tokens (你 is three bytes, 🦊 four): until it is whole, the decoder ends in
    U+FFFD and nothing is given out. Only a short window is decoded at a time, from the start of the piece before the
    last one, since some decoders treat the first token of a text differently (SentencePiece drops its space).

    >>> pieces = TextPieces(tokenizer)
    >>> [pieces.push(i) for i in tokenizer.encode("你好", add_special_tokens=False)], pieces.flush()
    (['', '', '你', '', '', '好'], '')
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._start = 0  # where the window begins
        self._given = 0  # how many ids have been given out as text

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._piece(whole_characters=True)

    def flush(self) -> str:
        """What is left at the end, even if its last character never became whole."""
        return self._piece(whole_characters=False)

    def _piece(self, *, whole_characters: bool) -> str:
        before = self._decode(self._ids[self._start : self._given])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (whole_characters and now.endswith("\ufffd")):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids, self._skip_special_tokens)


def decode(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of ids as they stand: spaces before punctuation are the model's and stay."""
    return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


class AnswerPieces:
    """Tokens one by one → pieces of their text, up to the first stop string, which is left out.

    Text that may be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, text: TextPieces, stop_strings: Sequence[str] = ()):
        self.stopped = False  # at a stop string
        self._text, self._stop_strings = text, stop_strings
        self._held = ""
        self._given = 0  # characters
        self._waiting: list[tuple[int, Token]] = []  # with the place where their text begins

    def push(self, token: Token) -> tuple[str, tuple[Token, ...]]:
        self._waiting.append((self._given + len(self._held), token))
        return self._release(self._text.push(token.id), at_end=False)

    def flush(self) -> tuple[str, tuple[Token, ...]]:
        """What is left once there is no more to come."""
        return ("", ()) if self.stopped else self._release(self._text.flush(), at_end=True)

    def _release(self, text: str, *, at_end: bool) -> tuple[str, tuple[Token, ...]]:
        self._held += text
        found = [at for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        held_back = 0 if at_end else overlap(self._held, self._stop_strings)
        length = min(found) if found else len(self._held) - held_back
        text, self._held = self._held[:length], self._held[length:]
        self._given += length
        given = [token for start, token in self._waiting if start < self._given or (at_end and not found)]
        self._waiting = self._waiting[len(given) :]
        return text, tuple(given)


def overlap(text: str, words: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of one of the words.

    >>> overlap("so be i", ["it was", "bed"])
    1
    """
    longest = max((len(word) for word in words), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(word.startswith(text[start:]) for word in words):
            return len(text) - start
    return 0


class StopWhen(StoppingCriteria):
    """Ends every row of a generation at the next token once the event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        stopped = torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)  # [B] bool
        return cast(torch.BoolTensor, stopped)


class TokenStream(BaseStreamer):
    """New tokens, one at a time, for a thread that waits for them; it raises there what went wrong here."""

    def __init__(self, make_token: Callable[[int], Token] = Token) -> None:
        self._make_token = make_token
        self._items: queue.SimpleQueue[list[Token] | BaseException | None] = queue.SimpleQueue()
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """`model.generate` hands over the prompt first, [1, S], then each new token, [1]."""
        if self._saw_prompt:
            self.give(value.flatten().tolist())
        self._saw_prompt = True

    def end(self) -> None:
        """`model.generate` says that it is about to return; `close` says that it has."""

    def give(self, ids: list[int]) -> None:
        self._items.put([self._make_token(token_id) for token_id in ids])

    def close(self, error: BaseException | None = None) -> None:
        self._items.put(error)

    def __iter__(self) -> Iterator[Token]:
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield from item
