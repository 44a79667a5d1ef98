"""A frozen linear layer with a low-rank adapter beside it, in as few passes over its output as can be.

Formula (Hu et al., LoRA, arXiv 2106.09685), x [M, K], W [N, K] frozen, A [r, K], B [N, r], scale s:

    t  = x Aᵀ                     [M, r]
    y  = x Wᵀ + bias + s · t Bᵀ   [M, N]     added in place by the product that makes it
    ∂t = s · ∂y B                 [M, r]
    ∂x = ∂y W + ∂t A              [M, K]
    ∂A = ∂tᵀ x                    [r, K]
    ∂B = s · (tᵀ ∂y)ᵀ             [N, r]     the small factor first: ∂yᵀ t would walk ∂y by columns, 4 times slower

Autograd over peft's own layer makes four passes more over [M, N] (scale, add, and both again backward).

t is given, not made here, so that layers of one input (q, k and v) can share the product that makes it; autograd of
that product gives ∂t A, which it adds to ∂y W, and ∂A.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.frozen_linear import Frozen, in_features, out_features, rows_of, times, times_transposed


def lora_linear(x: Tensor, weight: Frozen, bias: Tensor | None, inner: Tensor, b: Tensor, scale: float) -> Tensor:
    """x [..., K] and t = x Aᵀ [..., r] → [..., N]. All in one dtype; `x`, `inner` and `b` get gradients."""
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    rows = rows_of(flat, weight)
    y = torch.ops.burnish.lora_linear(flat, rows, weight, bias, inner.reshape(-1, inner.shape[-1]), b, scale)
    return y.view(*x.shape[:-1], out_features(weight))


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same as three linear layers: what the fused form is checked against."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)


def forward_of(
    x: Tensor, rows: list[Tensor], weight: Frozen, bias: Tensor | None, inner: Tensor, b: Tensor, scale: float
) -> Tensor:
    """y of the formula from t; `rows`: x as a product in fp8 reads it (frozen_linear.py)."""
    if rows or not x.is_cuda:
        return times_transposed(x, rows, weight, bias).addmm_(inner, b.T, alpha=scale)
    # The small product first: the large one then adds to it while it writes, which costs a pass less.
    y = x.new_empty(x.shape[0], weight[0].shape[0])
    if bias is None:
        y.addmm_(inner, b.T, beta=0, alpha=scale)
    else:
        torch.addmm(bias, inner, b.T, alpha=scale, out=y)
    return y.addmm_(x, weight[0].T)


def backward_of(
    grad_y: Tensor, weight: Frozen, inner: Tensor, b: Tensor, scale: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(∂y W, ∂t, ∂B); the first is empty where nobody asks for it."""
    grad_x = times(grad_y, weight) if needs_x else grad_y.new_empty(0)
    return grad_x, (grad_y @ b).mul_(scale), (inner.T @ grad_y).mul_(scale).T.contiguous()


# As operators, for torch.compile: it would take the products apart and add in passes of its own. (What it makes of an
# autograd.Function has lost gradients, on torch 2.11: tests/gpu compares them.)

_library = torch.library.Library("burnish", "FRAGMENT")
_library.define(
    "lora_linear(Tensor x, Tensor[] rows, Tensor[] weight, Tensor? bias, Tensor inner, Tensor b, float scale) -> Tensor"
)
_library.define(
    "lora_linear_backward(Tensor grad_y, Tensor[] weight, Tensor inner, Tensor b, float scale, bool needs_x) -> "
    "(Tensor, Tensor, Tensor)"
)
for _key in ("CPU", "CUDA"):
    _library.impl("lora_linear", forward_of, _key)
    _library.impl("lora_linear_backward", backward_of, _key)


@torch.library.register_fake("burnish::lora_linear", lib=_library)
def _(
    x: Tensor, rows: list[Tensor], weight: Frozen, bias: Tensor | None, inner: Tensor, b: Tensor, scale: float
) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[0])


@torch.library.register_fake("burnish::lora_linear_backward", lib=_library)
def _(
    grad_y: Tensor, weight: Frozen, inner: Tensor, b: Tensor, scale: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = grad_y.new_empty((grad_y.shape[0], in_features(weight)) if needs_x else (0,))
    return grad_x, grad_y.new_empty(grad_y.shape[0], b.shape[1]), b.new_empty(b.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, weight, _, inner, b, scale = inputs
    ctx.save_for_backward(inner, b, *weight)
    ctx.rows, ctx.scale = len(rows), scale


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    inner, b, *weight = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_inner, grad_b = torch.ops.burnish.lora_linear_backward(
        grad_y.contiguous(), weight, inner, b, ctx.scale, needs_x
    )
    return grad_x if needs_x else None, [None] * ctx.rows, [None] * len(weight), None, grad_inner, grad_b, None


torch.library.register_autograd("burnish::lora_linear", _differentiate, setup_context=_save, lib=_library)
