from __future__ import annotations

import pickle

import numpy as np
import pytest

from burnish.data import store as store_module
from burnish.data.store import SampleStore
from burnish.types import IGNORE_INDEX, Sample


def sample(ids, trained, place="", documents=()):
    ids = np.array(ids, dtype=np.int32)
    return Sample(ids, np.where(np.array(trained, bool), ids, np.int32(IGNORE_INDEX)), place, documents)


SAMPLES = [
    sample([1, 2, 3], [0, 1, 1], "a.jsonl:1"),
    sample([4], [0], "b.jsonl:2"),
    sample([5, 6, 7, 8], [0, 1, 0, 1], "a.jsonl:30", (1, 3)),
    sample([9, 9], [0, 1], "somewhere"),
    sample([9, 8], [0, 0]),
]


def same(one, other):
    return (
        np.array_equal(one.input_ids, other.input_ids)
        and np.array_equal(one.labels, other.labels)
        and (one.place, one.documents) == (other.place, other.documents)
    )


def test_a_store_gives_back_the_samples_it_was_made_of():
    store = SampleStore.from_samples(iter(SAMPLES))
    assert len(store) == 5
    assert all(same(one, other) for one, other in zip(store, SAMPLES, strict=True))
    assert same(store[-1], SAMPLES[-1])
    assert (store.input_ids.dtype, store.labels.dtype) == (np.int32, np.int32)


def test_an_index_outside_is_an_index_error():
    store = SampleStore.from_samples(SAMPLES)
    for index in (5, -6):
        with pytest.raises(IndexError):
            store[index]


def test_lengths_and_trained_tokens_are_known_without_making_samples():
    store = SampleStore.from_samples(SAMPLES)
    assert store.lengths.tolist() == [len(one) for one in SAMPLES]
    assert store.num_trained.tolist() == [one.num_trained for one in SAMPLES] == [2, 0, 2, 1, 0]
    assert (store.lengths.dtype, store.num_trained.dtype) == (np.int32, np.int32)


def test_the_first_label_of_a_sample_never_counts_as_trained():
    store = SampleStore.from_samples([sample([1, 2], [1, 1]), sample([3], [1])])
    assert store.num_trained.tolist() == [1, 0]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_first_sample_with_an_id_beyond_a_number_is_found(chunk, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK", chunk)
    store = SampleStore.from_samples(SAMPLES)
    found = {ids: store.first_beyond(ids) for ids in (1, 4, 5, 9, 10)}
    assert [each and each.place for each in found.values()] == [
        "a.jsonl:1",
        "b.jsonl:2",
        "a.jsonl:30",
        "somewhere",
        None,
    ]
    assert SampleStore.from_samples([]).first_beyond(0) is None


def test_joined_stores_hold_all_samples_in_order():
    parts = [SampleStore.from_samples(SAMPLES[a:b]) for a, b in ((0, 2), (2, 2), (2, 5))]
    joined = SampleStore.concatenate(parts)
    assert all(same(one, other) for one, other in zip(joined, SAMPLES, strict=True))


def test_a_store_of_nothing_is_empty():
    for store in (SampleStore.from_samples([]), SampleStore.concatenate([])):
        assert (len(store), store.lengths.tolist(), store.num_trained.tolist()) == (0, [], [])


def test_a_store_survives_the_way_from_another_process():
    store = pickle.loads(pickle.dumps(SampleStore.from_samples(SAMPLES)))
    assert all(same(one, other) for one, other in zip(store, SAMPLES, strict=True))
