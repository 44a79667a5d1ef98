"""The data of a run, looked at without training on it: also what training would refuse, as far as it can be read.

One idea: preview asks `get_dataset` for exactly what training asks it for, so what is shown is what is trained. Only
where that is refused is it asked again, with every bad row allowed, for the rows that are good. What `get_dataset`
refuses is data, as the configuration was checked before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from burnish.data.arguments import DataArguments
from burnish.data.encode import AFTER_ANSWER, NOTHING_TRAINED, ONE_TOKEN
from burnish.data.report import DataReport, NothingLeft
from burnish.data.sources import Datasets
from burnish.data.store import SampleStore
from burnish.data.stream import StreamedSamples
from burnish.errors import UserError
from burnish.types import IGNORE_INDEX, Sample

STREAMED = 1000  # samples of a stream that are looked at, unless more are to be shown
_NO_CUTOFF = 2**30  # more tokens than any sample has

GetDataset = Callable[[DataArguments], Datasets]


@dataclass(frozen=True)
class Looked:
    """What was found: samples by part ("train", "eval" or names of sets), what became of rows, why it is refused."""

    parts: dict[str, SampleStore]
    report: DataReport
    refused: tuple[str, ...] = ()  # what training would say and stop
    streamed: int | None = None  # samples of a stream that were looked at; None where all was read
    # parts as they would be without a cutoff, where cutoff_len took something of conversations
    uncut: dict[str, SampleStore] = field(default_factory=dict)


def look(get: GetDataset, args: DataArguments, *, rows: int) -> Looked:
    """`get` is get_dataset with everything set but its first argument. `rows`: how many are to be shown at least."""
    refused: tuple[str, ...] = ()
    try:
        datasets = get(args)
    except UserError as error:
        refused = tuple(str(problem) for problem in error.problems)
        datasets = _good_rows(get, args)
    if isinstance(datasets, DataReport):
        return Looked({}, datasets, refused)
    if isinstance(datasets.train, StreamedSamples):
        return _first_of_stream(datasets, datasets.train, max(rows, STREAMED), refused)
    parts = {} if datasets.train is None else {"train": datasets.train}
    uncut = _without_cutoff(get, args) if _lost_to_cutoff(datasets.report) else {}
    return Looked(parts | datasets.eval, datasets.report, refused, uncut=uncut)


def _without_cutoff(get: GetDataset, args: DataArguments) -> dict[str, SampleStore]:
    whole = get(replace(args, cutoff_len=_NO_CUTOFF, max_bad_rows=math.inf, tokenized_path=None, overwrite_cache=False))
    return ({"train": whole.train} if isinstance(whole.train, SampleStore) else {}) | whole.eval


def _good_rows(get: GetDataset, args: DataArguments) -> Datasets | DataReport:
    """What is left when every bad row is allowed; of train alone, where nothing is left for evaluation. Where nothing
    is left at all, what became of the rows.
    """
    lenient, report = replace(args, max_bad_rows=math.inf, overwrite_cache=False), DataReport()
    for attempt in (lenient, replace(lenient, val_size=0.0, eval_dataset=None)):
        try:
            return get(attempt)
        except NothingLeft as error:
            report = error.report
        except UserError:
            continue
    return report


def _first_of_stream(datasets: Datasets, train: StreamedSamples, most: int, refused: tuple[str, ...]) -> Looked:
    samples: list[Sample] = []
    try:
        for sample in islice(train, most):
            samples.append(sample)
    except UserError as error:  # too many of the rows so far are bad
        refused += tuple(str(problem) for problem in error.problems)
    report = datasets.report
    report.merge(train.report)
    store = SampleStore.from_samples(samples)
    report.add_part("train", store)
    return Looked({"train": store} | datasets.eval, report, refused, streamed=len(samples))


def _lost_to_cutoff(report: DataReport) -> bool:
    """Never so in stage pt, which cuts documents without a loss."""
    return bool(set(report.cut) - {AFTER_ANSWER} or set(report.dropped) - {NOTHING_TRAINED, ONE_TOKEN})


def needed_lengths(store: SampleStore) -> np.ndarray:
    """Tokens up to the last trained one, [N]: how long cutoff_len must be for each sample to stay whole."""
    lengths = np.zeros(len(store), dtype=np.int64)
    for index, sample in enumerate(store):
        trained = np.flatnonzero(sample.labels != IGNORE_INDEX)
        lengths[index] = trained[-1] + 1 if len(trained) else len(sample)
    return lengths
