"""One token as text and as bytes, for those who look at single tokens: 你 may be three of them, each a byte."""

from __future__ import annotations

import re
from typing import Any

from burnish.generate.stream import decode

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece calls a token that is a byte


class TokenTexts:
    """Texts and bytes of single tokens.

    >>> texts = TokenTexts(tokenizer)
    >>> [(texts.text_of(i), texts.bytes_of(i)) for i in tokenizer.encode(" 你")]
    [(' �', b' \\xe4'), ('�', b'\\xbd'), ('�', b'\\xa0')]
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Some decoders drop the space of the first word of a text, so that a token is seen behind another one
        self._first = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._first_text = decode(tokenizer, self._first, skip_special_tokens=False)

    def text_of(self, token_id: int) -> str:
        both = decode(self._tokenizer, [*self._first, token_id], skip_special_tokens=False)
        return both[len(self._first_text) :]

    def bytes_of(self, token_id: int) -> bytes | None:
        """None where the vocabulary does not say."""
        text = self.text_of(token_id)
        if "\ufffd" not in text:
            return text.encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(token, bytes):
            return token
        if found := _BYTE.fullmatch(token or ""):
            return bytes([int(found[1], 16)])
        known = [_BYTES.get(character) for character in token or ""]
        return None if None in known else bytes(byte for byte in known if byte is not None)


def _byte_level() -> dict[str, int]:
    """How byte-level BPE writes bytes as characters: printable Latin-1 as it is, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level()
