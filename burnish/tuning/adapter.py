"""`init_adapter`: which weights of a loaded model are trained, by `finetuning_type`, and adapters put on or merged in.

    full     every weight of the text model
    freeze   some blocks (freeze.py)
    lora     small matrices beside frozen weights, through peft (lora.py)

Without `trainable` nothing is trained: adapters are merged and the model is ready to be asked.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from burnish import console
from burnish.errors import Problem, UserError
from burnish.model.arguments import ModelArguments
from burnish.model.fp8 import hold_layers_in_fp8
from burnish.model.patch import size_of
from burnish.model.quantized import is_quantized
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.blocks import linear_layers, text_modules
from burnish.tuning.freeze import init_freeze
from burnish.tuning.lora import init_lora, load_adapter, merge_adapters


def init_adapter(
    model: PreTrainedModel, args: FinetuningArguments, model_args: ModelArguments, *, trainable: bool
) -> PreTrainedModel | PeftModel:
    """The model to train (`requires_grad` set on every parameter), or to ask. `model` itself is changed."""
    adapters = list(model_args.adapter_name_or_path or [])
    if model_args.base_dtype == "fp8":
        hold_layers_in_fp8(model, linear_layers(model).values())
    if is_quantized(model) and (problems := what_quantized_cannot(model_args, args, trainable=trainable)):
        raise UserError(problems)
    if not trainable and adapters and is_quantized(model):  # beside the weights: merged they would be rounded again
        tuned: Any = load_adapter(model, adapters[0], model_args, trainable=False)
        model = tuned.get_base_model()
    elif not trainable:
        model = merge_adapters(model, adapters, model_args)
    if not trainable:
        return model.requires_grad_(False).eval()
    if args.finetuning_type == "lora":
        return init_lora(model, args, model_args)
    if adapters:
        remedy = "set finetuning_type: lora, or export base and adapter into one model first"
        message = f"cannot be trained with finetuning_type: {args.finetuning_type}"
        raise UserError(Problem(adapters[0], "adapter_name_or_path", None, message, remedy))
    if args.finetuning_type == "freeze":
        init_freeze(model, args)
    else:
        _train_everything(model)
    return model


def what_quantized_cannot(model_args: ModelArguments, args: FinetuningArguments, *, trainable: bool) -> list[Problem]:
    """A quantized weight can neither be trained nor take an adapter in: both would round what was learned away."""
    found = []
    if trainable and args.finetuning_type != "lora":
        message = f"is of frozen weights, and finetuning_type: {args.finetuning_type} trains them"
        name = "base_dtype" if model_args.base_dtype else "quantization_bit"
        found.append(Problem(name, "", None, message, "set finetuning_type: lora, or leave it out"))
    if trainable and model_args.base_dtype and args.use_dora:
        message = "scales whole weights, which a base in fp8 does not have"
        found.append(Problem("use_dora", "", None, message, "leave it out, or leave base_dtype out"))
    adapters = model_args.adapter_name_or_path or []
    if len(adapters) > 1 or (trainable and adapters and args.create_new_adapter):
        message = "is not possible on quantized weights: all but the last are merged"
        remedy = "export base and adapters into one model with burnish export, and give that as the model"
        found.append(Problem("adapter_name_or_path", "", ",".join(adapters), message, remedy))
    return found


def _train_everything(model: PreTrainedModel) -> None:
    """Every weight that text passes through. What sees or hears would only lie in memory: no row reaches it."""
    text: list[nn.Module] = list(text_modules(model).values())
    model.requires_grad_(False)
    for parameter in (parameter for module in text for parameter in module.parameters(recurse=False)):
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    idle = sum(size_of(parameter) for parameter in model.parameters() if not parameter.requires_grad)
    if idle:
        console.say(f"{idle:,} parameters that no text passes through are not trained")
