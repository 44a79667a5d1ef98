"""What stands in each token, as text that a person can read: one entry a token, and their texts joined are the row's.

    ids of "你好\\n"  →  ["你", None, "好", "\\n"]     None: bytes of the character that the entry before it shows

A tokenizer may cut a character into pieces of bytes, which are no text by themselves; such tokens are read together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_NO_TEXT = "\ufffd"  # what decoding makes of bytes that are no whole character
_LONGEST = 12  # tokens that are tried together: a character of a few joined ones (a family of emoji) has many bytes
_WORD_BEGINS = "▁"  # how SentencePiece writes a space in a token; decoded alone, the token loses it


class TokenTexts:
    """Texts of the tokens of one tokenizer; each token that is a text by itself is decoded once."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._single: dict[int, str] = {}

    def of(self, ids: Sequence[int]) -> tuple[str | None, ...]:
        texts: list[str | None] = []
        while len(texts) < len(ids):
            at = len(texts)
            count, text = self._whole(ids[at : at + _LONGEST])
            texts += [text, *[None] * (count - 1)]
        return tuple(texts)

    def _whole(self, ids: Sequence[int]) -> tuple[int, str]:
        """How many tokens from the first on are a text together, and that text."""
        first = self._one(ids[0])
        if _NO_TEXT in first:
            for count in range(2, len(ids) + 1):
                text = self._decoded(ids[:count])
                if _NO_TEXT not in text:
                    return count, text
        return 1, first

    def _one(self, token: int) -> str:
        if token not in self._single:
            text, raw = self._decoded([token]), self._tokenizer.convert_ids_to_tokens(token)
            begins = isinstance(raw, str) and raw.startswith(_WORD_BEGINS) and not text.startswith(" ")
            self._single[token] = f" {text}" if begins else text
        return self._single[token]

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
