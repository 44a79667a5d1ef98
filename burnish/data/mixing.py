"""Which rows are trained on, and which are set aside: mixing, sampling, splitting. All by index or order, from a seed.

The choices are those of the `datasets` library for the same seed (`interleave_datasets`, `train_test_split`), so that a
run moved from LLaMA-Factory sets the same rows aside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from burnish.errors import Problem, UserError

T = TypeVar("T")
Source = Callable[[], Iterable[T]]  # begins anew at each call

_DRAWS_AT_ONCE = 1000  # as datasets draws them: another number gives another order


def mix(sources: Sequence[Source[T]], strategy: str, probabilities: Sequence[float] | None, seed: int) -> Iterator[T]:
    """Rows of several sets: one set after the other, or drawn in turns until the first or the last is used up."""
    if strategy == "concat" or len(sources) == 1:
        return itertools.chain.from_iterable(source() for source in sources)
    return _interleave(sources, probabilities, seed, until_last=strategy == "interleave_over")


def _interleave(
    sources: Sequence[Source[T]], probabilities: Sequence[float] | None, seed: int, *, until_last: bool
) -> Iterator[T]:
    """Turns go around, or are drawn; a set that is used up before the end begins anew.

    Without probabilities it ends only after a whole round: [a b c] [x y] gives a x b y, or a x b y c x.
    """
    streams = [iter(source()) for source in sources]
    ahead = [next(stream) for stream in streams]  # one row ahead of each, to know when it is used up
    used_up = [probability == 0 for probability in probabilities or [1] * len(sources)]  # never drawn
    enough = all if until_last else any
    for turn, at in enumerate(_turns(len(sources), probabilities, seed), 1):
        row = ahead[at]
        try:
            ahead[at] = next(streams[at])
        except StopIteration:
            used_up[at] = True
            streams[at] = iter(sources[at]())
            ahead[at] = next(streams[at])
        yield row
        drawn = [
            done for done, share in zip(used_up, probabilities or used_up, strict=True) if share or not probabilities
        ]
        if enough(drawn) and (probabilities or turn % len(sources) == 0):
            return


def _turns(num_sources: int, probabilities: Sequence[float] | None, seed: int) -> Iterator[int]:
    if not probabilities:
        yield from itertools.cycle(range(num_sources))
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.choice(num_sources, size=_DRAWS_AT_ONCE, p=probabilities).tolist()


def sample(rows: Sequence[T], number: int, seed: int) -> list[T]:
    """`number` rows drawn without putting back; where there are fewer, all of them and then some again."""
    if not rows:  # that is told where they are read
        return []
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(rows))[:number]
    again = rng.choice(len(rows), max(number - len(rows), 0))
    return [rows[index] for index in np.concatenate([chosen, again]).tolist()]


def set_aside(num_rows: int, val_size: float, seed: int) -> np.ndarray:
    """Which rows are kept for evaluation, [num_rows] bool. Of 54 rows 0.2 are 11: a share rounds up."""
    number = math.ceil(val_size * num_rows) if val_size < 1 else int(val_size)
    if number >= num_rows:
        raise all_set_aside(val_size, num_rows)
    aside = np.zeros(num_rows, dtype=bool)
    aside[np.random.default_rng(seed).permutation(num_rows)[:number]] = True
    return aside


def all_set_aside(val_size: float, num_rows: int) -> UserError:
    rows = "the only row" if num_rows == 1 else f"all of {num_rows} rows"
    message = f"would set aside {rows}"
    return UserError(Problem("data", "val_size", val_size, message, "give a smaller number, or an eval_dataset"))


def shuffled(rows: Iterable[T], buffer_size: int, seed: Sequence[int]) -> Iterator[T]:
    """A stream in an order that is random within `buffer_size` rows: each row that comes in pushes a random one out."""
    rng = np.random.default_rng(seed)
    buffer: list[T] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        at = int(rng.integers(buffer_size))
        buffer[at], row = row, buffer[at]
        yield row
    for at in rng.permutation(len(buffer)).tolist():
        yield buffer[at]
