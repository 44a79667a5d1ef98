"""Data sets → what training takes: rows are read, mixed, split, encoded and kept, and all that happened is reported.

    dataset: pairs,more   →  load_single_dataset each  →  mix  →  split by val_size  →  encode  →  SampleStore

`val_size`, `max_samples` and `num_samples` count rows as they stand in files, the broken ones among them. With
`streaming` rows are read and encoded as they are needed, again in each epoch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from burnish.data.catalog import get_dataset_list
from burnish.data.encode import ONE_TOKEN, DocumentFrame, join_documents
from burnish.data.entry import DatasetAttr, files_of_data
from burnish.data.formats import columns_read, detect_formatting
from burnish.data.mixing import mix, sample, split
from burnish.data.report import DataReport
from burnish.data.rows import Row, read_rows, without_nulls
from burnish.data.store import SampleStore
from burnish.data.stream import StreamedSamples
from burnish.data.values import BadRow
from burnish.data.workers import Item, RowEncoder, encode_items
from burnish.errors import Problem, UserError
from burnish.types import EncodesMessages

if TYPE_CHECKING:
    from burnish.data.arguments import DataArguments


@dataclass(frozen=True)
class Hub:
    """How to reach the hub: arguments of the model, which hold for data too."""

    cache_dir: str | None = None
    token: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Datasets:
    """What a run trains and evaluates on."""

    train: SampleStore | StreamedSamples | None
    eval: dict[str, SampleStore]  # {"eval": …}, or one for each data set
    report: DataReport


def get_dataset(
    args: DataArguments,
    stage: str,
    tokenizer: Any,
    template: EncodesMessages | None,
    *,
    seed: int,
    hub: Hub | None = None,
    split_special_tokens: bool = False,
) -> Datasets:
    """Read and encode all that `dataset` and `eval_dataset` name. The same seed sets the same rows aside.

    `template` is for stage sft; pt does without, and takes `split_special_tokens` itself. Raises UserError, with every
    reason, where too many rows are bad or no sample is left.
    """
    report = DataReport()
    frame = DocumentFrame.of(tokenizer, split_special_tokens=split_special_tokens) if stage == "pt" else None
    encoder = RowEncoder(stage, tokenizer, template, args, frame)
    open_items = partial(_items, args=args, stage=stage, seed=seed, hub=hub or Hub(), report=report)

    sources = [partial(open_items, attr) for attr in get_dataset_list(args)]
    all_rows = partial(mix, sources, args.mix_strategy, args.interleave_probs, seed)
    train: SampleStore | StreamedSamples | None = None
    aside: list[Item] = []
    if sources and args.streaming:
        aside = list(itertools.islice(all_rows(), int(args.val_size)))
        train = StreamedSamples(all_rows, encoder, seed=seed, skip=len(aside))
        report.note("train: read while training goes on (streaming)")
    elif sources:
        rows = list(all_rows())
        rows, aside = split(rows, args.val_size, seed) if args.val_size else (rows, [])
        train = _store("train", rows, encoder, report)

    eval_items = {"eval": aside} if aside else {}
    for attr in get_dataset_list(args, args.eval_dataset or []):
        name = _short_name(attr) if args.eval_on_each_dataset else "eval"
        eval_items.setdefault(name, []).extend(open_items(attr))
    evaluation = {name: _store(name, items, encoder, report) for name, items in eval_items.items()}

    report.check(args.max_bad_rows)
    _check_not_empty({"train": train, **evaluation}, report)
    return Datasets(train, evaluation, report)


def load_single_dataset(
    attr: DatasetAttr, args: DataArguments, *, seed: int, hub: Hub | None = None, report: DataReport | None = None
) -> Iterator[Row]:
    """The rows of one data set, bad ones among them, with `num_samples` and `max_samples` applied.

    What is left out of a folder is noted in the report.
    """
    if attr.load_from == "file":
        rows = _file_rows(attr.path, report or DataReport())
    else:
        rows = _hub_rows(attr, hub or Hub(), streaming=args.streaming)
    if attr.num_samples and not args.streaming:
        rows = iter(sample(list(rows), attr.num_samples, seed))
    most = [number for number in (attr.num_samples, args.max_samples) if number]
    return itertools.islice(rows, min(most)) if most else rows


def _file_rows(path: str, report: DataReport) -> Iterator[Row]:
    if not os.path.isdir(path):
        yield from read_rows(path)
        return
    names = files_of_data(path)
    for other in sorted(set(os.listdir(path)) - set(names)):
        if not other.startswith("."):
            report.note(f"left out: {os.path.join(path, other)} is not a file of data")
    for name in names:
        yield from read_rows(os.path.join(path, name))


def _hub_rows(attr: DatasetAttr, hub: Hub, *, streaming: bool) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(
            attr.path,
            name=attr.subset,
            data_dir=attr.folder,
            split=attr.split,
            cache_dir=hub.cache_dir,
            token=hub.token,
            revision=hub.revision,
            streaming=streaming,
        )
        for number, row in enumerate(loaded, 1):
            yield Row(without_nulls(dict(row)), f"{attr.path}:{number}")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check its name, subset and split, and the connection; or download it and name the folder"
        if "script" in reason:
            remedy = "datasets no longer runs scripts: save its rows as parquet or jsonl, and name that file"
        raise UserError(Problem("data", attr.name, attr.path, f"cannot be loaded: {reason}", remedy)) from error


def _items(
    attr: DatasetAttr, *, args: DataArguments, stage: str, seed: int, hub: Hub, report: DataReport
) -> Iterator[Item]:
    """The rows of one data set, each with how it is to be read; that may be known only from the first one."""
    rows = load_single_dataset(attr, args, seed=seed, hub=hub, report=report)
    head: list[Row] = []
    for row in rows:
        head.append(row)
        if row.value is not None:
            attr = _settled(attr, row.value, stage, report)
            break
    if not head:
        raise UserError(Problem(attr.path, "", None, "holds no rows", "give a file with rows"))
    return ((row, attr) for row in itertools.chain(head, rows))


def _settled(attr: DatasetAttr, first: dict[str, Any], stage: str, report: DataReport) -> DatasetAttr:
    if attr.formatting == "auto":
        try:
            attr = detect_formatting(first, attr)
        except BadRow as error:
            raise UserError(Problem(attr.path, "", None, f"has a first row whose {error}", "mend it")) from error
    if stage == "pt" and attr.formatting != "alpaca":
        message = "holds conversations, and stage pt trains on texts"
        raise UserError(Problem(attr.path, "", None, message, "use stage sft, or rows with a column text"))
    if stage == "sft" and attr.formatting == "alpaca" and not attr.columns.response:
        message = "names columns, but none with answers"
        raise UserError(Problem(attr.path, "columns.response", None, message, "name it in dataset_info.json"))
    unread = sorted(str(column) for column in set(first) - columns_read(attr, stage))
    if unread:
        report.note(f"columns that are not read: {', '.join(unread)} ({attr.name})")
    return attr


def _store(name: str, items: Sequence[Item], encoder: RowEncoder, report: DataReport) -> SampleStore:
    stores = list(encode_items(items, encoder, report))
    if encoder.frame:  # documents → rows
        documents = itertools.chain.from_iterable(stores)
        rows = list(join_documents(documents, encoder.args.cutoff_len))
        if rows and len(rows[-1]) == 1:
            report.add("dropped", ONE_TOKEN, rows.pop().place)
        store = SampleStore.from_samples(rows)
    else:
        store = SampleStore.concatenate(stores)
    report.add_part(name, store)
    return store


def _short_name(attr: DatasetAttr) -> str:
    """A file that was named by its path is called by its stem: it becomes a part of metrics' names."""
    return os.path.splitext(os.path.basename(attr.name))[0] if "/" in attr.name or "." in attr.name else attr.name


def _check_not_empty(parts: dict[str, SampleStore | StreamedSamples | None], report: DataReport) -> None:
    empty = [name for name, part in parts.items() if isinstance(part, SampleStore) and not len(part)]
    if empty:
        why = [
            Problem(tally.first, "", None, f"dropped: {reason} ({tally.count:,} samples)")
            for reason, tally in report.dropped.items()
        ]
        raise UserError(
            [*why, Problem("data", empty[0], None, "has no sample left", "raise cutoff_len or give more rows")]
        )
