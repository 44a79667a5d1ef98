"""Attention on the CPU, forward and backward: each document by itself (burnish/model/attention.py) or one padded batch.

    python benchmarks/cpu_attention.py --lengths 559,396,372,360,340,150,90,47

SmolLM2's heads (9 of 64, 3 for keys and values). `padded` is what transformers does with such a batch: repeat the key
heads, one scaled_dot_product_attention over the longest length with a causal mask that hides padding. Alternating, in
one process; the median of the repeats, and their ratio. Real tokens are the same on both sides.

Predicted: the padded batch multiplies 8 × 559² pairs, the documents 2.6 times fewer, and causality halves theirs again
(a mask tensor does not let torch skip the upper half): 3 times faster. In bf16 on a CPU without bf16 instructions the
documents, multiplied in float32, win by far more.
Measured (results/cpu_attention.json): 2.8 times in float32, 13 times in bf16 on an AVX2 machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from burnish.model.attention import _by_document

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


def by_document(lengths: list[int], dtype: torch.dtype) -> float:
    q, k, v = (
        torch.randn(1, n, sum(lengths), HEAD_DIM, dtype=dtype, requires_grad=True) for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    started = time.perf_counter()
    _by_document(q, k, v, borders, None, None, 0.0).sum().backward()
    return time.perf_counter() - started


def padded(lengths: list[int], dtype: torch.dtype) -> float:
    longest = -(-max(lengths) // 8) * 8
    q, k, v = (
        torch.randn(len(lengths), n, longest, HEAD_DIM, dtype=dtype, requires_grad=True)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    real = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]  # [B, S]
    mask = torch.ones(longest, longest, dtype=torch.bool).tril() & real[:, None, None, :]  # [B, 1, S, S]
    started = time.perf_counter()
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="559,396,372,360,340,150,90,47", help="tokens of each document")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "cpu_attention.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths = [int(word) for word in args.lengths.split(",")]
    entries = []
    for dtype in (torch.float32, torch.bfloat16):
        by_document(lengths, dtype), padded(lengths, dtype)  # not timed
        pairs = [(by_document(lengths, dtype), padded(lengths, dtype)) for _ in range(args.repeats)]
        ours, theirs = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        name = str(dtype).removeprefix("torch.")
        print(f"{name:9} by document {ours:8.1f} ms   padded {theirs:8.1f} ms   ratio {ratio:.2f}")
        entries.append(
            {
                "name": f"attention {name}",
                "by_document_ms": round(ours, 1),
                "padded_ms": round(theirs, 1),
                "ratio": round(ratio, 2),
                "lengths": lengths,
                "threads": args.threads,
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "bf16_instructions": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
                "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
            }
        )
    Path(args.out).write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
