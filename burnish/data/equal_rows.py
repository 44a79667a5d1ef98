"""Samples that are equal to others, token by token: repeated within a part, or in training and evaluation alike.

One idea: what is compared is what the model sees. Rows that differ in a file may be one sample (a space that the
template strips), and in stage pt documents are compared, put together again from the rows that they were cut into.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from burnish.data.store import SampleStore
from burnish.types import Sample

EXAMPLES = 20  # of which the places are told

Key = tuple[bytes, int]  # hash of ids, and how many they are
Keys = list[tuple[Key, int]]  # with the index of the row in which each begins


@dataclass(frozen=True)
class Equals:
    """How many of the samples (documents) are equal to another, and for the first of them the two rows."""

    count: int
    of: int
    rows: tuple[tuple[int, int], ...]  # (index, index of the one that it repeats)
    places: tuple[tuple[str, str], ...]


def keys_of(store: SampleStore, document_end: int | None) -> Keys:
    """One key a sample; where `document_end` is given (stage pt), one a document."""
    if document_end is None:
        return [(_key(sample.input_ids), index) for index, sample in enumerate(store)]
    return [(_key(np.concatenate(pieces)), index) for pieces, index in _documents(store, document_end)]


def _documents(store: SampleStore, end: int) -> Iterator[tuple[list[np.ndarray], int]]:
    held: list[np.ndarray] = []
    begun = 0
    for index, sample in enumerate(store):
        for piece in _pieces(sample):
            begun = begun if held else index
            held.append(piece)
            if piece[-1] == end:
                yield held, begun
                held = []
    if held:
        yield held, begun


def _pieces(sample: Sample) -> list[np.ndarray]:
    return np.split(sample.input_ids, np.cumsum(sample.documents)[:-1]) if sample.documents else [sample.input_ids]


def _key(ids: np.ndarray) -> Key:
    return blake2b(np.ascontiguousarray(ids, dtype=np.int32).tobytes(), digest_size=12).digest(), len(ids)


def repeated(keys: Keys, store: SampleStore) -> Equals:
    """Those that are equal to an earlier one of the same part."""
    first: dict[Key, int] = {}
    pairs: list[tuple[int, int]] = []
    for key, index in keys:
        if key in first:
            pairs.append((index, first[key]))
        else:
            first[key] = index
    return _equals(pairs, len(keys), store, store)


def shared(train: Keys, train_store: SampleStore, other: Keys, store: SampleStore) -> Equals:
    """Those of an evaluation part that stand in train too."""
    at = dict(reversed(train))  # the first of equal ones
    pairs = [(index, at[key]) for key, index in other if key in at]
    return _equals(pairs, len(other), store, train_store)


def _equals(pairs: list[tuple[int, int]], of: int, store: SampleStore, earlier: SampleStore) -> Equals:
    told = tuple(pairs[:EXAMPLES])
    places = dict.fromkeys((store[a].place, earlier[b].place) for a, b in told)  # a row may give several samples
    return Equals(len(pairs), of, told, tuple(places))
