"""What `burnish preview` shows, as plain values: some rows token by token, and figures about all of them.

what was looked at (preview_data.py)  →  make_preview  →  Preview  →  the terminal (preview_text.py)
                                                                  →  a page (preview_page.py)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish.data.broken import MAYBE_GBK, not_utf8_reason
from burnish.data.encode import DocumentFrame
from burnish.data.equal_rows import Equals, Keys, keys_of, repeated, shared
from burnish.data.packing import pack
from burnish.data.preview_data import Looked, needed_lengths
from burnish.data.preview_rows import ShownRow, first_rows, rows_worth_a_look, show
from burnish.data.report import Tally
from burnish.data.store import SampleStore
from burnish.data.token_texts import TokenTexts

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings

KEPT_WHOLE = 0.99  # which share of the samples the suggested cutoff leaves whole
_BINS = 20
_EXCERPT = 240  # characters of a row that cannot be used
_MOST_BYTES = 4 * (_EXCERPT + 1)
_TEXT_FILES = (".json", ".jsonl", ".csv", ".txt")


@dataclass(frozen=True)
class About:
    """What is looked at, in words of the configuration."""

    stage: str
    datasets: tuple[str, ...]
    model: str
    template: str  # "" in stage pt
    cutoff_len: int
    packing: bool

    @classmethod
    def of(cls, settings: Settings, template: str | None) -> About:
        """`template`: its name, "" for the tokenizer's own, None in stage pt."""
        data = settings.data
        return cls(
            stage=settings.finetuning.stage,
            datasets=(*(data.dataset or ()), *(data.eval_dataset or ())),
            model=str(settings.model.model_name_or_path),
            template="" if template is None else template or "of the tokenizer",
            cutoff_len=data.cutoff_len,
            packing=data.packing,
        )


@dataclass(frozen=True)
class Histogram:
    """counts[i] values lie in [edges[i], edges[i+1]), those of the last bin up to its end."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Lengths:
    """Tokens of samples; of documents in stage pt."""

    shortest: int
    median: int
    mean: float
    longest: int
    histogram: Histogram
    before_cutoff: bool  # some samples are shorter now


@dataclass(frozen=True)
class Fill:
    """How well samples fill rows of cutoff_len."""

    rows: int
    share: float


@dataclass(frozen=True)
class PartView:
    """All samples of one part in figures."""

    name: str
    samples: int
    tokens: int
    trained: int
    lengths: Lengths | None  # None where the part is empty
    shares: Histogram | None  # percent of each sample that is trained; None in stage pt
    repeated: Equals
    shared: Equals | None  # with train; None for train itself
    fill: Fill | None
    cutoff: int | None  # the least cutoff_len that keeps KEPT_WHOLE of the samples whole


@dataclass(frozen=True)
class Reason:
    kind: str  # bad | dropped | cut
    text: str
    count: int
    first: str
    excerpt: str  # how that row begins in its file; "" where it cannot be shown

    @property
    def tag(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class Preview:
    about: About
    rows: int
    kept: int
    duplicates: int  # rows of the files that are equal to an earlier one, before anything is encoded
    straddled: int
    parts: tuple[PartView, ...]
    reasons: tuple[Reason, ...]
    notes: tuple[str, ...]
    refused: tuple[str, ...]
    streamed: int | None
    shown: tuple[ShownRow, ...] = ()

    @property
    def units(self) -> str:
        """What lengths, duplicates and the cutoff are of."""
        return "documents" if self.about.stage == "pt" else "samples"


def make_preview(looked: Looked, tokenizer: Any, about: About) -> Preview:
    """All figures; rows to show are added by one of the two functions below."""
    end = DocumentFrame.of(tokenizer).end if about.stage == "pt" else None
    keys = {name: keys_of(store, end) for name, store in looked.parts.items()}
    parts = tuple(_part(name, keys, looked, about) for name in looked.parts)
    report = looked.report
    by_kind = (("bad", report.bad), ("dropped", report.dropped), ("cut", report.cut))
    reasons = [reason for kind, tallies in by_kind for reason in _reasons(kind, tallies)]
    return Preview(
        about=about,
        rows=report.rows,
        kept=report.kept,
        duplicates=report.duplicates,
        straddled=report.straddled,
        parts=parts,
        reasons=tuple(reasons),
        notes=tuple(report.notes),
        refused=looked.refused,
        streamed=looked.streamed,
    )


def with_first_rows(preview: Preview, looked: Looked, tokenizer: Any, count: int) -> Preview:
    tags = first_rows(looked.parts, count)
    return replace(preview, shown=tuple(show(looked.parts, tags, TokenTexts(tokenizer))))


def with_rows_worth_a_look(preview: Preview, looked: Looked, tokenizer: Any, count: int, seed: int) -> Preview:
    """The first, the longest and shortest, one for each loss, equal ones, and random ones."""
    lost = {reason.tag: reason.first for reason in preview.reasons if reason.kind == "cut"}
    again = {part.name: part.repeated for part in preview.parts}
    both = {part.name: part.shared for part in preview.parts if part.shared}
    tags = rows_worth_a_look(looked.parts, count, lost, again, both, seed)
    return replace(preview, shown=tuple(show(looked.parts, tags, TokenTexts(tokenizer))))


def _part(name: str, keys: Mapping[str, Keys], looked: Looked, about: About) -> PartView:
    store = looked.parts[name]
    is_pt = about.stage == "pt"
    if is_pt:
        lengths = whole = np.array([length for (_, length), _ in keys[name]], dtype=np.int64)
    else:
        uncut = looked.uncut.get(name, store)
        lengths, whole = uncut.lengths.astype(np.int64), needed_lengths(uncut)
    compared = name != "train" and "train" in keys
    return PartView(
        name=name,
        samples=len(store),
        tokens=int(store.lengths.sum()),
        trained=int(store.num_trained.sum()),
        lengths=_lengths(lengths, before_cutoff=name in looked.uncut) if len(lengths) else None,
        shares=None if is_pt else _shares(store),
        repeated=repeated(keys[name], store),
        shared=shared(keys["train"], looked.parts["train"], keys[name], store) if compared else None,
        fill=_fill(store, about) if len(store) and looked.streamed is None else None,
        cutoff=_cutoff(whole) if len(whole) else None,
    )


# ---- figures -----------------------------------------------------------------------------------------------------


def _lengths(values: np.ndarray, *, before_cutoff: bool) -> Lengths:
    least, middle, mean, most = values.min(), np.median(values), values.mean(), values.max()
    return Lengths(int(least), int(middle), float(mean), int(most), _histogram(values), before_cutoff)


def _histogram(values: np.ndarray) -> Histogram:
    """Bins of a round width for all but the longest hundredth, which share the last one."""
    most = int(np.quantile(values, 0.99, method="higher"))
    lowest, highest = int(values.min()), int(values.max())
    width = round_width((most - lowest + 1) / _BINS)
    start = lowest // width * width
    edges = [*range(start, most + 1, width), most // width * width + width]
    if highest >= edges[-1]:
        edges.append(highest + 1)
    counts, _ = np.histogram(values, edges)
    return Histogram(tuple(edges), tuple(counts.tolist()))


def round_width(least: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    power = 10 ** max(math.floor(math.log10(max(least, 1))), 0)
    return next(power * step for step in (1, 2, 5, 10) if power * step >= least)


def _shares(store: SampleStore) -> Histogram:
    percent = 100 * store.num_trained / np.maximum(store.lengths, 1)
    edges = (*range(0, 100, 10), 101)  # 100 percent is in the last bin
    return Histogram(edges, tuple(np.histogram(percent, edges)[0].tolist()))


def _fill(store: SampleStore, about: About) -> Fill:
    """What packing makes of samples; rows of stage pt are full already, but for the last."""
    if about.stage == "pt":
        return Fill(len(store), float(store.lengths.sum() / (len(store) * about.cutoff_len)))
    packing = pack(store.lengths, about.cutoff_len)
    return Fill(len(packing), packing.fill)


def _cutoff(needed: np.ndarray) -> int:
    return int(np.sort(needed)[math.ceil(KEPT_WHOLE * len(needed)) - 1])


# ---- rows that were lost -----------------------------------------------------------------------------------------


def _reasons(kind: str, tallies: Mapping[str, Tally]) -> Iterator[Reason]:
    for text, tally in sorted(tallies.items(), key=lambda item: -item[1].count):
        yield Reason(kind, text, tally.count, tally.first, "" if kind == "cut" else excerpt(tally.first))


def excerpt(place: str) -> str:
    """How the row at a place begins, where its file is one of text."""
    name, _, number = place.rpartition(":")
    file = Path(name)
    if file.suffix.lower() not in _TEXT_FILES or not number.isdecimal() or not file.is_file():
        return ""
    with file.open("rb") as lines:  # whose ends are \n alone, as where rows are counted
        rest = islice(lines, int(number) - 1, int(number) + (20 if file.suffix.lower() == ".json" else 0))
        start = b" ".join(line[:_MOST_BYTES].strip() for line in rest)[:_MOST_BYTES]
    encoding = "gb18030" if not_utf8_reason(start) == MAYBE_GBK and not _is_utf8(start) else "utf-8"
    text = start.decode(encoding, "replace").removeprefix("\ufeff").removeprefix("[").strip()
    return text[:_EXCERPT] + "…" if len(text) > _EXCERPT else text


def _is_utf8(start: bytes) -> bool:
    """Of a text that may end inside a character."""
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True
