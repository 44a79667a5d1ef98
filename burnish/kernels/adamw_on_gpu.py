"""The Triton kernel of adamw.py: all weights of a group in one launch, each byte read and written once.

Imported only on a GPU. A program finds its piece of a weight through a table of addresses, so that a model of hundreds
of small weights costs as few launches as one of a single large one (a launch takes Python 40 µs). Addresses are 64 bits
wide: a weight may have more than 2^31 elements.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton is no dependency (torch's CUDA builds bring it), and its functions are called through an index.

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16384  # elements a program; the look-ups before its first load are then nothing
# Of them at a time: with 4 warps 4 a thread, in one layout for float32 and bf16. With 8 a thread (16 bytes of bf16)
# what is stored in float32 would change its layout through shared memory.
BLOCK = 512
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _move(
    master, first, second, gradient, low, at, size, factor, rate, root_scale, keep, beta1, rest1, beta2, rest2, eps,
    HAS_LOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The elements `at`. `WHOLE`: all of them are inside, and no mask narrows what a thread loads at once."""
    inside = at < size
    if WHOLE:
        g = tl.load(gradient + at).to(tl.float32) * factor
        m = tl.load(first + at)
        v = tl.load(second + at)
        w = tl.load(master + at)
    else:
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * factor
        m = tl.load(first + at, mask=inside, other=0.0)
        v = tl.load(second + at, mask=inside, other=0.0)
        w = tl.load(master + at, mask=inside, other=0.0)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    w = keep * w - rate * (m / (tl.sqrt(v) * root_scale + eps))
    if WHOLE:
        tl.store(first + at, m)
        tl.store(second + at, v)
        tl.store(master + at, w)
        if HAS_LOW:
            tl.store(low + at, w.to(low.dtype.element_ty))
    else:
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)
        tl.store(master + at, w, mask=inside)
        if HAS_LOW:
            tl.store(low + at, w.to(low.dtype.element_ty), mask=inside)


@triton.jit
def _adamw(
    table, numbers, chunks, factor_at, left_out_at, keep, beta1, rest1, beta2, rest2, eps,
    GRADIENT: tl.constexpr, LOW: tl.constexpr, HAS_LOW: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of a weight a program; `table` [n, 6] has a row of addresses and the size of each weight."""
    if tl.load(left_out_at) == 0:
        which = tl.load(chunks + 2 * tl.program_id(0))
        start = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
        row = table + 6 * which
        master = tl.load(row).to(tl.pointer_type(tl.float32))
        first = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        second = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        gradient = tl.load(row + 3).to(tl.pointer_type(GRADIENT))
        low = tl.load(row + 4).to(tl.pointer_type(LOW))
        size = tl.load(row + 5)
        if ALIGNED:
            master = tl.multiple_of(master, 16)
            first = tl.multiple_of(first, 16)
            second = tl.multiple_of(second, 16)
            gradient = tl.multiple_of(gradient, 16)
            low = tl.multiple_of(low, 16)
        factor = tl.load(factor_at)
        rate = tl.load(numbers + 2 * which)
        root_scale = tl.load(numbers + 2 * which + 1)
        lanes = tl.arange(0, BLOCK)
        if start + CHUNK <= size:
            for offset in range(0, CHUNK, BLOCK):
                _move(
                    master, first, second, gradient, low, start + offset + lanes, size, factor, rate, root_scale,
                    keep, beta1, rest1, beta2, rest2, eps, HAS_LOW, True,
                )  # fmt: skip
        else:
            for offset in range(0, CHUNK, BLOCK):
                if start + offset < size:
                    _move(
                        master, first, second, gradient, low, start + offset + lanes, size, factor, rate, root_scale,
                        keep, beta1, rest1, beta2, rest2, eps, HAS_LOW, False,
                    )  # fmt: skip


@lru_cache(maxsize=32)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[programs, 2] int32: which weight, and which chunk of it. The same in every step: sent to the device once."""
    counts = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
    which = torch.arange(len(sizes)).repeat_interleave(counts)
    number = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
    return torch.stack([which, number], 1).int().to(device)


def move(
    rows: list[tuple[int, ...]], sizes: list[int], gradient: torch.dtype, low: torch.dtype | None, numbers: Tensor,
    factor: Tensor, left_out: Tensor, keep: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One launch. A row: the addresses of master, both moments, gradient and low-precision weight (0: none).

    numbers [n, 2] float32: each weight's lr / (1 - β₁^t) and 1 / √(1 - β₂^t). factor, left_out: float32 scalars. All
    of them lie on the device.
    """
    device = numbers.device
    # The addresses of gradients change from step to step; from pinned memory nobody waits until they have arrived.
    whole = [(*row, size) for row, size in zip(rows, sizes, strict=True)]
    host = torch.tensor(whole, dtype=torch.int64, pin_memory=device.type == "cuda")
    chunks = _chunks(tuple(sizes), device)
    if not len(chunks):
        return
    _adamw[(len(chunks),)](
        host.to(device, non_blocking=True), numbers, chunks, factor, left_out,
        float(keep), float(betas[0]), 1.0 - betas[0], float(betas[1]), 1.0 - betas[1], float(eps),
        GRADIENT=_TYPES[gradient], LOW=_TYPES[low or torch.float32], HAS_LOW=low is not None,
        ALIGNED=all(address % 16 == 0 for row in rows for address in row),
        CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
