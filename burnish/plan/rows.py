"""The lengths of a run's rows, for its plan: read where that is cheap, else taken as the longest that may be.

Data sets on this disk are encoded as training encodes them, all of them or, of large ones, the first rows. What is on a
hub is not fetched, and what cannot be read is training's to complain about, not the plan's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish.data.catalog import get_dataset_list
from burnish.data.entry import DatasetAttr, files_of_data
from burnish.data.store import SampleStore
from burnish.errors import UserError
from burnish.plan.steps import Rows

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings
    from burnish.data.arguments import DataArguments

ALL_UP_TO = 16 * 2**20  # bytes of files that are encoded whole, in seconds
FIRST_ROWS = 2000  # of each larger set


def lengths_of(settings: Settings, get: Callable[[DataArguments], Any]) -> Rows:
    """`get(data)` reads and encodes as training does (Datasets)."""
    data = settings.data
    if why := _not_worth_it(data):
        return Rows.unread(data.cutoff_len, why)
    whole = data.max_samples is not None and data.max_samples <= FIRST_ROWS
    if not whole:
        whole = sum(map(_size, get_dataset_list(data))) <= ALL_UP_TO
    if not whole:
        data = replace(data, max_samples=FIRST_ROWS)
    try:
        store = get(replace(data, eval_dataset=None)).train
    except UserError as error:
        problem = error.problems[0]
        return Rows.unread(data.cutoff_len, f"{problem.place} {problem.message}")
    if not isinstance(store, SampleStore):
        return Rows.unread(data.cutoff_len, "there is nothing to train on")
    lengths = np.diff(store.offsets)
    trained = float(store.num_trained.sum() / max(lengths.sum(), 1))
    which = f"{len(lengths):,} rows" if whole else f"the first {len(lengths):,} rows"
    source = f"{which} of {lengths.mean():,.0f} tokens on average, the longest {lengths.max():,}; {trained:.0%} trained"
    return Rows(lengths, trained, source, whole)


def _not_worth_it(data: DataArguments) -> str:
    if data.streaming:
        return "streaming"
    if not data.dataset:
        return "no dataset"
    if any(attr.load_from != "file" for attr in get_dataset_list(data)):
        return "a data set of a hub, which is not fetched for a plan"
    return ""


def _size(attr: DatasetAttr) -> int:
    path = Path(attr.path)
    files = files_of_data(attr.path) if path.is_dir() else [attr.path]
    return sum(Path(file).stat().st_size for file in files)
