"""Samples that are read, shuffled and encoded while training takes them: for data that is never at hand as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from burnish.data.encode import join_documents
from burnish.data.mixing import shuffled
from burnish.data.report import DataReport
from burnish.data.workers import Item, RowEncoder
from burnish.types import Sample

_ROWS_BETWEEN_CHECKS = 1000  # bad rows are a share of the rows so far, which says little before this many


class StreamedSamples:
    """An iterable of `Sample`s that can be gone through again; epoch e has the order of (seed, e).

    Rows are shuffled within a buffer of `buffer_size`; the first `skip` of them are left to evaluation.
    """

    def __init__(self, rows: Callable[[], Iterable[Item]], encoder: RowEncoder, *, seed: int, skip: int = 0):
        self._rows, self._encoder, self._seed, self._skip = rows, encoder, seed, skip
        self._epoch = 0
        self.report = DataReport(hashes=None)  # of the latest pass, as far as it got

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[Sample]:
        args = self._encoder.args
        self.report = DataReport(hashes=None)
        rows = shuffled(islice(self._rows(), self._skip, None), args.buffer_size, (self._seed, self._epoch))
        samples = self._encoded(rows, self.report)
        yield from join_documents(samples, args.cutoff_len) if self._encoder.frame else samples

    def _encoded(self, rows: Iterable[Item], report: DataReport) -> Iterator[Sample]:
        for row, attr in rows:
            yield from self._encoder.encode(row, attr, report)
            if report.rows % _ROWS_BETWEEN_CHECKS == 0:
                report.check(self._encoder.args.max_bad_rows)
        report.check(self._encoder.args.max_bad_rows)
