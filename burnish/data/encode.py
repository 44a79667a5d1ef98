"""An `Example` → `Sample`s: ids, and labels that are ids where the loss looks and IGNORE_INDEX elsewhere.

    stage sft  [system, user, assistant, …]  →  what the chat template makes of it, shortened to cutoff_len
    stage pt   "text"                        →  a document with its end; `join_documents` makes rows of many

Both are pure: what became of a row is handed back as an `Outcome`; nothing is printed or counted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish.data.shorten import Encode, Shortened, needed, shorten, trained_turns
from burnish.errors import Problem, UserError
from burnish.types import IGNORE_INDEX, Encoded, EncodesMessages, Example, Message, Sample

if TYPE_CHECKING:
    from burnish.data.arguments import DataArguments

AFTER_ANSWER = "turns after the last answer"
NOTHING_TRAINED = "nothing in it is trained"
TOO_LONG = "longer than cutoff_len"
ONE_TOKEN = "the last row, of a single token"

# What ends a document, where a tokenizer has it beside another token that ends a turn of chat (its eos_token).
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>")


@dataclass(frozen=True)
class Outcome:
    """What became of one row."""

    samples: tuple[Sample, ...] = ()
    cut: tuple[str, ...] = ()  # what samples lost, one reason for each loss
    dropped: tuple[str, ...] = ()  # why samples were left out, one reason for each
    straddled: int = 0


def encode_sft(example: Example, template: EncodesMessages, args: DataArguments) -> Outcome:
    """A conversation → its samples: one, or one for each answer where the template rewrites history (thinking).

    Raises what the template raises for a conversation that it cannot render.
    """
    last = max(index for index, message in enumerate(example.messages) if message["role"] == "assistant")
    messages = list(example.messages[: last + 1])
    cut = [AFTER_ANSWER] if last + 1 < len(example.messages) else []
    if not (args.train_on_prompt or _answers_to_train(messages, args)):
        return Outcome(dropped=(NOTHING_TRAINED,))
    kept, dropped = _fit(messages, list(example.tools), template, args)
    samples, straddled = [], 0
    for part in kept:
        cut += part.cut
        if part.dropped or not needed(part.encoded):
            dropped.append(part.dropped or NOTHING_TRAINED)
        else:
            samples.append(_sample(part.encoded, args.cutoff_len, example.place))
            straddled += part.encoded.straddled
    return Outcome(tuple(samples), tuple(cut), tuple(dropped), straddled)


def _fit(
    messages: list[Message], tools: list[dict[str, Any]], template: EncodesMessages, args: DataArguments
) -> tuple[list[Shortened], list[str]]:
    """What the template makes of a conversation, what is too long in it shortened or dropped."""

    def encode(messages: list[Message], *, last_only: bool, train_on_prompt: bool | None = None) -> list[Encoded]:
        on_prompt = args.train_on_prompt if train_on_prompt is None else train_on_prompt
        return template.encode(
            messages, tools or None, train_on_prompt=on_prompt, mask_history=last_only and not on_prompt
        )

    encode_all = partial(encode, last_only=args.mask_history)
    encode_last = partial(encode, last_only=True)

    whole = encode_all(messages)
    fitting = [Shortened(encoded) for encoded in whole if needed(encoded) <= args.cutoff_len]
    if len(fitting) == len(whole):
        return fitting, []
    if args.overlong == "drop":
        return fitting, [TOO_LONG] * (len(whole) - len(fitting))
    if len(whole) == 1:
        return [shorten(messages, encode_all, args.cutoff_len)], []
    # One sample an answer: each is a conversation that ends there.
    parts = [messages[: end + 1] for end in _answers_to_train(messages, args)]
    return [_shortened_if_long(part, encode_last, args.cutoff_len) for part in parts], []


def _answers_to_train(messages: list[Message], args: DataArguments) -> list[int]:
    """Indices of the answers that the loss is on. The last message is an answer."""
    return [index for index in trained_turns(messages) if not args.mask_history or index == len(messages) - 1]


def _shortened_if_long(messages: list[Message], encode: Encode, cutoff_len: int) -> Shortened:
    encoded = encode(messages)[-1]
    return Shortened(encoded) if needed(encoded) <= cutoff_len else shorten(messages, encode, cutoff_len)


def _sample(encoded: Encoded, cutoff_len: int, place: str) -> Sample:
    ids = np.array(encoded.input_ids[:cutoff_len], dtype=np.int32)  # what the cutoff takes here is not trained
    trained = np.frombuffer(bytes(encoded.trained[:cutoff_len]), dtype=np.bool_)  # a quarter of np.array's time
    labels = np.where(trained, ids, np.int32(IGNORE_INDEX))
    labels[0] = IGNORE_INDEX
    return Sample(ids, labels, place)


@dataclass(frozen=True)
class DocumentFrame:
    """What a tokenizer puts around a text: its first token, if it has one, and the end of a document."""

    start: tuple[int, ...]
    end: int
    split_special_tokens: bool = False  # "<|endoftext|>" inside a text is text

    @classmethod
    def of(cls, tokenizer: Any, *, split_special_tokens: bool = False) -> DocumentFrame:
        """Chat models end a turn and a document with different tokens; the end of a document is what pt needs."""
        vocabulary = tokenizer.get_vocab()
        end = next((vocabulary[token] for token in _DOCUMENT_ENDS if token in vocabulary), tokenizer.eos_token_id)
        if end is None:
            message = "has no token that ends a document"
            raise UserError(
                Problem("model", "tokenizer", None, message, "give one by add_special_tokens: <|endoftext|>")
            )
        first = tokenizer("").input_ids[:1]
        starts = first == [tokenizer.bos_token_id] and first != [end]
        return cls(tuple(first) if starts else (), end, split_special_tokens)


def encode_pt(example: Example, tokenizer: Any, frame: DocumentFrame) -> Outcome:
    """A text → one document of ids, however long, every token of it a label."""
    text = example.messages[0]["content"]
    how = {"split_special_tokens": frame.split_special_tokens, "verbose": False}
    ids = tokenizer(text, add_special_tokens=False, **how).input_ids
    document = np.array([*frame.start, *ids, frame.end], dtype=np.int32)
    return Outcome((Sample(document, document, example.place),))


def join_documents(documents: Iterable[Sample], cutoff_len: int, *, apart: bool = True) -> Iterator[Sample]:
    """Documents end to end, cut into rows of exactly cutoff_len tokens; the last row is what is left.

    [[a b c $] [d e $]] at 5  →  [a b c $ d] with documents (4, 1), [e $] with documents (2,)
    Nothing predicts the first token of a document in a row, so it is no label: _ b c $ _ | _ $.
    Not `apart` they are one text, each predicted from those before it: _ b c $ d | _ $.
    """
    row: list[np.ndarray] = []
    place, room = "", cutoff_len
    for document in documents:
        ids = document.input_ids
        while len(ids):
            place = place or document.place
            row.append(ids[:room])
            ids, room = ids[room:], room - len(row[-1])
            if not room:
                yield _row(row, place, apart)
                row, place, room = [], "", cutoff_len
    if row:
        yield _row(row, place, apart)


def _row(pieces: list[np.ndarray], place: str, apart: bool) -> Sample:
    ids = np.concatenate(pieces)
    lengths = [len(piece) for piece in pieces] if apart else [len(ids)]
    labels = ids.copy()
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORE_INDEX
    return Sample(ids, labels, place, tuple(lengths))
