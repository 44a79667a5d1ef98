"""What single settings do to a run; that its numbers do not depend on how it is cut stands in test_invariants.py."""

from __future__ import annotations

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import Stream, arguments, samples, small_model, trainer
from transformers import TrainerCallback

from burnish import workflow
from burnish.arguments.parse import parse_command
from burnish.data.loader import order_of
from burnish.errors import UserError
from burnish.model.patch import enable_gradient_checkpointing
from burnish.train.checkpoint import last_checkpoint


def places_of(run, resume=None):
    """The rows of every pass of a run, in order."""
    seen = []
    real = run.training_step
    run.training_step = lambda batch, *count, **how: seen.append(batch.places) or real(batch, *count, **how)
    run.train(resume)
    return seen


def run(folder, rows=8, kind="qwen3", callbacks=(), shape=None, **changes):
    return trainer(small_model(kind, **(shape or {})), arguments(folder, **changes), samples(rows), callbacks=callbacks)


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_the_seed_decides_the_order_and_dropout_and_data_seed_the_order_alone(tmp_path):
    def go(name, **changes):
        made = run(tmp_path / name, kind="llama", shape={"attention_dropout": 0.5}, **changes)
        return places_of(made), losses(made)

    first, again = go("a", seed=1), go("b", seed=1)
    assert first == again
    other, same_order = go("c", seed=2), go("d", seed=2, data_seed=1)
    assert other[0] != first[0]
    assert same_order[0] == first[0] and same_order[1] != first[1]
    assert go("e", seed=1, data_seed=2)[0] == other[0]


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    seen = places_of(run(tmp_path, num_train_epochs=3))
    epochs = [[place for places in seen[e * 4 : e * 4 + 4] for place in places] for e in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_resumed_run_goes_on_inside_the_epoch_unless_it_is_told_to_ignore_that(tmp_path):
    settings = dict(save_strategy="steps", save_steps=5, num_train_epochs=2)
    whole = places_of(run(tmp_path, **settings))
    place = tmp_path / "checkpoint-5"  # one step into the second epoch
    assert places_of(run(tmp_path / "on", **settings), place) == whole[5:]
    ignoring = places_of(run(tmp_path / "ignoring", ignore_data_skip=True, **settings), place)
    assert ignoring == whole[4:7]


def test_clipping_scales_the_whole_gradient_and_the_norm_before_it_is_logged(tmp_path):
    def go(name, limit):
        norms = []

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())

        made = run(tmp_path / name, rows=2, max_grad_norm=limit, callbacks=[Look])
        made.train()
        return norms[0], made.state.log_history[0]["grad_norm"]

    clipped, logged = go("clipped", 0.25)
    assert clipped == pytest.approx(0.25, rel=1e-4)
    assert logged > 0.5
    assert go("free", 0.0) == pytest.approx((logged, logged), rel=1e-5)


def test_tokens_that_were_seen_are_counted_without_padding_and_logged_where_that_is_asked_for(tmp_path):
    made = run(tmp_path / "told", include_num_input_tokens_seen="all", num_train_epochs=2)
    made.train()
    total = sum(len(row) for row in samples(8))
    assert made.state.num_input_tokens_seen == 2 * total
    told = [entry["num_input_tokens_seen"] for entry in made.state.log_history if "loss" in entry]
    assert told[3] == total and told[-1] == 2 * total
    silent = run(tmp_path / "silent")
    silent.train()
    assert all("num_input_tokens_seen" not in entry for entry in silent.state.log_history)


def test_the_loaders_options_reach_torchs_loader(tmp_path):
    made = run(
        tmp_path,
        dataloader_num_workers=2,
        dataloader_prefetch_factor=3,
        dataloader_persistent_workers=True,
        dataloader_drop_last=True,
        per_device_train_batch_size=3,
    )
    loader = made.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (2, 3, True)
    assert len(loader) == 2 and order_of(loader).drop_last
    assert loader.pin_memory is False  # nothing to pin for on a CPU
    plain = run(tmp_path).get_train_dataloader()
    assert (plain.num_workers, plain.prefetch_factor, plain.persistent_workers) == (0, None, False)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12 on
def test_workers_change_no_number(tmp_path):
    alone, worked = run(tmp_path / "a"), run(tmp_path / "b", dataloader_num_workers=2)
    alone.train(), worked.train()
    assert losses(alone) == losses(worked) and len(losses(alone)) == 4


def test_a_stream_is_trained_on_for_max_steps_and_resumed_where_it_was(tmp_path):
    settings = dict(max_steps=7, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3)

    def streamed(name):
        return trainer(small_model(), arguments(tmp_path / name, **settings), Stream(5))

    whole = streamed("whole")
    seen = places_of(whole)
    assert len(seen) == 14 and whole.state.global_step == 7
    assert [place for places in seen[:5] for place in places][:6] == [f"rows.jsonl:{n}" for n in (1, 2, 3, 4, 5, 2)]
    resumed = streamed("resumed")
    assert places_of(resumed, tmp_path / "whole" / "checkpoint-3") == seen[6:]
    assert losses(resumed) == losses(whole)


def test_a_data_set_with_no_sample_is_refused(tmp_path):
    with pytest.raises(UserError, match="gave no sample that can be trained"):
        trainer(small_model(), arguments(tmp_path, max_steps=3), Stream(0)).train()


def test_gradient_checkpointing_changes_no_loss_of_a_run(tmp_path):
    def go(name, checkpointed):
        torch.manual_seed(0)
        model = get_peft_model(small_model(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
        made = trainer(model, arguments(tmp_path / name, num_train_epochs=2), samples(8))
        if checkpointed:
            enable_gradient_checkpointing(model)
        made.train()
        return losses(made)

    plain = go("plain", False)
    assert len(plain) == 8 and go("checkpointed", True) == plain


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "hello", "output": "hi"}\n')

    def make(**changes):
        given = {
            "model_name_or_path": tmp_path / "model",
            "dataset": tmp_path / "rows.jsonl",
            "output_dir": tmp_path / "out",
        } | changes
        return parse_command("train", [f"{name}={value}" for name, value in given.items()])

    return make


def test_full_determinism_lets_torch_use_only_what_gives_the_same_every_time(settings, tmp_path, monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "as it was")
    try:
        workflow._begin(settings(full_determinism=False, seed=3))
        assert not torch.are_deterministic_algorithms_enabled()
        drawn = torch.rand(3)
        workflow._begin(settings(full_determinism=True, seed=3))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        assert torch.equal(torch.rand(3), drawn)
        made = run(tmp_path / "run", label_smoothing_factor=0.1)  # no operation of a step is refused
        made.train()
        assert len(losses(made)) == 4
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_trained_model_is_saved_with_what_stands_beside_it(tmp_path):
    made = run(tmp_path, save_strategy="epoch")
    made.beside_weights = lambda folder: (folder / "beside").write_text("here")
    made.train()
    made.save_model()
    place = last_checkpoint(tmp_path)
    assert place is not None and (place / "beside").is_file() and (tmp_path / "beside").is_file()
    assert (tmp_path / "model.safetensors").read_bytes() == (place / "model.safetensors").read_bytes()


def test_a_run_sums_up_what_it_did(tmp_path):
    made = run(tmp_path, num_train_epochs=2, logging_steps=3)
    result = made.train()
    assert result.global_step == 8
    entries = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]  # 7 and 8 are in the mean all the same
    every = run(tmp_path / "every", num_train_epochs=2)
    every.train()
    assert result.training_loss == pytest.approx(sum(losses(every)) / 8, rel=1e-6)
    assert entries[1]["loss"] == pytest.approx(sum(losses(every)[3:6]) / 3, rel=1e-6)
    assert result.metrics["train_loss"] == result.training_loss and result.metrics["train_runtime"] > 0
    embedding = made.model.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in made.model.parameters()) - embedding
    assert result.metrics["total_flos"] == 6 * weights * 2 * sum(len(row) for row in samples(8))
