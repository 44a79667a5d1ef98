"""Samples laid end to end in a few flat arrays: a million of them are no million objects.

    input_ids  [a b c d e f]     offsets [0 3 6]     store[1] = Sample([d e f], …)
    labels     [. b c . . f]

A `SampleStore` is made in memory by the process that encodes; its parts come from several processes and are joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from burnish.types import IGNORE_INDEX, Sample


@dataclass(frozen=True, eq=False)
class SampleStore:
    """N samples of T tokens in all. Every array is flat, so that it could as well be a file mapped into memory."""

    input_ids: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32
    offsets: np.ndarray  # [N+1] int64: where each sample begins
    documents: np.ndarray  # [D] int32: lengths of the texts inside samples; none for a sample that is all one
    document_offsets: np.ndarray  # [N+1] int64: where each sample's lengths begin
    files: tuple[str, ...]  # where samples came from
    place_file: np.ndarray  # [N] int32: index into files
    place_line: np.ndarray  # [N] int64: 0 where a place has no line

    @classmethod
    def from_samples(cls, samples: Iterable[Sample]) -> SampleStore:
        kept = list(samples)
        files: dict[str, int] = {}
        places = [_split_place(sample.place) for sample in kept]
        return cls(
            _joined([sample.input_ids for sample in kept], np.int32),
            _joined([sample.labels for sample in kept], np.int32),
            _offsets([len(sample) for sample in kept]),
            np.array([length for sample in kept for length in sample.documents], dtype=np.int32),
            _offsets([len(sample.documents) for sample in kept]),
            place_file=np.array([files.setdefault(file, len(files)) for file, _ in places], dtype=np.int32),
            place_line=np.array([line for _, line in places], dtype=np.int64),
            files=tuple(files),
        )

    @classmethod
    def concatenate(cls, stores: Sequence[SampleStore]) -> SampleStore:
        files: dict[str, int] = {}
        indices = [np.array([files.setdefault(f, len(files)) for f in store.files], dtype=np.int32) for store in stores]
        places = [index[store.place_file] for index, store in zip(indices, stores, strict=True) if len(store)]
        return cls(
            _joined([store.input_ids for store in stores], np.int32),
            _joined([store.labels for store in stores], np.int32),
            _offsets(_joined([np.diff(store.offsets) for store in stores], np.int64)),
            _joined([store.documents for store in stores], np.int32),
            _offsets(_joined([np.diff(store.document_offsets) for store in stores], np.int64)),
            tuple(files),
            _joined(places, np.int32),
            _joined([store.place_line for store in stores], np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        lengths = slice(self.document_offsets[index], self.document_offsets[index + 1])
        return Sample(
            self.input_ids[tokens], self.labels[tokens], self._place(index), tuple(self.documents[lengths].tolist())
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def _place(self, index: int) -> str:
        file, line = self.files[self.place_file[index]], self.place_line[index]
        return f"{file}:{line}" if line else file

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, [N] int32."""
        return np.diff(self.offsets).astype(np.int32)

    @cached_property
    def num_trained(self) -> np.ndarray:
        """Trained tokens of each sample, [N] int32. A sample's first label never counts: nothing predicts it."""
        if not len(self):
            return np.zeros(0, dtype=np.int32)
        starts = self.offsets[:-1]  # no sample is empty, which reduceat would need
        trained = self.labels != IGNORE_INDEX
        return np.add.reduceat(trained, starts, dtype=np.int32) - trained[starts].astype(np.int32)


def _split_place(place: str) -> tuple[str, int]:
    """ "data/pairs.jsonl:17" → ("data/pairs.jsonl", 17)."""
    file, colon, line = place.rpartition(":")
    return (file, int(line)) if colon and line.isdecimal() else (place, 0)


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if len(arrays) else np.zeros(0, dtype=dtype)


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)
