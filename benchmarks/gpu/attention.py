"""Attention over packed rows on one GPU: torch's variable-length attention beside cuDNN's, forward and backward.

    python benchmarks/gpu/attention.py --out results/attention.json

The rows are those of work.py, documents of mean 257 tokens laid end to end with the heads of the models that sft.py
trains; and documents of 4,096 and 16,384 tokens. torch's is FlashAttention 2, whose instructions are those of the chips
before Hopper; cuDNN's is burnish's own operator (burnish/kernels/cudnn_attention.py).

Each contestant's numbers are compared with float32 attention, document by document. Its time is the median of the
repeats, alternating, of a recorded CUDA graph: what a CPU takes to launch kernels is not in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sft import versions_of
from torch import Tensor
from work import draw_lengths

from burnish.model import attention
from burnish.model.cuda_recorder import CudaRecorder

SHAPES = {  # heads, heads of keys and values, head_dim, tokens, tokens of each document (0: as in work.py)
    "7b": (28, 4, 128, 8192, 0),
    "7b-4096": (28, 4, 128, 8192, 4096),
    "7b-16384": (28, 4, 128, 16384, 16384),
    "1.5b": (12, 2, 128, 16384, 0),
    "0.5b": (14, 2, 64, 8192, 0),
    "0.5b-4096": (14, 2, 64, 8192, 4096),
    "0.5b-16384": (14, 2, 64, 16384, 16384),
    "smollm2": (9, 3, 64, 8192, 0),
}
TIMES = 10  # in one recording


class Rows(NamedTuple):
    query: Tensor  # [1, heads, T, head_dim]
    key: Tensor  # [1, kv_heads, T, head_dim]
    value: Tensor
    grad: Tensor  # of the output, [1, T, heads, head_dim]
    cu_seq_lens: Tensor  # [documents + 1]
    longest: int


def make_rows(shape: str) -> Rows:
    heads, kv_heads, head_dim, tokens, each = SHAPES[shape]
    drawn = [each] * tokens if each else draw_lengths(np.random.default_rng(0)).tolist()
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(drawn[len(lengths)], tokens - sum(lengths)))
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, n, tokens, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    return Rows(query, key, value, torch.randn_like(query.transpose(1, 2)), borders, max(lengths))


def attend(function: Callable[..., Tensor], rows: Rows) -> Tensor:
    return function(*rows[:3], rows.cu_seq_lens, rows.longest, None)


def output_and_gradients(function: Callable[..., Tensor], rows: Rows) -> list[Tensor]:
    output = attend(function, rows)
    return [output.detach(), *torch.autograd.grad(output, rows[:3], rows.grad.to(output.dtype))]


def exact(rows: Rows) -> list[Tensor]:
    """In float32, one document after the other."""
    low = [x.detach().float().requires_grad_() for x in rows[:3]]
    return output_and_gradients(by_document, Rows(*low, *rows[3:]))


def by_document(*given: Any) -> Tensor:
    query, key, value, borders, _longest, scale = given
    return attention._by_document(query, key, value, borders, scale, None, 0.0)


CONTESTANTS: dict[str, Callable[..., Tensor]] = {"torch": attention._varlen, "cudnn": attention._cudnn}


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def recorded(work: Callable[[], Any]) -> Callable[[], None]:
    recorder = CudaRecorder()
    recorder.rehearse(work)
    return recorder.record(lambda: [work() for _ in range(TIMES)] and None)


def milliseconds(replay: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / TIMES


def measure(shape: str, repeats: int) -> list[dict[str, Any]]:
    rows = make_rows(shape)
    right = exact(rows)
    entries, running = [], {}
    for name, function in CONTESTANTS.items():
        try:
            apart = [distance(a, b) for a, b in zip(output_and_gradients(function, rows), right, strict=True)]
            forward = recorded(lambda f=function: attend(f, rows))
            both = recorded(lambda f=function: output_and_gradients(f, rows))
        except Exception as error:  # a contestant that is not installed or cannot do it leaves the others standing
            print(f"{shape} {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        running[name] = forward, both
        sizes = {"documents": len(rows.cu_seq_lens) - 1, "longest": rows.longest}
        parts = ("o", "dq", "dk", "dv")
        entries.append({"name": f"{shape} {name}", **sizes, "apart": dict(zip(parts, apart, strict=True))})
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for _ in range(repeats):
        for name, (forward, both) in running.items():
            times[name].append((milliseconds(forward), milliseconds(both)))
    for entry in entries:
        forward, both = (statistics.median(t) for t in zip(*times[entry["name"].partition(" ")[2]], strict=True))
        entry["forward_ms"], entry["backward_ms"] = round(forward, 4), round(both - forward, 4)
        apart = " ".join(f"{name} {value:.1e}" for name, value in entry["apart"].items())
        print(f"{entry['name']:14} {forward:.3f} + {both - forward:.3f} ms   {apart}", flush=True)
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may repeat; all of them where none is given")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    about = {
        "device": torch.cuda.get_device_name(),
        "versions": versions_of("torch", "nvidia-cudnn-frontend") | {"cudnn": torch.backends.cudnn.version()},
        "date": datetime.date.today().isoformat(),
    }
    entries = [entry | about for shape in args.shape or SHAPES for entry in measure(shape, args.repeats)]
    Path(args.out).write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
