"""AdamW in one pass against torch's own; the Triton kernel under its interpreter, where that is asked for."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from one_update import KINDS, SETTINGS, SHAPES, check_that_nothing_moves, compare_with_reference, weights

from burnish.kernels.adamw import adamw_, on_gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
ONE, NONE = torch.tensor(1.0), torch.tensor(0.0)


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


def test_nothing_moves_and_nothing_is_counted_where_the_flag_says_so():
    check_that_nothing_moves(adamw_)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("gradient, low", KINDS)
def test_the_kernel_gives_what_the_reference_gives(gradient, low):
    """The interpreter cuts bf16 off where a GPU rounds it."""
    from burnish.kernels.adamw_on_gpu import BLOCK, CHUNK

    compare_with_reference(gradient, low, [*SHAPES, (CHUNK,), (CHUNK + 1,), (3, CHUNK // 2 + BLOCK + 7)])


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
def test_the_kernel_moves_nothing_where_the_flag_says_so():
    check_that_nothing_moves(on_gpu)
