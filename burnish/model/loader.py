"""`load_model`: a causal language model from its folder, in the dtype that was asked for.

One idea: transformers loads whatever fits and fills the rest with random numbers; here what does not fit is an error
with its remedy, and what is changed on purpose (positions, vocabulary, attention) is said. No list of model names: what
a model is, is asked of transformers' public interface.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from burnish import console
from burnish.errors import Problem, UserError
from burnish.model.arguments import ModelArguments
from burnish.model.patch import gathered, shape_of, size_of
from burnish.model.positions import scale_positions
from burnish.model.quantized import exchange_forwards, quantization
from burnish.model.source import find_model, first_line, is_native, model_problems, read_json, runs_own_code

SHOWN = 4  # names of weights or tokens in a message; more would hide what it says
ROWS_MULTIPLE = 64  # a grown vocabulary is rounded up to this, which matrix units of a GPU want


def load_model(
    args: ModelArguments,
    *,
    dtype: torch.dtype,
    trainable: bool,
    device: torch.device | str = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> PreTrainedModel:
    """The model of `args`, in `dtype` on `device`, in eval mode, every parameter loaded.

    `tokenizer` is checked against the rows of the embedding, which `resize_vocab` grows. `max_length` (cutoff_len) says
    how far `rope_scaling` must reach.
    """
    folder = find_model(args, weights=True)
    if problems := model_problems(folder, args):
        raise UserError(problems)
    if is_native(folder) and "auto_map" in read_json(folder / "config.json"):
        console.warn(
            f"{args.model_name_or_path}: its .py files are not run: burnish has code for this model, and under "
            "transformers 5 theirs would fill attn.c_proj with random numbers"
        )
    config = _load_config(folder, args)
    if args.rope_scaling is not None:
        scale_positions(config.get_text_config(), args.rope_scaling, max_length, place=str(args.model_name_or_path))
    quantized = quantization(args, dtype)
    on_cpu = torch.device(device).type == "cpu" and quantized is None  # left open, a quantized one goes to the GPU
    model = _load_weights(
        folder,
        config,
        args,
        dtype=dtype,
        attn_implementation=_attention_name(args.flash_attn),
        device_map=None if on_cpu else {"": device},  # no copy on the CPU in between
        quantization_config=quantized,
    )
    if quantized is not None:
        exchange_forwards(model)
    model.name_or_path = model.config.name_or_path = _name_to_keep(args, folder)
    _mend_generation_config(model)
    if not trainable:  # training passes use_cache=False with every batch, and saves the setting as it was published
        _keep_keys_and_values(model, args.use_kv_cache)
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer, args)
    return model


def compute_dtype(bf16: bool, device: torch.device | str, *, fp16: bool = False) -> torch.dtype:
    """bf16 or float16 where it was asked for and the device multiplies it, else float32.

    No CPU computes in float16. One without bf16 instructions (AVX512_BF16, AMX) emulates them: 8 to 100 times slower
    than float32, and no more exact, so there float32 is used and one line says so.
    """
    if fp16:
        return torch.float32 if torch.device(device).type == "cpu" else torch.float16
    if not bf16:
        return torch.float32
    if torch.device(device).type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        console.warn(
            "this CPU has no bf16 instructions and would emulate them far slower: computing in float32 instead"
        )
        return torch.float32
    return torch.bfloat16


def _load_config(folder: Path, args: ModelArguments) -> PreTrainedConfig:
    place, trusted = str(args.model_name_or_path), runs_own_code(folder, args)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trusted)
    except Exception as error:  # its own checks, or code that came with the model
        message = f"cannot be used ({first_line(error)})"
        raise UserError(Problem(place, "config.json", None, message, "copy the model's files again")) from error
    own_code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (own_code and trusted):
        message = f"is a {config.model_type} model, which does not continue text"
        raise UserError(Problem(place, "", None, message, "give a causal language model (Qwen, Llama, Gemma ...)"))
    if own_code and not trusted:
        delattr(config, "auto_map")  # another class is used: what is saved must not name .py files it lacks
    return config


def _load_weights(folder: Path, config: PreTrainedConfig, args: ModelArguments, **how: Any) -> PreTrainedModel:
    """`how`: dtype, attn_implementation, device_map, quantization_config.

    Not one weight may be missing; those left over are said.
    """
    place = str(args.model_name_or_path)
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(
            str(folder),
            config=config,
            trust_remote_code=runs_own_code(folder, args),
            output_loading_info=True,
            **how,
        )
    except Exception as error:  # torn files, shapes that do not fit, code that came with the model, no memory
        message = f"cannot be loaded ({first_line(error)})"
        remedy = "check that its files are whole and that config.json is theirs"
        raise UserError(Problem(place, "", None, message, remedy)) from error
    missing = sorted(info["missing_keys"])
    if missing:
        message = f"lacks {len(missing)} weights of a {type(model).__name__}: {_some(missing)}"
        raise UserError(Problem(place, "", None, message, "they would be random; copy the model's files again"))
    unused = sorted(info["unexpected_keys"])
    if unused:
        console.warn(f"{place}: {len(unused)} weights are not used by {type(model).__name__}: {_some(unused)}")
    return model


def _attention_name(flash_attn: str) -> str | None:
    """`flash_attn` → the name transformers takes; None lets it choose what the model can do (sdpa, else eager).

    Where the model is trained, `probe.choose_path` then tries burnish's own.
    """
    return {"disabled": "eager", "off": "eager", "sdpa": "sdpa"}.get(flash_attn)


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: ModelArguments) -> None:
    """Every id of the tokenizer has a row in the embedding, or the user knows.

    Published models are not always so (Gemma 3 1B's tokenizer has a token for images beyond its last row), so what the
    tokenizer came with is said and what the user added is refused.
    """
    place = str(args.model_name_or_path)
    rows = num_rows(model)
    beyond = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= rows)
    if not beyond:
        return
    if args.resize_vocab:
        grow_vocabulary(model, beyond[-1][0] + 1)
        return
    tokens = [token for _, token in beyond]
    added = [token for token in (*(args.add_tokens or ()), *(args.add_special_tokens or ())) if token in tokens]
    if added:
        message = f"has {rows} rows: none for {_some(added)}"
        raise UserError(Problem(place, "the embedding", None, message, "set resize_vocab: true"))
    if tokenizer.vocab_size > rows or tokenizer.pad_token in tokens:
        message = f"has {rows} rows, its tokenizer {beyond[-1][0] + 1} tokens: {_some(tokens)} would have none"
        remedy = "set resize_vocab: true if the tokenizer is the model's own"
        raise UserError(Problem(place, "the embedding", None, message, remedy))
    console.warn(f"{place}: the model has no row for {_some(tokens)}; text with it cannot be used")


def grow_vocabulary(model: PreTrainedModel, size: int) -> None:
    """At least `size` rows in embedding and head. The new ones are the mean of the old.

    Their logits are then the mean of the others, never the largest: greedy answers stay what they were.
    """
    before = num_rows(model)
    model.resize_token_embeddings(size, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows = [parameter for module in tables if module is not None for parameter in module.parameters()]
    with torch.no_grad(), gathered(rows, to_change=True):
        for table in rows:
            table[before:] = table[:before].mean(dim=0, dtype=torch.float32).to(table.dtype)  # weight, or a head's bias
    console.say(f"vocabulary grown from {before} to {num_rows(model)} rows")


def num_rows(model: PreTrainedModel) -> int:
    """How many ids the embedding has a row for."""
    embedding: Any = model.get_input_embeddings()
    return shape_of(embedding.weight)[0]


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Published settings contradict themselves (a temperature without sampling); transformers refuses to save those."""
    generation = model.generation_config
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True  # what the settings for sampling were meant for


def _keep_keys_and_values(model: PreTrainedModel, keep: bool) -> None:
    """`use_kv_cache`; `generate` looks at the second of the two."""
    model.config.get_text_config().use_cache = keep
    if model.generation_config is not None:
        model.generation_config.use_cache = keep


def _name_to_keep(args: ModelArguments, folder: Path) -> str:
    """What adapters saved later call their base: the folder from anywhere, or the name on the hub."""
    name = str(args.model_name_or_path)
    return str(folder) if Path(os.path.expanduser(name)).is_dir() else name


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


class ParameterTable(NamedTuple):
    """How many parameters a model has and how many of them are trained. Tied weights count once."""

    trainable: int
    all: int

    @property
    def share(self) -> float:
        return self.trainable / self.all if self.all else 0.0

    def __str__(self) -> str:
        return f"trainable parameters: {self.trainable:,} of {self.all:,} ({self.share:.2%})"


def parameter_table(model: nn.Module) -> ParameterTable:
    sizes = [(size_of(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterTable(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))
