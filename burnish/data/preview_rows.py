"""Which rows are shown token by token, and how one of them is taken apart.

The first ones, as a person expects; and on a page also those that are worth a look: the longest, the shortest, one for
each thing that samples lost, repeated ones, and random ones for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from burnish.data.equal_rows import Equals
from burnish.data.store import SampleStore
from burnish.data.token_texts import TokenTexts
from burnish.types import IGNORE_INDEX, Sample

MOST_TOKENS = 300_000  # of all rows that are shown: about 6 MB of a page
OF_EACH_END = 5  # longest, shortest
OF_EQUALS = 5

Tags = dict[tuple[str, int], list[str]]  # (part, index of its row) → why it is shown


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one document that are all trained, or all not."""

    texts: tuple[str | None, ...]  # as TokenTexts gives them
    ids: tuple[int, ...]
    trained: bool
    begins_document: bool  # another one than the run before: its tokens see none of those before them


@dataclass(frozen=True)
class ShownRow:
    part: str
    index: int  # in its part, from 0
    place: str
    tags: tuple[str, ...]  # why this one is shown: "first", "cut: oldest turns"
    runs: tuple[Run, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(run.ids) for run in self.runs)

    @property
    def num_trained(self) -> int:
        return sum(len(run.ids) for run in self.runs if run.trained)


def first_rows(parts: Mapping[str, SampleStore], count: int) -> Tags:
    """The first ones of the first part that has any."""
    name = next((name for name, store in parts.items() if len(store)), None)
    return {} if name is None else {(name, index): ["first"] for index in range(min(count, len(parts[name])))}


def rows_worth_a_look(
    parts: Mapping[str, SampleStore],
    count: int,
    lost: Mapping[str, str],
    repeated: Mapping[str, Equals],
    shared: Mapping[str, Equals],
    seed: int,
) -> Tags:
    """About `count` rows of all parts; the rarer the reason, the earlier. `lost`: what was cut → place of the first."""
    tags: Tags = {}

    def tag(part: str, indices: Iterable[int], why: str) -> None:
        for index in indices:
            tags.setdefault((part, int(index)), []).append(why)

    for name, index, why in _lost(parts, lost):
        tag(name, [index], why)
    for name, store in parts.items():
        by_length = np.argsort(store.lengths, kind="stable")
        few = min(OF_EACH_END, len(store) // 4 + 1)
        tag(name, by_length[::-1][:few], "longest")
        tag(name, by_length[:few], "shortest")
    for name, equals in repeated.items():
        for index, earlier in equals.rows[:OF_EQUALS]:
            tag(name, dict.fromkeys((earlier, index)), "duplicate")
    for name, equals in shared.items():
        for index, in_train in equals.rows[:OF_EQUALS]:
            tag(name, [index], "in train and evaluation")
            tag("train", [in_train], "in train and evaluation")
    room = max(count - len(tags), count // 2)
    sizes = _divided(room, {name: len(store) for name, store in parts.items()})
    rng = np.random.default_rng(seed)
    for name, size in sizes.items():
        tag(name, range(size // 2 + size % 2), "first")
        tag(name, np.sort(rng.permutation(len(parts[name]))[: size // 2]), "random")
    return {row: list(dict.fromkeys(why)) for row, why in tags.items()}


def _lost(parts: Mapping[str, SampleStore], lost: Mapping[str, str]) -> Iterator[tuple[str, int, str]]:
    """(part, index, what was cut). Of several samples of one row, the longest is taken for the one that was cut."""
    found: dict[str, tuple[str, int, int]] = {}
    places = set(lost.values())
    for name, store in parts.items():
        for index, sample in enumerate(store) if places else ():
            if sample.place in places and len(sample) > found.get(sample.place, ("", 0, 0))[2]:
                found[sample.place] = name, index, len(sample)
    for why, place in lost.items():
        if place in found:
            yield *found[place][:2], why


def _divided(room: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Room for each part by its size; a little for the smallest too."""
    total = max(sum(sizes.values()), 1)
    return {name: min(size, max(room * size // total, min(room, 6))) for name, size in sizes.items()}


def show(parts: Mapping[str, SampleStore], tags: Tags, texts: TokenTexts) -> Iterator[ShownRow]:
    """The tagged rows in the order of their parts, as many as MOST_TOKENS allow; the first tagged are the last left."""
    room, kept = MOST_TOKENS, []
    for name, index in tags:
        length = int(parts[name].lengths[index])
        if kept and length > room:
            continue
        room -= length
        kept.append((name, index))
    order = {name: at for at, name in enumerate(parts)}
    for name, index in sorted(kept, key=lambda row: (order[row[0]], row[1])):
        sample = parts[name][index]
        yield ShownRow(name, index, sample.place, tuple(tags[name, index]), tuple(runs_of(sample, texts)))


def runs_of(sample: Sample, texts: TokenTexts) -> Iterator[Run]:
    """A token is trained where the loss looks at it; a row's first one never is, as nothing predicts it."""
    trained = sample.labels != IGNORE_INDEX
    trained[0] = False
    begins = np.zeros(len(sample), dtype=bool)
    begins[np.cumsum(sample.documents, dtype=np.int64)[:-1]] = True
    borders = np.flatnonzero(begins | np.append(False, trained[1:] != trained[:-1]))
    for start, end in zip([0, *borders], [*borders, len(sample)], strict=True):
        ids = sample.input_ids[start:end].tolist()
        yield Run(texts.of(ids), tuple(ids), bool(trained[start]), bool(begins[start]))
