"""What one launch on the GPU computes, reads and writes, and the operators that torch's compiler does not look into.

Those are ours (LoRA, SwiGLU with LoRA: the formulas stand in burnish/kernels/) and torch's attention. For each: its
kernels, and what it holds while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Kind = Literal["product", "swiglu", "attention", "element-wise"]
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


def _lora_linear(args: list[Any], _: Amount) -> Iterator[Kernel]:
    weight, a = args[1], args[3]
    (n, k), r, size = weight.shape, a.shape[0], weight.element_size()
    yield from (product(k, r, size), product(r, n, size), product(k, n, size, adds=True))


def _lora_linear_backward(args: list[Any], _: Amount) -> Iterator[Kernel]:
    weight, a, needs_x = args[2], args[3], args[-1]
    (n, k), r, size = weight.shape, a.shape[0], weight.element_size()
    yield product(n, r, size)  # ∂t
    if needs_x:
        yield from (product(r, k, size), product(n, k, size, adds=True))
    yield from (product(r, k, size), product(r, n, size))  # ∂A, ∂B


def _lora_mlp(args: list[Any], _: Amount) -> Iterator[Kernel]:
    weight, a = args[1], args[2]
    (n, k), r, size = weight.shape, a.shape[0], weight.element_size()
    yield from (product(k, 2 * r, size), product(k, n, size), product(k, n, size))
    yield Kernel("swiglu", 0.0, Amount(size * 3 * n))
    yield from (product(n, r, size), product(r, k, size), product(n, k, size, adds=True))


def _lora_mlp_backward(args: list[Any], _: Amount) -> Iterator[Kernel]:
    weight, a = args[6], args[7]
    (n, k), r, size = weight.shape, a.shape[0], weight.element_size()
    yield from (product(k, r, size), product(r, k, size), product(k, n, size))  # ∂t_d, ∂B_d, ∂h
    yield Kernel("swiglu", 0.0, Amount(size * 5 * n))
    yield from (product(n, r, size), product(n, r, size))  # ∂t_g, ∂t_u
    yield from (product(2 * r, k, size), product(2 * r, k, size))  # ∂A_g and ∂A_u, ∂x
    yield from (product(n, k, size, adds=True), product(n, k, size, adds=True))


def _inside_lora_mlp_backward(args: list[Any]) -> Amount:
    """∂h, ∂g, ∂u, and partial sums of [3, r, N] float32."""
    weight, r = args[6], args[7].shape[0]
    n = weight.shape[0]
    return Amount(3.0 * n * weight.element_size() + 4.0 * 3 * r * n / ROWS_A_SUM)


def _attention(args: list[Any], moved: Amount) -> Iterator[Kernel]:
    """Its FLOPs depend on the lengths of documents: plan_speed.py knows them."""
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
    "lora_mlp": Operator(_lora_mlp, lambda args: Amount(float(args[1].shape[0] * args[1].element_size()))),  # h
    "lora_mlp_backward": Operator(_lora_mlp_backward, _inside_lora_mlp_backward),
    "_varlen_attn": Operator(_attention),
    "_varlen_attn_backward": Operator(_attention, _inside_attention_backward),
}
