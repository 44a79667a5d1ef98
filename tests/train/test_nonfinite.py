"""A loss or gradient that is not finite: not applied, the run stops, and the rows and the module are named."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import VOCABULARY, arguments, samples, small_model, trainer
from torch import nn
from transformers import TrainerCallback

from burnish.errors import RunStopped
from burnish.train import checkpoint
from burnish.train.nonfinite import FiniteGuard, StepRecord
from burnish.train.optimizer import LocalUpdate

TOKEN = VOCABULARY - 1  # stands in one row only


def rows_with_a_token(count, at):
    """Rows of which the one at index `at` holds TOKEN in an untrained place, and no other does."""
    rows = samples(count)
    for row in rows:
        row.input_ids[row.input_ids == TOKEN] = 3
        row.labels[row.labels == TOKEN] = 3
    rows[at].input_ids[1] = TOKEN
    return rows


class Infect(TrainerCallback):
    """Puts a value into a weight right before a step, as a bad rounding would."""

    def __init__(self, step, infect):
        self.step, self.infect, self.before = step, infect, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.infect(model)
            self.before = {name: weight.clone() for name, weight in model.state_dict().items()}


def embed(model):
    return model.get_input_embeddings().weight.data


def infect_embedding(model):
    embed(model)[TOKEN] = float("nan")


def run_until_it_stops(folder, rows, infect=infect_embedding, step=1, model=None, **changes):
    callback = Infect(step, infect)
    run = trainer(model or small_model(), arguments(folder, **changes), rows, callbacks=[callback])
    with pytest.raises(RunStopped) as stopped:
        run.train()
    return run, callback, stopped.value


def step_of_row(folder, rows, place, **changes):
    """The number of the step that takes the row from `place`: an undisturbed run tells."""
    seen = []
    run = trainer(small_model(), arguments(folder, **changes), rows)
    real = run._optimizer_step

    def note(batches, *where):
        seen.append([place for batch in batches for place in batch.places])
        real(batches, *where)

    run._optimizer_step = note
    run.train()
    return next(number for number, places in enumerate(seen, start=1) if place in places), seen


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_nan_of_one_row_stops_the_run_at_its_step_and_names_step_row_and_module(accumulation, tmp_path):
    rows, changes = rows_with_a_token(12, at=8), dict(gradient_accumulation_steps=accumulation)
    step, seen = step_of_row(tmp_path / "well", rows, "rows.jsonl:9", **changes)
    _, _, stopped = run_until_it_stops(tmp_path / "ill", rows, **changes)
    text = str(stopped)
    assert stopped.status == 1
    assert text.startswith(f"step {step}: the loss or its gradient is not finite. The step was not applied")
    named = [line for line in text.splitlines() if line.startswith("  rows ")]
    assert len(named) == 1  # of the step's passes only the one with the row
    places, fault = named[0].removeprefix("  rows ").split(": ", maxsplit=1)
    batch = [place for place in seen[step - 1] if place in places.split(", ")]
    assert "rows.jsonl:9" in batch and places == ", ".join(batch) and len(batch) == 2
    assert fault == "the first value that is not finite comes out of model.embed_tokens (Embedding)"
    assert "--learning_rate" in text.splitlines()[-1]


def test_the_step_is_not_applied_and_the_checkpoint_holds_what_was_before(tmp_path):
    rows = rows_with_a_token(12, at=8)
    step, _ = step_of_row(tmp_path / "well", rows, "rows.jsonl:9")
    assert step > 2
    run, callback, stopped = run_until_it_stops(
        tmp_path / "ill", rows, step=step, save_strategy="steps", save_steps=100
    )
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight.nan_to_num(7.0), callback.before[name].nan_to_num(7.0)), name
    place = tmp_path / "ill" / f"checkpoint-{step - 1}"
    assert checkpoint.checkpoints(tmp_path / "ill") == [place]
    assert f"the weights from before it are in {place}" in str(stopped)
    state = json.loads((place / "trainer_state.json").read_text())
    assert state["global_step"] == step - 1 and state["epoch"] == pytest.approx((step - 1) / 6)
    assert [entry["step"] for entry in state["log_history"]] == list(range(1, step))
    assert all(entry["loss"] < 10 for entry in state["log_history"])


def test_a_run_goes_on_from_there_once_the_cause_is_gone(tmp_path):
    """The same weights, rate and losses as if nothing had happened."""
    rows, changes = rows_with_a_token(12, at=8), dict(num_train_epochs=2, logging_steps=4, warmup_steps=3)
    step, _ = step_of_row(tmp_path / "first", rows, "rows.jsonl:9", **changes)

    def break_head(model):
        model.model.norm.weight.data[0] = float("inf")

    run_until_it_stops(tmp_path / "ill", rows, infect=break_head, step=step, **changes)
    mended = trainer(small_model(), arguments(tmp_path / "ill", **changes), rows)

    class Mend(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.model.norm.weight.data[0] = self.value

    mend = Mend()
    well = trainer(small_model(), arguments(tmp_path / "well", **changes), rows)
    values = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            values.append(model.model.norm.weight.data[0].clone())

    well.add_callback(Look)
    well.train()
    mend.value = values[step - 1]
    mended.add_callback(mend)
    mended.train(checkpoint.last_checkpoint(tmp_path / "ill"))
    losses = [
        [(e["step"], e["loss"], e["learning_rate"]) for e in r.state.log_history if "loss" in e] for r in (mended, well)
    ]
    assert losses[0] == losses[1] and len(losses[1]) == 3
    assert mended.state.log_history[-1]["train_loss"] == well.state.log_history[-1]["train_loss"]


def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is(tmp_path):
    """The root of zero: its value is finite, its slope is not."""

    class Infinite(nn.Module):
        def forward(self, x):
            return x + (x * 0).abs().sqrt()

    model = small_model()
    run = trainer(model, arguments(tmp_path), samples(4))
    model.model.layers[1].mlp.act_fn = Infinite()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(RunStopped) as stopped:
        run.train()
    assert "the first gradient that is not finite comes out of model.layers.1.mlp.act_fn (Infinite)" in str(
        stopped.value
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not list(tmp_path.glob("checkpoint-*"))  # nothing was learned before step 1
    assert "are in" not in str(stopped.value)


def test_a_broken_head_is_named_by_the_loss_itself(tmp_path):
    def infect(model):
        model.get_output_embeddings().weight.data[5] = float("inf")

    _, _, stopped = run_until_it_stops(tmp_path, samples(4), infect=infect, model=small_model("llama"))
    assert "the loss itself is " in str(stopped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_and_bf16_are_watched_too(dtype, tmp_path):
    model = get_peft_model(
        small_model(dtype=dtype), LoraConfig(r=2, target_modules="all-linear"), autocast_adapter_dtype=False
    )

    name = "base_model.model.model.layers.2.self_attn.k_proj.base_layer.weight"  # frozen: no master would heal it

    def infect(model):
        model.get_parameter(name).data[0, 0] = float("nan")

    _, callback, stopped = run_until_it_stops(tmp_path, samples(8), infect=infect, step=2, model=model)
    assert str(stopped).startswith("step 2:")
    fault = f"{name.removesuffix('.weight')} (Linear)"
    assert str(stopped).count(f"the first value that is not finite comes out of {fault}") == 1
    assert all(
        torch.equal(weight.nan_to_num(7.0), callback.before[name].nan_to_num(7.0))
        for name, weight in model.state_dict().items()
    )


def test_what_does_not_happen_again_is_said(tmp_path):
    once = []

    def infect(model):
        def hook(module, inputs, output):
            once.append(1)
            return output * float("nan") if len(once) == 1 else output

        model.model.norm.register_forward_hook(hook)

    _, _, stopped = run_until_it_stops(tmp_path, samples(4), infect=infect)
    assert "run again, the same rows gave finite values" in str(stopped)


def test_the_guard_remembers_the_first_step_and_leaves_out_all_later_ones():
    """Where the device is not asked at every step, steps go by before the run stops."""
    guard = FiniteGuard(torch.device("cpu"))
    fine, bad = torch.tensor(1.0), torch.tensor(float("nan"))

    def check(step, *values):
        return bool(guard.check(StepRecord(step, None, {}, []), *values))

    assert [check(1, fine, fine), check(2, fine, fine)] == [False, False]
    assert guard.first_bad() is None
    assert [check(3, fine, fine), check(4, fine, bad), check(5, fine, fine), check(6, bad, fine)] == [
        False,
        True,
        True,
        True,
    ]
    assert guard.first_bad().step == 4


def test_no_loss_that_is_not_finite_is_logged(tmp_path):
    run, _, _ = run_until_it_stops(tmp_path, rows_with_a_token(8, at=5), logging_steps=1)
    assert all(entry["loss"] == entry["loss"] for entry in run.state.log_history)
    assert len(run.state.log_history) == run.state.global_step


def test_where_nobody_waits_for_the_device_steps_go_by_and_the_run_comes_back_to_before_the_bad_one(
    tmp_path, monkeypatch
):
    """As on CUDA: the fused optimizer is told by a flag (found_inf) and the run stops at the next log step."""
    changes = dict(optim="adamw_torch_fused", logging_steps=5, lr_scheduler_type="linear", warmup_steps=2)
    run = trainer(small_model(), arguments(tmp_path, **changes), samples(20))

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                self.before = {name: weight.clone() for name, weight in model.state_dict().items()}
                self.rate = run.lr_scheduler.get_last_lr()
                self.hook = model.model.norm.register_forward_hook(lambda *call: call[-1] * float("nan"))
            if state.global_step == 3:
                self.hook.remove()

    updates = []

    def update_unless(update, must_not):
        updates.append(bool(must_not))
        update.optimizer.found_inf = must_not.float()
        update.optimizer.step()
        return True

    monkeypatch.setattr(LocalUpdate, "_update_unless", update_unless)
    real = run._stop_if_not_finite
    run._stop_if_not_finite = lambda: real() if run.control.should_log else None
    watch = Watch()
    run.add_callback(watch)
    with pytest.raises(RunStopped) as stopped:
        run.train()
    assert str(stopped.value).startswith("step 3:")
    assert updates == [False, False, True, True, True]
    assert all(torch.equal(weight, watch.before[name]) for name, weight in run.model.state_dict().items())
    assert run.lr_scheduler.get_last_lr() == watch.rate
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
    loop = torch.load(tmp_path / "checkpoint-2" / "rng_state.pth")["loop"]
    assert 8 < loop["loss_since_log"] < 12  # of the two good steps


class NotFiniteAt(TrainerCallback):
    """The loss of one step, and of no other, is not finite; later the process may get a signal."""

    def __init__(self, step, signal_at=None):
        self.step, self.signal_at = step, signal_at

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.hook = model.model.norm.register_forward_hook(lambda *call: call[-1] * float("nan"))
        if state.global_step + 1 == self.signal_at:
            signal.raise_signal(signal.SIGTERM)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.hook.remove()


def stopped_as_on_cuda(folder, callback, **changes):
    """Six steps, three an epoch, on a device that is asked only where something else waits for it too."""
    run = trainer(small_model(), arguments(folder, num_train_epochs=2, **changes), samples(6), callbacks=[callback])
    real = run._stop_if_not_finite

    def stop(*, now=False):
        control = run.control
        if now or control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            real(now=now)

    run._stop_if_not_finite = stop
    with pytest.raises(RunStopped) as stopped:
        run.train()
    return stopped.value


def epochs_ended_in(place):
    return torch.load(place / "rng_state.pth")["loop"]["epochs_ended"]


def test_an_epochs_checkpoint_is_not_written_after_a_bad_step(tmp_path):
    stopped = stopped_as_on_cuda(tmp_path, NotFiniteAt(2), logging_strategy="no", save_strategy="epoch")
    assert str(stopped).startswith("step 2:") and stopped.status == 1
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]
    assert epochs_ended_in(tmp_path / "checkpoint-1") == 0


@pytest.mark.parametrize("signal_at", [4, None])  # in the second epoch; at the run's end
def test_a_bad_step_of_an_epoch_before_is_come_back_to_also_where_a_signal_stops_the_run(signal_at, tmp_path):
    stopped = stopped_as_on_cuda(tmp_path, NotFiniteAt(2, signal_at), logging_strategy="no", save_strategy="no")
    assert str(stopped).startswith("step 2:") and stopped.status == 1
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]
    assert epochs_ended_in(tmp_path / "checkpoint-1") == 0
