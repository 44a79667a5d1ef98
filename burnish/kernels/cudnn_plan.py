"""cuDNN's plans of attention, one for each shape, and what it takes to run them: for cudnn_attention.py.

A plan is made before its shape is computed, and the GPU waits for 50 ms and more. So shapes are few, all of powers of
two: documents without tokens fill their number up to one less, the longest counts as 2,048 or more, and so do all
tokens where sums of ∂Q are kept. How many documents are empty does not show in the time that it takes.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

BORDERS, LONGEST, TOKENS = 16, 2048, 2048  # the least that shapes are rounded up to


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
        documents = power_of_two(borders, BORDERS) - 1
        most, room = power_of_two(longest, LONGEST), power_of_two(tokens, TOKENS) if backward else 0
        return cls(device, query.dtype, heads, key.shape[1], head_dim, documents, most, room, scale)


class Plan(NamedTuple):
    graph: Any
    uids: dict[str, int]
    workspace: int  # bytes
    widths: Tensor  # [3, 1] int32: elements of a token in Q, in K and in L


def run(shape: Shape, cu_seq_lens: Tensor, tensors: dict[str, Tensor]) -> None:
    """Compute what the plan of a shape makes of `tensors`: q, k, v, o, stats, and backward do, dq, dk, dv."""
    plan = plan_of(shape)
    lengths, places = layout_of(cu_seq_lens, shape.documents, len(tensors["q"]), plan.widths)
    tensors |= dict(zip(("of_q", "of_k", "of_stats"), places, strict=True)) | {"lengths": lengths}
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=lengths.device)
    handle = _handle(shape.device)
    _frontend().set_stream(handle, torch.cuda.current_stream(shape.device).cuda_stream)
    plan.graph.execute({plan.uids[name]: x for name, x in tensors.items()}, workspace, handle=handle)


def layout_of(cu_seq_lens: Tensor, documents: int, tokens: int, widths: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens of each document [documents], where it begins [3, documents + 1] in elements of Q, of K and of L)."""
    missing = documents + 1 - len(cu_seq_lens)
    borders = torch.nn.functional.pad(cu_seq_lens, (0, missing), value=tokens) if missing else cu_seq_lens
    return borders.diff(), borders * widths


@cache  # for good: a recorded pass reads what its plans hold
def plan_of(shape: Shape) -> Plan:
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


def power_of_two(number: int, least: int) -> int:
    return max(1 << (number - 1).bit_length(), least)
