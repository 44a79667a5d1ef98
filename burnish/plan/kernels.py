"""What one launch on the GPU computes, reads and writes, and the operators that torch's compiler does not look into.

Those are ours (LoRA, SwiGLU with LoRA: the formulas stand in burnish/kernels/) and torch's attention, which stands for
cuDNN's too. For each: its kernels, and what it holds while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from burnish.kernels.frozen_linear import in_features

Kind = Literal["product", "product in fp8", "swiglu", "attention", "element-wise"]
ROWS_A_SUM = 512  # over which the backward of SwiGLU adds up in registers (on_gpu.py: 32 tiles of 16)


class Amount(NamedTuple):
    """`per_token` × tokens + `fixed`."""

    per_token: float = 0.0
    fixed: float = 0.0

    def plus(self, other: Amount, times: float = 1.0) -> Amount:
        return Amount(self.per_token + times * other.per_token, self.fixed + times * other.fixed)

    def at(self, tokens: float) -> float:
        return self.per_token * tokens + self.fixed


NOTHING = Amount()


@dataclass(frozen=True)
class Kernel:
    """One launch: FLOPs of a token, and bytes read and written."""

    kind: Kind
    flops: float
    moved: Amount
    width: int = 0  # attention: heads × their size


@dataclass(frozen=True)
class Work:
    """What one graph does, and the most bytes that it holds at once, what it was handed included."""

    kernels: tuple[Kernel, ...] = ()
    most_alive: Amount = NOTHING


class Operator(NamedTuple):
    """Of the operator's arguments (tensors without memory) and all that it reads and writes."""

    kernels: Callable[[list[Any], Amount], Iterator[Kernel]]
    inside: Callable[[list[Any]], Amount] = lambda _: NOTHING


def product(width: int, into: int, size: int, *, adds: bool = False) -> Kernel:
    """[tokens, width] × [width, into], or the gradient [width, tokens] × [tokens, into]: the same numbers move.

    `size`: bytes of a number. `adds`: to what is there, which is read.
    """
    moved = Amount(size * (width + into * (2 if adds else 1)), size * width * into)
    return Kernel("product", 2.0 * width * into, moved)


def _large(weight: list[Any], width: int, into: int, size: int, *, adds: bool = False) -> Iterator[Kernel]:
    """The product with a frozen weight: as it is, or in fp8, whose other factor the caller has rounded.

    What fp8 has twice, a few channels, is not counted.
    """
    if len(weight) == 1:
        yield product(width, into, size, adds=adds)
        return
    yield Kernel("product in fp8", 2.0 * width * into, Amount(width + size * into, width * into))
    if adds:  # what is added to it comes after it
        yield Kernel("element-wise", 0.0, Amount(3 * size * into))


def _rounded(weight: list[Any], width: int, size: int) -> Iterator[Kernel]:
    """Rows to fp8: read once, written in one byte."""
    if len(weight) > 1:
        yield Kernel("element-wise", 0.0, Amount(width * (size + 1)))


def _lora_linear(args: list[Any], _: Amount) -> Iterator[Kernel]:
    weight, b = args[2], args[5]
    n, k, r, size = weight[0].shape[0], in_features(weight), b.shape[1], b.element_size()
    yield product(r, n, size)
    yield from _large(weight, k, n, size, adds=True)


def _lora_linear_backward(args: list[Any], _: Amount) -> Iterator[Kernel]:
    weight, b, needs_x = args[1], args[3], args[-1]
    n, k, r, size = weight[0].shape[0], in_features(weight), b.shape[1], b.element_size()
    yield product(n, r, size)  # ∂t
    if needs_x:
        yield from (*_rounded(weight, n, size), *_large(weight, n, k, size))
    yield product(r, n, size)  # ∂B


def _lora_mlp(args: list[Any], _: Amount) -> Iterator[Kernel]:
    weight, a = args[1], args[2]
    n, k, r, size = weight[0].shape[0], in_features(weight), a.shape[0], a.element_size()
    yield from (product(k, 2 * r, size), *_rounded(weight, k, size))
    yield from (*_large(weight, k, n, size), *_large(weight, k, n, size))
    yield Kernel("swiglu", 0.0, Amount(size * 3 * n))
    yield from (product(n, r, size), product(r, k, size), *_rounded(weight, n, size))
    yield from _large(weight, n, k, size, adds=True)


def _lora_mlp_backward(args: list[Any], _: Amount) -> Iterator[Kernel]:
    weight, a = args[6], args[7]
    n, k, r, size = weight[0].shape[0], in_features(weight), a.shape[0], a.element_size()
    yield from (product(k, r, size), product(r, k, size), *_rounded(weight, k, size), *_large(weight, k, n, size))
    yield Kernel("swiglu", 0.0, Amount(size * 5 * n))
    yield from (product(n, r, size), product(n, r, size))  # ∂t_g, ∂t_u
    yield from (product(2 * r, k, size), product(2 * r, k, size))  # ∂A_g and ∂A_u, ∂x
    for _part in ("gate", "up"):
        yield from (*_rounded(weight, n, size), *_large(weight, n, k, size, adds=True))


def _frozen_linear(args: list[Any], _: Amount) -> Iterator[Kernel]:
    n, k, size = args[2][0].shape[0], in_features(args[2]), args[0].element_size()
    yield from _large(args[2], k, n, size)


def _frozen_linear_backward(args: list[Any], _: Amount) -> Iterator[Kernel]:
    n, k, size = args[1][0].shape[0], in_features(args[1]), args[0].element_size()
    yield from (*_rounded(args[1], n, size), *_large(args[1], n, k, size))


def _inside_lora_mlp(args: list[Any]) -> Amount:
    """h, and in fp8 its rounded copy."""
    weight, size = args[1], args[2].element_size()
    return Amount(float(weight[0].shape[0] * (size + (len(weight) > 1))))


def _inside_lora_mlp_backward(args: list[Any]) -> Amount:
    """∂h, ∂g, ∂u, in fp8 a rounded copy of one of them, and partial sums of [3, r, N] float32."""
    weight, a = args[6], args[7]
    n, r = weight[0].shape[0], a.shape[0]
    return Amount(n * (3.0 * a.element_size() + (len(weight) > 1)) + 4.0 * 3 * r * n / ROWS_A_SUM)


def _attention(args: list[Any], moved: Amount) -> Iterator[Kernel]:
    """Its FLOPs depend on the lengths of documents: speed.py knows them."""
    query = next(each for each in args if getattr(each, "ndim", 0) == 3)
    yield Kernel("attention", 0.0, moved, width=query.shape[-2] * query.shape[-1])


def _inside_attention_backward(args: list[Any]) -> Amount:
    """∂q is added up in float32; with grouped heads ∂k and ∂v first exist once for each query head."""
    query, key = args[1], args[2]
    width, grouped = query.shape[-2] * query.shape[-1], key.shape[-2] != query.shape[-2]
    return Amount(width * (4.0 + (2.0 * query.element_size() if grouped else 0.0)))


OPERATORS = {
    "lora_linear": Operator(_lora_linear),
    "lora_linear_backward": Operator(_lora_linear_backward),
    "lora_mlp": Operator(_lora_mlp, _inside_lora_mlp),
    "lora_mlp_backward": Operator(_lora_mlp_backward, _inside_lora_mlp_backward),
    "frozen_linear": Operator(_frozen_linear),
    "frozen_linear_backward": Operator(_frozen_linear_backward),
    "_varlen_attn": Operator(_attention),
    "_varlen_attn_backward": Operator(_attention, _inside_attention_backward),
}
