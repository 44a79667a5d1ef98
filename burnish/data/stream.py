"""Samples that are read, shuffled and encoded while training takes them: for data that is never at hand as a whole.

A run that is resumed goes on at the very next sample. What `state_dict` tells is enough for that, however long the run
was: passes before this one are not gone through again (each is shuffled by its own number), and the rows that this one
had used up are read and shuffled, which is quick, but not encoded again, which is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from burnish.data.mixing import shuffled
from burnish.data.report import DataReport
from burnish.data.workers import Item, RowEncoder
from burnish.errors import Problem, UserError
from burnish.types import Sample

_ROWS_BETWEEN_CHECKS = 1000  # bad rows are a share of the rows so far, which says little before this many


class StreamedSamples:
    """An iterable of `Sample`s that can be gone through again; epoch e has the order of (seed, e).

    Rows are shuffled within a buffer of `buffer_size`; the first `skip` of them are left to evaluation.
    """

    def __init__(self, rows: Callable[[], Iterable[Item]], encoder: RowEncoder, *, seed: int, skip: int = 0):
        self._rows, self._encoder, self._seed, self._skip = rows, encoder, seed, skip
        self._whole: DataReport | None = None  # of the latest pass that came to its end
        self.set_epoch(0)

    @property
    def known(self) -> DataReport:
        """What became of the rows of a whole pass; where there was none, of those so far."""
        if self._whole:
            return self._whole
        report = DataReport(hashes=None)
        report.merge(self.report)
        report.note("train: as far as the stream was read; it is longer")
        return report

    def set_epoch(self, epoch: int) -> None:
        self._begin = {"epoch": epoch, "waiting": 0, "report": None}
        self._go_to_begin()

    def state_dict(self) -> dict[str, Any]:
        """The place after the last sample that was given: the pass, what its rows became so far (hence how many they
        are), and how much of the last of them was not given yet: samples, or tokens where texts are joined."""
        whole = self._whole and self._whole.to_json()
        return {"epoch": self.epoch, "waiting": self._waiting, "report": self.report.to_json(), "whole": whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin = state
        self._whole = DataReport.from_json(state["whole"]) if state["whole"] else None
        self._go_to_begin()

    def _go_to_begin(self) -> None:
        report = self._begin["report"]
        self.epoch, self._waiting = self._begin["epoch"], self._begin["waiting"]
        # Of this pass, as far as it got.
        self.report = DataReport.from_json(report) if report else DataReport(hashes=None)

    def __iter__(self) -> Iterator[Sample]:
        """The samples of a pass, from where `set_epoch` or `load_state_dict` said."""
        self._go_to_begin()
        buffer_size = self._encoder.args.buffer_size
        rows = iter(shuffled(islice(self._rows(), self._skip, None), buffer_size, (self._seed, self.epoch)))
        rest = self._rest_of_row(rows) if self.report.rows else ()
        encoded = self._encoded(rest, rows)
        for sample in self._encoder.joined(encoded, self.report):
            self._waiting -= self._size(sample)
            yield sample

    def _size(self, sample: Sample) -> int:
        return len(sample) if self._encoder.frame else 1

    def _rest_of_row(self, rows: Iterator[Item]) -> Iterable[Sample]:
        """Go on to the last row that the report knows of: what of it was not given yet."""
        row = next(islice(rows, self.report.rows - 1, None), None)
        if row is None:
            message = f"has fewer rows than the {self.report.rows:,} that this run had read of it"
            raise UserError(Problem("data", "streaming", None, message, "begin a new run, with another output_dir"))
        samples = self._encoder.encode(*row, DataReport(hashes=None)) if self._waiting else ()
        if not self._encoder.frame:
            return samples[len(samples) - self._waiting :]
        return [
            Sample(s.input_ids[-self._waiting :], s.labels[-self._waiting :], s.place) for s in samples
        ]  # a text is one sample

    def _encoded(self, rest: Iterable[Sample], rows: Iterator[Item]) -> Iterator[Sample]:
        yield from rest
        for row, attr in rows:
            if self.report.rows % _ROWS_BETWEEN_CHECKS == 0:
                self.report.check(self._encoder.args.max_bad_rows)
            samples = self._encoder.encode(row, attr, self.report)
            self._waiting += sum(map(self._size, samples))
            yield from samples
        self.report.check(self._encoder.args.max_bad_rows)
        self._whole = self.report
