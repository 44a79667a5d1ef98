"""The Triton kernels: one pass over memory where torch's own operations would take several. Imported only on a GPU.

Each is called by the operation that it belongs to (linear_cross_entropy.py, lora_mlp.py), which has the formula and the
same in plain torch. Arithmetic is in float32 inside, whatever is read and written.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton is no dependency (torch's CUDA builds bring it), and its functions are called through an index.

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOWEST = tl.constexpr(-1e30)  # under every logit, and its difference to itself is a number, unlike that of -inf


@triton.jit
def _softmax_loss(
    logits, targets, losses, hits, vocabulary, smoothing, boost,
    NEEDS_GRAD: tl.constexpr, COUNTS: tl.constexpr, SMOOTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program; the second walk over it finds it in the cache."""
    row = tl.program_id(0)
    z = logits + row.to(tl.int64) * vocabulary
    target = tl.load(targets + row)
    lanes = tl.arange(0, BLOCK)

    # 1. For each lane the largest logit so far and the sum of exponentials under it, rescaled when that grows.
    largest = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    plain_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        x = tl.load(z + start + lanes, mask=inside, other=_LOWEST).to(tl.float32)
        new = tl.maximum(largest, x)
        total = total * tl.exp(largest - new) + tl.exp(x - new)
        largest = new
        if SMOOTHS:
            plain_sum += tl.where(inside, x, 0.0)
    top = tl.max(largest, axis=0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    at_target = tl.load(z + target).to(tl.float32)
    loss = log_sum - (1 - smoothing) * at_target
    if SMOOTHS:
        loss -= smoothing * tl.sum(plain_sum, axis=0) / vocabulary
    tl.store(losses + row, loss)

    # 2. The gradient, in the place of the logits; and whether the target is the first of the largest.
    if NEEDS_GRAD or COUNTS:
        first = tl.full([BLOCK], 2147483647, tl.int32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + lanes
            inside = columns < vocabulary
            x = tl.load(z + columns, mask=inside, other=_LOWEST).to(tl.float32)
            if COUNTS:
                first = tl.minimum(first, tl.where(x == top, columns, 2147483647))
            if NEEDS_GRAD:
                grad = tl.exp(x - log_sum) - smoothing / vocabulary
                grad = tl.where(columns == target, grad - (1 - smoothing), grad)
                tl.store(z + columns, (boost * grad).to(logits.dtype.element_ty), mask=inside)
        if COUNTS:
            tl.store(hits + row, (tl.min(first, axis=0) == target).to(tl.int32))


def softmax_loss_(
    logits: Tensor, targets: Tensor, smoothing: float, boost: float, *, needs_grad: bool, counts: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses of rows, [M] float32, and which of them hit. `logits` [M, V] are overwritten by boost · gradient."""
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    hits = targets.new_empty(rows, dtype=torch.int32) if counts else None
    _softmax_loss[(rows,)](
        logits, targets, losses, losses if hits is None else hits, vocabulary, smoothing, boost,
        NEEDS_GRAD=needs_grad, COUNTS=counts, SMOOTHS=smoothing > 0, BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return losses, hits


@triton.jit
def _scale_into(rounded, total, scale, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    scaled = tl.load(total + at, mask=inside).to(tl.float32) * tl.load(scale)
    tl.store(rounded + at, scaled.to(rounded.dtype.element_ty), mask=inside)


def scale_into(rounded: Tensor, total: Tensor, scale: Tensor) -> Tensor:
    """total · scale, a float32 scalar, in the dtype of `rounded`. Of mixed dtypes torch.mul takes twice as long."""
    size = total.numel()
    _scale_into[(triton.cdiv(size, 2048),)](rounded, total, scale, size, BLOCK=2048)
    return rounded


@triton.jit
def _low_rank(rows, columns, left, right, left_stride, right_stride, r, m_ok, n_ok, R: tl.constexpr):
    """left [M, r] @ right [N, r]ᵀ for a tile; ranks below 16, the least that the matrix units take, are filled up."""
    j = tl.arange(0, R)
    a = tl.load(left + rows[:, None] * left_stride + j[None, :], mask=m_ok[:, None] & (j < r)[None, :], other=0.0)
    b = tl.load(right + columns[None, :] * right_stride + j[:, None], mask=n_ok[None, :] & (j < r)[:, None], other=0.0)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _swiglu(gate, up, inner, b_gate, b_up, hidden, M, N, scale, r, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_ok, n_ok = m < M, n < N
    ok = m_ok[:, None] & n_ok[None, :]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    g = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=ok, other=0.0).to(tl.float32)
    g += scale * _low_rank(m, n, inner, b_gate, 2 * r, r, r, m_ok, n_ok, R)
    u += scale * _low_rank(m, n, inner + r, b_up, 2 * r, r, r, m_ok, n_ok, R)
    tl.store(hidden + at, (g * tl.sigmoid(g) * u).to(hidden.dtype.element_ty), mask=ok)


@triton.jit
def _swiglu_backward(
    gate, up, grad_hidden, inner, grad_inner, b_gate, b_up, a_down, grad_gate, grad_up, sums, M, N, scale, r, blocks,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`blocks` tiles below each other a program: what is summed over rows stays in registers until the last."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, R)
    n_ok, j_ok = n < N, j < r
    bg = tl.load(b_gate + n[None, :] * r + j[:, None], mask=n_ok[None, :] & j_ok[:, None], other=0.0)  # [R, BN]
    bu = tl.load(b_up + n[None, :] * r + j[:, None], mask=n_ok[None, :] & j_ok[:, None], other=0.0)
    ad = tl.load(a_down + j[:, None] * N + n[None, :], mask=n_ok[None, :] & j_ok[:, None], other=0.0)
    sum_gate = tl.zeros([R, BN], tl.float32)
    sum_up = tl.zeros([R, BN], tl.float32)
    sum_down = tl.zeros([R, BN], tl.float32)
    for block in range(blocks):
        m = (tl.program_id(1) * blocks + block) * BM + tl.arange(0, BM)
        m_ok = m < M
        ok = m_ok[:, None] & n_ok[None, :]
        at = m[:, None].to(tl.int64) * N + n[None, :]
        mj_ok = m_ok[:, None] & j_ok[None, :]
        tg = tl.load(inner + m[:, None] * (2 * r) + j[None, :], mask=mj_ok, other=0.0)  # [BM, R]
        tu = tl.load(inner + m[:, None] * (2 * r) + r + j[None, :], mask=mj_ok, other=0.0)
        td = tl.load(grad_inner + m[:, None] * r + j[None, :], mask=mj_ok, other=0.0)
        g = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32) + scale * tl.dot(tg, bg, input_precision="ieee")
        s = tl.sigmoid(g)
        dh = tl.load(grad_hidden + at, mask=ok, other=0.0).to(tl.float32) + tl.dot(td, ad, input_precision="ieee")
        u = tl.load(up + at, mask=ok, other=0.0).to(tl.float32) + scale * tl.dot(tu, bu, input_precision="ieee")
        dg = (dh * u * s * (1 + g * (1 - s))).to(grad_gate.dtype.element_ty)
        du = (dh * g * s).to(grad_up.dtype.element_ty)
        tl.store(grad_gate + at, dg, mask=ok)
        tl.store(grad_up + at, du, mask=ok)
        h = (g * s * u).to(grad_up.dtype.element_ty)
        sum_gate += tl.dot(tl.trans(tg), dg, input_precision="ieee")
        sum_up += tl.dot(tl.trans(tu), du, input_precision="ieee")
        sum_down += tl.dot(tl.trans(td), h, input_precision="ieee")
    to = sums + (tl.program_id(1).to(tl.int64) * 3 * r + j[:, None]) * N + n[None, :]
    rn_ok = j_ok[:, None] & n_ok[None, :]
    tl.store(to, sum_gate, mask=rn_ok)
    tl.store(to + r * N, sum_up, mask=rn_ok)
    tl.store(to + 2 * r * N, sum_down, mask=rn_ok)


# The fastest of those tried at 8,192 × 18,944 on an H100.
_FORWARD = {"BM": 32, "BN": 64, "num_warps": 4}
_BACKWARD = {"BM": 16, "BN": 128, "num_warps": 4}
_BLOCKS = 32  # tiles below each other a program of the backward pass


def _tile(tile: dict[str, int], rank: int) -> dict[str, int]:
    """With larger ranks the sums leave fewer registers for the rest."""
    filled = max(16, triton.next_power_of_2(rank))
    return tile | {"R": filled, "BN": tile["BN"] if filled == 16 else min(tile["BN"], 64)}


def swiglu(gate: Tensor, up: Tensor, inner: Tensor, b_gate: Tensor, b_up: Tensor, scale: float) -> Tensor:
    """silu(gate + s·t_g·B_gᵀ) · (up + s·t_u·B_uᵀ), [M, N]; inner [M, 2r] is t_g beside t_u."""
    (M, N), r = gate.shape, b_gate.shape[1]
    hidden, tile = torch.empty_like(gate), _tile(_FORWARD, r)
    grid = triton.cdiv(N, tile["BN"]), triton.cdiv(M, tile["BM"])
    _swiglu[grid](gate, up, inner, b_gate, b_up, hidden, M, N, scale, r, **tile)
    return hidden


def swiglu_backward(
    gate: Tensor, up: Tensor, grad_hidden: Tensor, inner: Tensor, grad_inner: Tensor, b_gate: Tensor, b_up: Tensor,
    a_down: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """∂gate and ∂up [M, N], and [3, r, N] float32: t_gᵀ ∂gate, t_uᵀ ∂up, ∂t_dᵀ h.

    `grad_hidden` lacks what comes through A of the layer after it, which is added here: grad_inner [M, r] · a_down.
    """
    (M, N), r = gate.shape, b_gate.shape[1]
    tile = _tile(_BACKWARD, r)
    grid = triton.cdiv(N, tile["BN"]), triton.cdiv(M, tile["BM"] * _BLOCKS)
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    sums = gate.new_empty(grid[1], 3, r, N, dtype=torch.float32)
    _swiglu_backward[grid](
        gate, up, grad_hidden, inner, grad_inner, b_gate, b_up, a_down, grad_gate, grad_up, sums, M, N, scale, r,
        _BLOCKS, **tile,
    )  # fmt: skip
    return grad_gate, grad_up, sums.sum(0)


@triton.jit
def _quantize_rows(
    x, channels, quantized, scales, columns, largest, least,
    MAIN: tl.constexpr, REST: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """One row a program, held in registers between its largest number and its rounding: read once."""
    row = tl.program_id(0).to(tl.int64)
    quantized += row * (columns + 2 * TWICE)
    first = tl.arange(0, MAIN)
    a = tl.load(x + row * columns + first, mask=first < columns, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(a), axis=0)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        b = tl.load(x + row * columns + rest, mask=rest < columns, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(b), axis=0))
        scale = tl.maximum(most / largest, least)
        b = _within(b / scale, largest).to(quantized.dtype.element_ty)
        tl.store(quantized + rest, b, mask=rest < columns)
    scale = tl.maximum(most / largest, least)
    tl.store(scales + row, scale)
    a = _within(a / scale, largest).to(quantized.dtype.element_ty)
    tl.store(quantized + first, a, mask=first < columns)
    if TWICE > 0:
        j = tl.arange(0, TWICE)
        exact = tl.load(x + row * columns + tl.load(channels + j)).to(tl.float32)
        exact = _within(exact / scale, largest)
        near = exact.to(quantized.dtype.element_ty)
        tl.store(quantized + columns + j, (exact - near.to(tl.float32)).to(quantized.dtype.element_ty))
        tl.store(quantized + columns + TWICE + j, near)


@triton.jit
def _within(value, largest):
    """Leaves NaN as it is."""
    return tl.where(tl.abs(value) > largest, tl.where(value > 0, largest, -largest), value)


def quantize_rows(
    x: Tensor, channels: Tensor | None, dtype: torch.dtype, largest: float, least: float
) -> tuple[Tensor, Tensor]:
    """x [M, K] → x / scales in `dtype`, and the scales [M] float32: the largest of a row over `largest`.

    Behind the K columns stand, for each of `channels` [c], what rounding took away, and then the rounded number again.
    """
    rows, columns = x.shape
    twice = 0 if channels is None else channels.shape[0]
    quantized, scales = x.new_empty(rows, columns + 2 * twice, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    main, rest = triton.next_power_of_2(columns), 0
    if main > 4096 and columns <= 0.75 * main:  # two powers of two leave fewer lanes idle than one
        main //= 2
        rest = triton.next_power_of_2(columns - main)
    _quantize_rows[(rows,)](
        x, channels, quantized, scales, columns, largest, least, MAIN=main, REST=rest, TWICE=twice, num_warps=8
    )
    return quantized, scales
