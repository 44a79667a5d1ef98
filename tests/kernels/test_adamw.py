"""AdamW in one pass against torch's own; the Triton kernel under its interpreter, where that is asked for."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from burnish.kernels.adamw import Settings, Weight, adamw_, on_gpu, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
SETTINGS = Settings(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
SHAPES = [(3, 5), (1,), (7, 1, 2)]
ONE, NONE = torch.tensor(1.0), torch.tensor(0.0)


def weights(shapes, dtype, *, gradient=None, low=None, seed=0):
    """New ones, of which nothing has moved yet."""
    generator = torch.Generator().manual_seed(seed)
    for shape in shapes:
        value, slope = (torch.randn(shape, generator=generator) for _ in range(2))
        copy = None if low is None else value.to(low)
        master = (value if copy is None else copy).to(dtype).clone()
        moments = torch.zeros_like(master), torch.zeros_like(master)
        yield Weight(master, slope.to(gradient or dtype), *moments, torch.zeros(()), copy)


def tensors(weight):
    return [tensor for tensor in weight if tensor is not None]


def test_steps_are_those_of_torchs_adamw_in_float64():
    ours = list(weights(SHAPES, torch.float64))
    theirs = [torch.nn.Parameter(w.master.clone()) for w in ours]
    optimizer = torch.optim.AdamW(theirs, **SETTINGS._asdict())
    for step in range(5):
        for w, parameter in zip(ours, theirs, strict=True):
            parameter.grad = w.gradient * (step - 1.5)
        moved = [w._replace(gradient=w.gradient * (step - 1.5) * 4) for w in ours]
        adamw_(moved, SETTINGS, torch.tensor(0.25), NONE)  # the factor takes the 4 away
        optimizer.step()
    for w, parameter in zip(ours, theirs, strict=True):
        state = optimizer.state[parameter]
        torch.testing.assert_close(w.master, parameter.data, rtol=1e-12, atol=0)
        torch.testing.assert_close(w.first, state["exp_avg"], rtol=1e-12, atol=0)
        torch.testing.assert_close(w.second, state["exp_avg_sq"], rtol=1e-12, atol=0)
        assert w.step == state["step"] == 5


def test_the_models_weight_is_the_rounding_of_its_master():
    ours = list(weights(SHAPES, torch.float32, gradient=torch.bfloat16, low=torch.bfloat16))
    before = [w.low.clone() for w in ours]
    adamw_(ours, SETTINGS, ONE, NONE)
    for w, old in zip(ours, before, strict=True):
        assert torch.equal(w.low, w.master.bfloat16()) and not torch.equal(w.low, old)


def check_that_nothing_moves(step_of, device="cpu"):
    for bad in (1.0, float("nan")):
        ours = [Weight(*(t.to(device) for t in w)) for w in weights(SHAPES, torch.float32, low=torch.bfloat16)]
        for w in ours:
            w.gradient.fill_(bad)
        before = [[tensor.clone() for tensor in tensors(w)] for w in ours]
        step_of(ours, SETTINGS, torch.tensor(bad, device=device), torch.tensor(1.0, device=device))
        for w, old in zip(ours, before, strict=True):
            for now, then in zip(tensors(w), old, strict=True):
                torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def test_nothing_moves_and_nothing_is_counted_where_the_flag_says_so():
    check_that_nothing_moves(adamw_)


KINDS = [
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def compare_with_reference(gradient, low, shapes, *, device="cpu", roundings=1.0):
    """Three steps, and one that is left out, of the kernel in float32 and of the formula in float64.

    `roundings`: how many of the model's dtype the kernel may differ from the rounding of its own master.
    """
    ours = list(weights(shapes, torch.float32, gradient=gradient, low=low))
    ours = [Weight(*(None if t is None else t.to(device) for t in w)) for w in ours]
    theirs = list(weights(shapes, torch.float64, gradient=gradient, low=low))
    for flag in (0.0, 0.0, 1.0, 0.0):
        on_gpu(ours, SETTINGS, torch.tensor(0.5, device=device), torch.tensor(flag, device=device))
        reference(theirs, SETTINGS, torch.tensor(0.5), torch.tensor(flag))
    for a, b in zip(ours, theirs, strict=True):
        for ours_now, theirs_now in ((a.master, b.master), (a.first, b.first), (a.second, b.second)):
            torch.testing.assert_close(ours_now.double().cpu(), theirs_now, rtol=1e-5, atol=1e-6)
        assert a.step.item() == 3
        if low is not None:
            rounding = torch.finfo(low).eps * a.master.abs() * roundings + torch.finfo(low).smallest_normal
            assert ((a.low.float() - a.master).abs() <= rounding).all()


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("gradient, low", KINDS)
def test_the_kernel_gives_what_the_reference_gives(gradient, low):
    """The interpreter cuts bf16 off where a GPU rounds it."""
    from burnish.kernels.adamw_on_gpu import BLOCK, CHUNK

    compare_with_reference(gradient, low, [*SHAPES, (CHUNK,), (CHUNK + 1,), (3, CHUNK // 2 + BLOCK + 7)])


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
def test_the_kernel_moves_nothing_where_the_flag_says_so():
    check_that_nothing_moves(on_gpu)
