"""What a compiled block computes and holds, read off the graphs that torch's compiler makes of it.

    forward and backward graph  →  kernels: FLOPs and bytes a token     (speed.py makes milliseconds of them)
                                →  the most bytes alive at one time     (memory.py)

Every size is `per_token`, or fixed where the number of tokens does not enter. Element-wise work is fused as inductor
does it: between two matrix products (or attention) it is one kernel, that reads and writes what crosses its border.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node

from burnish.plan.kernels import OPERATORS, Amount, Kernel, Work

VIEWS = frozenset(
    {"view", "reshape", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "select",
     "slice", "alias", "detach", "split", "split_with_sizes", "as_strided", "unbind", "chunk"}
)  # fmt: skip
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "grouped_mm"})
NOT_FUSED = PRODUCTS | {
    *("convolution", "index_put", "scatter", "scatter_add", "index_add", "sort", "topk", "embedding_dense_backward")
}


class Graph:
    """An FX graph of `tokens` tokens whose sizes are known (a SymInt's hint is the size that was traced)."""

    def __init__(self, module: GraphModule, tokens: int):
        self.nodes, self.tokens = list(module.graph.nodes), tokens
        self.kept = {node for node in self.nodes if self._is_kept(node)}

    def work(self) -> Work:
        return Work(tuple(self._kernels()), self._most_alive())

    # ---- sizes -----------------------------------------------------------------------------------------------------

    def size(self, value: Any) -> Amount:
        """Bytes of a tensor, or of several."""
        if isinstance(value, tuple | list):
            total = Amount()
            for each in value:
                total = total.plus(self.size(each))
            return total
        if not isinstance(value, torch.Tensor):
            return Amount()
        bytes_ = prod(_hint(size) for size in value.shape) * value.element_size()
        grows = any(isinstance(size, torch.SymInt) and _hint(size) >= self.tokens for size in value.shape)
        return Amount(bytes_ / self.tokens, 0.0) if grows else Amount(0.0, bytes_)

    def _size_of(self, node: Node) -> Amount:
        return self.size(node.meta.get("val"))

    # ---- what is written to memory ---------------------------------------------------------------------------------

    def _is_kept(self, node: Node) -> bool:
        """Whether its value exists in memory: an input, what a kernel of its own gives, what such a kernel reads."""
        if node.op == "placeholder":
            return True
        if node.op != "call_function" or _is_view(node):
            return False
        if _is_own_kernel(node):
            return not isinstance(node.meta.get("val"), tuple | list)
        if _is_part(node):
            return _is_own_kernel(node.args[0])
        return any(user.op == "output" or _is_own_kernel(user) for user in _users(node))

    def _sources(self, node: Node) -> set[Node]:
        """The tensors in memory that a value is computed from, through views and fused operations."""
        found: set[Node] = set()
        waiting, seen = list(node.all_input_nodes), set()
        while waiting:
            each = waiting.pop()
            if each in seen:
                continue
            seen.add(each)
            if each in self.kept:
                found.add(each)
            else:
                waiting += each.all_input_nodes
        return found

    # ---- kernels ---------------------------------------------------------------------------------------------------

    def _kernels(self) -> Iterator[Kernel]:
        """Kernels of their own, and one for all the fused work that waits for the same of them."""
        level: dict[Node, int] = {}
        groups: dict[int, set[Node]] = {}
        for number, node in enumerate(self.nodes):
            before = max((level[each] for each in node.all_input_nodes), default=0)
            own = node.op == "call_function" and _is_own_kernel(node)
            level[node] = number if own else before
            if own:
                yield from self._own_kernels(node)
            elif node in self.kept and node.op == "call_function" and not _is_part(node):
                groups.setdefault(before, set()).add(node)
        for members in groups.values():
            read = set().union(*(self._sources(node) for node in members)) - members
            moved = Amount()
            for node in (*members, *read):
                moved = moved.plus(self._size_of(node))
            yield Kernel("element-wise", 0.0, moved)

    def _own_kernels(self, node: Node) -> Iterator[Kernel]:
        name = _name(node)
        moved = self._size_of(node)
        for each in node.all_input_nodes:
            moved = moved.plus(self._size_of(each))
        if name in OPERATORS:
            yield from OPERATORS[name].kernels(_values(node), moved)
        elif name in PRODUCTS:
            left, right = [value for value in _values(node) if getattr(value, "ndim", 0) >= 2][-2:]
            flops = 2.0 * prod(map(_hint, left.shape)) * _hint(right.shape[-1]) / self.tokens
            yield Kernel("product", flops, moved)
        else:
            yield Kernel("element-wise", 0.0, moved)

    # ---- what is alive ---------------------------------------------------------------------------------------------

    def _most_alive(self) -> Amount:
        """The largest moment, in the order of the graph: a value goes when its last reader has run."""
        last: dict[Node, int] = {}
        for number, node in enumerate(self.nodes):
            for source in self._sources(node):
                last[source] = number
        handed_in = [node for node in self.nodes if node.op == "placeholder" and self._size_of(node).per_token]
        alive, most = Amount(), Amount()
        for node in handed_in:
            alive = alive.plus(self._size_of(node))
        ends: dict[int, list[Node]] = {}
        for node, number in last.items():
            if node.op == "placeholder" and node not in handed_in:  # weights, which stay
                continue
            ends.setdefault(number, []).append(node)
        for number, node in enumerate(self.nodes):
            inside = Amount()
            if node.op == "call_function" and _is_own_kernel(node):
                operator = OPERATORS.get(_name(node))
                inside = operator.inside(_values(node)) if operator else Amount()
                alive = alive.plus(self._size_of(node))  # its parts, if several, are counted here
            elif node in self.kept and node.op == "call_function" and not _is_part(node):
                alive = alive.plus(self._size_of(node))
            here = alive.plus(inside)
            if here.at(self.tokens) > most.at(self.tokens):
                most = here
            for each in ends.get(number, ()):
                alive = alive.plus(self._size_of(each), -1.0)
        return most


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _name(node: Node) -> str:
    target: Any = node.target
    return target._schema.name.rpartition("::")[2] if hasattr(target, "_schema") else getattr(target, "__name__", "")


def _values(node: Node) -> list[Any]:
    def value(each: Any) -> Any:
        if isinstance(each, list | tuple):
            return [value(part) for part in each]
        return each.meta.get("val") if isinstance(each, Node) else each

    return [value(each) for each in node.args]


def _is_view(node: Node) -> bool:
    return _name(node) in VIEWS or (_is_part(node) and not _is_own_kernel(node.args[0]))


def _is_part(node: Node) -> bool:
    return _name(node) == "getitem" and isinstance(node.args[0], Node)


def _is_own_kernel(node: Any) -> bool:
    """A matrix product, attention, an operator of somebody's own: what inductor calls and does not fuse."""
    target = node.target
    if node.op != "call_function" or not hasattr(target, "_schema"):
        return False
    room, _, name = target._schema.name.partition("::")
    return room not in ("aten", "prims", "inductor_prims", "_c10d_functional") or name in NOT_FUSED


def _users(node: Node) -> Iterator[Node]:
    """Who reads a value, views passed over."""
    for user in node.users:
        if user.op == "call_function" and _is_view(user):
            yield from _users(user)
        else:
            yield user
