"""pure_bf16: weights and moments in bf16 alone, rounded at random, so that small updates add up to what they are."""

from __future__ import annotations

import json

import pytest
import torch
from processes import ROOT, run_script
from small import arguments, samples, small_model, trainer
from torch import nn

from burnish.train import rounding
from burnish.train.rounding import AdamW, Sums, round_at_random

LOW = torch.bfloat16


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def weight(value=1.0, size=256, dtype=LOW):
    return nn.Parameter(torch.full((size,), value, dtype=dtype))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rounding_is_right_on_average_and_gives_one_of_the_two_neighbours():
    values = torch.tensor([1.001, -1.001, 3.14159e-20, 0.7777e12, 1.0039])
    drawn = round_at_random(values.repeat(100_000, 1), generator()).double()
    assert all(len(drawn[:, column].unique()) == 2 for column in range(5))
    assert (drawn.mean(0) / values.double() - 1).abs().max() < 1e-4  # to the nearest it would be up to 3e-3
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 1.0078125, float("inf"), -float("inf"), 2.0**-126])
    assert torch.equal(round_at_random(exact, generator()).float(), exact)
    assert round_at_random(torch.tensor([float("nan")])).isnan().all()


def test_ten_thousand_updates_far_below_the_spacing_of_bf16_add_up_to_the_truth():
    """Each moves the weight by 1e-5, where bf16 knows nothing between 1 and 0.996."""
    found = {}
    for kind in (AdamW, torch.optim.AdamW):
        moved = weight()
        optimizer = kind([moved], lr=1e-5, weight_decay=0.0)
        for _ in range(10_000):
            moved.grad = torch.ones_like(moved)
            optimizer.step()
        found[kind] = moved.float().mean().item()
    assert found[torch.optim.AdamW] == 1.0
    assert 1 - found[AdamW] == pytest.approx(0.1, rel=0.03)


def test_the_second_moment_falls_as_it_should_where_to_the_nearest_it_would_stay():
    """Why moments are rounded at random too: of a large gradient long ago nothing must be left."""
    found = {}
    for kind in (AdamW, torch.optim.AdamW):
        moved = weight()
        optimizer = kind([moved], lr=0.0)
        for step in range(2000):
            moved.grad = torch.full_like(moved, 100.0 if step == 0 else 0.0)
            optimizer.step()
        found[kind] = optimizer.state[moved]["exp_avg_sq"].float().mean().item()
    truth = 0.001 * 100.0**2 * 0.999**1999
    assert found[AdamW] == pytest.approx(truth, rel=0.05)
    assert found[torch.optim.AdamW] > 5 * truth


def train(kind, weights, steps=12, **how):
    """Random gradients, the same for all; one weight has none in every third step."""
    optimizer = kind(weights, lr=1e-2, weight_decay=0.1, **how)
    draw = generator(7)
    for step in range(steps):
        for number, each in enumerate(weights):
            gradient = torch.randn(each.shape, generator=draw).to(each.dtype)
            each.grad = None if number == 1 and step % 3 == 0 else gradient
        optimizer.step()
    return [each.detach().clone() for each in weights]


def several(dtype):
    return [nn.Parameter(torch.randn(shape, generator=generator(3)).to(dtype)) for shape in ((40, 30), (7,), (3, 5))]


@pytest.mark.parametrize("chunk", [100, 2**23])
def test_of_float32_weights_it_is_torchs_adamw(chunk, monkeypatch):
    monkeypatch.setattr(rounding, "CHUNK", chunk)  # a weight in many pieces, or all weights in one
    for ours, theirs in zip(
        train(AdamW, several(torch.float32)), train(torch.optim.AdamW, several(torch.float32)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_bf16_weights_follow_float32_ones_on_average():
    truth = train(torch.optim.AdamW, several(torch.float32))[0]
    drawn = torch.stack([train(AdamW, several(LOW), seed=seed)[0].float() for seed in range(30)])
    assert (drawn.mean(0) - truth).abs().mean() < 4e-3 < (drawn[0] - truth).abs().mean()
    assert torch.equal(train(AdamW, several(LOW), seed=3)[0], train(AdamW, several(LOW), seed=3)[0])


def test_an_update_with_found_inf_moves_nothing():
    """On a GPU nobody looks whether a step is finite: the flag keeps what was there."""
    moved = several(LOW)
    optimizer = AdamW(moved, lr=1e-2)
    flag = optimizer.found_inf = torch.zeros(())
    for each in moved:
        each.grad = torch.ones_like(each)
    optimizer.step()
    before = [value.clone() for each in moved for value in (each, *optimizer.state[each].values())]
    flag.fill_(1.0)
    for each in moved:
        each.grad = torch.full_like(each, float("nan"))
    optimizer.step()
    after = [value for each in moved for value in (each, *optimizer.state[each].values())]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_gradients_of_many_passes_add_up_to_what_they_are():
    """In bf16 as autograd adds, the sum would stop at 256."""
    moved = weight(size=1000)
    sums = Sums({"weight": moved})
    for _ in range(1000):
        moved.float().sum().backward()
        assert moved.grad is None
    sums.give_back()
    assert moved.grad.dtype == LOW and moved.grad.float().mean().item() == pytest.approx(1000, rel=0.01)
    sums.release()
    moved.grad = None
    moved.float().sum().backward()
    assert moved.grad is not None


def run_of(folder, *, pure, resume=None, **changes):
    args = arguments(folder, num_train_epochs=8, gradient_accumulation_steps=2, learning_rate=2e-3, **changes)
    run = trainer(small_model(dtype=LOW), args, samples(24), pure_bf16=pure)
    run.train(resume)
    return run


def state_bytes(run):
    """Of the optimizer and of masters, besides the model."""
    own = {id(parameter) for parameter in run.model.parameters()}
    kept = [value for state in run.optimizer.state.values() for name, value in state.items() if name != "step"]
    kept += [each for each in run.update.weights.values() if id(each) not in own]
    return sum(value.numel() * value.element_size() for value in kept)


def test_losses_are_those_of_float32_masters_with_a_third_of_the_state(tmp_path):
    pure, masters = (run_of(tmp_path / str(pure), pure=pure) for pure in (True, False))
    assert losses(pure) == pytest.approx(losses(masters), rel=0.03)
    assert losses(pure)[-1] < losses(pure)[0] - 0.2
    assert {value.dtype for value in pure.model.parameters()} == {LOW}
    assert state_bytes(pure) * 3 == state_bytes(masters)


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path):
    whole = run_of(tmp_path, pure=True, save_strategy="steps", save_steps=13)
    parted = run_of(tmp_path / "parted", pure=True, resume=tmp_path / "checkpoint-13")
    assert losses(parted) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parted.model.state_dict()[name]), name
    assert not (tmp_path / "checkpoint-13" / "masters.safetensors").exists()


SCRIPT = """
import json, sys
from datetime import timedelta
from pathlib import Path

sys.path[:0] = {paths}
import torch
from small import arguments, samples, small_model, trainer
from burnish import ranks
from burnish.train.peers import meet, part

meet("gloo", timedelta(seconds=60))
args = arguments(Path(sys.argv[1]), gradient_accumulation_steps=3, learning_rate=2e-3)
run = trainer(small_model(dtype=torch.bfloat16), args, samples(30), pure_bf16=True)
run.train()
weights = [weight.double() for weight in run.model.parameters()]
found = [run.state.log_history[-2]["loss"], *(float((weight * weight).sum()) for weight in weights)]
Path(sys.argv[1], f"{{ranks.rank()}}.json").write_text(json.dumps(found))
part()
"""


def test_processes_round_their_weights_alike(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT.format(paths=[str(ROOT / "tests")]))
    run_script(2, tmp_path / "run.py", str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and 4 < first[0] < 6
