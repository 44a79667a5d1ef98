"""AdamW's step in one pass over memory: gradient and state are read once, state and the model's weight written once.

Formula, for each element of a weight with gradient g, float32 master w and moments m, v, at its t-th update:

    g ← c·g                               c: clipping coefficient ÷ scale of the loss, a number on the device
    m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²
    w ← (1 - ηλ) w - η · m/(1 - β₁^t) ÷ (√(v/(1 - β₂^t)) + ε)
    the model's weight ← w, rounded to its dtype

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2; in the order of
torch.optim.AdamW, whose state (exp_avg, exp_avg_sq, step) it moves. Where `left_out` is not zero nothing moves at all,
`step` neither, as with `found_inf` of torch's fused AdamW; the flag stays on the device and nobody waits for it.

Done one after the other, clipping, casting, step and rounding walk over the same memory four times. Of a bf16 weight
with its bf16 gradient this pass reads 14 bytes an element and writes 14. All weights of one kind are one launch,
through a table of their addresses: a single path serves both the few large weights of full fine-tuning and LoRA's
hundreds of small ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from burnish.kernels.fast_path import has_kernels


class Weight(NamedTuple):
    """A weight and what belongs to it, all of one shape, contiguous, on one device."""

    master: Tensor  # float32
    gradient: Tensor  # float32, bf16 or float16
    first: Tensor  # moments, float32
    second: Tensor
    step: Tensor  # float32 scalar: its updates so far
    low: Tensor | None = None  # the model's weight in bf16 or float16, where the master is a copy of it


class Settings(NamedTuple):
    """η, (β₁, β₂), ε, λ"""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def adamw_(weights: Sequence[Weight], settings: Settings, factor: Tensor, left_out: Tensor) -> None:
    """One update of all `weights`, in place. `factor`, `left_out`: float32 scalars on the device of the weights."""
    if not weights:
        return
    way = on_gpu if has_kernels(weights[0].master.device) else reference
    way(weights, settings, factor, left_out)


def reference(weights: Sequence[Weight], settings: Settings, factor: Tensor, left_out: Tensor) -> None:
    """The formula in plain torch, in the dtype of the masters."""
    lr, betas, eps, weight_decay = settings
    moves = left_out == 0
    for w in weights:
        t = w.step + moves
        g = w.gradient.to(w.master.dtype) * factor
        m = betas[0] * w.first + (1 - betas[0]) * g
        v = betas[1] * w.second + (1 - betas[1]) * g * g
        root = (v / (1 - betas[1] ** t.double()).to(v.dtype)).sqrt() + eps
        rate = (lr / (1 - betas[0] ** t.double())).to(v.dtype)
        moved = (1 - lr * weight_decay) * w.master - rate * (m / root)
        for place, value in ((w.master, moved), (w.first, m), (w.second, v), (w.step, t)):
            place.copy_(torch.where(moves, value, place))
        if w.low is not None:
            w.low.copy_(torch.where(moves, w.master.to(w.low.dtype), w.low))


def on_gpu(weights: Sequence[Weight], settings: Settings, factor: Tensor, left_out: Tensor) -> None:
    """The same in one launch for each pair of dtypes (of gradient and model) that occurs."""
    from burnish.kernels.adamw_on_gpu import move

    lr, betas, eps, weight_decay = settings
    kinds: dict[tuple[torch.dtype, torch.dtype | None], list[Weight]] = defaultdict(list)
    for w in weights:
        kinds[w.gradient.dtype, None if w.low is None else w.low.dtype].append(w)
    for (gradient, low), some in kinds.items():
        steps = [w.step for w in some]
        torch._foreach_add_(steps, 1 - left_out, alpha=1)  # without alpha torch would ask the device for the number
        t = torch.stack(steps).double()  # in float32 the first 1 - β₂^t would lose 3 of its 7 digits
        numbers = torch.stack([lr / (1 - betas[0] ** t), (1 - betas[1] ** t).rsqrt()], 1).float()  # [n, 2]
        rows, sizes = [_addresses(w) for w in some], [w.master.numel() for w in some]
        move(rows, sizes, gradient, low, numbers, factor, left_out, 1 - lr * weight_decay, betas, eps)


def _addresses(w: Weight) -> tuple[int, ...]:
    whole = (w.master, w.first, w.second, w.gradient)
    return *(tensor.data_ptr() for tensor in whole), 0 if w.low is None else w.low.data_ptr()
