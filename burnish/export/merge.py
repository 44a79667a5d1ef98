"""Adapters into weights: W + s·B·A in float32 for one matrix at a time, rounded once to the dtype that W had.

peft merges in the weight's own dtype, which in bf16 rounds twice. Here its own `merge` is called with one layer
widened, so that everything peft can merge (DoRA, PiSSA, fused experts, layers trained whole) is merged exactly, and the
model is in memory once.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from burnish.errors import Problem, UserError
from burnish.export.precision import narrow, widen
from burnish.model.arguments import ModelArguments
from burnish.model.source import find_folder, first_line
from burnish.tuning.lora import give_own_matrices, load_adapter


def put_on(model: PreTrainedModel, name: str, args: ModelArguments) -> tuple[PeftModel, int, list[str]]:
    """The adapter on the model in float32, as its file has it: (both, number of its tensors, names of those unused)."""
    of_base = {id(parameter) for parameter in model.parameters()}
    tuned = load_adapter(model, name, args, trainable=False)
    for parameter in tuned.parameters():
        if id(parameter) not in of_base and parameter.is_floating_point():
            parameter.data = parameter.data.float()  # load_adapter rounds it to the base's dtype
    weights = load_peft_weights(str(find_folder(name, args, revision=None, weights=True)), device="cpu")
    set_peft_model_state_dict(tuned, weights)
    held = tuned.state_dict() | get_peft_model_state_dict(tuned, save_embedding_layers=False)  # the base's too
    unused = [name for name, tensor in weights.items() if name not in held or not _is_held(tensor, held[name])]
    return tuned.eval(), len(weights), unused


def _is_held(tensor: Tensor, held: Tensor) -> bool:
    """peft may save a base's embedding with the adapter: that one is in the base's dtype."""
    return torch.equal(tensor.to(held.dtype), held.cpu())


def merge_exactly(tuned: PeftModel, name: str) -> PreTrainedModel:
    """The base with the adapter in its weights. `tuned` is used up."""
    layers: list[Any] = [module for module in tuned.modules() if isinstance(module, BaseTunerLayer)]
    with torch.no_grad(), warnings.catch_warnings():
        give_own_matrices(tuned)
        for layer in layers:
            was = widen(layer)
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:  # numbers that are none
                remedy = "train it again, or give an earlier checkpoint"
                raise UserError(Problem(name, "", None, f"cannot be merged ({first_line(error)})", remedy)) from error
            narrow(layer, was)
        # what it says of layers that are merged already, and of tied matrices that were trained apart
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        merger: Any = tuned
        return merger.merge_and_unload()


def cast(model: nn.Module, dtypes: dict[str, torch.dtype], main: torch.dtype) -> None:
    """Every weight that is saved in the dtype it is written in: its own of `dtypes`, else `main`."""
    saved = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes.get(name, main))
