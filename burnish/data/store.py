"""Samples laid end to end in a few flat arrays: a million of them are no million objects.

    input_ids  [a b c d e f]     offsets [0 3 6]     store[1] = Sample([d e f], …)
    labels     [. b c . . f]

A `SampleStore` is made in memory by the process that encodes. Stores of several processes are joined in memory, or
written one after the other into the files of a folder (`StoreWriter`), which `open_store` maps into memory: there the
system keeps what is being read, and the samples of a process cost it no memory of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from burnish.types import Sample

CHUNK = 2**24  # ids that are looked at together


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
    num_trained: np.ndarray  # [N] int32: trained tokens; a first label never counts, nothing predicts it

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
            num_trained=np.array([sample.num_trained for sample in kept], dtype=np.int32),
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
            _joined([store.num_trained for store in stores], np.int32),
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

    def first_beyond(self, ids: int) -> Sample | None:
        """The first sample with an id that is none of the first so many."""
        for begin in range(0, len(self.input_ids), CHUNK):
            found = self.input_ids[begin : begin + CHUNK] >= ids
            if found.any():
                return self[int(np.searchsorted(self.offsets, begin + found.argmax(), side="right")) - 1]
        return None

    def _place(self, index: int) -> str:
        file, line = self.files[self.place_file[index]], self.place_line[index]
        return f"{file}:{line}" if line else file

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, [N] int32."""
        return np.diff(self.offsets).astype(np.int32)


# ---- in files --------------------------------------------------------------------------------------------------------

DTYPES = {
    **dict.fromkeys(("input_ids", "labels", "documents", "place_file", "num_trained"), np.dtype(np.int32)),
    **dict.fromkeys(("offsets", "document_offsets", "place_line"), np.dtype(np.int64)),
}


@dataclass(frozen=True)
class Extent:
    """How far the files of a folder are filled: all that is needed to map them, or to go on writing."""

    samples: int = 0
    tokens: int = 0
    documents: int = 0
    files: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Extent:
        return cls(value["samples"], value["tokens"], value["documents"], tuple(value["files"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def count(self, array: str) -> int:
        """Numbers in the file of an array."""
        lengths = {"input_ids": self.tokens, "labels": self.tokens, "documents": self.documents}
        return lengths.get(array, self.samples + array.endswith("offsets"))


def open_store(folder: Path, extent: Extent) -> SampleStore:
    """The store in a folder's files. Raises OSError where they are not those of the extent."""
    return SampleStore(
        files=extent.files, **{name: _mapped(_file(folder, name), extent.count(name), DTYPES[name]) for name in DTYPES}
    )


def _mapped(path: Path, count: int, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise OSError(f"{path} has {size} bytes, not {count * dtype.itemsize}")
    if not count:
        return np.zeros(0, dtype)  # nothing cannot be mapped
    return np.memmap(path, dtype, "r").view(np.ndarray)  # a memmap's own slices cost more


def _file(folder: Path, array: str) -> Path:
    return folder / f"{array}.{DTYPES[array].name}"


class StoreWriter:
    """Appends stores to the files of a folder. What stands there beyond `extent` is of a writer that was killed."""

    def __init__(self, folder: Path, extent: Extent):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.extent = folder, extent
        self._index = {file: number for number, file in enumerate(extent.files)}
        self._open = ExitStack()
        self._files = {name: self._open.enter_context(_file(folder, name).open("ab", 0)) for name in DTYPES}
        for name, file in self._files.items():
            file.truncate(extent.count(name) * DTYPES[name].itemsize if extent.samples else 0)
            if not extent.samples and name.endswith("offsets"):
                self._write(name, np.zeros(1, np.int64))

    def append(self, store: SampleStore) -> None:
        if not len(store):
            return
        at = self.extent
        files = np.array([self._index.setdefault(file, len(self._index)) for file in store.files], dtype=np.int32)
        arrays = {name: getattr(store, name) for name in DTYPES}
        arrays["offsets"] = store.offsets[1:] + at.tokens
        arrays["document_offsets"] = store.document_offsets[1:] + at.documents
        arrays["place_file"] = files[store.place_file]
        for name, array in arrays.items():
            self._write(name, array)
        self.extent = Extent(
            at.samples + len(store),
            at.tokens + len(store.input_ids),
            at.documents + len(store.documents),
            tuple(self._index),
        )

    def sync(self) -> None:
        """Onto the disk, so that not even a power cut can take back what is then said to be there."""
        for file in self._files.values():
            os.fsync(file)

    def close(self) -> None:
        self._open.close()

    def _write(self, name: str, array: np.ndarray) -> None:
        rest = np.ascontiguousarray(array, DTYPES[name]).data.cast("B")
        while rest:  # a disk that fills up takes a part first
            rest = rest[self._files[name].write(rest) :]


def _split_place(place: str) -> tuple[str, int]:
    """ "data/pairs.jsonl:17" → ("data/pairs.jsonl", 17)."""
    file, colon, line = place.rpartition(":")
    return (file, int(line)) if colon and line.isdecimal() else (place, 0)


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if len(arrays) else np.zeros(0, dtype=dtype)


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)
