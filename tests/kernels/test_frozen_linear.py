"""The products with a frozen weight in fp8: against the formula in float64, and against the weight as it was."""

from __future__ import annotations

import pytest
import torch

from burnish.kernels.frozen_linear import (
    FP8,
    LARGEST,
    dequantized,
    frozen_linear,
    hold_in_fp8,
    how_many_twice,
    in_features,
    quantize_rows,
)

N, K = 48, 32


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def rounded(x, channels=()):
    """Row by row to e4m3 and back, in float64: the numbers, and what the second ones of `channels` add to them."""
    scales = x.double().abs().amax(1, keepdim=True) / LARGEST
    exact = x.double() / scales
    first = exact.to(FP8).double()
    second = torch.zeros_like(first)
    for channel in channels:
        second[:, channel] = (exact - first)[:, channel].to(FP8).double()
    return first * scales, second * scales


def product(x, weight, channels=()):
    """Σ (X + r)(Q + e), without r·e."""
    (x, r), (q, e) = rounded(x, channels), rounded(weight, channels)
    return x @ q.T + r @ q.T + x @ e.T


def some(columns):
    """Channels, not in a row: c of them."""
    return torch.randperm(columns, generator=torch.Generator().manual_seed(9))[: how_many_twice(columns)].int()


def hold(weight):
    return hold_in_fp8(weight, some(weight.shape[1]))


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_both_products_are_those_of_the_rounded_numbers(dtype, rounding):
    weight, bias = draw(N, K, dtype=dtype), draw(N, seed=3, dtype=dtype)
    for rows in (1, 7, 64):
        x = draw(2, rows, K, seed=rows, dtype=dtype).requires_grad_()
        y = frozen_linear(x, hold(weight), bias)
        grad_y = draw(2, rows, N, seed=rows + 1, dtype=dtype)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
        expected = product(x.detach().view(-1, K), weight, some(K).tolist()) + bias.double()
        assert y.dtype == grad_x.dtype == dtype and y.shape == (2, rows, N)
        assert distance(y.view(-1, N), expected) < rounding
        assert distance(grad_x.view(-1, K), product(grad_y.view(-1, N), weight.T)) < rounding


def test_rounding_takes_four_hundredths_of_a_weight_and_no_more():
    weight = draw(N, K) * torch.logspace(-6, 6, N)[:, None]  # rows of very different size: each has its own scale
    held, channels = hold(weight), some(K).tolist()
    error, least = (dequantized(held) - weight).abs(), weight.abs().amax(1, keepdim=True) * 2**-10 / LARGEST
    assert (error <= weight.abs() / 16 + least).all()
    assert (error[:, channels] <= weight[:, channels].abs() / 256 + least).all()
    once = [channel for channel in range(K) if channel not in channels]
    assert 0.01 < distance(dequantized(held)[:, once], weight[:, once]) < 0.04
    assert distance(dequantized(held)[:, channels], weight[:, channels]) < 0.002
    c = len(channels)
    assert sum(part.numel() * part.element_size() for part in held) == 2 * N * K + 2 * c * N + 4 * (N + K + c)


def test_what_the_largest_channels_bring_is_all_but_exact():
    """As in real models: x is 50 times as large in a few channels, which then bring nearly all of the error."""
    x, weight, c = draw(64, 256), draw(N, 256), how_many_twice(256)
    x[:, :c] *= 50
    exact = x.double() @ weight.double().T
    apart = {
        name: distance(frozen_linear(x, hold_in_fp8(weight, channels.int()), None), exact)
        for name, channels in {"largest": torch.arange(c), "others": torch.arange(c, 2 * c)}.items()
    }
    assert apart["others"] > 0.02 and apart["largest"] < apart["others"] / 8


@pytest.mark.parametrize("columns, c", [(16, 8), (48, 8), (256, 16), (576, 32), (18_944, 32)])
def test_the_sides_stay_whole_numbers_of_16(columns, c):
    assert how_many_twice(columns) == c and (columns + 2 * c) % 16 == 0
    held = hold(draw(16, columns))
    assert held[0].shape == (16, columns + 2 * c) and in_features(held) == columns


def test_the_largest_number_of_a_row_is_the_largest_of_fp8_and_zeros_stay_zeros():
    quantized, scales = quantize_rows(torch.tensor([[3.0, -6.0, 0.5], [0.0, 0.0, 0.0]]))
    assert quantized[0].float().tolist() == [224.0, -448.0, 36.0] and scales[0].item() == pytest.approx(6 / 448)
    assert not quantized[1].float().any() and scales[1] > 0


def test_what_is_not_finite_stays_visible():
    weight = hold(draw(N, K))
    for value in (float("nan"), float("inf")):
        x = draw(3, K)
        x[1, 5] = value
        y = frozen_linear(x, weight, None)
        assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()


def test_a_row_does_not_depend_on_what_stands_beside_it():
    weight, x = hold(draw(N, K)), draw(9, K)
    together = frozen_linear(x * torch.logspace(-3, 3, 9)[:, None], weight, None)
    alone = torch.cat(
        [frozen_linear(row[None] * scale, weight, None) for row, scale in zip(x, torch.logspace(-3, 3, 9), strict=True)]
    )
    assert distance(together, alone) < 1e-6
