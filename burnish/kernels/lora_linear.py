"""A frozen linear layer with a low-rank adapter beside it, in as few passes over its output as can be.

Formula (Hu et al., LoRA, arXiv 2106.09685), x [M, K], W [N, K] frozen, A [r, K], B [N, r], scale s:

    t  = x Aᵀ                     [M, r]
    y  = x Wᵀ + bias + s · t Bᵀ   [M, N]     added in place by the product that makes it
    ∂t = s · ∂y B                 [M, r]
    ∂x = ∂y W + ∂t A              [M, K]     added in place likewise
    ∂A = ∂tᵀ x                    [r, K]
    ∂B = s · (tᵀ ∂y)ᵀ             [N, r]     the small factor first: ∂yᵀ t would walk ∂y by columns, 4 times slower

Autograd over peft's own layer makes four passes more over [M, N] (scale, add, and both again backward).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x [..., K] → [..., N]. All in one dtype; `weight` and `bias` get no gradient, `x`, `a` and `b` do."""
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    return _LoraLinear.apply(flat, weight, bias, a, b, scale).view(*x.shape[:-1], weight.shape[0])


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same as three linear layers: what the fused form is checked against."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = x @ a.T  # [M, r]
        y = F.linear(x, weight, bias)  # [M, N]
        y.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, inner = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        grad_inner = (grad_y @ b).mul_(ctx.scale)  # [M, r]
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_y, weight).addmm_(grad_inner, a)
        if ctx.needs_input_grad[3]:
            grad_a = grad_inner.T @ x
        if ctx.needs_input_grad[4]:
            grad_b = (inner.T @ grad_y).mul_(ctx.scale).T
        return grad_x, None, None, grad_a, grad_b, None
