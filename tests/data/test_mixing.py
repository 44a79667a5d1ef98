from __future__ import annotations

from functools import partial

import datasets
import numpy as np
import pytest

from burnish.data.mixing import mix, sample, set_aside, shuffled
from burnish.errors import UserError

SETS = [[f"{name}{number}" for number in range(length)] for name, length in (("a", 30), ("b", 40), ("c", 12))]
SOURCES = [partial(iter, rows) for rows in SETS]


def by_datasets(strategy, probabilities, seed):
    sets = [datasets.Dataset.from_dict({"row": rows}) for rows in SETS]
    stop = {"interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}[strategy]
    return datasets.interleave_datasets(sets, probabilities=probabilities, seed=seed, stopping_strategy=stop)["row"]


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("probabilities", [None, [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
def test_sets_are_interleaved_as_the_datasets_library_does(strategy, probabilities, seed):
    assert list(mix(SOURCES, strategy, probabilities, seed)) == list(by_datasets(strategy, probabilities, seed))


def test_a_set_of_probability_zero_is_left_out_and_ends_nothing():
    for strategy in ("interleave_under", "interleave_over"):
        rows = list(mix(SOURCES, strategy, [0.5, 0.5, 0.0], 1))
        assert not any(row.startswith("c") for row in rows)
    assert set(rows) == {*SETS[0], *SETS[1]}


def test_concatenated_sets_follow_each_other():
    assert list(mix(SOURCES, "concat", None, 0)) == [*SETS[0], *SETS[1], *SETS[2]]


@pytest.mark.parametrize(("rows", "val_size"), [(54, 0.2), (54, 0.5), (10, 0.01), (100, 7), (100, 1), (43, 0.3)])
def test_rows_are_set_aside_as_the_datasets_library_does(rows, val_size):
    number = val_size if val_size < 1 else int(val_size)
    theirs = datasets.Dataset.from_dict({"row": list(range(rows))}).train_test_split(test_size=number, seed=42)
    aside = set_aside(rows, val_size, 42)
    assert np.flatnonzero(~aside).tolist() == sorted(theirs["train"]["row"])
    assert np.flatnonzero(aside).tolist() == sorted(theirs["test"]["row"])


def test_54_rows_with_a_fifth_set_aside_are_43_and_11():
    aside = set_aside(54, 0.2, 1)
    assert ((~aside).sum(), aside.sum()) == (43, 11)


@pytest.mark.parametrize(("rows", "val_size"), [(1, 0.1), (5, 5), (5, 9)])
def test_setting_all_rows_aside_is_refused(rows, val_size):
    with pytest.raises(UserError, match=r"val_size .* would set aside (all of|the only row)"):
        set_aside(rows, val_size, 0)


def test_samples_are_drawn_without_putting_back_until_all_are_drawn():
    assert len(set(sample(range(100), 30, 0))) == 30
    more = sample(range(10), 25, 0)
    assert (len(more), set(more)) == (25, set(range(10)))
    assert sample(range(100), 30, 0) == sample(range(100), 30, 0) != sample(range(100), 30, 1)


def test_a_shuffled_stream_gives_every_row_once_in_an_order_of_its_seed():
    orders = [list(shuffled(range(100), 10, (42, epoch))) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(100)) != orders[0]
    assert sorted(shuffled(range(3), 10, (0, 0))) == [0, 1, 2]
    assert list(shuffled([], 10, (0, 0))) == []


def test_a_row_is_never_given_earlier_than_the_buffer_allows():
    order = list(shuffled(range(100), 10, (42, 0)))
    assert all(row <= at + 10 for at, row in enumerate(order))
