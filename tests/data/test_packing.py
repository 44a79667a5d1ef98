"""Which samples share a row, against a best fit that one can read; and what packing makes of an epoch and of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from small import SHAPE, samples, small_model
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, TrainerCallback

from burnish.arguments.parse import parse_command
from burnish.data.loader import EpochOrder, Share, collate, make_loader, order_of
from burnish.data.packing import pack
from burnish.data.report import DataReport
from burnish.data.store import SampleStore
from burnish.errors import UserError
from burnish.workflow import run_train


def drawn(seed, most=300):
    """(lengths, capacity): of many kinds, some with hardly two samples of one length, some with nothing else."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(3, 200))
    lengths = rng.lognormal(1 + seed % 4, 1, rng.integers(0, most)).astype(int) + 1
    return np.minimum(lengths, capacity), capacity


def best_fit_decreasing(lengths, capacity):
    """The room that is left in each row, one sample after the other."""
    rooms = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return rooms


def rooms_left(packing, lengths):
    return [packing.capacity - int(lengths[row].sum()) for row in packing]


def companions(packing):
    """Pairs of samples that share a row."""
    return {(a, b) for row in packing for a in row for b in row if a < b}


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_the_example_of_the_docstring():
    assert list(pack(np.array([5, 2, 3, 4]), 7)) == [[0, 1], [3, 2]]


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_best_fit_one_sample_after_the_other(seed):
    lengths, capacity = drawn(seed)
    assert sorted(rooms_left(pack(lengths, capacity), lengths)) == sorted(best_fit_decreasing(lengths, capacity))


@pytest.mark.parametrize("seed", range(40))
def test_every_draw_holds_each_sample_once_and_whole_in_as_many_rows(seed):
    lengths, capacity = drawn(seed)
    number = len(best_fit_decreasing(lengths, capacity))
    for draw in range(4):
        packing = pack(lengths, capacity, np.random.default_rng([seed, draw]))
        assert sorted(packing.samples.tolist()) == list(range(len(lengths)))
        assert len(packing) == number
        assert all(0 <= room < capacity for room in rooms_left(packing, lengths))  # and no row is empty
        assert packing.num_tokens == lengths.sum()


def test_even_a_set_without_two_samples_of_one_length_has_other_rows_in_each_draw():
    lengths = np.random.default_rng(0).permutation(np.arange(1, 400))
    one, other, same = (pack(lengths, 2000, np.random.default_rng(draw)) for draw in (1, 2, 1))
    assert companions(one) == companions(same)
    assert len(companions(one) & companions(other)) < 0.3 * len(companions(one))


def test_a_large_set_has_other_rows_by_chance_among_equals_alone():
    lengths = np.random.default_rng(0).integers(1, 60, 4000)
    one, other = (companions(pack(lengths, 100, np.random.default_rng(draw))) for draw in (1, 2))
    assert len(one & other) < 0.1 * len(one)


@pytest.mark.parametrize("lengths", [[3, 9], [0, 3]])
def test_a_sample_that_no_row_can_hold_is_an_error_and_not_cut(lengths):
    with pytest.raises(ValueError, match="do not go into rows of 8"):
        pack(np.array(lengths), 8)


@pytest.mark.parametrize("capacity", [2048, 8192])
def test_a_million_lengths_are_packed_in_under_two_seconds_and_99_percent_full(capacity):
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.3, 1, 1_000_000).astype(int) + 1, capacity)
    begun = time.process_time()  # of this process alone, whoever else is at work
    packing = pack(lengths, capacity, np.random.default_rng(1))
    assert time.process_time() - begun < 2
    assert packing.fill > 0.99


def test_rows_are_99_percent_full_on_real_lengths(fixture_path):
    """Texts of LLaMA-Factory's demo rows; benchmarks/packing.py measures more sets, as they are trained."""
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("tokenizer-qwen3"))
    rows = json.loads((fixture_path("llamafactory-data") / "data" / "alpaca_en_demo.json").read_text("utf-8"))
    texts = [row["instruction"] + row["input"] + row["output"] for row in rows]
    lengths = np.array([len(ids) for ids in tokenizer(texts).input_ids])
    for capacity in (2048, 8192):
        packing = pack(lengths, capacity, np.random.default_rng(0))
        assert len(packing) == -(-lengths.sum() // capacity)  # no packing needs fewer
        assert np.sort(rooms_left(packing, lengths))[:-1].mean() < 0.01 * capacity  # the last is what is left


# ---- an epoch --------------------------------------------------------------------------------------------------------


def order(epoch=0, skip=0, **how):
    made = EpochOrder(len(LENGTHS), how.pop("batch_size", 2), seed=7, lengths=LENGTHS, pack_to=50, **how)
    made.set_epoch(epoch, skip=skip)
    return made


LENGTHS = np.array([len(sample) for sample in samples(80)])


def test_a_batch_is_rows_and_an_epoch_all_of_them_in_an_order_that_seed_and_epoch_decide():
    first, again, later = list(order()), list(order()), list(order(epoch=1))
    assert first == again != later
    assert len(first) == len(later) == len(order()) == -(-len(pack(LENGTHS, 50)) // 2)
    for batches in (first, later):
        assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
        assert all(LENGTHS[batch].sum() <= 2 * 50 for batch in batches)
        assert max(len(batch) for batch in batches) > 2


def test_a_resumed_epoch_has_the_rows_that_were_left():
    whole = list(order(epoch=3))
    assert list(order(epoch=3, skip=5)) == whole[5:]
    assert len(order(epoch=3, skip=5)) == len(whole)


@pytest.mark.parametrize("of", [2, 3])
def test_processes_share_a_batch_by_whole_rows(of):
    whole = list(order(batch_size=2 * of))
    shares = [list(order(share=Share(rank, of))) for rank in range(of)]
    rows = {frozenset(row) for row in order()._packing(np.random.default_rng([7, 0]))}
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(index for part in parts for index in part) == sorted(batch)
        for part in parts:
            held = [row for row in rows if row <= set(part)]
            assert len(held) <= 2 and sum(map(len, held)) == len(part)


def test_in_sequence_rows_come_by_their_first_samples_in_every_epoch():
    batches = list(order(batch_size=1, strategy="sequential"))
    firsts = [min(batch) for batch in batches]
    assert firsts == sorted(firsts) and batches == list(order(epoch=1, batch_size=1, strategy="sequential"))


def test_dropping_the_last_batch_drops_rows():
    number = len(pack(LENGTHS, 50))
    assert len(list(order(batch_size=number - 1))) == 2
    assert len(list(order(batch_size=number - 1, drop_last=True))) == 1


def test_a_loader_lays_the_samples_of_its_rows_end_to_end():
    store = SampleStore.from_samples(samples(80))
    loader = make_loader(store, 2, collate, seed=7, pack_to=50)
    order_of(loader).set_epoch(1)
    batches = list(loader)
    assert len(loader) == len(batches)
    assert [batch.places for batch in batches] == [
        tuple(store[index].place for index in indices) for indices in order(epoch=1)
    ]
    assert all(batch.inputs["input_ids"].shape[1] == batch.num_tokens <= 100 for batch in batches)
    assert all(len(batch.inputs["cu_seq_lens_q"]) == len(batch.places) + 1 for batch in batches)
    assert sum(batch.num_trained for batch in batches) == store.num_trained.sum()


def test_the_report_says_how_many_rows_there_are_and_how_full():
    report = DataReport(packed=pack(np.array([5, 2, 3, 3]), 7))
    assert report.lines() == ["  packed: 2 rows of up to 7 tokens, 92.9% full, 2.0 samples a row"]
    report = DataReport(packed=pack(np.array([5]), 1000))
    assert report.lines() == ["  packed: 1 row of up to 1,000 tokens, 0.5% full, 1.0 samples a row"]


# ---- a run -----------------------------------------------------------------------------------------------------------


class Batches(TrainerCallback):
    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.steps, self.batches = state.max_steps, list(train_dataloader)


@pytest.fixture(scope="module")
def base(fixture_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("smollm2"))
    small_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"instruction": f"question {n}", "output": "word " * (n % 9 + 1)} for n in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": folder / "model", "dataset": folder / "rows.jsonl", "output_dir": folder / "out",
        "overwrite_output_dir": True, "finetuning_type": "full", "cutoff_len": 128, "packing": True,
        "per_device_train_batch_size": 1, "num_train_epochs": 2, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip


def settings(base, **changes):
    return parse_command("train", [f"{name}={value}" for name, value in {**base, **changes}.items()])


def problems(base, **changes):
    with pytest.raises(UserError) as caught:
        settings(base, **changes)
    return [str(problem).partition(": ")[2] for problem in caught.value.problems]


def test_a_packed_run_makes_a_step_of_each_row_of_its_set_and_says_how_full_they_are(base, capsys):
    seen = Batches()
    run_train(settings(base), [seen])
    rows = len(seen.batches)
    assert seen.steps == 2 * rows and 8 < rows < 16
    places = [place for batch in seen.batches for place in batch.places]
    assert len(places) == len(set(places)) == 30
    assert f"packed: {rows} rows of up to 128 tokens" in capsys.readouterr().out


def test_what_cannot_be_packed_is_told_before_anything_is_loaded(base):
    assert problems(base, streaming=True, max_steps=2) == [
        "packing True needs all rows at hand, not a stream; leave one of them out"
    ]
    assert problems(base, group_by_length=True) == [
        "packing True and train_sampling_strategy: group_by_length exclude each other; "
        "leave one out, packed rows have one length"
    ]
    assert problems(base, flash_attn="sdpa") == [
        "packing True needs an attention that keeps samples apart, and flash_attn asks for the model's own; "
        "set flash_attn: auto"
    ]
    assert problems(base, ignore_pad_token_for_loss=False) == [
        "packing True leaves no padding for ignore_pad_token_for_loss: false; leave one out"
    ]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_texts_are_in_full_rows_whatever_packing_says(base, packing):
    told = settings(base, stage="pt", packing=packing).translated
    assert told == [("packing", "", "has no effect in stage pt: its rows are always full")]


@pytest.mark.filterwarnings("ignore")  # of a Mamba without its kernels
def test_a_model_that_keeps_state_between_tokens_is_not_packed_and_the_reason_is_told(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(Path(base["model_name_or_path"]))
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=SHAPE["pad_token_id"]
    )
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match=r"packing True needs samples laid end to end.*Mamba.*leave it out"):
        run_train(settings(base, model_name_or_path=tmp_path / "mamba"))
