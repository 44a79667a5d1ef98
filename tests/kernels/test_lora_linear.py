"""The LoRA layer and the LoRA SwiGLU block against the same written as linear layers, eager and compiled."""

from __future__ import annotations

import pytest
import torch

from burnish.kernels import frozen_linear as frozen_kernel
from burnish.kernels import lora_linear as linear_kernel
from burnish.kernels import lora_mlp as mlp_kernel
from burnish.kernels.lora_mlp import LoraWeights

ROWS = [1, 7, 64]
HIDDEN, WIDE = 32, 48


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lora(wide, narrow, rank, dtype, seed):
    a, b = draw(rank, narrow, dtype=dtype, seed=seed), draw(wide, rank, dtype=dtype, seed=seed + 1)
    return LoraWeights([draw(wide, narrow, dtype=dtype, seed=seed + 2)], a.requires_grad_(), b.requires_grad_())


def in_float64(layer):
    """The same numbers as leaves of their own."""
    a, b = (part.detach().double().requires_grad_() for part in (layer.a, layer.b))
    return LoraWeights([part.double() for part in layer.weight], a, b)


def in_fp8(layer):
    weight = layer.weight[0]
    channels = torch.arange(frozen_kernel.how_many_twice(weight.shape[1]), dtype=torch.int32)
    return layer._replace(weight=frozen_kernel.hold_in_fp8(weight, channels))


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def results(function, x, layers, *more):
    """The output, and the gradients of x and of every A and B."""
    out = function(x, *layers, *more)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    learned = [part for layer in layers for part in (layer.a, layer.b)]
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *learned])]


def one_linear(function, bias):
    def call(x, layer, scale):
        if function is linear_kernel.lora_linear:
            return function(x, layer.weight, bias, x @ layer.a.T, layer.b, scale)
        return function(x, layer.weight[0], bias, layer.a, layer.b, scale)

    return call


CASES = [(torch.float64, 1e-12, False), (torch.float32, 1e-5, False), (torch.bfloat16, 3e-2, False)]
CASES += [(torch.float32, 1e-5, True)]  # compiled


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, rounding, compiled", CASES, ids=str)
def test_a_lora_layer_is_three_linear_layers(dtype, rounding, bias, compiled):
    layer, offset = lora(WIDE, HIDDEN, 4, dtype, seed=1), draw(WIDE, dtype=dtype) if bias else None
    fused = one_linear(linear_kernel.lora_linear, offset)
    function = torch.compile(fused, dynamic=True) if compiled else fused
    exact = one_linear(linear_kernel.reference, None if offset is None else offset.double())
    truth = in_float64(layer)
    for rows in ROWS[1:] if compiled else ROWS:
        x = draw(2, rows, HIDDEN, dtype=dtype, seed=rows).requires_grad_()
        got = results(function, x, [layer], 1.5)
        wanted = results(exact, x.detach().double().requires_grad_(), [truth], 1.5)
        assert max(map(distance, got, wanted)) < rounding


@pytest.mark.parametrize("dtype, rounding, compiled", CASES, ids=str)
def test_a_lora_swiglu_block_is_its_linear_layers(dtype, rounding, compiled):
    shapes = [(WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)]
    layers = [lora(*shape, 4, dtype, seed=10 * number) for number, shape in enumerate(shapes)]
    truths = [in_float64(layer) for layer in layers]
    function = torch.compile(mlp_kernel.lora_mlp, dynamic=True) if compiled else mlp_kernel.lora_mlp
    for rows in ROWS[1:] if compiled else ROWS:
        x = (0.2 * draw(2, rows, HIDDEN, seed=rows)).to(dtype).requires_grad_()
        got = results(function, x, layers, 0.5)
        wanted = results(mlp_kernel.reference, x.detach().double().requires_grad_(), truths, 0.5)
        assert max(map(distance, got, wanted)) < rounding


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_weights_in_fp8_layer_and_block_are_what_they_are_beside_whole_ones(dtype, compiled):
    """To fp8's rounding, 4 % of a number; what an adapter learns is not rounded but follows from what is."""
    shapes = [(WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)]
    whole = [lora(*shape, 4, dtype, seed=10 * number) for number, shape in enumerate(shapes)]
    held = [in_fp8(layer) for layer in whole]
    bias = draw(WIDE, dtype=dtype)
    for function, count in ((one_linear(linear_kernel.lora_linear, bias), 1), (mlp_kernel.lora_mlp, 3)):
        function = torch.compile(function, dynamic=True) if compiled else function
        for rows in ROWS[1:]:
            x = (0.2 * draw(2, rows, HIDDEN, seed=rows)).to(dtype).requires_grad_()
            got, wanted = (results(function, x, layers[:count], 0.5) for layers in (held, whole))
            apart = [distance(a, b) for a, b in zip(got, wanted, strict=True)]
            assert apart[0] > 1e-3 and max(apart) < 0.15


@pytest.mark.parametrize("held", [False, True], ids=["whole", "fp8"])
def test_the_operators_keep_the_rules_of_torch(held):
    """Shapes without data, no outputs that share memory with inputs, gradients that are registered."""
    layer, down, up = (
        in_fp8(each) if held else each
        for each in (
            lora(WIDE, HIDDEN, 4, torch.float32, seed=1),
            lora(HIDDEN, WIDE, 4, torch.float32, seed=5),
            lora(WIDE, HIDDEN, 4, torch.float32, seed=9),
        )
    )
    x = draw(6, HIDDEN, dtype=torch.float32).requires_grad_()
    rows = frozen_kernel.rows_of(x, layer.weight)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.burnish.lora_linear.default,
        (x, rows, layer.weight, None, x @ layer.a.T, layer.b, 2.0),
        test_utils=checks,
    )
    torch.library.opcheck(torch.ops.burnish.lora_mlp.default, (x, *layer, *up, *down, 2.0), test_utils=checks)
    torch.library.opcheck(torch.ops.burnish.frozen_linear.default, (x, rows, layer.weight, None), test_utils=checks)
