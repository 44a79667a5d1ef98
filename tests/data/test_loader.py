"""The order of samples, and what a batch holds."""

from __future__ import annotations

from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from small import Stream, samples, small_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from burnish.data.loader import (
    EpochOrder,
    Share,
    StreamOrder,
    collate,
    go_on_from,
    make_collate,
    make_loader,
    order_of,
    position_of,
)
from burnish.data.store import SampleStore
from burnish.errors import UserError
from burnish.model.head import CausalLoss
from burnish.model.probe import choose_path
from burnish.types import IGNORE_INDEX, Sample

PAD = 5


def sample(ids, trained, place="", documents=()):
    """`trained`: the positions whose labels are kept."""
    ids = np.array(ids, dtype=np.int32)
    labels = np.where(np.isin(np.arange(len(ids)), trained), ids, IGNORE_INDEX).astype(np.int32)
    return Sample(ids, labels, place, documents)


def padding_tokenizer(side="right"):
    vocabulary = {f"word{number}": number for number in range(PAD)} | {"<pad>": PAD}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary)), pad_token="<pad>", padding_side=side
    )


def indices(order):
    return [index for batch in order for index in batch]


# ---- the order -------------------------------------------------------------------------------------------------------


def test_an_epochs_order_is_a_permutation_that_seed_and_epoch_alone_decide():
    def order(seed, epoch):
        drawn = EpochOrder(50, 4, seed=seed)
        drawn.set_epoch(epoch)
        return indices(drawn)

    torch.manual_seed(1), np.random.seed(1)
    first = order(7, 3)
    torch.manual_seed(2), np.random.seed(2)
    assert order(7, 3) == first  # whatever else was drawn
    assert sorted(first) == list(range(50)) != first
    others = [order(7, 2), order(7, 4), order(8, 3), order(3, 7)]
    assert all(sorted(other) == sorted(first) and other != first for other in others)
    assert len({tuple(other) for other in others}) == 4


def test_an_order_may_be_gone_through_again():
    order = EpochOrder(9, 2, seed=0)
    order.set_epoch(1)
    assert list(order) == list(order)


@pytest.mark.parametrize("skip", [0, 1, 4, 5])
def test_skipped_batches_are_left_out_and_the_rest_is_as_it_was(skip):
    order = EpochOrder(10, 2, seed=3)
    order.set_epoch(2)
    whole = list(order)
    order.set_epoch(2, skip=skip)
    assert list(order) == whole[skip:]
    assert len(order) == 5  # of the whole epoch, or a resumed run would count other steps
    order.set_epoch(3)
    assert len(list(order)) == 5  # the next epoch is whole


@pytest.mark.parametrize("drop_last, sizes", [(False, [4, 4, 2]), (True, [4, 4])])
def test_the_last_batch_may_be_smaller_or_dropped(drop_last, sizes):
    order = EpochOrder(10, 4, seed=0, drop_last=drop_last)
    assert [len(batch) for batch in order] == sizes and len(order) == len(sizes)


def test_without_shuffling_rows_come_as_they_stand():
    assert list(EpochOrder(5, 2, seed=42, strategy="sequential")) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("of", [2, 3])
def test_processes_share_every_batch_among_them(of):
    whole = EpochOrder(43, 2 * of, seed=5)
    shares = [EpochOrder(43, 2, seed=5, share=Share(rank, of)) for rank in range(of)]
    assert {len(share) for share in shares} == {len(whole)}  # as many passes in each
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(indices(parts)) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_processes_share_a_stream_among_them():
    rows = samples(10)
    seen = [[row.place for row in islice(StreamOrder(Stream(10), Share(rank, 2)), 5)] for rank in range(2)]
    assert seen == [[row.place for row in rows[0::2]], [row.place for row in rows[1::2]]]


def test_grouped_by_length_a_batch_holds_samples_of_about_one_length_and_the_longest_come_first():
    lengths = np.random.default_rng(0).integers(1, 1000, 1001)
    order = EpochOrder(1001, 4, seed=1, strategy="group_by_length", lengths=lengths)
    batches = list(order)
    assert sorted(indices(batches)) == list(range(1001))
    assert max(lengths[batches[0]]) == max(lengths)
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 0.05 * np.mean([np.ptp(lengths[batch]) for batch in EpochOrder(1001, 4, seed=1)])
    order.set_epoch(1)
    assert list(order) != batches


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_grouped_by_length_an_epoch_is_shared_and_taken_up_again_as_any_other(processes):
    lengths = np.random.default_rng(1).integers(1, 500, 403)
    make = partial(EpochOrder, 403, seed=1, strategy="group_by_length", lengths=lengths)
    alone = list(make(2 * processes))
    shares = [make(2, share=Share(rank, processes)) for rank in range(processes)]
    assert [sorted(indices(parts)) for parts in zip(*shares, strict=True)] == [sorted(batch) for batch in alone]
    drawn = make(2)
    whole = list(drawn)
    drawn.set_epoch(0, skip=7)
    assert list(drawn) == whole[7:] and list(make(2)) == whole
    assert list(EpochOrder(403, 2, seed=2, strategy="group_by_length", lengths=lengths)) != whole


def test_a_loader_groups_a_store_by_its_lengths():
    store = SampleStore.from_samples(samples(60, longest=200))
    loader = make_loader(store, 4, collate, seed=0, strategy="group_by_length")
    assert next(iter(loader)).inputs["max_length_q"] == store.lengths.max()


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_process_with_no_row_of_a_batch_computes_a_pass_that_teaches_nothing(padding_free):
    model = small_model()
    path = choose_path(model) if padding_free else None
    make = make_collate(padding_tokenizer(), padding_free=padding_free)
    batch = make([])
    assert (batch.num_trained, batch.num_tokens, batch.places) == (0, 0, ())
    loss = CausalLoss(model, fused=bool(path and path.fused_head))(batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ---- samples laid end to end -----------------------------------------------------------------------------------------


def test_samples_are_laid_end_to_end_and_borders_say_where_each_begins():
    batch = collate([sample([10, 11, 12], [0, 1, 2], "a:1"), sample([13, 14], [1], "a:2")])
    inputs = batch.inputs
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 13, 14]] and inputs["input_ids"].dtype == torch.int64
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert (inputs["max_length_q"], inputs["max_length_k"]) == (3, 3) and type(inputs["max_length_q"]) is int
    assert "attention_mask" not in inputs
    assert batch.labels.tolist() == [[IGNORE_INDEX, 11, 12, IGNORE_INDEX, 14]]
    assert batch.trained_at.tolist() == [0, 1, 3] and batch.targets.tolist() == [11, 12, 14]
    assert (batch.num_trained, batch.num_tokens, batch.places) == (3, 5, ("a:1", "a:2"))


def test_a_sample_of_several_documents_has_a_border_at_each():
    whole = sample([10, 11, 12, 13, 14, 15], range(6), documents=(2, 4))
    batch = collate([whole, sample([16], [0])])
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 2, 6, 7]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 0]]
    assert batch.inputs["max_length_q"] == 4
    assert batch.targets.tolist() == [11, 13, 14, 15]  # nothing predicts 10, 12 and 16


def test_the_last_token_of_a_sample_predicts_nothing_of_the_next():
    batch = collate([sample([10, 11], []), sample([12, 13], [0, 1])])
    assert batch.trained_at.tolist() == [2] and batch.targets.tolist() == [13]


def test_the_store_keeps_its_own_when_a_batch_is_made_of_it():
    store = SampleStore.from_samples([sample([10, 11], [0, 1], "rows.jsonl:1")])
    collate([store[0]])
    assert store.labels.tolist() == [10, 11]


# ---- padded batches --------------------------------------------------------------------------------------------------


def test_padded_batches_are_padded_to_a_multiple_of_8_and_padding_is_not_trained():
    rows = [sample([10, 11, 12], [1, 2], "a:1"), sample(range(20, 29), [0, 8], "a:2")]
    batch = make_collate(padding_tokenizer(), padding_free=False)(rows)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert ids.shape == mask.shape == batch.labels.shape == (2, 16)
    assert ids[0].tolist() == [10, 11, 12] + [PAD] * 13 and ids[1, :9].tolist() == list(range(20, 29))
    assert mask.sum(1).tolist() == [3, 9]
    assert batch.labels[0].tolist() == [IGNORE_INDEX, 11, 12] + [IGNORE_INDEX] * 13
    assert batch.labels[1, 0] == IGNORE_INDEX  # nothing predicts it, though the sample had it trained
    assert batch.trained_at.tolist() == [0, 1, 16 + 7] and batch.targets.tolist() == [11, 12, 28]
    assert (batch.num_trained, batch.num_tokens, batch.places) == (3, 12, ("a:1", "a:2"))
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    exact = make_collate(padding_tokenizer(), padding_free=False)([sample(range(8), [7])])
    assert exact.inputs["input_ids"].shape == (1, 8)


def test_both_kinds_of_batch_train_the_same_tokens():
    rows = samples(6)
    padded = make_collate(padding_tokenizer(), padding_free=False)(rows)
    packed = make_collate(padding_tokenizer(), padding_free=True)(rows)
    assert "cu_seq_lens_q" in packed.inputs and "cu_seq_lens_q" not in padded.inputs
    assert packed.targets.tolist() == padded.targets.tolist()
    assert (packed.num_trained, packed.num_tokens) == (padded.num_trained, padded.num_tokens)
    assert packed.num_trained == sum(row.num_trained for row in rows)


@pytest.mark.parametrize("padding_free", [True, False])
def test_training_on_padding_makes_padded_batches_whose_labels_are_the_pad_token(padding_free):
    collate_all = make_collate(padding_tokenizer(), padding_free=padding_free, ignore_pad_token_for_loss=False)
    batch = collate_all([sample([10, 11, 12], [2]), sample(range(20, 28), [7])])
    assert batch.inputs["input_ids"].shape == (2, 8)
    assert batch.labels[0].tolist() == [IGNORE_INDEX, IGNORE_INDEX, 12] + [PAD] * 5
    assert batch.targets.tolist() == [12] + [PAD] * 5 + [27]
    assert batch.num_trained == 7 and batch.num_tokens == 11


def test_an_empty_share_trains_no_padding():
    batch = make_collate(padding_tokenizer(), padding_free=False, ignore_pad_token_for_loss=False)([])
    assert (batch.num_trained, batch.num_tokens, batch.targets.tolist()) == (0, 0, [])
    assert set(batch.labels.flatten().tolist()) == {IGNORE_INDEX}


def test_token_type_ids_are_made_only_for_a_model_that_takes_them():
    rows = [sample([10, 11], [1]), sample([12, 13, 14], [1])]
    with_types = make_collate(padding_tokenizer(), padding_free=False, takes_token_type_ids=True)(rows)
    assert with_types.inputs["token_type_ids"].tolist() == [[0] * 8] * 2
    assert "token_type_ids" not in make_collate(padding_tokenizer(), padding_free=False)(rows).inputs


# ---- the loader ------------------------------------------------------------------------------------------------------


def places(loader):
    return [batch.places for batch in loader]


def test_a_loader_gives_the_batches_of_its_order_from_where_it_is_told():
    rows = samples(11)
    loader = make_loader(rows, 3, collate, seed=5)
    order = EpochOrder(11, 3, seed=5)
    for epoch, skip in [(0, 0), (1, 2), (2, 4)]:
        order_of(loader).set_epoch(epoch, skip=skip)
        order.set_epoch(epoch, skip=skip)
        assert places(loader) == [tuple(rows[index].place for index in batch) for batch in order]
    assert len(loader) == 4


def test_a_loader_leaves_the_global_random_numbers_alone():
    before = torch.get_rng_state()
    list(make_loader(samples(4), 2, collate, seed=5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12 on
def test_workers_give_the_same_batches_epoch_after_epoch():
    store = SampleStore.from_samples(samples(9))
    options = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 2}
    alone = make_loader(store, 2, collate, seed=5)
    worked = make_loader(store, 2, collate, seed=5, options=options)
    for epoch, skip in [(0, 0), (1, 2)]:
        for loader in (alone, worked):
            order_of(loader).set_epoch(epoch, skip=skip)
        pairs = list(zip(alone, worked, strict=True))
        assert len(pairs) == 5 - skip
        for ours, theirs in pairs:
            assert ours.places == theirs.places
            assert torch.equal(ours.inputs["input_ids"], theirs.inputs["input_ids"])
            assert torch.equal(ours.labels, theirs.labels) and ours.num_trained == theirs.num_trained


def test_batches_move_to_a_device_whole():
    batch = collate(samples(2))
    moved = batch.to(torch.device("meta"))
    tensors = [value for value in moved.inputs.values() if isinstance(value, torch.Tensor)]
    assert {t.device.type for t in [*tensors, moved.labels, moved.trained_at, moved.targets]} == {"meta"}
    assert moved.inputs["max_length_q"] == batch.inputs["max_length_q"] and moved.places == batch.places


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_begun_again_in_another_order_when_it_ends():
    batches = iter(make_loader(Stream(3), 2, collate, seed=0))
    seen = [place for _ in range(4) for place in next(batches).places]
    numbers = [int(place.split(":")[1]) for place in seen]
    assert numbers == [1, 2, 3, 2, 3, 1, 3, 1]


@pytest.mark.parametrize("share", [Share(), Share(0, of=3), Share(1, of=3)])
@pytest.mark.parametrize("batches_before", [1, 2, 3, 4, 5, 6])
def test_a_stream_is_taken_up_after_any_batch(batches_before, share):
    whole, resumed = (make_loader(Stream(4), 2, collate, seed=0, share=share) for _ in range(2))
    batches, again = iter(whole), iter(resumed)
    for _ in range(batches_before):
        next(batches)
    go_on_from(resumed, position_of(whole))
    order_of(resumed).set_epoch(0, skip=batches_before)
    assert [next(again).places for _ in range(7)] == [next(batches).places for _ in range(7)]
    order_of(resumed).set_epoch(0)
    assert next(iter(resumed)).places == next(iter(make_loader(Stream(4), 2, collate, seed=0, share=share))).places


def test_a_stream_cannot_go_on_in_a_run_that_was_not_streamed():
    rows = samples(4)
    plain, streamed = make_loader(rows, 2, collate, seed=0), make_loader(Stream(4), 2, collate, seed=0)
    go_on_from(plain, position_of(plain))
    with pytest.raises(UserError, match="streaming cannot go on in a run that was not streamed"):
        go_on_from(streamed, position_of(plain))


def test_an_empty_stream_ends_at_once():
    assert list(make_loader(Stream(0), 2, collate, seed=0)) == []


def test_a_stream_is_read_by_one_process_whatever_the_options():
    """Two readers would each give every row."""
    options = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 2}
    batches = iter(make_loader(Stream(3), 3, collate, seed=0, options=options))
    assert [next(batches).places for _ in range(2)] == [
        ("rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"),
        ("rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:1"),
    ]


def test_the_documents_of_a_sample_become_padded_rows_of_their_own():
    row = sample(range(7), trained=[1, 2, 4, 5, 6], place="a.txt:1", documents=(3, 4))
    batch = make_collate(padding_tokenizer(), padding_free=False)([row])
    assert batch.inputs["attention_mask"].sum(1).tolist() == [3, 4]
    assert batch.inputs["input_ids"][1, :4].tolist() == [3, 4, 5, 6]
    assert (batch.num_trained, batch.num_tokens, batch.places) == (5, 7, ("a.txt:1",))
