"""The first Qwen's tokenizer, made from the `qwen.tiktoken` in a model's folder.

One idea: the file holds tokens with their ranks, and byte pair encoding by rank is byte pair encoding by a list of
merges in that order; each token's merge is the pair of parts that its own encoding with lower ranks ends in. So it
becomes a tokenizer of the `tokenizers` library with the same ids, which saves as tokenizer.json. It takes 3 seconds.

Format: QwenLM's tokenization_qwen.py (2023) and openai/tiktoken, load.py.
"""

from __future__ import annotations

import base64
import binascii
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from burnish import console
from burnish.errors import Problem, UserError

FILE = "qwen.tiktoken"
NUM_TOKENS = 151643  # of every published one; the special tokens come after them
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Its own class took these from transformers 4, so that batches had a `token_type_ids`, which the model ignores.
INPUT_NAMES = ["input_ids", "token_type_ids", "attention_mask"]


def qwen_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of `qwen.tiktoken` with what else the folder says of it: a chat template, another pad token.

    What it does not say is as in 2023: `<|endoftext|>` ends and pads.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        str(folder), tokenizer_object=read_tokenizer(folder), model_input_names=INPUT_NAMES
    )
    tokenizer.init_kwargs.pop("auto_map", None)  # what is saved must not name .py files that it does not need
    tokenizer.eos_token = tokenizer.eos_token or END_OF_TEXT
    tokenizer.pad_token = tokenizer.pad_token or END_OF_TEXT
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """Gives the ids of tiktoken's encoding of NFC text, special tokens included."""
    ranks = read_ranks(folder / FILE)
    if len(ranks) != NUM_TOKENS:
        console.warn(f"{folder / FILE} holds {len(ranks):,} tokens, not the {NUM_TOKENS:,} of a published one")
    letters = _letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    tokenizer = Tokenizer(
        models.BPE(
            {written(token): rank for token, rank in ranks.items()},
            [(written(left), written(right)) for left, right in merges(ranks)],
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """{b"!": 0, ...} from lines `base64 rank`, in the order of their ranks, which are 0, 1, 2 ..."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise _torn(path, number, "is no token with its rank") from error
        if int(rank) != number or len(ranks) != number + 1:
            raise _torn(path, number, f"has rank {int(rank)}, or a token that was there before")
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise _torn(path, len(ranks), f"is the end, and {len(absent)} of the 256 bytes are no tokens")
    return ranks


def _torn(path: Path, number: int, message: str) -> UserError:
    return UserError(Problem(f"{path} line {number + 1}", "", None, message, "copy the model's files again"))


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Which two tokens make each longer one, lowest rank first."""
    return [_halves(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]


def _halves(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    possible = [
        (token[:i], token[i:])
        for i in range(1, len(token))
        if ranks.get(token[:i], rank) < rank and ranks.get(token[i:], rank) < rank
    ]
    if len(possible) == 1:
        return possible[0]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:  # encode it with lower ranks alone
        pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _letters() -> dict[int, str]:
    """How byte-level tokenizers write each byte (GPT-2): printable ones as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
