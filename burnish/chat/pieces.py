"""Rendered text → token ids, with a yes or no to one question: is this place in the text a border between tokens?

Training needs the ids of a prompt to be exactly those that serving sends, and the answer's ids to begin right behind
them. Both are usually one tokenization of the whole text. Where a token would lie across the border (Qwen3 has one
for the two newlines of `assistant\\n` + `\\nHello`) the text is cut there and the parts are tokenized one by one.

Special-token look-alikes that stand in `Rendered.plain` are tokenized as the ordinary text they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from burnish.chat.words import Marker, WordTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED_HEADS = 4096  # texts such as "<|im_start|>assistant\n", whose ids are asked for again with every row
_LONGEST_HEAD = 64  # characters; longer ones hold a user's words and do not come back


@dataclass(frozen=True)
class Rendered:
    """What a template wrote. `plain`: [start, end) of look-alikes that must not become special tokens."""

    text: str
    plain: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _Piece:
    """A stretch of text that was tokenized in one go."""

    start: int  # where it begins in the whole text
    text: str
    ids: list[int]
    encoding: Any = None  # tokenizers.Encoding, None for a tokenizer written in Python, or word by word
    markers: Sequence[Marker] | None = None  # where it was tokenized word by word
    lead_chars: int = 0  # what stands in `encoding` before the piece's own text (see TextEncoder._after)
    lead_tokens: int = 0

    def token_at(self, char: int) -> int:
        """The first token that reaches beyond `char` (a place in this piece)."""
        char += self.lead_chars
        found = self.encoding.char_to_token(char)
        if found is None:  # no token holds it: dropped by the normalizer, or trimmed off a token's offsets
            ends = (end for _, end in self.encoding.offsets)
            found = next((n for n, end in enumerate(ends) if end > char), len(self.encoding.ids))
        return found - self.lead_tokens

    def start_of(self, token: int) -> int:
        return self.encoding.token_to_chars(token + self.lead_tokens)[0] - self.lead_chars


class Tokens:
    """The ids of a text, and the borders between them."""

    def __init__(self, encoder: TextEncoder, pieces: Sequence[_Piece]):
        self._encoder, self._pieces = encoder, pieces
        self.ids = pieces[0].ids if len(pieces) == 1 else [i for piece in pieces for i in piece.ids]
        self._known: dict[tuple[int, bool], int | None] = {}  # borders are asked for twice: can it stand, where is it

    def index_at(self, border: int, *, after_marker: bool = False) -> int | None:
        """How many tokens `text[:border]` has, given that they are also the first tokens of the whole; else None.

        `after_marker`: the border stands behind a marker that may swallow the white space after it (Phi-3's `<|end|>`
        does); the white space then belongs to the marker.
        """
        asked = border, after_marker
        if asked not in self._known:
            self._known[asked] = self._index_at(border, after_marker)
        return self._known[asked]

    def index_of(self, char: int) -> int | None:
        """Which token holds `char`: for a border that is none of serving's, and need not be cut out of a token."""
        before = 0
        for piece in self._pieces:
            if piece.start <= char < piece.start + len(piece.text):
                piece = self._encoder.with_offsets(piece)
                if piece.encoding is not None:
                    return before + piece.token_at(char - piece.start)
            before += len(piece.ids)
        return self.index_at(char)

    def _index_at(self, border: int, after_marker: bool) -> int | None:
        before = 0
        for piece in self._pieces:
            if border <= piece.start:
                return before
            if border < piece.start + len(piece.text):
                inside = self._index_in(piece, border - piece.start, after_marker)
                return None if inside is None else before + inside
            before += len(piece.ids)
        return before

    def _index_in(self, piece: _Piece, at: int, after_marker: bool) -> int | None:
        if piece.markers is not None:
            return self._index_behind_marker(piece, piece.markers, at, after_marker)
        if piece.encoding is None:
            head = self._encoder.head_ids(piece.text[:at], continues=piece.start > 0)
            return len(head) if piece.ids[: len(head)] == head else None
        added = self._encoder.added_ids
        index = piece.token_at(at)
        if index < len(piece.ids) and piece.start_of(index) < at:  # one token on both sides
            return index + 1 if after_marker and piece.ids[index] in added else None
        # Offsets alone do not prove it: a tokenizer may trim the space off " Hello", or choose otherwise at the end of
        # a text. Added tokens are split off before all else, so what must be compared begins at the last of them.
        marker = index - 1
        while marker >= 0 and piece.ids[marker] not in added:
            marker -= 1
        first = max(marker, 0)
        head_start = piece.start_of(marker) if marker >= 0 else 0
        head = self._encoder.head_ids(piece.text[head_start:at], continues=marker < 0 and piece.start > 0)
        return index if head == piece.ids[first:index] else None

    def _index_behind_marker(self, piece: _Piece, markers: Sequence[Marker], at: int, after_marker: bool) -> int | None:
        """Where tokens spell their text byte by byte, equal ids are equal text, and no offsets are needed."""
        number = bisect_left(markers, at, key=lambda marker: marker.start)
        start, end, token = markers[number - 1] if number else Marker(0, 0, 0)
        if at < end:  # inside a marker
            return token + 1 if after_marker else None
        head = self._encoder.head_ids(piece.text[start:at], continues=False)
        behind = token + len(head)
        return behind if piece.ids[token:behind] == head else None


class TextEncoder:
    """A tokenizer as chat templates need it: no special tokens of its own (templates write them), exact borders."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        from transformers import PreTrainedTokenizerFast

        self._tokenizer = tokenizer
        fast = isinstance(tokenizer, PreTrainedTokenizerFast)
        as_is = fast and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
        # straight to the Rust tokenizer: the call around it does work for batches and padding, with every row
        self._backend: Any = tokenizer.backend_tokenizer if fast and as_is else None
        self._words = WordTokenizer.of(self._backend) if self._backend is not None else None
        self.added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._heads: dict[tuple[str, bool], list[int]] = {}
        self._anchor, self._anchor_ids = "", []
        self._anchor, self._anchor_ids = self._find_anchor()

    def encode(self, rendered: Rendered, cuts: Iterable[int] = ()) -> Tokens:
        """Tokenize, with a border between tokens at every place of `cuts`."""
        text, plain = rendered.text, rendered.plain
        cuts = {cut for cut in cuts if 0 < cut < len(text)}
        if not cuts and not plain:
            return Tokens(self, [self._piece(0, text)])
        edges = sorted({0, len(text), *cuts, *(edge for span in plain for edge in span)})
        pieces = []
        for start, end in pairwise(edges):
            as_text = any(low <= start < high for low, high in plain)
            pieces.append(self._piece(start, text[start:end], as_text=as_text))
        return Tokens(self, pieces)

    def ids(self, rendered: Rendered) -> list[int]:
        return self.encode(rendered).ids

    def head_ids(self, text: str, *, continues: bool) -> list[int]:
        """Ids of the text before a border. `continues`: it does not begin the whole text."""
        known = self._heads.get((text, continues))
        if known is None:
            known = self._piece(1 if continues else 0, text).ids
            if len(text) <= _LONGEST_HEAD and len(self._heads) < _REMEMBERED_HEADS:
                self._heads[text, continues] = known
        return known

    def _piece(self, start: int, text: str, *, as_text: bool = False) -> _Piece:
        if start and self._anchor:
            return self._after(start, text, as_text)
        if self._words and not as_text and (found := self._words.encode(text)):
            return _Piece(start, text, found[0], markers=found[1])
        ids, encoding = self._call(text, as_text)
        return _Piece(start, text, ids, encoding)

    def with_offsets(self, piece: _Piece) -> _Piece:
        """The piece as the tokenizer itself gives it, which knows the place of each token."""
        if piece.markers is None:
            return piece
        ids, encoding = self._call(piece.text, False)
        return _Piece(piece.start, piece.text, ids, encoding)

    def _after(self, start: int, text: str, as_text: bool) -> _Piece:
        """Tokenize text that follows other text, where the tokenizer would put a space before the first word.

        "Hello" alone is `▁Hello` for Llama 2, but in "[INST]Hello" it is `Hello`: it is tokenized behind a newline,
        whose ids are then taken off.
        """
        ids, encoding = self._call(self._anchor + text, as_text)
        lead = len(self._anchor_ids)
        if ids[:lead] != self._anchor_ids:
            ids, encoding = self._call(text, as_text)
            return _Piece(start, text, ids, encoding)
        return _Piece(start, text, ids[lead:], encoding, lead_chars=len(self._anchor), lead_tokens=lead)

    def _find_anchor(self) -> tuple[str, list[int]]:
        newline = self._call("\n", False)[0]
        behind = self._call("\na", False)[0]
        adds_space = behind[: len(newline)] == newline and behind[len(newline) :] != self._call("a", False)[0]
        return ("\n", newline) if adds_space else ("", [])

    def _call(self, text: str, as_text: bool) -> tuple[list[int], Any]:
        if self._backend is None:
            out = self._tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)
            return list(out["input_ids"]), None
        backend = self._backend  # shared with the tokenizer, whose other users may have left settings behind
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != as_text:
            backend.encode_special_tokens = as_text
        encoding = backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding


def is_one_token(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer knows the text as one token, as it must a marker."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id
