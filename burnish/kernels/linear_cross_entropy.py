"""The head and its loss in one operation, without ever holding tokens × vocabulary.

Formula, over positions m with hidden state h_m, target y_m and logits z = W h_m + b:

    loss  = Σ_m [ (1 - ε)·(lse(z) - z_y) + ε·(lse(z) - mean(z)) ]          lse = log Σ exp, ε = label smoothing
    ∂z_v  = softmax(z)_v - (1 - ε)·[v = y] - ε/V
    ∂h_m  = Wᵀ ∂z          ∂W = Σ_m ∂z h_mᵀ          ∂b = Σ_m ∂z

The positions are walked in tiles. A tile's logits live only while its loss *and* its gradient are computed, so the
backward pass has nothing to recompute: it multiplies the stored gradients by the incoming scalar. (The idea of
computing a loss's gradient in its forward is that of Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989; the
tiles here are plain torch.) With a frozen head no gradient of W is formed. Only trained positions are handed in, so
masked ones cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.fast_path import has_kernels

HALF_BOOST = 1024.0  # ∂z in fp16 is stored this much larger: most of a softmax is below fp16's least number, 6e-8
CPU_TILE = 256  # tokens; a tile's float32 logits at a vocabulary of 50k are 50 MB, and larger tiles gain nothing


def gpu_tile(trained: bool) -> int:
    """Tokens; 2,048 keep the matrix units busy (tiles of 256 lose a third). Fewer tiles where the weight is `trained`:
    each adds to the whole of its float32 gradient."""
    return 4096 if trained else 2048


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    count_correct: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of `targets` under softmax(hidden @ weight.T + bias).

    hidden [M, H] and weight [V, H] in one dtype, targets [M] int64, bias [V].
    Returns (loss, correct): two scalars, float32 and int64; `correct` counts argmax hits when asked, else 0.
    Differentiable once in hidden, weight and bias.
    """
    if hidden.shape[0] == 0:  # a batch with nothing to train: keep the graph, add nothing
        nothing = hidden.sum().float() + weight[:0].sum().float()
        return nothing, torch.zeros((), dtype=torch.int64, device=hidden.device)
    if not torch.is_grad_enabled():  # what a Function is told (needs_input_grad) says nothing of no_grad
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing, count_correct)


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """The same loss as one matrix product and torch's cross_entropy: what the tiles are checked against."""
    logits = F.linear(hidden, weight, bias).float()  # [M, V]
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        label_smoothing: float,
        count_correct: bool,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None  # [M, H]
        # Sums over all tiles are kept in float32: bf16 would lose the small addends of later tiles.
        grad_weight: Tensor | None = None  # [V, H]
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None  # [V]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)

        needs_grad = need_hidden or need_weight or need_bias
        # Between -1 and 1 before, so it cannot overflow. A power of two, and taken off again in the backward pass: the
        # scale of the loss (train/scale.py) comes too late for what is computed here.
        boost = HALF_BOOST if hidden.dtype == torch.float16 else 1.0
        tile = gpu_tile(need_weight) if hidden.is_cuda else CPU_TILE
        for start in range(0, hidden.shape[0], tile):
            h, y = hidden[start : start + tile], targets[start : start + tile]
            tile_loss = _tile_loss_on_gpu if has_kernels(hidden.device) else _tile_loss
            losses, hits, grad_logits = tile_loss(
                F.linear(h, weight, bias), y, label_smoothing, boost, needs_grad=needs_grad, counts=count_correct
            )
            loss += losses.sum()
            if hits is not None:
                correct += hits.sum()
            if grad_logits is None:
                continue
            grad_logits_low = grad_logits.to(hidden.dtype)  # [tile, V]
            if grad_hidden is not None:
                torch.mm(grad_logits_low, weight, out=grad_hidden[start : start + tile])
            if need_weight:
                grad_weight = _add_product(grad_weight, grad_logits_low.T, h)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
            del grad_logits, grad_logits_low  # not to be held beside the next tile's

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        ctx.boost = boost
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        scale = grad_loss / ctx.boost  # float32: rounded to bf16 it would be a factor of up to 1.004 on every gradient
        return (
            None if grad_hidden is None else _product_in(grad_hidden.dtype, grad_hidden, scale),
            None if grad_weight is None else _product_in(weight_dtype, grad_weight, scale),
            None if grad_bias is None else _product_in(bias_dtype, grad_bias, scale),
            None,
            None,
            None,
        )


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in float32, written over the total; where there is none yet nothing is read, and no zeros are made.

    On CUDA a product of less precision adds to it while it is written, never rounded.
    """
    if not a.is_cuda or a.dtype not in (torch.bfloat16, torch.float16):
        product = a @ b
        return product.float() if total is None else total.add_(product)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _product_in(dtype: torch.dtype, total: Tensor, scale: Tensor) -> Tensor:
    """total · scale, a float32 scalar, rounded as it is written: no float32 copy of it in between."""
    rounded = torch.empty_like(total, dtype=dtype)
    if has_kernels(total.device):
        from burnish.kernels.on_gpu import scale_into

        return scale_into(rounded, total, scale)
    wide = total.float() if total.dtype.itemsize < scale.dtype.itemsize else total  # torch would round the scale
    return torch.mul(wide, scale, out=rounded)


Tile = tuple[Tensor, Tensor | None, Tensor | None]  # losses [tile], hits [tile], ∂z [tile, V]


def _tile_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float, boost: float, *, needs_grad: bool, counts: bool
) -> Tile:
    """Loss of a tile's rows, which of them hit, and boost · ∂z in float32."""
    logits, at_target = logits.float(), targets[:, None]  # [tile, V], [tile, 1]
    smoothing = label_smoothing
    hits = logits.argmax(-1) == targets if counts else None
    # The loss needs z at the target and on average before the logits are overwritten.
    picked = (1 - smoothing) * logits.gather(1, at_target)[:, 0]  # [tile]
    if smoothing:
        picked += smoothing * logits.mean(-1)
    largest = logits.amax(-1, keepdim=True)  # [tile, 1]
    exponentials = logits.sub_(largest).exp_()  # [tile, V], in place: one pass of exp for loss and gradient
    total = exponentials.sum(-1, keepdim=True)  # [tile, 1]
    losses = (total.log() + largest)[:, 0] - picked
    if not needs_grad:
        return losses, hits, None
    grad = exponentials.div_(total)
    if smoothing:
        grad -= smoothing / logits.shape[-1]
    grad.scatter_add_(1, at_target, torch.full_like(at_target, -(1 - smoothing), dtype=grad.dtype))
    return losses, hits, grad if boost == 1 else grad.mul_(boost)


def _tile_loss_on_gpu(
    logits: Tensor, targets: Tensor, label_smoothing: float, boost: float, *, needs_grad: bool, counts: bool
) -> Tile:
    """The same in one kernel, with ∂z in the dtype of the logits and in their place: 2 passes over them, not 12."""
    from burnish.kernels.on_gpu import softmax_loss_

    losses, hits = softmax_loss_(logits, targets, label_smoothing, boost, needs_grad=needs_grad, counts=counts)
    return losses, hits, logits if needs_grad else None
