"""What became of every row: kept, cut, dropped or bad, by reason, with the place of the first one. Nothing goes unsaid.

A report is filled while rows are encoded; what several processes counted is merged in the order of the rows. `lines()`
is what a run prints, `check()` is what stops it when too many rows cannot be used.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish.data.broken import remedy_for
from burnish.errors import Problem, UserError
from burnish.types import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    from burnish.data.packing import Packing
    from burnish.data.store import SampleStore

MOST_REASONS = 20  # that are told of each kind, and counted apart
OTHER = "other reasons than those before"


@dataclass
class Tally:
    """How many rows or samples share one reason, and where the first of them stands."""

    count: int
    first: str  # "data/pairs.jsonl:17"

    def __str__(self) -> str:
        return f"{self.count:,} (first: {self.first})" if self.first else f"{self.count:,}"


@dataclass(frozen=True)
class Part:
    """The samples that one part of the data (train, or an evaluation set) was made into."""

    samples: int
    tokens: int
    trained: int  # tokens that the loss is on

    def __str__(self) -> str:
        share = f"{self.trained / self.tokens:.0%}" if self.tokens else "none"
        return f"{self.samples:,} samples, {self.tokens:,} tokens, {self.trained:,} of them trained ({share})"


@dataclass
class DataReport:
    """Counts of one run's data. Rows are what stands in files; samples are what the model sees."""

    rows: int = 0  # looked at, the bad ones too
    kept: int = 0  # rows that gave a sample or a text
    bad: dict[str, Tally] = field(default_factory=dict)  # rows, by reason
    dropped: dict[str, Tally] = field(default_factory=dict)  # samples, by reason
    cut: dict[str, Tally] = field(default_factory=dict)  # samples, by what they lost
    straddled: int = 0  # borders of trained spans where one token was cut in two
    duplicates: int = 0  # rows equal to an earlier one, once `count_duplicates` was called
    notes: list[str] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)
    packed: Packing | None = None  # the rows of train, with packing
    # 64 bits of each row's hash: a set of them would need ten times the memory. None: duplicates are not looked for.
    hashes: array[int] | None = field(default_factory=lambda: array("Q"))

    def add(self, kind: str, reason: str, place: str) -> None:
        """Count one row or sample under `bad`, `dropped` or `cut`."""
        tallies: dict[str, Tally] = {"bad": self.bad, "dropped": self.dropped, "cut": self.cut}[kind]
        _tally(tallies, reason, place).count += 1

    def add_part(self, name: str, store: SampleStore) -> None:
        self.parts[name] = Part(len(store), len(store.input_ids), int(store.num_trained.sum()))

    def note(self, line: str) -> None:
        line = printable(line)
        if line not in self.notes:
            self.notes.append(line)

    def merge(self, later: DataReport) -> None:
        """Take in what was counted over rows that come after these."""
        self.rows += later.rows
        self.kept += later.kept
        self.straddled += later.straddled
        if self.hashes is not None and later.hashes is not None:
            self.hashes.extend(later.hashes)
        for mine, theirs in ((self.bad, later.bad), (self.dropped, later.dropped), (self.cut, later.cut)):
            for reason, tally in theirs.items():
                _tally(mine, reason, tally.first).count += tally.count
        for line in later.notes:
            self.note(line)

    def count_duplicates(self) -> None:
        if self.hashes is not None:
            self.duplicates = len(self.hashes) - len(np.unique(np.array(self.hashes, dtype=np.uint64)))

    def to_json(self) -> dict[str, Any]:
        """As it is kept beside tokens: without hashes, and without the rows that this run packs its samples into."""
        return asdict(replace(self, hashes=None, packed=None))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DataReport:
        tallies = {kind: {r: Tally(**t) for r, t in value[kind].items()} for kind in ("bad", "dropped", "cut")}
        parts = {name: Part(**part) for name, part in value["parts"].items()}
        return cls(**{**value, **tallies, "parts": parts})

    @property
    def num_bad(self) -> int:
        return sum(tally.count for tally in self.bad.values())

    def check(self, max_bad_rows: float) -> None:
        """Raise UserError where more rows are bad than the user allows: a share below 1, or a number of rows."""
        allowed = max_bad_rows * self.rows if max_bad_rows < 1 else max_bad_rows
        if self.num_bad <= allowed:
            return
        share = f"{self.num_bad:,} of {self.rows:,} rows ({self.num_bad / self.rows:.1%}) cannot be used"
        remedy = "mend or drop these rows, or allow more"
        raise UserError(
            [*self.problems("bad"), Problem("data", "max_bad_rows", max_bad_rows, f"is passed: {share}", remedy)]
        )

    def problems(self, kind: str) -> list[Problem]:
        """One for each reason, at the first row that has it."""
        tallies: dict[str, Tally] = {"bad": self.bad, "dropped": self.dropped}[kind]
        before, unit = ("dropped: ", "sample") if kind == "dropped" else ("", "row")
        return [
            Problem(tally.first, "", None, before + _as_sentence(reason, tally.count, unit), remedy_for(reason))
            for reason, tally in _by_count(tallies)
        ]

    def lines(self) -> list[str]:
        """What a person reads before training starts."""
        return list(map(printable, self._lines()))

    def _lines(self) -> Iterator[str]:
        if self.rows:  # none yet where all is streamed
            yield f"data: {self.rows:,} rows, {self.kept:,} of them used"
        for name, part in self.parts.items():
            yield f"  {name}: {part}"
        if self.packed is not None:
            yield f"  packed: {_as_rows(self.packed)}"
        for heading, tallies in (("bad row", self.bad), ("dropped", self.dropped), ("cut", self.cut)):
            for reason, tally in _by_count(tallies):
                yield f"  {heading}: {reason}: {tally}"
        if self.duplicates:
            yield f"  duplicates: {self.duplicates:,} rows are equal to an earlier row"
        if self.straddled:
            yield f"  borders: an answer began or ended inside a token, cut in two there, {self.straddled:,} times"
        yield from (f"  {line}" for line in self.notes)


class NothingLeft(UserError):
    """A part of the data without a sample; the report says what became of its rows."""

    def __init__(self, part: str, report: DataReport):
        remedy = "raise cutoff_len, or give more rows" if report.dropped else "give rows that can be used"
        left = Problem("data", part, None, "has no sample left", remedy)
        super().__init__([*report.problems("bad"), *report.problems("dropped"), left])
        self.report = report


def printable(line: str) -> str:
    """A name of a column or a file may hold what no terminal takes: half a surrogate pair, bytes that are no UTF-8."""
    return line.encode("utf-8", "backslashreplace").decode()


def _tally(tallies: dict[str, Tally], reason: str, place: str) -> Tally:
    """Where a reason quotes the row, there may be as many reasons as rows: the later ones are counted as one."""
    if reason not in tallies and len(tallies) >= MOST_REASONS:
        reason = OTHER
    return tallies.setdefault(reason, Tally(0, place))


def _as_rows(packing: Packing) -> str:
    rows = f"{len(packing):,} {'row' if len(packing) == 1 else 'rows'} of up to {packing.capacity:,} tokens"
    return f"{rows}, {packing.fill:.1%} full, {len(packing.samples) / len(packing):.1f} samples a row"


def _by_count(tallies: dict[str, Tally]) -> list[tuple[str, Tally]]:
    return sorted(tallies.items(), key=lambda item: -item[1].count)


def _as_sentence(reason: str, count: int, unit: str) -> str:
    return reason if count == 1 else f"{reason} (and {count - 1:,} more {unit if count == 2 else f'{unit}s'} with it)"


def first_sample_text(sample: Sample, tokenizer: Any) -> str:
    """A sample as ids and as text, whole and only what is trained: what a run prints once, before it begins.

    A run of ignored labels is told by its length: "-100 ×31".
    """
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    trained = [label for label in labels if label != IGNORE_INDEX]
    return "\n".join(
        [
            f"first sample ({sample.place}), {len(ids)} tokens, {len(trained)} trained",
            f"input_ids: {ids}",
            f"inputs: {tokenizer.decode(ids, skip_special_tokens=False)}",
            f"label_ids: [{', '.join(_short_labels(labels))}]",
            f"labels: {tokenizer.decode(trained, skip_special_tokens=False)}",
        ]
    )


def _short_labels(labels: list[int]) -> Iterator[str]:
    ignored = 0
    for label in [*labels, None]:
        if label == IGNORE_INDEX:
            ignored += 1
            continue
        if ignored:
            yield f"{IGNORE_INDEX} ×{ignored}" if ignored > 1 else str(IGNORE_INDEX)
            ignored = 0
        if label is not None:
            yield str(label)
