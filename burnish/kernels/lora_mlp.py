"""A SwiGLU block whose three frozen linear layers have low-rank adapters, as one operation.

Formula, x [M, K], frozen gate and up W_g, W_u [N, K] and down W_d [K, N], adapters A, B and the scale s as in
lora_linear.py:

    t_g = x A_gᵀ    g = x W_gᵀ + s·t_g B_gᵀ                          u likewise
    h   = silu(g) · u                                                [M, N]
    t_d = h A_dᵀ    y = h W_dᵀ + s·t_d B_dᵀ                          [M, K]

    ∂t_d = s·∂y B_d                ∂h = ∂y W_d + ∂t_d A_d            σ = sigmoid(g)
    ∂g   = ∂h · u · σ(1 + g(1-σ))  ∂u = ∂h · gσ
    ∂x   = ∂g W_g + ∂u W_u + ∂t_g A_g + ∂t_u A_u                     ∂t_g = s·∂g B_g, ∂t_u likewise
    ∂A_d = ∂t_dᵀ h, ∂B_d = s·∂yᵀ t_d, and so on

What is gained over its parts: what the adapters add to g, u and ∂h, and their gradients that are sums over g's rows,
happen in the two passes that SwiGLU takes anyway (on_gpu.py); A_g and A_u read x once; and h, as large as g, is
computed again in registers rather than kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.fast_path import has_kernels
from burnish.kernels.frozen_linear import Frozen, rows_of, times, times_transposed


class LoraWeights(NamedTuple):
    weight: Frozen  # [N, K], as it is or in fp8
    a: Tensor  # [r, K]
    b: Tensor  # [N, r]


def lora_mlp(x: Tensor, gate: LoraWeights, up: LoraWeights, down: LoraWeights, scale: float) -> Tensor:
    """x [..., K] → [..., K]. One dtype, one rank and one scale throughout; x and the adapters get gradients."""
    flat = x.reshape(-1, x.shape[-1])
    y, *_ = torch.ops.burnish.lora_mlp(flat, *gate, *up, *down, scale)
    return y.view(x.shape)


def reference(x: Tensor, gate: LoraWeights, up: LoraWeights, down: LoraWeights, scale: float) -> Tensor:
    """The same as linear layers: what the fused form is checked against."""

    def linear(h: Tensor, layer: LoraWeights) -> Tensor:
        return F.linear(h, layer.weight[0]) + scale * F.linear(F.linear(h, layer.a), layer.b)

    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def _forward(
    x: Tensor, w_g: Frozen, a_g: Tensor, b_g: Tensor, w_u: Frozen, a_u: Tensor, b_u: Tensor,
    w_d: Frozen, a_d: Tensor, b_d: Tensor, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y, and what the backward pass reads: x W_gᵀ, x W_uᵀ, [t_g t_u], t_d."""
    inner = x @ torch.cat([a_g, a_u]).T  # [M, 2r]
    rows = rows_of(x, w_g)
    gate, up = times_transposed(x, rows, w_g), times_transposed(x, rows, w_u)  # [M, N]
    hidden = _swiglu(gate, up, inner, b_g, b_u, scale)
    inner_down = hidden @ a_d.T  # [M, r]
    if len(w_d) == 1:
        y = (inner_down @ b_d.T).mul_(scale).addmm_(hidden, w_d[0].T)
    else:
        y = times_transposed(hidden, rows_of(hidden, w_d), w_d).addmm_(inner_down, b_d.T, alpha=scale)
    return y, gate, up, inner, inner_down


def _backward(
    grad_y: Tensor, x: Tensor, gate: Tensor, up: Tensor, inner: Tensor, inner_down: Tensor, w_g: Frozen, a_g: Tensor,
    b_g: Tensor, w_u: Frozen, a_u: Tensor, b_u: Tensor, w_d: Frozen, a_d: Tensor, b_d: Tensor, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """∂x, ∂A_g, ∂B_g, ∂A_u, ∂B_u, ∂A_d, ∂B_d."""
    grad_inner_down = (grad_y @ b_d).mul_(scale)  # [M, r]
    grad_b_d = (inner_down.T @ grad_y).mul_(scale).T
    grad_gate, grad_up, sums = _swiglu_backward(
        gate, up, times(grad_y, w_d), inner, grad_inner_down, b_g, b_u, a_d, scale
    )  # [M, N], [M, N], [3, r, N]
    grad_b_g, grad_b_u, grad_a_d = (scale * sums[0]).T, (scale * sums[1]).T, sums[2]
    grad_inner = torch.cat([grad_gate @ b_g, grad_up @ b_u], dim=1).mul_(scale)  # [M, 2r]
    grad_a_g, grad_a_u = (grad_inner.T @ x).chunk(2)  # [r, K]
    if len(w_g) == 1:
        grad_x = (grad_inner @ torch.cat([a_g, a_u])).addmm_(grad_gate, w_g[0]).addmm_(grad_up, w_u[0])
    else:
        grad_x = times(grad_gate, w_g).add_(times(grad_up, w_u)).addmm_(grad_inner, torch.cat([a_g, a_u]))
    learned = (grad_a_g, grad_b_g, grad_a_u, grad_b_u, grad_a_d, grad_b_d)
    # An operator's outputs must share no memory with each other.
    return grad_x, *(torch.empty_like(each, dtype=x.dtype, memory_format=_ROWS).copy_(each) for each in learned)


_ROWS = torch.contiguous_format


def _swiglu(gate: Tensor, up: Tensor, inner: Tensor, b_g: Tensor, b_u: Tensor, scale: float) -> Tensor:
    """h [M, N] from what the frozen layers gave and what the adapters add."""
    if has_kernels(gate.device):
        from burnish.kernels import on_gpu

        return on_gpu.swiglu(gate, up, inner, b_g, b_u, scale)
    g, u = _with_adapters(gate, up, inner, b_g, b_u, scale)
    return (F.silu(g) * u).to(gate.dtype)


def _swiglu_backward(
    gate: Tensor, up: Tensor, grad_hidden: Tensor, inner: Tensor, grad_inner: Tensor, b_g: Tensor, b_u: Tensor,
    a_d: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """∂g, ∂u [M, N] and [3, r, N]: t_gᵀ ∂g, t_uᵀ ∂u, ∂t_dᵀ h, in float32 at least."""
    if has_kernels(gate.device):
        from burnish.kernels import on_gpu

        return on_gpu.swiglu_backward(gate, up, grad_hidden, inner, grad_inner, b_g, b_u, a_d, scale)
    g, u = _with_adapters(gate, up, inner, b_g, b_u, scale)
    t, t_d = inner.to(g.dtype), grad_inner.to(g.dtype)
    grad_h = torch.addmm(grad_hidden.to(g.dtype), t_d, a_d.to(g.dtype))
    sigmoid = g.sigmoid()
    grad_g, grad_u = grad_h * u * sigmoid * (1 + g * (1 - sigmoid)), grad_h * g * sigmoid
    r = b_g.shape[1]
    sums = torch.stack([t[:, :r].T @ grad_g, t[:, r:].T @ grad_u, t_d.T @ (g * sigmoid * u)])
    return grad_g.to(gate.dtype), grad_u.to(gate.dtype), sums


def _with_adapters(
    gate: Tensor, up: Tensor, inner: Tensor, b_g: Tensor, b_u: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """g and u, in float32 where they are less (as the GPU's kernel has them)."""
    r, dtype = b_g.shape[1], torch.promote_types(gate.dtype, torch.float32)
    t = inner.to(dtype)
    g = torch.addmm(gate.to(dtype), t[:, :r], b_g.to(dtype).T, alpha=scale)
    return g, torch.addmm(up.to(dtype), t[:, r:], b_u.to(dtype).T, alpha=scale)


_LAYERS = ", ".join(f"Tensor[] w_{n}, Tensor a_{n}, Tensor b_{n}" for n in "gud")
_library = torch.library.Library("burnish", "FRAGMENT")
_library.define(f"lora_mlp(Tensor x, {_LAYERS}, float scale) -> ({', '.join(['Tensor'] * 5)})")
_library.define(
    "lora_mlp_backward(Tensor grad_y, Tensor x, Tensor gate, Tensor up, Tensor inner, Tensor inner_down, "
    f"{_LAYERS}, float scale) -> ({', '.join(['Tensor'] * 7)})"
)
for _key in ("CPU", "CUDA"):
    _library.impl("lora_mlp", _forward, _key)
    _library.impl("lora_mlp_backward", _backward, _key)


@torch.library.register_fake("burnish::lora_mlp", lib=_library)
def _(x: Tensor, w_g: Frozen, a_g: Tensor, *others: Any) -> tuple[Tensor, ...]:
    rows, wide, r = x.shape[0], w_g[0].shape[0], a_g.shape[0]
    return tuple(x.new_empty(rows, columns) for columns in (x.shape[1], wide, wide, 2 * r, r))


@torch.library.register_fake("burnish::lora_mlp_backward", lib=_library)
def _(grad_y: Tensor, x: Tensor, gate: Tensor, up: Tensor, inner: Tensor, inner_down: Tensor, *layers: Any) -> Any:
    _, a_g, b_g, _, a_u, b_u, _, a_d, b_d, _ = layers
    return tuple(torch.empty_like(each) for each in (x, a_g, b_g, a_u, b_u, a_d, b_d))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_g, a_g, b_g, w_u, a_u, b_u, w_d, a_d, b_d, ctx.scale = inputs
    ctx.parts = len(w_g)  # of a frozen weight: one, or those of fp8
    ctx.save_for_backward(x, *output[1:], *w_g, a_g, b_g, *w_u, a_u, b_u, *w_d, a_d, b_d)


def _differentiate(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
    x, gate, up, inner, inner_down, *rest = ctx.saved_tensors
    n = ctx.parts
    layers = [each for at in range(0, len(rest), n + 2) for each in (rest[at : at + n], rest[at + n], rest[at + n + 1])]
    grads = torch.ops.burnish.lora_mlp_backward(grad_y.contiguous(), x, gate, up, inner, inner_down, *layers, ctx.scale)
    x, a_g, b_g, a_u, b_u, a_d, b_d = grads
    none = [None] * n
    return x, none, a_g, b_g, none, a_u, b_u, none, a_d, b_d, None


torch.library.register_autograd("burnish::lora_mlp", _differentiate, setup_context=_save, lib=_library)
