"""AdamW in one pass within a run: the losses, states and checkpoints of torch's own.

On the CPU the formula in plain torch takes the kernel's place.
"""

from __future__ import annotations

import pytest
import torch
from small import arguments, samples, small_model, trainer
from torch import nn
from transformers import TrainerCallback

from burnish.errors import RunStopped
from burnish.train import adamw
from burnish.train.masters import Masters

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def choose(monkeypatch):
    """choose(True): runs from here on step in one pass; choose(False): as they do without a kernel."""
    return lambda one_pass: monkeypatch.setattr(adamw, "has_kernels", lambda device: one_pass)


def go(folder, dtype=torch.bfloat16, resume=None, rows=16, micro_batch_tokens="auto", **changes):
    args = arguments(folder, **changes)
    run = trainer(small_model(dtype=dtype), args, samples(rows), micro_batch_tokens=micro_batch_tokens)
    run.train(resume)
    return run


def logged(run, name):
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_in_one_pass_is_the_run_of_torchs_adamw(dtype, accumulation, choose, tmp_path):
    runs = []
    for one_pass in (False, True):
        choose(one_pass)
        how = {
            "gradient_accumulation_steps": accumulation,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "learning_rate": 1e-3,
        }
        passes = "40" if accumulation == 2 else "auto"  # several, or one
        runs.append(go(tmp_path / str(one_pass), dtype, micro_batch_tokens=passes, **how))
    torchs, ours = runs
    assert ours.optimizer.in_one_pass and not torchs.optimizer.in_one_pass
    assert max(logged(ours, "grad_norm")) > 0.5  # clipped
    for name in ("loss", "grad_norm"):
        assert logged(ours, name) == pytest.approx(logged(torchs, name), rel=2e-3)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(ours.model.get_parameter(name), ours.update.weights[name].to(dtype))
    moved = ours.update.weights[name] - small_model(dtype=dtype).get_parameter(name)
    assert (ours.update.weights[name] - torchs.update.weights[name]).norm() < 0.02 * moved.norm()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("begins_in_one_pass", [True, False])
def test_a_run_goes_on_in_one_pass_from_torchs_checkpoint_and_the_other_way_round(
    begins_in_one_pass, optim, choose, tmp_path
):
    choose(begins_in_one_pass)
    whole = go(tmp_path, optim=optim, save_strategy="steps", save_steps=4)
    choose(not begins_in_one_pass)
    parted = go(tmp_path / "parted", optim=optim, resume=tmp_path / "checkpoint-4")
    assert parted.optimizer.in_one_pass is not begins_in_one_pass
    assert logged(parted, "loss") == pytest.approx(logged(whole, "loss"), rel=2e-3)
    for weight in parted.update.weights.values():
        assert set(parted.optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
        assert parted.optimizer.state[weight]["step"] == 8


def test_a_checkpoint_holds_what_torchs_adamw_reads(choose, tmp_path):
    choose(True)
    run = go(tmp_path, save_strategy="steps", save_steps=8)
    saved = torch.load(tmp_path / "checkpoint-8" / "optimizer.pt")
    plain = torch.optim.AdamW([{"params": group["params"]} for group in run.optimizer.param_groups])
    plain.load_state_dict(saved)
    for weight in run.update.weights.values():
        for name, value in run.optimizer.state[weight].items():
            assert torch.equal(plain.state[weight][name], value)


class Poison(TrainerCallback):
    """A weight that is not a number, before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights = [weight.detach().clone() for weight in model.parameters()]
        if state.global_step + 1 == self.step:
            model.get_input_embeddings().register_forward_hook(lambda *call: call[-1] * float("nan"))


def test_a_step_that_is_not_finite_is_neither_applied_nor_counted(choose, tmp_path):
    choose(True)
    poison = Poison(step=3)
    run = trainer(small_model(dtype=torch.bfloat16), arguments(tmp_path), samples(16), callbacks=[poison])
    with pytest.raises(RunStopped, match="step 3"):
        run.train()
    for now, before in zip(run.model.parameters(), poison.weights, strict=True):
        assert torch.equal(now, before)
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {2}


def test_the_float32_gradients_of_a_bf16_model_never_exist_where_one_pass_gives_them(choose, tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            masters = run.update.masters
            seen.append({masters.gradient_of(master).dtype for master in masters.by_name.values()})
            assert all(master.grad is None for master in masters.by_name.values())

    choose(True)
    run = trainer(small_model(dtype=torch.bfloat16), arguments(tmp_path), samples(8), callbacks=[Look()])
    run.train()
    assert seen == [{torch.bfloat16}] * 4


@pytest.mark.parametrize("asked", ["amsgrad=True", "maximize=True", "foreach=True", "fused=False", "capturable=True"])
def test_what_else_torchs_adamw_can_do_torch_does(asked, choose):
    choose(True)
    model, (name, value) = nn.Linear(2, 2), asked.split("=")
    optimizer = adamw.AdamW(model.parameters(), masters=Masters(model), **{name: value == "True"})
    assert not optimizer.in_one_pass


def test_amsgrad_trains_as_torchs_does(choose, tmp_path):
    runs = []
    for one_pass in (False, True):
        choose(one_pass)
        runs.append(go(tmp_path / str(one_pass), optim="adamw_torch", optim_args="amsgrad=True", rows=8))
    assert logged(runs[0], "loss") == logged(runs[1], "loss")


def test_weights_that_do_not_lie_in_a_row_are_left_to_torch(choose):
    choose(True)
    model = nn.Linear(3, 4)
    assert adamw.AdamW(model.parameters(), masters=Masters(model)).in_one_pass
    model.weight = nn.Parameter(torch.randn(3, 4).T)
    assert not adamw.AdamW(model.parameters(), masters=Masters(model)).in_one_pass
