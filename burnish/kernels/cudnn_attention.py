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

cuDNN plans a shape before it computes it, and the GPU waits for 50 to 150 ms. So shapes are few, all of powers of two:
documents without tokens fill their number up to one less, the longest counts as 2,048 or more, and so do all tokens
where sums of ∂Q are kept. How many documents are empty does not show in the time that it takes.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

BORDERS, LONGEST, TOKENS = 16, 2048, 2048  # the least that shapes are rounded up to
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
    backward. "" where nothing is wrong."""
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
    try:
        output, stats = forward_of(q, k, v, *about)
        ours = (output, *backward_of(grad, q, k, v, output, stats, *about))
    except Exception as error:  # a library of another version, a shape it has no kernel for: what it raises then
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
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


class Shape(NamedTuple):
    """What a plan is for. `tokens` bounds what its backward pass adds up in float32 and is 0 forward."""

    device: int
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    documents: int
    longest: int
    tokens: int
    scale: float

    @classmethod
    def of(cls, query: Tensor, key: Tensor, borders: int, longest: int, scale: float, *, backward: bool) -> Shape:
        (tokens, heads, head_dim), device = query.shape, query.device.index or 0
        documents = _power_of_two(borders, BORDERS) - 1
        most, room = _power_of_two(longest, LONGEST), _power_of_two(tokens, TOKENS) if backward else 0
        return cls(device, query.dtype, heads, key.shape[1], head_dim, documents, most, room, scale)


class Plan(NamedTuple):
    graph: Any
    uids: dict[str, int]
    workspace: int  # bytes
    widths: Tensor  # [3, 1] int32: elements of a token in Q, in K and in L


def forward_of(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(O, L) of the formula."""
    shape = Shape.of(query, key, len(cu_seq_lens), longest, scale, backward=False)
    output, stats = torch.empty_like(query), _stats_for(query)
    _run(shape, cu_seq_lens, {"q": query, "k": key, "v": value, "o": output, "stats": stats})
    return output, stats


def backward_of(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, stats: Tensor, cu_seq_lens: Tensor,
    longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(∂Q, ∂K, ∂V) of the formula."""
    shape = Shape.of(query, key, len(cu_seq_lens), longest, scale, backward=True)
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    given = {"q": query, "k": key, "v": value, "o": output, "stats": stats, "do": grad}
    _run(shape, cu_seq_lens, given | {"dq": dq, "dk": dk, "dv": dv})
    return dq, dk, dv


def _run(shape: Shape, cu_seq_lens: Tensor, tensors: dict[str, Tensor]) -> None:
    plan = _plan(shape)
    lengths, places = _layout(cu_seq_lens, shape.documents, len(tensors["q"]), plan.widths)
    tensors |= dict(zip(("of_q", "of_k", "of_stats"), places, strict=True)) | {"lengths": lengths}
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=lengths.device)
    handle = _handle(shape.device)
    _frontend().set_stream(handle, torch.cuda.current_stream(shape.device).cuda_stream)
    plan.graph.execute({plan.uids[name]: x for name, x in tensors.items()}, workspace, handle=handle)


def _layout(cu_seq_lens: Tensor, documents: int, tokens: int, widths: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens of each document [documents], where it begins [3, documents + 1] in elements of Q, of K and of L)."""
    missing = documents + 1 - len(cu_seq_lens)
    borders = torch.nn.functional.pad(cu_seq_lens, (0, missing), value=tokens) if missing else cu_seq_lens
    return borders.diff(), borders * widths


@cache  # for good: a recorded pass reads what its plans hold
def _plan(shape: Shape) -> Plan:
    """Documents are a batch whose entries begin where `of_…` say ("ragged") and are as long as `lengths` says."""
    cudnn = _frontend()
    device, dtype, heads, kv_heads, head_dim, documents, longest, tokens, scale = shape
    float32, int32 = cudnn.data_type.FLOAT, cudnn.data_type.INT32
    own = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[dtype]
    graph = cudnn.pygraph(
        io_data_type=own, intermediate_data_type=float32, compute_data_type=float32, handle=_handle(device)
    )
    parts: dict[str, Any] = {}
    for name, count in (("lengths", documents), *((each, documents + 1) for each in ("of_q", "of_k", "of_stats"))):
        parts[name] = graph.tensor(name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=int32)

    def layout(n: int, width: int = head_dim) -> dict[str, list[int]]:
        return {"dim": [documents, n, longest, width], "stride": [longest * n * width, width, n * width, 1]}

    def given(name: str, n: int, places: str, width: int = head_dim, kind: Any = own) -> Any:
        parts[name] = graph.tensor(name=name, **layout(n, width), data_type=kind)
        parts[name].set_ragged_offset(parts[places])
        return parts[name]

    def made(name: str, tensor: Any, n: int, places: str, width: int = head_dim, kind: Any = own) -> None:
        where = layout(n, width)
        tensor.set_output(True).set_data_type(kind).set_dim(where["dim"]).set_stride(where["stride"])
        tensor.set_ragged_offset(parts[places])
        parts[name] = tensor

    inputs: dict[str, Any] = {
        "q": given("q", heads, "of_q"), "k": given("k", kv_heads, "of_k"), "v": given("v", kv_heads, "of_k"),
        "attn_scale": scale, "use_padding_mask": True, "seq_len_q": parts["lengths"], "seq_len_kv": parts["lengths"],
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0,
    }  # fmt: skip
    if tokens:
        inputs |= {"o": given("o", heads, "of_q"), "dO": given("do", heads, "of_q")}
        inputs["stats"] = given("stats", heads, "of_stats", 1, float32)
        grads = graph.sdpa_backward(name="backward", **inputs, max_total_seq_len_q=tokens, max_total_seq_len_kv=tokens)
        for name, grad, like in zip(("dq", "dk", "dv"), grads, ("q", "k", "k"), strict=True):
            made(name, grad, heads if like == "q" else kv_heads, f"of_{like}")
    else:
        output, stats = graph.sdpa(name="forward", **inputs, is_inference=False)
        made("o", output, heads, "of_q")
        made("stats", stats, heads, "of_stats", 1, float32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    uids = {name: part.get_uid() for name, part in parts.items()}
    widths = torch.tensor([[heads * head_dim], [kv_heads * head_dim], [heads]], dtype=torch.int32)
    return Plan(graph, uids, max(graph.get_workspace_size(), 1), widths.to(torch.device("cuda", device)))


@cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return _frontend().create_handle()


@cache
def _frontend() -> Any:
    """The package nvidia-cudnn-frontend, which not everybody has."""
    return import_module("cudnn")


def _power_of_two(number: int, least: int) -> int:
    return max(1 << (number - 1).bit_length(), least)


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
