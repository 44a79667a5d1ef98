"""Causal attention inside each document by cuDNN, whose kernels for Hopper use that chip's own matrix instructions.

FlashAttention 2, which torch calls, takes those of the chips before it (benchmarks/gpu/attention.py has both).

Formula (Dao, FlashAttention-2, arXiv 2307.08691), for the tokens of one document and one head:

    S  = scale · Q Kᵀ, above the diagonal −∞
    L  = log Σ exp(S), P = exp(S − L)        [n], [n, n]
    O  = P V                                 O and L are kept
    ∂V = Pᵀ ∂O
    ∂S = P ∘ (∂O Vᵀ − rowsum(∂O ∘ O))
    ∂Q = scale · ∂S K
    ∂K = scale · ∂Sᵀ Q                       for the heads of a group, which share K and V, added up
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from burnish.kernels.cudnn_plan import Shape, run

DTYPES = (torch.bfloat16, torch.float16)
MOST = 2**31  # elements of Q that a 32-bit place in it can name


def cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, longest: int, scale: float
) -> Tensor:
    """query [T, heads, head_dim], key and value [T, kv_heads, head_dim] → [T, heads, head_dim], all in one dtype.

    `cu_seq_lens` [D + 1] int32: where documents begin, and T. `longest`: tokens of the longest, or more.
    """
    q, k, v = query.contiguous(), key.contiguous(), value.contiguous()
    return torch.ops.burnish.cudnn_attention(q, k, v, cu_seq_lens, longest, scale)[0]


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Shapes [T, heads, head_dim] and dtypes that it is known to compute."""
    tokens, heads, head_dim = query.shape
    return (
        query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and head_dim == value.shape[-1] <= 128
        and head_dim % 8 == 0
        and tokens * heads * head_dim < MOST
    )


def is_for(device: torch.device, dtype: torch.dtype) -> bool:
    """16 bits on a Hopper chip."""
    return dtype in DTYPES and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def try_out(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> str:
    """Why it is not to be used: it is not there, or gives other numbers than the formula for four documents, forward or
    backward. "" where nothing is wrong. Raises what a library of another version does, or one without such a kernel."""
    if device.type == "cuda" and find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed (pip install 'burnish[cudnn]')"
    lengths = (300, 1, 70, 141)
    borders = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    rows = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(sum(lengths), n, head_dim, device=device, dtype=dtype, generator=rows)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    if not fits(q, k, v):
        return f"its heads are {head_dim} wide"
    about = (borders, max(lengths), head_dim**-0.5)
    output, stats = forward_of(q, k, v, *about)
    ours = (output, *backward_of(grad, q, k, v, output, stats, *about))
    q, k, v, grad = (x.float() for x in (q, k, v, grad))
    output, stats = reference(q, k, v, *about)
    right = (output, *reference_backward(grad, q, k, v, output, stats, *about))
    apart = torch.stack([(a.float() - b).norm() / b.norm() for a, b in zip(ours, right, strict=True)]).max().item()
    return "" if apart < 2e-2 else f"its numbers are wrong by {apart:.1g}"  # not a number is wrong too


# ---- the formula, document by document -----------------------------------------------------------------------------


def reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(O [T, heads, head_dim], L [T, heads])."""
    group = query.shape[1] // key.shape[1]
    output, stats = torch.empty_like(query), _stats_for(query)
    wide = (x.to(stats.dtype) for x in (query, key, value))
    for q, k, v, o, each in _documents(cu_seq_lens, *wide, output, stats):
        scores = _scores(q, k, group, scale)
        each.copy_(scores.logsumexp(-1).T)
        o.copy_(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.repeat_interleave(group, 1)))
    return output, stats


def reference_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, stats: Tensor, cu_seq_lens: Tensor,
    longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(∂Q, ∂K, ∂V) from ∂O and what the forward pass kept."""
    group = query.shape[1] // key.shape[1]
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    wide = (x.to(stats.dtype) for x in (grad, query, key, value, output))
    for do, q, k, v, o, each, dq, dk, dv in _documents(cu_seq_lens, *wide, stats, *grads):
        p = (_scores(q, k, group, scale) - each.T[..., None]).exp()  # [heads, n, n]
        dp = torch.einsum("ihd,jhd->hij", do, v.repeat_interleave(group, 1))
        ds = p * (dp - (do * o).sum(-1).T[..., None]) * scale
        dq.copy_(torch.einsum("hij,jhd->ihd", ds, k.repeat_interleave(group, 1)))
        for made, weights, by in ((dk, ds, q), (dv, p, do)):
            of_heads = torch.einsum("hij,ihd->jhd", weights, by)
            made.copy_(of_heads.unflatten(1, (-1, group)).sum(2))
    return grads


def _stats_for(query: Tensor) -> Tensor:
    """Room for L, in float32 at least."""
    return query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))


def _documents(cu_seq_lens: Tensor, *tensors: Tensor) -> Any:
    return zip(*(x.split(cu_seq_lens.diff().tolist()) for x in tensors), strict=True)


def _scores(query: Tensor, key: Tensor, group: int, scale: float) -> Tensor:
    """S [heads, n, n]."""
    scores = torch.einsum("ihd,jhd->hij", query, key.repeat_interleave(group, 1)) * scale
    return scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))


# ---- cuDNN ---------------------------------------------------------------------------------------------------------


def forward_of(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(O, L) of the formula."""
    shape = Shape.of(query, key, len(cu_seq_lens), longest, scale, backward=False)
    output, stats = torch.empty_like(query), _stats_for(query)
    run(shape, cu_seq_lens, {"q": query, "k": key, "v": value, "o": output, "stats": stats})
    return output, stats


def backward_of(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, stats: Tensor, cu_seq_lens: Tensor,
    longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(∂Q, ∂K, ∂V) of the formula."""
    shape = Shape.of(query, key, len(cu_seq_lens), longest, scale, backward=True)
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    given = {"q": query, "k": key, "v": value, "o": output, "stats": stats, "do": grad}
    run(shape, cu_seq_lens, given | {"dq": dq, "dk": dk, "dv": dv})
    return dq, dk, dv


# ---- as operators, for torch.compile -------------------------------------------------------------------------------

_library = torch.library.Library("burnish", "FRAGMENT")
_library.define(
    "cudnn_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seq_lens, SymInt longest, float scale) -> "
    "(Tensor, Tensor)"
)
_library.define(
    "cudnn_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor stats, "
    "Tensor cu_seq_lens, SymInt longest, float scale) -> (Tensor, Tensor, Tensor)"
)
_library.impl("cudnn_attention", forward_of, "CUDA")
_library.impl("cudnn_attention_backward", backward_of, "CUDA")
_library.impl("cudnn_attention", reference, "CPU")
_library.impl("cudnn_attention_backward", reference_backward, "CPU")


@torch.library.register_fake("burnish::cudnn_attention", lib=_library)
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), _stats_for(query)


@torch.library.register_fake("burnish::cudnn_attention_backward", lib=_library)
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seq_lens, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seq_lens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _of_stats: None) -> tuple[Any, ...]:
    grads = torch.ops.burnish.cudnn_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scale)
    return *grads, None, None, None


torch.library.register_autograd("burnish::cudnn_attention", _differentiate, setup_context=_save, lib=_library)
