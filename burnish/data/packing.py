"""Samples → rows of up to `capacity` tokens with hardly any room left over, without cutting a sample.

    lengths [5 2 3 4] at 7  →  rows [[0 1] [3 2]]

Best fit decreasing: the longest sample first, each into the fullest row that still has room for it, else into a new
one. All samples of one length go in together, and rows with the same room are one heap, so the work is a few steps for
each length that occurs and not for each sample.

What changes from epoch to epoch: which of several samples of one length goes where, and which of several rows with the
same room is taken, is drawn. A small set, whose samples hardly share a length, would still keep most of its rows (in
1,000 samples in rows of 2,048, 73 % of a sample's companions would stay), so it is cut at random into parts that are
packed one after the other, each into the room that the earlier ones left (12 %). What does not change is the number of
rows: that of the whole set in one part, on which the other draws have no influence; parts that come to another number
are not used. So a run knows its steps before it begins.

A sample is never cut, because none is longer than a row: cutoff_len is the most tokens of a sample and the capacity.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PARTS = (4, 2)  # into how many a set is cut, in turn, until the number of rows is right
ENOUGH_ALIKE = 32  # samples for each length that could be: from here on chance among equals changes rows enough


@dataclass(frozen=True, eq=False)
class Packing:
    """R rows of N samples in two flat arrays: a million samples are no million lists."""

    samples: np.ndarray  # [N] indices of samples, row after row
    borders: np.ndarray  # [R+1] where each row begins in `samples`
    num_tokens: int
    capacity: int

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, row: int) -> list[int]:
        """The samples of a row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.samples[self.borders[row] : self.borders[row + 1]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[row] for row in range(len(self)))

    @property
    def first_samples(self) -> np.ndarray:
        """The lowest index in each row, [R]."""
        return np.minimum.reduceat(self.samples, self.borders[:-1]) if len(self) else self.samples

    @property
    def fill(self) -> float:
        """Which share of the rows is tokens."""
        return self.num_tokens / (self.capacity * max(len(self), 1))


def pack(lengths: np.ndarray, capacity: int, rng: np.random.Generator | None = None) -> Packing:
    """Rows for samples of these lengths, each from 1 to `capacity`. Without `rng` nothing is drawn."""
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"samples of {lengths.min()} to {lengths.max()} tokens do not go into rows of {capacity}")
    in_order = np.arange(len(lengths))
    if rng is None:
        return _pack_parts([in_order], lengths, capacity, rng)
    whole = _pack_parts([rng.permutation(in_order)], lengths, capacity, rng)
    for number in PARTS if len(lengths) < ENOUGH_ALIKE * capacity else ():
        parts = np.array_split(rng.permutation(in_order), number)
        packing = _pack_parts(parts, lengths, capacity, rng)
        if len(packing) == len(whole):
            return packing
    return whole


def _pack_parts(
    parts: list[np.ndarray], lengths: np.ndarray, capacity: int, rng: np.random.Generator | None
) -> Packing:
    """Each part by best fit, one after the other, into the same rows."""
    rows = _Rows(capacity, rng)
    placed, row_of = [], []
    for part in parts:
        placed.append(part[np.argsort(-lengths[part].astype(np.int64), kind="stable")])  # the longest first
        row_of.append(rows.fill(np.bincount(lengths[part], minlength=1)))
    by_row = np.concatenate(row_of)
    samples = np.concatenate(placed)[np.argsort(by_row, kind="stable")]
    borders = np.concatenate([[0], np.cumsum(np.bincount(by_row, minlength=rows.begun))]).astype(np.int64)
    return Packing(samples, borders, int(lengths.sum()), capacity)


class _Rows:
    """Rows while they are filled; those that have room left are in one heap for each amount of it."""

    def __init__(self, capacity: int, rng: np.random.Generator | None):
        self.capacity, self.begun = capacity, 0
        self._rng = rng
        self._heaps: dict[int, list[np.ndarray]] = {}
        self._rooms: list[int] = []  # the keys of _heaps, ascending

    def fill(self, counts: np.ndarray) -> np.ndarray:
        """Take in `counts[length]` samples of each length; → the row of each sample, the longest first."""
        rows = [np.zeros(0, dtype=np.int64)]
        for length in np.flatnonzero(counts)[::-1].tolist():
            rows.extend(self._fill_with(length, int(counts[length])))
        return np.concatenate(rows)

    def _fill_with(self, length: int, left: int) -> Iterator[np.ndarray]:
        while left:
            # Best fit fills one row with samples of this length before it turns to another: what is left of that row
            # is still the least room that suffices.
            room = self._least_room(length)
            each = room // length
            rows = self._take(room, -(-left // each))
            placed = min(left, len(rows) * each)
            whole, rest = divmod(placed, each)
            self._put(room - each * length, rows[:whole])
            self._put(room - rest * length, rows[whole:])  # the last one, if samples ran out before it was full
            yield np.repeat(rows, each)[:placed]
            left -= placed

    def _least_room(self, length: int) -> int:
        """The least room that a sample of this length fits into; the capacity where a row must be begun."""
        at = bisect_left(self._rooms, length)
        return self._rooms[at] if at < len(self._rooms) else self.capacity

    def _put(self, room: int, rows: np.ndarray) -> None:
        if not room or not len(rows):
            return
        if room not in self._heaps:
            insort(self._rooms, room)
            self._heaps[room] = []
        self._heaps[room].append(rows)

    def _take(self, room: int, most: int) -> np.ndarray:
        """Up to `most` rows with exactly this room, any of them; as many new ones as are wanted."""
        if room == self.capacity:
            self.begun += most
            return np.arange(self.begun - most, self.begun)
        rows = self._mixed(self._heaps.pop(room))
        self._rooms.pop(bisect_left(self._rooms, room))
        self._put(room, rows[most:])
        return rows[:most]

    def _mixed(self, parts: list[np.ndarray]) -> np.ndarray:
        """Rows that came to this room together are alike, or mixed already."""
        if len(parts) == 1:
            return parts[0]
        rows = np.concatenate(parts)
        return rows if self._rng is None else self._rng.permutation(rows)
