"""How many tokens the steps and passes of a run have, from the lengths of its rows alone.

The order is training's own (`EpochOrder`: the same seed gives the same batches), the cut into passes too
(train/passes.py), on lengths in the place of tokens. Where rows were not read, all are as long as cutoff_len allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from burnish.data.loader import EpochOrder, Share

MOST_STEPS = 400  # that are looked at; a run of more has no other ones
UNREAD = 512  # rows in the place of those that were not read


@dataclass(frozen=True)
class Rows:
    """The training rows: tokens of each, and which share of them is trained."""

    lengths: np.ndarray  # [N]
    trained: float  # of all tokens
    source: str  # how they are known, as one line
    whole: bool  # all rows of the run, and not some of them

    @classmethod
    def unread(cls, cutoff_len: int, why: str) -> Rows:
        lengths = np.full(UNREAD, cutoff_len)
        return cls(lengths, 1.0, f"not read ({why}): every row taken as cutoff_len, {cutoff_len:,} tokens", False)

    def cut_to(self, cutoff_len: int) -> Rows:
        return replace(self, lengths=np.minimum(self.lengths, cutoff_len))


@dataclass(frozen=True)
class Batching:
    """What the settings say a step is. `most_tokens` None: the batches are the passes."""

    batch_size: int
    accumulation: int
    pack_to: int | None
    padded: bool
    ranks: int
    seed: int
    strategy: str
    max_steps: int  # -1: as many as the epochs have
    epochs: float


@dataclass(frozen=True)
class Pass:
    """One pass forward and backward of one process."""

    tokens: int  # that are computed, padding included
    real: int
    squares: float  # of the documents' lengths, added up: attention
    longest: int


Step = list[list[int]]  # for each of its batches the lengths of the documents


def steps_of(rows: Rows, batching: Batching) -> list[Step]:
    """For each step the lengths of the documents of each of its batches, in the order of training."""
    steps: list[Step] = []
    order = EpochOrder(
        len(rows.lengths),
        batching.batch_size,
        seed=batching.seed,
        strategy=batching.strategy,
        share=Share(0, batching.ranks),
        lengths=rows.lengths,
        pack_to=batching.pack_to,
    )
    wanted = MOST_STEPS if batching.max_steps < 0 else min(batching.max_steps, MOST_STEPS)
    whole_epochs = max(1, int(np.ceil(batching.epochs))) if batching.max_steps < 0 else wanted
    for epoch in range(whole_epochs):
        order.set_epoch(epoch)
        batches = iter(order)
        while len(steps) < wanted and (step := list(islice(batches, batching.accumulation))):
            steps.append([rows.lengths[batch].tolist() for batch in step if batch])
        if len(steps) >= wanted:
            break
    return [step for step in steps if step]


def passes_of(step: Step, most_tokens: int | None, *, padded: bool, fills: int = 1) -> list[Pass]:
    """The documents of a step in passes of at most so many tokens; padded batches, and None: each batch is one.

    `fills`: a pass is filled up to a multiple of so many tokens (model/graphs.py).
    """
    if padded:
        return [_padded(batch) for batch in step]
    if most_tokens is None:
        return [_end_to_end(batch, fills) for batch in step]
    return [_end_to_end(documents, fills) for documents in _cut([n for batch in step for n in batch], most_tokens)]


def _cut(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """As train/passes.py does it."""
    waiting: list[int] = []
    for length in lengths:
        if waiting and sum(waiting) + length > most_tokens:
            yield waiting
            waiting = []
        waiting.append(length)
    if waiting:
        yield waiting


def _end_to_end(lengths: Sequence[int], fills: int) -> Pass:
    total = sum(lengths)
    return Pass(-(-total // fills) * fills, total, float(sum(n * n for n in lengths)), max(lengths))


def _padded(lengths: Sequence[int]) -> Pass:
    longest = max(lengths)
    return Pass(longest * len(lengths), sum(lengths), float(longest * longest * len(lengths)), longest)
