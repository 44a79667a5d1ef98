"""The one file that knows what an installed transformers calls things and what is inside its models.

Under DeepSpeed's ZeRO-3 a parameter is empty until it is gathered; its own size and shape stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def enable_gradient_checkpointing(model: nn.Module, settings: dict[str, Any] | None = None) -> None:
    """Recompute each block in the backward pass. transformers 5.23 calls the switch `activation_checkpointing`."""
    from burnish.model.head import unwrap

    inner = unwrap(model)
    settings = {"use_reentrant": False, **(settings or {})}
    if hasattr(inner, "activation_checkpointing_enable"):
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    # transformers then asks for gradients of the embeddings' output, which only reentrant checkpointing needs: the
    # backward pass would go through every frozen block below the first trained one.
    if not settings["use_reentrant"]:
        inner.disable_input_require_grads()


def checkpoint_only(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Recompute these blocks and no other module; False, and nothing is changed, where that cannot be chosen."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    from burnish.model.head import unwrap

    if not all(isinstance(block, GradientCheckpointingLayer) for block in blocks):
        return False
    enable_gradient_checkpointing(model)
    for module in unwrap(model).modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = any(module is block for block in blocks)
    return True


def wants_gradient_checkpointing(args: Any) -> tuple[bool, dict[str, Any] | None]:
    """What the training arguments say of it, under either name: (on, settings)."""
    on = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    settings = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    return bool(on), settings


def rotary_by_length(model: nn.Module) -> Iterator[tuple[nn.Module, str, int]]:
    """Rotary embeddings whose frequencies hang on the largest position of a forward pass, which is what transformers'
    `dynamic_rope_update` looks at: (module, type, the length up to which they do not)."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        parameters = getattr(config, "rope_parameters", None)
        if not parameters or not hasattr(module, "rope_type"):
            continue
        for each in [parameters] if "rope_type" in parameters else filter(None, parameters.values()):
            kind = each["rope_type"]
            if "dynamic" in kind or kind == "longrope":
                length = config.max_position_embeddings
                yield module, kind, min(length, each.get("original_max_position_embeddings") or length)


def swiglu_layers(block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module] | None:
    """The three layers of a block that computes down(silu(gate(x)) · up(x)), as most families call them; else None.

    Only what they are called is known here, not whether the block computes that.
    """
    children = dict(block.named_children())
    if set(children) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    if type(children["act_fn"]).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    return children["gate_proj"], children["up_proj"], children["down_proj"]


def layers_of_one_input(attention: nn.Module) -> tuple[nn.Module, ...]:
    """The layers of an attention that read the same, as most families call them. Where they do not, time is lost.

    torch's compiler reads it too, and of a comparison of sets (torch 2.11) it makes no graph.
    """
    children = dict(attention.named_children())
    names = ("q_proj", "k_proj", "v_proj")
    return tuple(children[name] for name in names) if all(name in children for name in names) else ()


def size_of(parameter: Any) -> int:
    """Elements of a parameter, gathered or not; bitsandbytes holds two in a byte, and fp8.py some of them twice."""
    if hasattr(parameter, "stands_for"):
        return parameter.stands_for
    if getattr(parameter, "quant_state", None) is not None:
        return parameter.quant_state.shape.numel()
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def shape_of(parameter: Any) -> torch.Size:
    return torch.Size(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.shape


@contextmanager
def gathered(tensors: Iterable[Tensor], *, to_change: bool = False) -> Iterator[None]:
    """Within the block divided parameters are whole, in every process; the others are left as they are.

    `to_change`: what the main process writes into them goes to all when the block ends.
    """
    divided = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if to_change else None):
        yield
