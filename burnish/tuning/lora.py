"""`finetuning_type: lora`: a new adapter through peft, or one that is already there.

One idea: the adapter is peft's own, in its layers and in its file, so it loads in plain peft and gives the same logits;
here it is only decided where it goes (targets.py) and checked that it went there. Adapters have the base's dtype
(`autocast_adapter_dtype=False`); the optimizer keeps their float32 masters.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from burnish import console
from burnish.errors import Problem, UserError
from burnish.model.arguments import ModelArguments
from burnish.model.fp8 import Fp8Linear
from burnish.model.quantized import is_quantized
from burnish.model.source import ADAPTER_CONFIG, find_folder, first_line
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.blocks import embedding_and_head, last_names
from burnish.tuning.targets import Targets, conflicts, find_additional, find_targets, safe_from_renaming, shortest


def init_lora(model: PreTrainedModel, args: FinetuningArguments, model_args: ModelArguments) -> PeftModel:
    """A model with one trained adapter: the last of those given, or a new one. The others are merged into the base."""
    adapters = list(model_args.adapter_name_or_path or [])
    goes_on = bool(adapters) and not args.create_new_adapter
    merged = adapters[:-1] if goes_on else adapters
    model = merge_adapters(model, merged, model_args)
    if merged:
        console.say(
            f"merged into the base first: {', '.join(merged)}; the new adapter is used after them, in this order"
        )
    if not goes_on:
        return _new_adapter(model, args, model_args)
    tuned = load_adapter(model, adapters[-1], model_args, trainable=True)
    config: Any = tuned.peft_config["default"]
    console.say(f"training goes on with {adapters[-1]}: its own rank {config.r}, alpha {config.lora_alpha} and targets")
    return tuned


def merge_adapters(model: PreTrainedModel, adapters: list[str], model_args: ModelArguments) -> PreTrainedModel:
    """Each adapter added into the weights, in this order, as the next may have been trained on the one before."""
    for name in adapters:
        tuned: Any = load_adapter(model, name, model_args, trainable=False)
        give_own_matrices(tuned)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
            model = tuned.merge_and_unload()
    return model


def give_own_matrices(tuned: PeftModel) -> None:
    """Before a merge: an adapter on the head alone must not change the embedding that is the same matrix."""
    model: Any = tuned.get_base_model()
    if not model.config.tie_word_embeddings:
        return
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def _new_adapter(model: PreTrainedModel, args: FinetuningArguments, model_args: ModelArguments) -> PeftModel:
    place = model.name_or_path or type(model).__name__
    targets, problems = find_targets(model, args.lora_target, place)
    whole, more = find_additional(model, _additional_names(model, args, model_args), place)
    targets = safe_from_renaming(model, targets)
    problems += [*more, *conflicts(model, targets, whole, args, place)]
    if problems:
        raise UserError(problems)
    embedding, head, tied = embedding_and_head(model)
    if (model_args.add_tokens or model_args.add_special_tokens) and embedding not in whole:
        names = ",".join(last_names(path for path in (embedding, head) if path is not None))
        console.warn(f"the rows of added tokens are not trained; additional_target: {names} would train them")
    try:
        tuned = _put_on(model, _lora_config(model, targets, whole, args, tied=tied and head in whole))
    except ValueError as error:  # peft leaves out some layers of some models (Mamba's out_proj)
        there = ", ".join(last_names(targets.modules))
        problem = Problem(place, "lora_target", None, f"is not possible: {first_line(error)}", f"name some of {there}")
        raise UserError(problem) from error
    adapted: Any = tuned.base_model
    assert set(adapted.targeted_module_names) == set(targets.modules), "peft adapted other layers than it was told to"
    return tuned


def _lora_config(
    model: PreTrainedModel, targets: Targets, whole: list[str], args: FinetuningArguments, *, tied: bool
) -> LoraConfig:
    modules = [path for path, _ in model.named_modules()]
    parameters = [path for path, _ in model.named_parameters()]
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=shortest(model, targets.modules, modules),
        target_parameters=shortest(model, targets.parameters, parameters) or None,
        modules_to_save=whole or None,  # exact paths: peft takes a name for the end of any word
        ensure_weight_tying=tied,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        # The full decomposition, not the fast random one: whoever loads the adapter takes the base apart again, and
        # must find the same remainder.
        init_lora_weights="pissa" if args.pissa_init else True,
        fan_in_fan_out=any(isinstance(model.get_submodule(path), Conv1D) for path in targets.modules),
    )


def _additional_names(model: PreTrainedModel, args: FinetuningArguments, model_args: ModelArguments) -> list[str]:
    """With `resize_vocab` the rows of new tokens have to be learned: embedding and head are trained whole."""
    if args.additional_target is not None or not model_args.resize_vocab:
        return list(args.additional_target or [])
    embedding, head, _ = embedding_and_head(model)
    names = [path for path in (embedding, head) if path is not None]
    console.say(f"resize_vocab: {' and '.join(names)} are trained whole (additional_target)")
    return names


def load_adapter(model: PreTrainedModel, name: str, model_args: ModelArguments, *, trainable: bool) -> PeftModel:
    """An adapter from a folder or a hub on `model`. One that does not fit it whole is refused."""
    folder = find_folder(name, model_args, revision=None, weights=True)
    config = _read_config(folder, name)
    if is_quantized(model) and (problem := _beside_quantized(model, config, name, trainable)):
        raise UserError(problem)
    based_on = config.base_model_name_or_path
    if based_on and model.name_or_path and based_on != model.name_or_path:
        console.warn(f"{name} was trained on {based_on}; here it is put on {model.name_or_path}")
    config.base_model_name_or_path = model.name_or_path or None
    config.inference_mode = not trainable
    remedy = "give the model that it was trained on"
    try:
        with warnings.catch_warnings():
            # of an embedding or a head that was tuned apart: an export makes two matrices of the one, and says so
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)
            tuned = _put_on(model, config)
            result = tuned.load_adapter(
                str(folder),
                "default",
                is_trainable=trainable,
                autocast_adapter_dtype=False,
                torch_device=str(model.device),
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(Problem(name, "", None, f"does not fit this model ({first_line(error)})", remedy)) from error
    astray = [*result.missing_keys, *result.unexpected_keys]
    if astray:
        message = f"does not fit this model: {len(astray)} of its matrices have no counterpart, {astray[0]} the first"
        raise UserError(Problem(name, "", None, message, remedy))
    return tuned


def _beside_quantized(model: PreTrainedModel, config: Any, name: str, trainable: bool) -> Problem | None:
    """What is the matter with an adapter that needs the weights as they were published."""
    in_fp8 = any(isinstance(layer, Fp8Linear) for layer in model.modules())
    remedy = f"leave {'base_dtype' if in_fp8 else 'quantization_bit'} out"
    if config.use_dora and in_fp8:  # peft knows how to dequantize bitsandbytes' weights alone
        return Problem(name, "", None, "is a DoRA adapter, which scales whole weights: a base in fp8 has none", remedy)
    if trainable and config.bias != "none":
        return Problem(name, "", None, f"trains biases of the base (bias: {config.bias}), which is frozen", remedy)
    if str(config.init_lora_weights).startswith("pissa"):
        return Problem(name, "", None, "is a PiSSA adapter, which takes whole weights apart", remedy)
    return None


def _put_on(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():
        # peft asks for gradient checkpointing by a name that transformers 5.23 warns about.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        tuned: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    layers: list[Any] = [layer for layer in tuned.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        if is_quantized(layer.get_base_layer()):
            for name, parameter in layer.named_parameters():  # peft gives them the weight's dtype where that is one
                if "base_layer" not in name:
                    parameter.data = parameter.data.to(model.dtype)
    return tuned


def _read_config(folder: Path, name: str) -> PeftConfig:
    if not (folder / ADAPTER_CONFIG).is_file():
        remedy = "give the folder that peft or burnish saved it in"
        raise UserError(Problem(name, ADAPTER_CONFIG, None, "is missing", remedy))
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        problem = Problem(name, ADAPTER_CONFIG, None, f"cannot be read ({first_line(error)})", "copy the adapter again")
        raise UserError(problem) from error
    if not isinstance(config, LoraConfig):
        message = f"is an adapter of kind {PeftType(config.peft_type).value}, not LORA"
        raise UserError(Problem(name, "", None, message, "merge it into its model with peft first"))
    return config
