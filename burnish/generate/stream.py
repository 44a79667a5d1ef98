"""The answer on its way: ids from the thread that generates to the one that reads, and ids into whole characters.

`TokenStream` is what `model.generate` fills, `TextPieces` what turns its ids into text, `StopWhen` how the reader ends
it early.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


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


class StopWhen(StoppingCriteria):
    """Ends every row of a generation at the next token once the event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        stopped = torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)  # [B] bool
        return cast(torch.BoolTensor, stopped)


class TokenStream(BaseStreamer):
    """New ids, one at a time, for a thread that waits for them; it raises there what went wrong here."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """`model.generate` hands over the prompt first, [1, S], then each new token, [1]."""
        if self._saw_prompt:
            self.give(value.flatten().tolist())
        self._saw_prompt = True

    def end(self) -> None:
        """`model.generate` says that it is about to return; `close` says that it has."""

    def give(self, ids: list[int]) -> None:
        self._items.put(ids)

    def close(self, error: BaseException | None = None) -> None:
        self._items.put(error)

    def __iter__(self) -> Iterator[int]:
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield from item
