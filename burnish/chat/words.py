"""Text → ids word by word, for tokenizers that do just that: the ids of a word are asked for once, and remembered.

    "<|im_start|>user\\nTwo and two"  →  <|im_start|> │ user · \\n · Two · ␣and · ␣two

Such a tokenizer takes its added tokens out of a text, cuts what lies between them into words by one regular expression,
and makes ids of each word's bytes alone. The words of a text return, and looking one up costs a tenth of tokenizing it.
Ids are those that the tokenizer itself gives, or none: `WordTokenizer.of` knows only a few such tokenizers, those of
GPT-2, SmolLM2, Llama 3 and Qwen, and a text with a character that two versions of Unicode might class differently is
left to the tokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from itertools import chain
from typing import Any, NamedTuple

import regex

_REMEMBERED_WORDS = 50_000  # some 15 MB, in each process that encodes
_LONGEST_WORD = 32  # longer ones (clauses of Chinese, which has no spaces) do not come back

# The expressions that are known to cut every text, without gaps, and alike in `regex` and in the tokenizers library
_WORDS_OF_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Where digits were taken out before, one by one: white space before a digit stands at the end of a text of its own
_WORDS_BETWEEN_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_LATER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS_OF_SPLIT = frozenset(_LATER % digits for digits in (r"\p{N}", r"\p{N}{1,3}"))  # Qwen's, Llama 3's

# What is no letter of an alphabet, number or sign that Unicode has had, unchanged, since 5.2
_STRANGE = re.compile(
    "[^\0-\u036f\u0391-\u03a1\u03a3-\u03fb\u0400-\u0523\u1e00-\u1eff\u2000-\u205f\u20a0-\u20bf\u2100-\u2189\u2190-\u2bff"
    "\u3000-\u303f\u3041-\u3096\u3099-\u30ff\u4e00-\u9fa5\uac00-\ud7a3\ufe0e\ufe0f\uff01-\uffbe"
    "\U0001f1e6-\U0001f1ff\U0001f300-\U0001f64f\U0001f680-\U0001f6ff\U0001f900-\U0001f9ff]"
)


class Marker(NamedTuple):
    """An added token in a text: `text[start:end]`, token number `token`."""

    start: int
    end: int
    token: int


class WordTokenizer:
    def __init__(self, backend: Any, words: str, added: dict[str, int]):
        self._find_words = regex.compile(words).findall
        self._find_ascii_words = re.compile(_of_ascii(words), re.ASCII).findall  # in half the time
        self._ids_of = _Remembered(backend.model)
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._markers = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self._is_normalized = backend.normalizer is None

    @classmethod
    def of(cls, backend: Any) -> WordTokenizer | None:
        """For a `tokenizers.Tokenizer`; None where it is of no kind that is known here."""
        from tokenizers import models, normalizers

        added = backend.get_added_tokens_decoder()
        moves_borders = any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in added.values())
        words = _words_of(backend.pre_tokenizer)
        if words is None or moves_borders or not isinstance(backend.normalizer, normalizers.NFC | None):
            return None
        if not isinstance(backend.model, models.BPE) or backend.model.dropout:
            return None
        return cls(backend, words, {token.content: number for number, token in added.items()})

    def encode(self, text: str) -> tuple[list[int], list[Marker]] | None:
        """The ids of a text, and where its added tokens stand; None for a text that must be left to the tokenizer."""
        if not text.isascii() and not self._takes(text):
            return None
        try:
            return self._encode(text)
        except KeyError:
            return None

    def _encode(self, text: str) -> tuple[list[int], list[Marker]]:
        ids: list[int] = []
        markers: list[Marker] = []
        start, ids_of = 0, self._ids_of.__getitem__
        for number, part in enumerate(self._markers.split(text) if self._markers else [text]):
            end = start + len(part)
            if number % 2:
                markers.append(Marker(start, end, len(ids)))
                ids.append(self._added[part])
            elif part:
                words = self._find_ascii_words(part) if part.isascii() else self._find_words(part)
                ids.extend(chain.from_iterable(map(ids_of, words)))
            start = end
        return ids, markers

    def _takes(self, text: str) -> bool:
        return not _STRANGE.search(text) and (self._is_normalized or unicodedata.is_normalized("NFC", text))


class _Remembered(dict[str, tuple[int, ...]]):
    """Word → ids, whose tokens spell it. KeyError for a word with a byte that the vocabulary lacks."""

    def __init__(self, model: Any):
        self._tokenize = model.tokenize
        self._letters = _letters_of_bytes()

    def __missing__(self, word: str) -> tuple[int, ...]:
        letters = word.encode().decode("latin-1").translate(self._letters)
        tokens = self._tokenize(letters)
        if "".join([token.value for token in tokens]) != letters:
            raise KeyError(word)
        ids = tuple([token.id for token in tokens])
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _REMEMBERED_WORDS:
                self.clear()  # the words that return come back at once; those of an earlier data set do not
            self[word] = ids
        return ids


def _letters_of_bytes() -> dict[int, str]:
    """The letter that a byte is written as in the vocabulary of a byte-level tokenizer: "Ġ" for a space."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # written as they are
    others = sorted(set(range(256)) - set(plain))
    return dict(zip(others, map(chr, range(256, 256 + len(others))), strict=True))


def _of_ascii(words: str) -> str:
    """What an expression comes to in a text of ASCII."""
    together = words.replace(r"\p{L}\p{N}", "A-Za-z0-9").replace(r"\s\p{N}", r"\s0-9")  # inside brackets
    return together.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")


def _words_of(pre_tokenizer: Any) -> str | None:
    """The expression that matches one word after the other, as this pre-tokenizer cuts; None where it is not known."""
    if pre_tokenizer is None:
        return None
    shape = json.loads(pre_tokenizer.__getstate__())
    *before, last = shape.get("pretokenizers", [shape])
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        known = {"[]": _WORDS_OF_GPT2, '[{"type": "Digits", "individual_digits": true}]': _WORDS_BETWEEN_DIGITS}
        return known.get(json.dumps(before))
    words = before[0].get("pattern", {}).get("Regex") if len(before) == 1 else None
    as_known = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    return words if words in _WORDS_OF_SPLIT and before[0] == as_known else None
