"""The model of a run as training would hold it, on torch's meta device: shapes and no numbers.

Adapters, frozen layers and fused operations are put on by the functions that training uses, so what is counted is what
is trained. Only config.json is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from burnish.errors import Problem, UserError
from burnish.model.arguments import ModelArguments
from burnish.model.head import unwrap
from burnish.model.patch import size_of
from burnish.model.source import ADAPTER_CONFIG, find_folder, find_model, first_line, read_json, runs_own_code
from burnish.plan.block import STAND_IN, Measured, measure, register
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.blocks import find_blocks, linear_layers
from burnish.tuning.fuse import fuse_lora, fuse_mlp, fuse_qkv

# Bytes of a weight held quantized by bitsandbytes: its bits, and the scales of 64 (4 bits; doubly: these in 8 bits).
QUANTIZED = {(8, True): 1.0, (8, False): 1.0, (4, True): 0.5 + 1 / 64 + 4 / (64 * 256), (4, False): 0.5 + 4 / 64}


@dataclass(frozen=True)
class Share:
    """Weights of a part of the model: what they take, and how many are trained."""

    held: float  # bytes, as the forward pass reads them
    trained: int  # numbers
    tensors: int  # that they are in


@dataclass(frozen=True)
class Shape:
    """What is known of the model: its weights by part, and what its blocks cost."""

    blocks: tuple[Share, ...]
    outside: Share  # embedding, last norm, head
    vocabulary: int
    width: int
    trains_head: bool
    trains_embedding: bool
    tied: bool
    largest: float  # bytes of the largest quantized weight, while it is dequantized
    dequantized: float  # bytes read and written to dequantize all of them once
    dtype: torch.dtype
    measured: Measured
    layers: int
    name: str

    @property
    def held(self) -> float:
        return self.outside.held + sum(block.held for block in self.blocks)

    @property
    def below(self) -> int:
        """Frozen blocks below all that is trained: the backward pass does not come there."""
        return sum(not block.goes_back for block in self.measured.blocks)

    @property
    def trained(self) -> int:
        return self.outside.trained + sum(block.trained for block in self.blocks)


@dataclass(frozen=True)
class Asked:
    """The settings that decide what the model is like."""

    model: ModelArguments
    tuning: FinetuningArguments
    dtype: torch.dtype
    compiled: bool


def shape_of_model(asked: Asked) -> Shape:
    """Reads config.json and builds the rest. Raises UserError where that is no causal language model."""
    register()
    folder = find_model(asked.model, weights=False)
    config = _config(folder, asked.model)
    with torch.device("meta"):
        how: dict[str, Any] = {"dtype": asked.dtype, "attn_implementation": STAND_IN}
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=runs_own_code(folder, asked.model), **how)
    model.name_or_path = str(asked.model.model_name_or_path)
    tuning, model_args = _as_a_new_adapter(asked)
    model = fuse_lora(init_adapter(model, tuning, model_args, trainable=True))
    if asked.compiled:
        fuse_mlp(model)
        fuse_qkv(model)
    try:
        measured = measure(model, compiled=asked.compiled)
    except Exception as error:  # a model that reads numbers while it runs
        message = (
            f"cannot be planned: {type(unwrap(model)).__name__} does not run on shapes alone ({first_line(error)})"
        )
        remedy = "train it: where memory does not suffice, passes become smaller by themselves"
        raise UserError(Problem(str(asked.model.model_name_or_path), "", None, message, remedy)) from error
    return _shape(model, asked, measured)


def _config(folder: Path, args: ModelArguments) -> Any:
    place = str(args.model_name_or_path)
    if not (folder / "config.json").is_file():
        raise UserError(Problem(place, "config.json", None, "is missing", "give the folder of a model"))
    trusted = runs_own_code(folder, args)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trusted)
    except Exception as error:  # its own checks, or code that came with the model
        message = f"cannot be used ({first_line(error)})"
        raise UserError(Problem(place, "config.json", None, message, "copy the model's files again")) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trusted:
        message = f"is a {config.model_type} model, which does not continue text"
        raise UserError(Problem(place, "", None, message, "give a causal language model (Qwen, Llama, Gemma ...)"))
    return config


def _as_a_new_adapter(asked: Asked) -> tuple[FinetuningArguments, ModelArguments]:
    """An adapter that is gone on with is as large as a new one of its rank on its layers."""
    names = asked.model.adapter_name_or_path
    if not names or asked.tuning.create_new_adapter:
        return asked.tuning, replace(asked.model, adapter_name_or_path=None)
    config = read_json(find_folder(names[-1], asked.model, revision=None, weights=False) / ADAPTER_CONFIG)
    targets = config.get("target_modules")
    tuning = replace(
        asked.tuning,
        lora_rank=int(config.get("r", asked.tuning.lora_rank)),
        lora_target=list(targets) if isinstance(targets, list) else ["all"],
        additional_target=config.get("modules_to_save"),
    )
    return tuning, replace(asked.model, adapter_name_or_path=None)


def _shape(model: nn.Module, asked: Asked, measured: Measured) -> Shape:
    inner = unwrap(model)
    blocks = list(find_blocks(inner).values())
    bits = asked.model.quantization_bit
    quantized = _base_weights(inner) if bits else {}
    share = QUANTIZED[bits, asked.model.double_quantization] if bits else 0.0
    seen: set[int] = set()

    def part(module: nn.Module) -> Share:
        held, trained, tensors = 0.0, 0, 0
        for weight in (*module.parameters(), *module.buffers()):  # of fp8: scales, and the weight transposed
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            held += weight.numel() * (share if id(weight) in quantized else weight.element_size())
            trained += size_of(weight) if weight.requires_grad else 0
            tensors += weight.requires_grad
        return Share(held, trained, tensors)

    of_blocks = tuple(part(block) for block in blocks)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    return Shape(
        blocks=of_blocks,
        outside=part(model),
        vocabulary=inner.config.get_text_config().vocab_size,
        width=inner.config.get_text_config().hidden_size,
        trains_head=any(weight.requires_grad for weight in head.parameters()),
        trains_embedding=any(weight.requires_grad for weight in embedding.parameters()),
        tied=_weight(head) is _weight(embedding),
        largest=max(quantized.values(), default=0) * asked.dtype.itemsize,
        dequantized=sum(quantized.values()) * (share + asked.dtype.itemsize),
        dtype=asked.dtype,
        measured=measured,
        layers=len(blocks),
        name=type(inner).__name__,
    )


def _weight(module: Any) -> Any:
    return next(iter(module.parameters()), None)


def _base_weights(inner: Any) -> dict[int, int]:
    """The weights of linear layers in the blocks, which are held quantized: id → how many numbers."""
    found = {}
    for layer in linear_layers(inner).values():
        weight: Any = layer.weight
        if not weight.requires_grad:
            found[id(weight)] = weight.numel()
    return found
