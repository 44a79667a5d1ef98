"""The one file that knows what an installed transformers calls things and what is inside its models."""

from __future__ import annotations

from typing import Any

from torch import nn


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


def wants_gradient_checkpointing(args: Any) -> tuple[bool, dict[str, Any] | None]:
    """What the training arguments say of it, under either name: (on, settings)."""
    on = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    settings = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    return bool(on), settings
