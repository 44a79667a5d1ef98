"""Rows → samples, on all cores where there are many rows. Order is kept; what was counted on the way comes back too.

Workers are forked, so that they see rows, tokenizer and template without a copy, and they hand back flat arrays. They
do nothing that a fork after threads could upset: no torch, no Arrow, and tokenizers without its own threads.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from burnish.data.encode import DocumentFrame, Outcome, encode_pt, encode_sft
from burnish.data.entry import DatasetAttr
from burnish.data.formats import align_dataset
from burnish.data.report import DataReport
from burnish.data.rows import Row
from burnish.data.store import SampleStore
from burnish.data.values import BadRow
from burnish.errors import RunStopped
from burnish.types import EncodesMessages, Sample

if TYPE_CHECKING:
    from burnish.data.arguments import DataArguments

Item = tuple[Row, DatasetAttr]  # a row, and how to read it

FEW_ROWS = 2000  # below this, starting processes costs more than it saves
_ROWS_A_CHUNK = 256


@dataclass(frozen=True)
class RowEncoder:
    """All that encoding needs besides the row."""

    stage: str
    tokenizer: Any
    template: EncodesMessages | None
    args: DataArguments
    frame: DocumentFrame | None = None  # stage pt

    def encode(self, row: Row, attr: DatasetAttr, report: DataReport) -> tuple[Sample, ...]:
        """The samples of one row, or none; either way the report knows what became of it."""
        report.rows += 1
        try:
            if row.value is None:
                raise BadRow(row.reason)
            _count_duplicate(row.value, report)
            outcome = self._encode(row.value, row.place, attr)
        except BadRow as error:
            report.add("bad", str(error), row.place)
            return ()
        report.kept += bool(outcome.samples)
        report.straddled += outcome.straddled
        for kind, reasons in (("cut", outcome.cut), ("dropped", outcome.dropped)):
            for reason in reasons:
                report.add(kind, reason, row.place)
        return outcome.samples

    def _encode(self, value: dict[str, Any], place: str, attr: DatasetAttr) -> Outcome:
        example = align_dataset(value, attr, stage=self.stage, place=place)
        if self.frame:
            return encode_pt(example, self.tokenizer, self.frame)
        assert self.template, "stage sft needs a template"
        try:
            return encode_sft(example, self.template, self.args)
        except ValueError as error:  # a conversation that the template cannot render
            raise BadRow(str(error)) from error


def _count_duplicate(value: dict[str, Any], report: DataReport) -> None:
    if report.seen is None:
        return
    text = json.dumps(value, sort_keys=True, default=str)
    digest = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
    report.duplicates += digest in report.seen
    report.seen.add(digest)


def encode_items(items: Sequence[Item], encoder: RowEncoder, report: DataReport) -> Iterator[SampleStore]:
    """Stores of the samples of consecutive rows, in order. `report` is filled as they come."""
    chunks = [range(start, min(start + _ROWS_A_CHUNK, len(items))) for start in range(0, len(items), _ROWS_A_CHUNK)]
    if len(items) > FEW_ROWS and _num_cores() > 1:
        encoded = _in_processes(items, encoder, chunks)
    else:
        encoded = (_encode_chunk(items, encoder, chunk) for chunk in chunks)
    for store, counted in encoded:
        report.merge(counted)
        yield store


def _encode_chunk(items: Sequence[Item], encoder: RowEncoder, chunk: range) -> tuple[SampleStore, DataReport]:
    report = DataReport()
    samples = [sample for index in chunk for sample in encoder.encode(*items[index], report)]
    return SampleStore.from_samples(samples), report


def _num_cores() -> int:
    """Cores that this process may use. One where a process cannot be forked safely: there the rows are encoded here."""
    if sys.platform != "linux":
        return 1
    return len(os.sched_getaffinity(0))


_inherited: Callable[[range], tuple[SampleStore, DataReport]] | None = None  # set in a worker, by the fork


def _in_processes(
    items: Sequence[Item], encoder: RowEncoder, chunks: Sequence[range]
) -> Iterator[tuple[SampleStore, DataReport]]:
    def work(chunk: range) -> tuple[SampleStore, DataReport]:
        return _encode_chunk(items, encoder, chunk)

    pool = ProcessPoolExecutor(
        min(_num_cores(), len(chunks)), multiprocessing.get_context("fork"), _start_worker, (work,)
    )
    try:
        with _quiet_fork():
            results = pool.map(_work, chunks)  # the processes start here
        yield from results
    except BrokenProcessPool as error:
        raise RunStopped("A process that encodes rows was killed, most likely for lack of memory.", 1) from error
    finally:  # also where the user pressed Ctrl-C: what has not begun never does
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """tokenizers and Python 3.12 warn of forks after threads; what they warn of does not happen in our workers."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"  # read by the child at the fork
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start_worker(work: Callable[[range], tuple[SampleStore, DataReport]]) -> None:
    global _inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    _inherited = work


def _work(chunk: range) -> tuple[SampleStore, DataReport]:
    assert _inherited
    return _inherited(chunk)
