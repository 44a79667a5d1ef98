"""The two products with a frozen weight: as it is published, or held and multiplied in fp8.

Formula, x [M, K], W [N, K]:

    y = x Wᵀ        ∂x = ∂y W

A frozen weight is a list of tensors: [W], or in fp8 [Q, s, Qᵗ, sᵗ, C]

    s_n  = max_k |W_nk| / 448     Q_nk  = e4m3(W_nk / s_n)              y_mn  = σ_m s_n  Σ_k X_mk Q_nk
    sᵗ_k = max_n |W_nk| / 448     Qᵗ_kn = e4m3(W_nk / sᵗ_k)             ∂x_mk = τ_m sᵗ_k Σ_n e4m3(∂y_mn / τ_m) Qᵗ_kn

with X_mk = e4m3(x_mk / σ_m), a scale σ_m for each row of x and τ_m for each of ∂y, made alike. e4m3 has three bits of
mantissa and 448 for its largest number (Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433). A scale
can only stand outside the sum, and the two products sum over different axes: so W is held twice, in 2 bytes a weight as
in bf16. Sums are in float32, on fp8 matrix units in the fewer bits of their fast accumulation. Scales are by row, so a
token's numbers do not depend on what stands beside it in a batch.

e4m3 rounds every number by the same share of itself, so the few channels of x that are far larger than the others bring
most of the error. In these, C [c], what rounding took away is a second number, r(v) = e4m3(v - e4m3(v)), of x and of W,
which leaves 0.1 % of them in the place of 2.6 %. They stand behind the others, so that it stays one product:

    X' = [X, r(x/σ)_C, X_C]   [M, K + 2c]       Q' = [Q, Q_C, r(W/s)_C]   [N, K + 2c]       y = σ s X' Q'ᵀ

Devices without fp8 matrix units multiply the same rounded numbers in bf16 (CUDA) or float32, where each of them is
exact.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.fast_path import has_kernels

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST = 1e-12  # of a scale: a row of zeros has none

Frozen = list[Tensor]


def frozen_linear(x: Tensor, weight: Frozen, bias: Tensor | None) -> Tensor:
    """x [..., K] → x Wᵀ + bias [..., N]; only `x` gets a gradient."""
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    y = torch.ops.burnish.frozen_linear(flat, rows_of(flat, weight), weight, bias)
    return y.view(*x.shape[:-1], out_features(weight))


def out_features(weight: Frozen) -> int:
    return weight[0].shape[0]


def in_features(weight: Frozen) -> int:
    return weight[0].shape[1] if len(weight) == 1 else weight[2].shape[0]


def hold_in_fp8(weight: Tensor, channels: Tensor) -> Frozen:
    """W [N, K], C [c] int32 → [Q', s, Qᵗ, sᵗ, C]; Q' [N, K + 2c] and Qᵗ [K, N] as bytes (uint8), s [N], sᵗ [K] float32.

    c is `how_many_twice`.
    """
    rows, scales = quantize_rows(weight, channels)
    rows, once, c = rows.view(torch.uint8), weight.shape[1], len(channels)
    rows = torch.cat([rows[:, :once], rows[:, once + c :], rows[:, once : once + c]], dim=1)  # X' has them otherwise
    transposed, transposed_scales = quantize_rows(weight.T.contiguous())
    return [rows, scales, transposed.view(torch.uint8), transposed_scales, channels]


def dequantized(weight: Frozen) -> Tensor:
    """W [N, K] float32 as the forward pass has it, but for r(x) r(W)."""
    rows, scales, _, _, channels = weight
    numbers, once = rows.view(FP8).float(), in_features(weight)
    held = numbers[:, :once]
    held[:, channels] += numbers[:, once + len(channels) :]
    return held * scales[:, None]


def how_many_twice(columns: int) -> int:
    """c of a weight with so many columns: a sixteenth, as a power of two from 8 to 32; K + 2c stays a multiple of 16.

    On SmolLM2's 576 channels 32 leave half of the error on English and two thirds on Chinese, 16 little more
    (docs/performance.md); they cost 2c/K of the forward product, 2 % of 7B's.
    """
    return max(8, min(32, 1 << (columns // 16).bit_length() - 1))


def rows_of(x: Tensor, weight: Frozen) -> list[Tensor]:
    """x as `times_transposed` reads it beside x: quantized, or [] where W is whole.

    An operation of its own, so that torch.compile sees that q, k and v, whose channels are one tensor, read the same.
    """
    return list(torch.ops.burnish.quantize_rows(x.detach(), weight[4])) if len(weight) > 1 else []


def times_transposed(x: Tensor, rows: list[Tensor], weight: Frozen, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias [M, N]; `rows` from `rows_of`."""
    if len(weight) == 1:
        return F.linear(x, weight[0], bias)
    return _multiply(rows[0], rows[1], weight[0], weight[1], bias, x.dtype)


def times(grad_y: Tensor, weight: Frozen) -> Tensor:
    """∂y W [M, K]."""
    if len(weight) == 1:
        return grad_y @ weight[0]
    return _multiply(*quantize_rows(grad_y), weight[2], weight[3], None, grad_y.dtype)


def quantize_rows(x: Tensor, channels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K], C [c] → (X' of the formula, e4m3 [M, K + 2c], and σ [M] float32); without C, (X [M, K], σ)."""
    if has_kernels(x.device):
        from burnish.kernels import on_gpu

        return on_gpu.quantize_rows(x.contiguous(), channels, FP8, LARGEST, LEAST)
    x = x.float()
    scales = (x.abs().amax(1) / LARGEST).clamp_min(LEAST)  # [M]
    exact = (x / scales[:, None]).clamp(-LARGEST, LARGEST)
    rounded = exact.to(FP8)
    if channels is None:
        return rounded, scales
    near = rounded[:, channels]
    return torch.cat([rounded, (exact[:, channels] - near.float()).to(FP8), near], dim=1), scales


def _multiply(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x [M, K], weight [N, K], both e4m3 or its bytes → [M, N] in `dtype`."""
    x, weight = x.view(FP8), weight.view(FP8)
    if x.is_cuda and has_fp8_units(x.device) and dtype == torch.bfloat16:
        return torch._scaled_mm(
            x, weight.T, x_scales[:, None], scales[None, :], bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    if x.is_cuda:
        product = torch.mm(x.bfloat16(), weight.bfloat16().T, out_dtype=torch.float32)
    else:
        product = x.float() @ weight.float().T
    product = product.mul_(x_scales[:, None]).mul_(scales)
    return (product if bias is None else product.add_(bias)).to(dtype)


@cache
def has_fp8_units(device: torch.device) -> bool:
    """Hopper and later; Ada has them too, but not with a scale for every row."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def fits_fp8(weight: Tensor) -> bool:
    """Both sides must be whole numbers of 16, which the matrix units ask for."""
    return weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0


def _quantize_to_bytes(x: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    quantized, scales = quantize_rows(x, channels)
    return quantized.view(torch.uint8), scales


_library = torch.library.Library("burnish", "FRAGMENT")
_library.define("quantize_rows(Tensor x, Tensor channels) -> (Tensor, Tensor)")
_library.define("frozen_linear(Tensor x, Tensor[] rows, Tensor[] weight, Tensor? bias) -> Tensor")
_library.define("frozen_linear_backward(Tensor grad_y, Tensor[] weight) -> Tensor")
for _key in ("CPU", "CUDA"):
    _library.impl("quantize_rows", _quantize_to_bytes, _key)
    _library.impl("frozen_linear", times_transposed, _key)
    _library.impl("frozen_linear_backward", times, _key)


@torch.library.register_fake("burnish::quantize_rows", lib=_library)
def _(x: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.shape[1] + 2 * channels.shape[0]
    return x.new_empty(x.shape[0], wide, dtype=torch.uint8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("burnish::frozen_linear", lib=_library)
def _(x: Tensor, rows: list[Tensor], weight: Frozen, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight[0].shape[0])


@torch.library.register_fake("burnish::frozen_linear_backward", lib=_library)
def _(grad_y: Tensor, weight: Frozen) -> Tensor:
    return grad_y.new_empty(grad_y.shape[0], in_features(weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, weight, _ = inputs
    ctx.rows = len(rows)
    ctx.save_for_backward(*weight)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    weight = list(ctx.saved_tensors)
    grad_x = torch.ops.burnish.frozen_linear_backward(grad_y.contiguous(), weight)
    return grad_x, [None] * ctx.rows, [None] * len(weight), None


torch.library.register_autograd("burnish::frozen_linear", _differentiate, setup_context=_save, lib=_library)
