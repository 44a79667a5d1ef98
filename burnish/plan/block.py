"""What a block of a model keeps for its backward pass and what it computes, measured on tensors without memory.

One idea: the block itself is asked. The model is built on torch's meta device with the adapters and the fused layers
that training uses, one pass runs through it, and what autograd is handed to keep is counted. A block that training
compiles is compiled here up to the graphs (inductor's own partition of them decides what is kept and what is computed
again), on a machine without a GPU and in seconds: no kernel is made.

Attention is a stand-in that calls the operator of the GPU, which knows its shapes anywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from burnish.model.attention import GROUPED
from burnish.model.head import decoder_of, unwrap
from burnish.model.probe import packed_inputs
from burnish.model.source import first_line
from burnish.plan.graph import Graph
from burnish.plan.kernels import Amount, Kernel, Work
from burnish.tuning.blocks import find_blocks

TOKENS = 2039  # of the pass that is measured; a prime: bytes that are no multiple of it do not grow with the tokens
STAND_IN = "burnish-plan"


@dataclass(frozen=True)
class BlockCost:
    """One block: bytes that it keeps, bytes of its input, and its work."""

    kept: Amount  # from the forward to the backward pass, its input included
    input: Amount
    forward: Work
    backward: Work
    fused: bool = True
    why_not: str = ""  # compiled, where that was wanted

    @property
    def goes_back(self) -> bool:
        """Whether it has a backward pass: frozen blocks below all that is trained have none."""
        return bool(self.backward.kernels)

    def keeps(self, *, recomputed: bool) -> Amount:
        """Computed again in its backward pass it keeps its input alone; without one there is nothing to keep."""
        return self.input if recomputed and self.goes_back else self.kept

    @property
    def extra_backward(self) -> Amount:
        """What its backward pass holds beyond what was kept."""
        extra = self.backward.most_alive.per_token - self.kept.per_token
        return Amount(max(extra, 0.0), self.backward.most_alive.fixed)

    @property
    def extra_forward(self) -> Amount:
        return Amount(self.forward.most_alive.per_token, 0.0)


@dataclass(frozen=True)
class Measured:
    """A model's blocks in their order, and what lies outside them (last norm)."""

    blocks: tuple[BlockCost, ...]
    outside: Amount
    hidden: Amount  # of what goes from block to block


def measure(model: nn.Module, *, compiled: bool, tokens: int = TOKENS) -> Measured:
    """Every block of a model on the meta device; equal ones are measured once. Changes how its attention is called."""
    inner = unwrap(model)
    blocks = list(find_blocks(inner).values())
    calls, outside, hidden = _one_pass(model, blocks, tokens)
    known: dict[Any, BlockCost] = {}
    costs = []
    for block, call in zip(blocks, calls, strict=True):
        key = _kind_of(block, call)
        if key not in known:
            known[key] = _measure_block(block, call, tokens, compiled=compiled)
        costs.append(known[key])
    return Measured(tuple(costs), outside, hidden)


def stand_in(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """Attention as the GPU computes it over rows laid end to end, whatever the device."""
    rows, _, length, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [T, heads, head_dim]
    borders, longest = others["cu_seq_lens_q"], others["max_length_q"]
    grouped = GROUPED if q.shape[1] != k.shape[1] else {}
    window = others.get("sliding_window")
    attended: Any = varlen_attn(
        q, k, v, borders, borders, longest, longest,
        scale=others.get("scaling"), window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # fmt: skip
    return attended.unflatten(0, (rows, length)), None


def register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(STAND_IN, stand_in)


# ---- one pass ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """How the decoder called a block."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _one_pass(model: nn.Module, blocks: list[nn.Module], tokens: int) -> tuple[list[Call], Amount, Amount]:
    inner = unwrap(model)
    calls: list[Call] = []
    inside = [False]

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        inside[0] = True
        hidden = args[0] if args else kwargs["hidden_states"]
        calls.append(Call(hidden, args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    def leave(*_: Any) -> None:
        inside[0] = False

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    model.train()
    kept = Kept(model)
    try:
        with torch.device("meta"), kept.watching(lambda: not inside[0]):
            inputs = packed_inputs(torch.zeros(1, tokens, dtype=torch.int64), (tokens // 2, tokens - tokens // 2))
            hidden = decoder_of(inner)(**inputs, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    kept.forget(call.hidden for call in calls)
    return calls, kept.amount(tokens), Amount(hidden.nbytes / tokens)


class Kept:
    """Counts what autograd keeps: each memory once, weights not at all."""

    def __init__(self, model: nn.Module):
        self._weights = {_memory(weight) for weight in (*model.parameters(), *model.buffers())}
        self._tensors: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, counts: Callable[[], bool] = lambda: True) -> Iterator[None]:
        def keep(tensor: Tensor) -> Tensor:
            if counts() and _memory(tensor) not in self._weights:
                self._tensors[_memory(tensor)] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield

    def forget(self, tensors: Any) -> None:
        for tensor in tensors:
            self._tensors.pop(_memory(tensor), None)

    def amount(self, tokens: int) -> Amount:
        """What is smaller than one number a token is no activation (borders of documents, states of generators)."""
        sizes = [tensor.untyped_storage().nbytes() for tensor in self._tensors.values()]
        grow = sum(size for size in sizes if size >= tokens and size % tokens == 0)
        return Amount(grow / tokens, float(sum(size for size in sizes if size >= tokens) - grow))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ---- one block -----------------------------------------------------------------------------------------------------


def _kind_of(block: nn.Module, call: Call) -> Any:
    weights = tuple(
        (name, weight.shape, weight.dtype, weight.requires_grad) for name, weight in block.named_parameters()
    )
    window = [getattr(module, "sliding_window", None) for module in block.modules()]
    return type(block), weights, call.hidden.requires_grad, tuple(window)


def _measure_block(block: nn.Module, call: Call, tokens: int, *, compiled: bool) -> BlockCost:
    hidden = call.hidden.detach().requires_grad_(call.hidden.requires_grad)
    size = Amount(hidden.nbytes / tokens)
    graphs: dict[str, Work] = {}
    why = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's compiler about itself
            kept = _run(block, hidden, call, tokens, graphs)
    except Exception as error:  # what training would tell too, and leave the block as it is
        why, kept = first_line(error), Amount()
    finally:
        block._compiled_call_impl = None
        torch._dynamo.reset()
    if not compiled or why:
        kept = _run(block, hidden, call, tokens, None)
    forward, backward = (graphs.get(name, Work()) for name in ("forward", "backward"))
    if not forward.kernels:
        forward, backward = _by_weights(block, kept, hidden.requires_grad)
    return BlockCost(kept, size, forward, backward, compiled and not why, why if compiled else "")


def _run(block: nn.Module, hidden: Tensor, call: Call, tokens: int, graphs: dict[str, Work] | None) -> Amount:
    """Forward and backward; → what was kept. Into `graphs`, if given, goes what the compiled block is."""
    if graphs is not None:
        block.compile(backend=_backend(graphs, tokens), dynamic=True)
    kept = Kept(block)
    with kept.watching():
        output = block(hidden, *call.args, **call.kwargs)
    kept.forget(_tensors(call.kwargs))  # of all blocks: positions
    output = output[0] if isinstance(output, tuple) else output
    if output.requires_grad:
        output.backward(torch.empty_like(output))
    for weight in block.parameters():
        weight.grad = None
    return kept.amount(tokens)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict | tuple | list):
        for each in values.values() if isinstance(values, dict) else values:
            yield from _tensors(each)


def _backend(graphs: dict[str, Work], tokens: int) -> Any:
    """Inductor's way to the two graphs, and no further: they run as they are, on tensors without memory."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def note(name: str) -> Callable[..., Any]:
        def compile_nothing(module: Any, _inputs: Any) -> Any:
            graphs[name] = Graph(module, tokens).work()
            return make_boxed_func(module.forward)

        return compile_nothing

    def partition(module: Any, inputs: Any, **how: Any) -> Any:
        return min_cut_rematerialization_partition(module, inputs, compiler="inductor", **how)

    return aot_autograd(
        fw_compiler=note("forward"),
        bw_compiler=note("backward"),
        partition_fn=partition,
        decompositions=select_decomp_table(),
        inference_compiler=note("forward"),
    )


def _by_weights(block: nn.Module, kept: Amount, passes_gradient: bool) -> tuple[Work, Work]:
    """For a block that the compiler cannot read: its matrices, and what it keeps written and read."""
    forward, backward = [], []
    for weight in block.parameters():
        if weight.dim() < 2:
            continue
        out, into = weight.shape[-2:]
        product = Kernel("product", 2.0 * out * into, Amount(2.0 * (out + into), float(weight.nbytes)))
        forward.append(product)
        backward += [product] * (int(passes_gradient) + int(weight.requires_grad))
    half = Kernel("element-wise", 0.0, Amount(2 * kept.per_token))
    if not backward:
        return Work((*forward, half)), Work()
    return Work((*forward, half)), Work((*backward, half), Amount(2 * kept.per_token))
