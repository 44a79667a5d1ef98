"""A linear layer whose frozen weight is held quantized, alone or with a low-rank adapter beside it.

The formula is lora_linear's, with W = dequantize(). W lives for one pass of the layer: it is made once in the forward
and once in the backward, never kept between them, so both use the same numbers and memory holds one W at a time. How
weights are quantized is not known here: `dequantize` gives them, [N, K], in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.lora_linear import backward_of, forward_of

Dequantize = Callable[[torch.dtype], Tensor]


def dequantized_linear(x: Tensor, dequantize: Dequantize, bias: Tensor | None) -> Tensor:
    """x [..., K] → x Wᵀ + bias [..., N]; only `x` gets a gradient."""
    return _Linear.apply(x, dequantize, bias)  # type: ignore[no-any-return]


def dequantized_lora_linear(
    x: Tensor, dequantize: Dequantize, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x [..., K] → x Wᵀ + bias + s·(x Aᵀ)Bᵀ [..., N]; `x`, `a` and `b` get gradients."""
    flat = x.reshape(-1, x.shape[-1])
    y = _LoraLinear.apply(flat, dequantize, bias, flat @ a.T, b, scale)
    return y.view(*x.shape[:-1], b.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dequantize: Dequantize, bias: Tensor | None) -> Tensor:
        ctx.dequantize = dequantize
        return F.linear(x, dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad_y @ ctx.dequantize(grad_y.dtype), None, None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dequantize: Dequantize, bias: Tensor | None, inner: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(inner, b)
        ctx.dequantize, ctx.scale = dequantize, scale
        return forward_of(x, [], [dequantize(x.dtype)], bias, inner, b, scale)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inner, b = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        weight = [ctx.dequantize(grad_y.dtype)] if needs_x else []  # nobody asks below the first block
        grad_x, grad_inner, grad_b = backward_of(grad_y, weight, inner, b, ctx.scale, needs_x)
        return grad_x if needs_x else None, None, None, grad_inner, grad_b, None
