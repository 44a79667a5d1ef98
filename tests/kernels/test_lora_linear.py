"""The LoRA layer and the LoRA SwiGLU block against the same written as linear layers, eager and compiled."""

from __future__ import annotations

import pytest
import torch

from burnish.kernels import lora_linear as linear_kernel
from burnish.kernels import lora_mlp as mlp_kernel
from burnish.kernels.lora_mlp import LoraWeights

ROWS = [1, 7, 64]
HIDDEN, WIDE = 24, 40


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lora(wide, narrow, rank, dtype, seed):
    a, b = draw(rank, narrow, dtype=dtype, seed=seed), draw(wide, rank, dtype=dtype, seed=seed + 1)
    return LoraWeights(draw(wide, narrow, dtype=dtype, seed=seed + 2), a.requires_grad_(), b.requires_grad_())


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def results(function, x, layers, *more):
    """The output, and the gradients of x and of every A and B."""
    out = function(x, *layers, *more)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    learned = [part for layer in layers for part in (layer.a, layer.b)]
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *learned])]


def one_linear(function, bias):
    return lambda x, layer, scale: function(x, layer.weight, bias, layer.a, layer.b, scale)


CASES = [(torch.float64, 1e-12, False), (torch.float32, 1e-5, False), (torch.bfloat16, 3e-2, False)]
CASES += [(torch.float32, 1e-5, True)]  # compiled


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, rounding, compiled", CASES, ids=str)
def test_a_lora_layer_is_three_linear_layers(dtype, rounding, bias, compiled):
    layer, offset = lora(WIDE, HIDDEN, 4, dtype, seed=1), draw(WIDE, dtype=dtype) if bias else None
    fused = one_linear(linear_kernel.lora_linear, offset)
    function = torch.compile(fused, dynamic=True) if compiled else fused
    exact = one_linear(linear_kernel.reference, None if offset is None else offset.double())
    truth = LoraWeights(*(part.detach().double() for part in layer))
    for part in truth[1:]:
        part.requires_grad_()
    for rows in ROWS[1:] if compiled else ROWS:
        x = draw(2, rows, HIDDEN, dtype=dtype, seed=rows).requires_grad_()
        got = results(function, x, [layer], 1.5)
        wanted = results(exact, x.detach().double().requires_grad_(), [truth], 1.5)
        assert max(map(distance, got, wanted)) < rounding


@pytest.mark.parametrize("dtype, rounding, compiled", CASES, ids=str)
def test_a_lora_swiglu_block_is_its_linear_layers(dtype, rounding, compiled):
    shapes = [(WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)]
    layers = [lora(*shape, 4, dtype, seed=10 * number) for number, shape in enumerate(shapes)]
    truths = [LoraWeights(*(part.detach().double() for part in layer)) for layer in layers]
    for truth in truths:
        truth.a.requires_grad_()
        truth.b.requires_grad_()
    function = torch.compile(mlp_kernel.lora_mlp, dynamic=True) if compiled else mlp_kernel.lora_mlp
    for rows in ROWS[1:] if compiled else ROWS:
        x = (0.2 * draw(2, rows, HIDDEN, seed=rows)).to(dtype).requires_grad_()
        got = results(function, x, layers, 0.5)
        wanted = results(mlp_kernel.reference, x.detach().double().requires_grad_(), truths, 0.5)
        assert max(map(distance, got, wanted)) < rounding


def test_the_operators_keep_the_rules_of_torch():
    """Shapes without data, no outputs that share memory with inputs, gradients that are registered."""
    layer = lora(WIDE, HIDDEN, 4, torch.float32, seed=1)
    x = draw(6, HIDDEN, dtype=torch.float32).requires_grad_()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.burnish.lora_linear.default, (x, layer.weight, None, layer.a, layer.b, 2.0), test_utils=checks
    )
    down = lora(HIDDEN, WIDE, 4, torch.float32, seed=5)
    arguments = (x, *layer, *lora(WIDE, HIDDEN, 4, torch.float32, seed=9), *down, 2.0)
    torch.library.opcheck(torch.ops.burnish.lora_mlp.default, arguments, test_utils=checks)
