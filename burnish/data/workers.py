"""Rows → samples, on all cores where there are many rows. Order is kept; what was counted on the way comes back too.

Rows are read here and handed to workers a chunk at a time, no faster than samples come back, so that a set of any size
needs the memory of a few chunks. Reading and writing are a twelfth of the work: one process can feed some twelve.
Workers are forked, so that they see tokenizer and template without a copy, and they hand back flat arrays. They
do nothing that a fork after threads could upset: no torch, no Arrow, and tokenizers without its own threads.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from burnish.data.encode import ONE_TOKEN, DocumentFrame, Outcome, encode_pt, encode_sft, join_documents
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
_CHUNKS_AHEAD = 2  # for each worker: one that it encodes and one that waits for it
_PR_SET_PDEATHSIG = 1  # of Linux's prctl

Encoded = tuple[SampleStore, DataReport]


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
            _add_hash(row.value, report)
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

    def joined(self, samples: Iterable[Sample], report: DataReport) -> Iterator[Sample]:
        """Rows of `cutoff_len` made of documents in stage pt; samples of conversations stay as they are.

        A row of one token, which only the last can be, trains nothing: it is dropped.
        """
        if not self.frame:
            yield from samples
            return
        for row in join_documents(samples, self.args.cutoff_len, apart=not self.args.cross_document_attention):
            if len(row) > 1:
                yield row
            else:
                report.add("dropped", ONE_TOKEN, row.place)

    def _encode(self, value: dict[str, Any], place: str, attr: DatasetAttr) -> Outcome:
        example = align_dataset(value, attr, stage=self.stage, place=place)
        if self.frame:
            return encode_pt(example, self.tokenizer, self.frame)
        assert self.template, "stage sft needs a template"
        try:
            return encode_sft(example, self.template, self.args)
        except ValueError as error:  # a conversation that the template cannot render
            raise BadRow(str(error)) from error


_as_text = json.JSONEncoder(sort_keys=True, default=str).encode


def _add_hash(value: dict[str, Any], report: DataReport) -> None:
    if report.hashes is None:
        return
    report.hashes.append(int.from_bytes(blake2b(_as_text(value).encode(), digest_size=8).digest(), "little"))


def encode_items(items: Iterable[Item], encoder: RowEncoder, report: DataReport) -> Generator[SampleStore]:
    """Stores of the samples of consecutive rows, in order. `report` is filled as they come: it knows of all rows whose
    samples were given, and of no other.
    """
    items = iter(items)
    first = list(islice(items, FEW_ROWS + 1))
    chunks = _chunks(chain(first, items))
    if len(first) > FEW_ROWS and _num_cores() > 1:
        encoded = _in_processes(chunks, encoder)
    else:
        encoded = map(partial(_encode_chunk, encoder), chunks)
    for store, counted in encoded:
        report.merge(counted)
        yield store


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(islice(items, _ROWS_A_CHUNK)):
        yield chunk


def _encode_chunk(encoder: RowEncoder, chunk: list[Item]) -> Encoded:
    report = DataReport()
    samples = [sample for row, attr in chunk for sample in encoder.encode(row, attr, report)]
    return SampleStore.from_samples(samples), report


def _num_cores() -> int:
    """Cores that this process may use. One where a process cannot be forked safely: there the rows are encoded here."""
    if sys.platform != "linux":
        return 1
    return len(os.sched_getaffinity(0))


_inherited: RowEncoder | None = None  # set in a worker, by the fork


def _in_processes(chunks: Iterator[list[Item]], encoder: RowEncoder) -> Iterator[Encoded]:
    cores = _num_cores()
    pool = ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), _start_worker, (encoder, os.getpid()))
    waiting: deque[Future[Encoded]] = deque()
    try:
        _start(pool)
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) >= cores * _CHUNKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunStopped("A process that encodes rows was killed, most likely for lack of memory.", 1) from error
    finally:  # also where the user pressed Ctrl-C: what has not begun never does
        pool.shutdown(wait=True, cancel_futures=True)


def _start(pool: ProcessPoolExecutor) -> None:
    try:
        with _quiet_fork():
            pool.submit(os.getpid)  # the processes start here
    except OSError as error:
        raise RunStopped(f"Processes that encode rows cannot be started: {error}.", 1) from error


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


def _start_worker(encoder: RowEncoder, parent: int) -> None:
    global _inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    _die_with(parent)
    gc.freeze()  # what was inherited is never garbage; looking for it would copy every page of it
    _inherited = encoder


def _die_with(parent: int) -> None:
    """A parent that is killed takes its workers along: they would wait for rows for ever, and hold its locks."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before we asked
        os._exit(1)


def _work(chunk: list[Item]) -> Encoded:
    assert _inherited
    return _encode_chunk(_inherited, chunk)
