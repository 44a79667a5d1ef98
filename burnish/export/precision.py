"""float32 arithmetic over weights that stay in their own dtype, so that a bf16 model need not be in memory twice.

bf16 → float32 → bf16 gives every weight back as it was. So a block is widened while it computes and narrowed after it,
and what two models answer can be compared without the rounding of their activations, which is larger than what is
looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from burnish.model.head import unwrap
from burnish.tuning.blocks import find_blocks

NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Forward passes inside compute in float32. Costs the largest block and what stands outside blocks once more."""
    blocks = list(find_blocks(unwrap(model)).values())
    of_blocks = {id(tensor) for block in blocks for tensor in named_tensors(block).values()}
    kept: dict[int, dict[str, Tensor]] = {}

    def begin(block: nn.Module, *_: Any) -> None:
        kept[id(block)] = widen(block)

    def end(block: nn.Module, *_: Any) -> None:
        give_back(block, kept.pop(id(block), {}))

    hooks = [block.register_forward_pre_hook(begin) for block in blocks]
    hooks += [block.register_forward_hook(end, always_call=True) for block in blocks]
    around = widen(model, leave=of_blocks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        give_back(model, around)


def widen(module: nn.Module, leave: set[int] = frozenset()) -> dict[str, Tensor]:  # type: ignore[assignment]
    """Make float32 of every bf16 or fp16 tensor but those with the ids of `leave`; what they were, by name."""
    was = {}
    for name, tensor in named_tensors(module).items():
        if tensor.dtype in NARROW and id(tensor) not in leave:
            was[name] = tensor.data
            tensor.data = tensor.data.float()
    return was


def give_back(module: nn.Module, was: dict[str, Tensor]) -> None:
    """The tensors as they were. By name: peft exchanges the parameters of fused experts during a forward pass."""
    now = named_tensors(module)
    for name, data in was.items():
        now[name].data = data


def narrow(module: nn.Module, was: dict[str, Tensor]) -> None:
    """Round what was changed while it was wide, to the dtype that it had."""
    now = named_tensors(module)
    for name, data in was.items():
        now[name].data = now[name].data.to(data.dtype)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; one that has several names comes once."""
    return dict([*module.named_parameters(), *module.named_buffers()])
