"""Data sets → what training takes: rows are read, mixed, split, encoded and kept, and all that happened is reported.

    dataset: pairs,more   →  load_single_dataset each  →  mix  →  split by val_size  →  encode  →  SampleStore

`val_size`, `max_samples` and `num_samples` count rows as they stand in files, the broken ones among them. With
`streaming` rows are read and encoded as they are needed, again in each epoch. Else a few thousand rows are encoded by
every run, in memory; more go through a folder of tokens (cache.py), row by row, so that memory does not grow with them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish.data.cache import Items, TokenFolder, token_cache
from burnish.data.catalog import get_dataset_list
from burnish.data.encode import DocumentFrame
from burnish.data.entry import DatasetAttr, files_of_data
from burnish.data.fingerprint import describe, fingerprint
from burnish.data.formats import columns_read, detect_formatting
from burnish.data.hub import Hub, hub_rows
from burnish.data.mixing import all_set_aside, mix, sample, set_aside
from burnish.data.report import DataReport, NothingLeft
from burnish.data.rows import Row, read_rows
from burnish.data.store import SampleStore
from burnish.data.stream import StreamedSamples
from burnish.data.workers import FEW_ROWS, Item, RowEncoder, encode_items
from burnish.errors import Problem, UserError
from burnish.types import EncodesMessages

if TYPE_CHECKING:
    from burnish.data.arguments import DataArguments


SMALL_DATA = 4 * 2**20  # bytes of files whose rows are encoded faster than tokens are found again

_ASIDE = "eval"  # the name of the rows that val_size sets aside, and of evaluation sets that are joined


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
    order_seed: int | None = None,
    hub: Hub | None = None,
    split_special_tokens: bool = False,
) -> Datasets:
    """Read and encode all that `dataset` and `eval_dataset` name. The same seed mixes them in the same way and sets the
    same rows aside; the order of a stream is of `order_seed` (`data_seed`), where that is given.

    `template` is for stage sft; pt does without, and takes `split_special_tokens` itself. Raises UserError, with every
    reason, where too many rows are bad or no sample is left.
    """
    report, hub = DataReport(), hub or Hub()
    frame = DocumentFrame.of(tokenizer, split_special_tokens=split_special_tokens) if stage == "pt" else None
    encoder = RowEncoder(stage, tokenizer, template, args, frame)
    open_items = partial(_items, args=args, stage=stage, seed=seed, hub=hub, report=report)
    sets = {"train": get_dataset_list(args), _ASIDE: get_dataset_list(args, args.eval_dataset or [])}

    all_rows = partial(mix, [partial(open_items, attr) for attr in sets["train"]], *_mixing(args), seed)
    parts: dict[str, Items] = {}
    train: SampleStore | StreamedSamples | None = None
    if sets["train"] and args.streaming:
        aside = _first_rows(all_rows, int(args.val_size), encoder)
        order_seed = seed if order_seed is None else order_seed
        train = StreamedSamples(all_rows, encoder, seed=order_seed, skip=len(aside))
        report.note("train: read while training goes on (streaming)")
        parts = {_ASIDE: partial(iter, aside)} if aside else {}
    elif sets["train"]:
        parts = _split(all_rows, encoder, seed) if args.val_size else {"train": all_rows}
    if args.val_size and args.mix_strategy == "interleave_over" and len(sets["train"]) > 1:
        report.note("val_size: a row that interleave_over takes twice may be both trained and evaluated on")
    parts |= _evaluation(sets[_ASIDE], open_items, each=args.eval_on_each_dataset)

    folder = None if args.streaming else _token_folder(encoder, sets, hub, seed)
    if folder:
        kept = folder.get(parts, encoder, report, overwrite=args.overwrite_cache)
        stores, report = kept.parts, kept.report
    else:
        stores = {name: _in_memory(name, items(), encoder, report) for name, items in parts.items()}
        report.count_duplicates()
    train = train or stores.pop("train", None)

    report.check(args.max_bad_rows)
    _check_not_empty({"train": train, **stores}, report)
    return Datasets(train, stores, report)


def _mixing(args: DataArguments) -> tuple[str, Sequence[float] | None]:
    return args.mix_strategy, args.interleave_probs


def _split(all_rows: Items, encoder: RowEncoder, seed: int) -> dict[str, Items]:
    """Two parts of the same rows. These are counted when the first of them is wanted: it means reading them once."""

    @cache
    def aside() -> np.ndarray:
        with _bad_rows_told(all_rows, encoder):
            return set_aside(sum(1 for _ in all_rows()), encoder.args.val_size, seed)

    def rows(*, kept_aside: bool) -> Iterator[Item]:
        return itertools.compress(all_rows(), aside() == kept_aside)

    return {"train": partial(rows, kept_aside=False), _ASIDE: partial(rows, kept_aside=True)}


def _first_rows(all_rows: Items, number: int, encoder: RowEncoder) -> list[Item]:
    """Of a stream, whose length nobody knows."""
    ahead = list(itertools.islice(all_rows(), number + 1)) if number else []
    if number and len(ahead) <= number:
        with _bad_rows_told(all_rows, encoder):
            raise all_set_aside(number, len(ahead))
    return ahead[:number]


@contextmanager
def _bad_rows_told(all_rows: Items, encoder: RowEncoder) -> Iterator[None]:
    """Where rows are too few to be split they may be so because they are broken: that is told with it."""
    try:
        yield
    except UserError as error:
        report = DataReport(hashes=None)
        for row, attr in itertools.islice(all_rows(), FEW_ROWS):
            encoder.encode(row, attr, report)
        raise UserError([*report.problems("bad"), *error.problems]) from error


def _evaluation(attrs: Sequence[DatasetAttr], open_items: Any, *, each: bool) -> dict[str, Items]:
    """Joined, or `each` by its name: of two called alike, or one like training's part, the later one is `name_2`."""
    by_name = {} if each or not attrs else {_ASIDE: attrs}
    for attr in attrs if each else ():
        short = _short_name(attr)
        names = itertools.chain([short], (f"{short}_{number}" for number in itertools.count(2)))
        by_name[next(name for name in names if name != "train" and name not in by_name)] = [attr]
    return {
        name: partial(mix, [partial(open_items, attr) for attr in named], "concat", None, 0)
        for name, named in by_name.items()
    }


def _token_folder(
    encoder: RowEncoder, sets: Mapping[str, Sequence[DatasetAttr]], hub: Hub, seed: int
) -> TokenFolder | None:
    """Where tokens are kept; None for few rows, which are faster encoded than found, unless the user named a folder."""
    args, attrs = encoder.args, [attr for part in sets.values() for attr in part]
    named = args.tokenized_path
    if not named and _are_few(attrs, args, hub):
        return None
    on_hub = {attr: hub.files(attr) for attr in attrs if attr.load_from != "file"}
    if in_memory := [attr for attr, files in on_hub.items() if not files]:
        if not named:
            return None
        message = "is in memory, with no file that its tokens could be known by"
        raise UserError(Problem("data", in_memory[0].name, in_memory[0].path, message, "leave out tokenized_path"))
    description = describe(encoder, sets, seed=seed, files=on_hub)
    if named:
        return TokenFolder(Path(os.path.expanduser(named)), description, is_named=True)
    return TokenFolder(token_cache() / fingerprint(description)[:32], description)


def _are_few(attrs: Sequence[DatasetAttr], args: DataArguments, hub: Hub) -> bool:
    """Told without reading a row."""
    most = [min(filter(None, (args.max_samples, attr.num_samples)), default=None) for attr in attrs]
    if sum(FEW_ROWS + 1 if number is None else number for number in most) <= FEW_ROWS:
        return True
    files = [path for attr in attrs for path in (_files(attr) if attr.load_from == "file" else hub.files(attr))]
    return sum(os.path.getsize(path) for path in files) <= SMALL_DATA


def load_single_dataset(
    attr: DatasetAttr, args: DataArguments, *, seed: int, hub: Hub | None = None, report: DataReport | None = None
) -> Iterator[Row]:
    """The rows of one data set, bad ones among them, with `num_samples` and `max_samples` applied.

    What is left out of a folder is noted in the report.
    """
    hub, report = hub or Hub(), report or DataReport()

    def rows() -> Iterator[Row]:
        if attr.load_from == "file":
            return _file_rows(attr.path, report)
        return hub_rows(attr, hub.load(attr, streaming=args.streaming))

    most = min((number for number in (attr.num_samples, args.max_samples) if number), default=None)
    if not most or not attr.num_samples or args.streaming:
        return itertools.islice(rows(), most)
    chosen = sample(range(sum(1 for _ in rows())), attr.num_samples, seed)[:most]
    if args.val_size and len(set(chosen)) < len(chosen):
        twice = f"a row of {attr.name} that num_samples takes twice"
        report.note(f"val_size: {twice} may be both trained and evaluated on")
    return _drawn(rows, chosen)


def _drawn(rows: Callable[[], Iterator[Row]], chosen: Sequence[int]) -> Iterator[Row]:
    """The chosen rows, in their order. These are held in memory, the others only passed over."""
    wanted = set(chosen)
    kept = {index: row for index, row in enumerate(rows()) if index in wanted}
    return (kept[index] for index in chosen)


def _files(attr: DatasetAttr) -> list[str]:
    if not os.path.isdir(attr.path):
        return [attr.path]
    return [os.path.join(attr.path, name) for name in files_of_data(attr.path)]


def _file_rows(path: str, report: DataReport) -> Iterator[Row]:
    if not os.path.isdir(path):
        yield from read_rows(path)
        return
    names = files_of_data(path)
    for other in sorted(set(os.listdir(path)) - set(names)):
        if not other.startswith("."):
            what = "a folder, whose files are not read" if os.path.isdir(os.path.join(path, other)) else ""
            report.note(f"left out: {os.path.join(path, other)} is {what or 'not a file of data'}")
    for name in names:
        is_empty = True
        for row in read_rows(os.path.join(path, name)):
            is_empty = False
            yield row
        if is_empty:
            report.note(f"holds no rows: {os.path.join(path, name)}")


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
        attr = detect_formatting(first, attr)
    if stage == "pt" and attr.formatting != "alpaca":
        message = "holds conversations, and stage pt trains on texts"
        raise UserError(Problem(attr.path, "", None, message, "use stage sft, or rows with a column text"))
    if stage == "sft" and attr.formatting == "alpaca" and not attr.columns.response:
        message = "names columns, but none with answers"
        raise UserError(Problem(attr.path, "columns.response", None, message, "name it in dataset_info.json"))
    unread = sorted(str(column) or "''" for column in set(first) - columns_read(attr, stage))
    if unread:
        report.note(f"columns that are not read: {', '.join(unread)} ({attr.name})")
    return attr


def _in_memory(name: str, items: Iterator[Item], encoder: RowEncoder, report: DataReport) -> SampleStore:
    stores = list(encode_items(items, encoder, report))
    if encoder.frame:  # documents → rows
        documents = itertools.chain.from_iterable(stores)
        store = SampleStore.from_samples(encoder.joined(documents, report))
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
        raise NothingLeft(empty[0], report)
