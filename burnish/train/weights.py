"""A model's weights on disk: all of them or an adapter's alone, also where ZeRO-3 divides them among the processes.

Every process calls these functions; the main one writes. No process ever holds all of a divided model on its device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from burnish import ranks
from burnish.model.patch import gathered


def save_weights(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """The model as it would be published: all of it, or its adapter alone; with tokenizer and chat template."""
    divided = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    state = _gathered_state(model) if divided else None
    if not ranks.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # An adapter's file holds what was trained: peft would else look the base up on the hub to see if embeddings grew.
    only_adapter = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, state_dict=state, **only_adapter)  # type: ignore[operator]
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors >= 0.8 makes them readable by their owner alone
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """What `save_pretrained` needs of a divided model, on the CPU of the main process, one tensor after the other.

    Of a model with an adapter only what was trained.
    """
    only_trained = isinstance(model, PeftModel)
    copies: dict[int, Tensor] = {}  # a matrix that embedding and head share stays one
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if only_trained and not tensor.requires_grad:
            continue
        if id(tensor) not in copies:
            with gathered([tensor]):
                copies[id(tensor)] = tensor.detach().cpu().clone() if ranks.is_main() else tensor.detach()
        state[name] = copies[id(tensor)]
    return state


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights into `model`, whose shape and adapters they have."""
    if isinstance(model, PeftModel):
        weights = load_peft_weights(str(folder), device="cpu")
        with gathered((p for p in model.parameters() if p.requires_grad), to_change=True):
            set_peft_model_state_dict(model, weights, adapter_name=str(model.active_adapter))
        return
    # Through transformers and not from the file into the model: file names and shapes may differ from the module's.
    saved = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)  # type: ignore[attr-defined]
    theirs = saved.state_dict(keep_vars=True)
    for name, tensor in model.state_dict(keep_vars=True).items():
        with torch.no_grad(), gathered([tensor, theirs[name]], to_change=True):
            tensor.copy_(theirs[name])
