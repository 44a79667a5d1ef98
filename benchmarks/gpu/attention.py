"""Attention over packed rows on one GPU: torch's variable-length attention beside cuDNN's, forward and backward.

    python benchmarks/gpu/attention.py --out results/attention.json

The rows are those of work.py: documents of mean 257 tokens laid end to end, with the heads of the models that sft.py
trains. burnish trains with torch's (FlashAttention 2, whose instructions are those of the chips before Hopper); cuDNN's
kernels use Hopper's own matrix units, take grouped heads as they are and come with torch. Reaching them over packed
rows needs the package nvidia-cudnn-frontend (1.18 was read for this; 2 MB), since torch 2.11's own entry,
`_cudnn_attention_backward`, takes the head's size for the longest document there and writes out of bounds.

Each contestant's numbers are compared with float32 attention, document by document; its time is the median of the
repeats, alternating. Empty documents fill their number up to one less than a power of two, as in training.

Predicted: the rows hold 18 GFLOP of causal products forward for 7B's heads, 45 backward; in a step FlashAttention 2
takes 0.75 ms for both and the sums of grouped heads, 84 TFLOP/s. cuDNN 0.35: 11 of the 444 ms of a step of 7B, 9 of the
306 of 1.5B's. Not run on a device yet: its graphs were built without one (cuDNN 9.19 has engines for them on sm_90).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from work import LONGEST, draw_lengths

SHAPES = {  # heads, heads of keys and values, head_dim, tokens
    "7b": (28, 4, 128, 8192),
    "1.5b": (12, 2, 128, 16384),
    "0.5b": (14, 2, 64, 8192),
    "smollm2": (9, 3, 64, 8192),
}


class Rows(NamedTuple):
    query: Tensor  # [T, heads, head_dim]
    key: Tensor  # [T, kv_heads, head_dim]
    value: Tensor
    grad: Tensor  # of the output
    cu_seq_lens: Tensor  # [documents + 1]
    longest: int


def make_rows(shape: str) -> Rows:
    heads, kv_heads, head_dim, tokens = SHAPES[shape]
    drawn = draw_lengths(np.random.default_rng(0)).tolist()
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(drawn[len(lengths)], tokens - sum(lengths)))
    lengths += [0] * (2 ** len(lengths).bit_length() - 1 - len(lengths))
    torch.manual_seed(0)
    query, key, value, grad = (
        torch.randn(tokens, n, head_dim, device="cuda", dtype=torch.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    return Rows(query, key, value, grad, borders, LONGEST)


def exact(rows: Rows) -> list[Tensor]:
    """Output and gradients in float32, one document after the other."""
    q, k, v = (x.float().requires_grad_() for x in rows[:3])
    lengths = rows.cu_seq_lens.diff().tolist()
    outputs = []
    for one in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        if one[0].shape[0]:
            query, key, value = (x.transpose(0, 1)[None] for x in one)  # [1, heads, n, head_dim]
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            outputs.append(F.scaled_dot_product_attention(query, key, value, is_causal=True)[0].transpose(0, 1))
    output = torch.cat(outputs)
    output.backward(rows.grad.float())
    return [output.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


# Each contestant: rows → its forward pass; the forward's result → (output, its backward pass → gradients)


def torch_forward(rows: Rows) -> tuple[Tensor, Callable[[], list[Tensor]]]:
    from burnish.model.attention import _varlen

    q, k, v = (x.detach().transpose(0, 1)[None].requires_grad_() for x in rows[:3])
    output = _varlen(q, k, v, rows.cu_seq_lens, rows.longest, None, None)[0]  # [T, heads, head_dim]

    def backward() -> list[Tensor]:
        grads = torch.autograd.grad(output, (q, k, v), rows.grad, retain_graph=True)
        return [g[0].transpose(0, 1) for g in grads]

    return output.detach(), backward


def cudnn_forward(rows: Rows) -> tuple[Tensor, Callable[[], list[Tensor]]]:
    q, k, v, grad, borders, longest = rows
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    sizes = (heads, kv_heads, head_dim, longest, len(borders) - 1, tokens)
    lengths = borders.diff()
    of_q, of_k, of_stats = borders * (heads * head_dim), borders * (kv_heads * head_dim), borders * heads
    output, stats = torch.empty_like(q), q.new_empty(tokens, heads, 1, dtype=torch.float32)
    shared = {"lengths_q": lengths, "lengths_k": lengths, "of_q": of_q, "of_k": of_k, "of_stats": of_stats}
    execute(*cudnn_graph(*sizes, backward=False), shared | {"q": q, "k": k, "v": v, "o": output, "stats": stats})

    def backward() -> list[Tensor]:
        grads = [torch.empty_like(x) for x in (q, k, v)]
        given = {"q": q, "k": k, "v": v, "o": output, "stats": stats, "do": grad}
        made = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        execute(*cudnn_graph(*sizes, backward=True), shared | given | made)
        return grads

    return output, backward


@cache
def cudnn_graph(
    heads: int, kv_heads: int, head_dim: int, longest: int, documents: int, tokens: int, *, backward: bool
) -> tuple[Any, dict[str, Any]]:
    """The plan of one shape and its tensors by name. `of_…` say where in memory each document begins."""
    import cudnn

    BF16, FLOAT, INT32 = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT, cudnn.data_type.INT32
    graph = cudnn.pygraph(io_data_type=BF16, intermediate_data_type=FLOAT, compute_data_type=FLOAT, handle=handle())

    def numbers(name: str, n: int) -> Any:
        return graph.tensor(name=name, dim=[n, 1, 1, 1], stride=[1, 1, 1, 1], data_type=INT32)

    parts = {name: numbers(name, documents) for name in ("lengths_q", "lengths_k")}
    parts |= {name: numbers(name, documents + 1) for name in ("of_q", "of_k", "of_stats")}

    def layout(n: int) -> dict[str, list[int]]:
        return {
            "dim": [documents, n, longest, head_dim],
            "stride": [longest * n * head_dim, head_dim, n * head_dim, 1],
        }

    stats_layout = {"dim": [documents, heads, longest, 1], "stride": [longest * heads, 1, heads, 1]}

    def given(name: str, n: int, offset: str) -> Any:
        parts[name] = graph.tensor(name=name, **layout(n), data_type=BF16)
        parts[name].set_ragged_offset(parts[offset])
        return parts[name]

    def made(name: str, tensor: Any, offset: str, place: dict[str, list[int]], dtype: Any = BF16) -> None:
        tensor.set_output(True).set_data_type(dtype).set_dim(place["dim"]).set_stride(place["stride"])
        tensor.set_ragged_offset(parts[offset])
        parts[name] = tensor

    inputs = {"q": given("q", heads, "of_q"), "k": given("k", kv_heads, "of_k"), "v": given("v", kv_heads, "of_k")}
    causal = {"diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0}
    inputs |= causal | {"attn_scale": head_dim**-0.5, "use_padding_mask": True}
    inputs |= {"seq_len_q": parts["lengths_q"], "seq_len_kv": parts["lengths_k"]}
    if backward:
        parts["stats"] = graph.tensor(name="stats", **stats_layout, data_type=FLOAT)
        parts["stats"].set_ragged_offset(parts["of_stats"])
        inputs |= {"o": given("o", heads, "of_q"), "dO": given("do", heads, "of_q"), "stats": parts["stats"]}
        grads = graph.sdpa_backward(name="backward", **inputs, max_total_seq_len_q=tokens, max_total_seq_len_kv=tokens)
        for name, grad, n, offset in zip(
            ("dq", "dk", "dv"), grads, (heads, kv_heads, kv_heads), ("of_q", "of_k", "of_k"), strict=True
        ):
            made(name, grad, offset, layout(n))
    else:
        output, stats = graph.sdpa(name="forward", **inputs, is_inference=False)
        made("o", output, "of_q", layout(heads))
        made("stats", stats, "of_stats", stats_layout, FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return graph, parts


@cache
def handle() -> Any:
    import cudnn

    made = cudnn.create_handle()
    cudnn.set_stream(made, torch.cuda.current_stream().cuda_stream)
    return made


def execute(graph: Any, parts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device="cuda")
    graph.execute({parts[name]: x for name, x in tensors.items() if name in parts}, workspace, handle=handle())


CONTESTANTS = {"torch": torch_forward, "cudnn": cudnn_forward}


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def milliseconds(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(shape: str, repeats: int) -> list[dict[str, Any]]:
    rows = make_rows(shape)
    right = exact(rows)
    entries, running = [], {}
    for name, forward in CONTESTANTS.items():
        try:
            output, backward = forward(rows)
            apart = [distance(a, b) for a, b in zip([output, *backward()], right, strict=True)]
        except Exception as error:  # a contestant that is not installed or cannot do it leaves the others standing
            print(f"{shape} {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        running[name] = forward, backward
        entries.append({"name": f"{shape} {name}", "apart": dict(zip(("o", "dq", "dk", "dv"), apart, strict=True))})
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for _ in range(repeats):
        for name, (forward, backward) in running.items():
            times[name].append((milliseconds(lambda f=forward: f(rows)), milliseconds(backward)))
    for entry in entries:
        pairs = times[entry["name"].split()[1]]
        entry["forward_ms"], entry["backward_ms"] = (round(statistics.median(t), 4) for t in zip(*pairs, strict=True))
        apart = " ".join(f"{name} {value:.1e}" for name, value in entry["apart"].items())
        print(f"{entry['name']:16} {entry['forward_ms']:.3f} + {entry['backward_ms']:.3f} ms   {apart}", flush=True)
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may repeat; all of them where none is given")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "date": datetime.date.today().isoformat(),
    }
    entries = [entry | about for shape in args.shape or SHAPES for entry in measure(shape, args.repeats)]
    Path(args.out).write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
