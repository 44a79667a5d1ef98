"""A linear layer on a weight that is made when it is needed, against the same layer on a weight that is there."""

from __future__ import annotations

import pytest
import torch

from burnish.kernels.dequantized_linear import dequantized_linear, dequantized_lora_linear
from burnish.kernels.lora_linear import reference


class Quantized:
    """A weight in 8 bits that counts how often it is asked for."""

    def __init__(self, rows, columns):
        self.numbers = torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(0))
        self.asked = 0

    def __call__(self, dtype):
        self.asked += 1
        return self.numbers.to(dtype) / 100


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("bias", [None, torch.arange(10, dtype=torch.float64)], ids=["", "bias"])
def test_the_layer_alone_is_a_linear_layer(bias):
    weight, x = Quantized(10, 6), draw(2, 5, 6, seed=1)
    wanted = torch.nn.functional.linear(x, weight(torch.float64), bias)
    got = dequantized_linear(x, weight, bias)
    assert torch.allclose(got, wanted)
    assert torch.allclose(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, wanted)))


@pytest.mark.parametrize("bias", [None, torch.arange(10, dtype=torch.float64)], ids=["", "bias"])
def test_with_an_adapter_it_is_three_linear_layers(bias):
    weight, x, a, b = Quantized(10, 6), draw(2, 5, 6, seed=1), draw(3, 6, seed=2), draw(10, 3, seed=3)
    wanted = reference(x, weight(torch.float64), bias, a, b, 1.5)
    got = dequantized_lora_linear(x, weight, bias, a, b, 1.5)
    assert torch.allclose(got, wanted)
    for found, expected in zip(*(torch.autograd.grad(y.square().sum(), (x, a, b)) for y in (got, wanted)), strict=True):
        assert torch.allclose(found, expected)


def test_the_weight_is_made_once_a_pass_and_not_at_all_where_no_gradient_is_asked_for():
    weight, x, a, b = Quantized(10, 6), draw(4, 6, seed=1), draw(3, 6, seed=2), draw(10, 3, seed=3)
    loss = dequantized_lora_linear(x, weight, None, a, b, 1.0).sum()
    assert weight.asked == 1
    loss.backward()
    assert weight.asked == 2
    dequantized_lora_linear(x.detach(), weight, None, a, b, 1.0).sum().backward()
    assert weight.asked == 3
