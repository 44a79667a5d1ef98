"""`load_model`: a causal language model from its folder, in the dtype that was asked for.

One idea: transformers loads whatever fits and fills the rest with random numbers; here what does not fit is an error
with its remedy, and what is changed on purpose (positions, vocabulary, attention) is said. No list of model names: what
a model is, is asked of transformers' public interface.
"""

from __future__ import annotations

import math
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
from burnish.model.attention import ATTENTION_NAME, register
from burnish.model.source import find_model, first_line, model_problems

SHOWN = 4  # names of weights or tokens in a message; more would hide what it says
ROWS_MULTIPLE = 64  # a grown vocabulary is rounded up to this, which matrix units of a GPU want
ROPE_FACTOR = 2.0  # where no length says how far positions must reach
# What a rotary embedding keeps of itself when it is scaled.
ROPE_BASE = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


def load_model(
    args: ModelArguments,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    trainable: bool,
    device: torch.device | str = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> PreTrainedModel:
    """The model of `args`, in `dtype` on `device`, in eval mode, every parameter loaded.

    `attention` is what `flash_attn: auto` means here. `tokenizer` is checked against the rows of the embedding, which
    `resize_vocab` grows. `max_length` (cutoff_len) says how far `rope_scaling` must reach.
    """
    folder = find_model(args, weights=True)
    if problems := model_problems(folder, args):
        raise UserError(problems)
    config = _load_config(folder, args)
    if args.rope_scaling is not None:
        scale_positions(config.get_text_config(), args.rope_scaling, max_length, place=str(args.model_name_or_path))
    model = _load_weights(
        folder,
        config,
        args,
        dtype=dtype,
        attn_implementation=attention_name(config, args.flash_attn, attention),
        device_map=None if torch.device(device).type == "cpu" else {"": device},  # no copy on the CPU in between
    )
    model.name_or_path = model.config.name_or_path = _name_to_keep(args, folder)
    _mend_generation_config(model)
    if not trainable:  # training passes use_cache=False with every batch, and saves the setting as it was published
        _keep_keys_and_values(model, args.use_kv_cache)
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer, args)
    return model


def compute_dtype(bf16: bool, device: torch.device | str) -> torch.dtype:
    """bf16 where it was asked for and the device multiplies it, else float32.

    A CPU without bf16 instructions (AVX512_BF16, AMX) emulates them: 8 to 100 times slower than float32, and no more
    exact, so there float32 is used and one line says so.
    """
    if not bf16:
        return torch.float32
    if torch.device(device).type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        console.warn(
            "this CPU has no bf16 instructions and would emulate them far slower: computing in float32 instead"
        )
        return torch.float32
    return torch.bfloat16


def check_positions(model: PreTrainedModel, cutoff_len: int, *, scaled: bool) -> None:
    """Say that samples may be longer than the model was made for. Raises UserError where it has no such positions.

    Rotary positions can be computed beyond their end, which a model has not learned; a table of learned ones just ends.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or cutoff_len <= positions or scaled:
        return
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    if any(positions <= table.num_embeddings <= positions + 2 for table in tables):  # OPT keeps two rows more
        message = f"is more than the {positions} positions that the model has"
        raise UserError(Problem("settings", "cutoff_len", cutoff_len, message, f"set cutoff_len: {positions}"))
    console.warn(
        f"cutoff_len {cutoff_len} is beyond the model's {positions} positions: it has not learned to use more; "
        "rope_scaling stretches them"
    )


def _load_config(folder: Path, args: ModelArguments) -> PreTrainedConfig:
    place = str(args.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=args.trust_remote_code)
    except Exception as error:  # its own checks, or code that came with the model
        message = f"cannot be used ({first_line(error)})"
        raise UserError(Problem(place, "config.json", None, message, "copy the model's files again")) from error
    own_code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (own_code and args.trust_remote_code):
        message = f"is a {config.model_type} model, which does not continue text"
        raise UserError(Problem(place, "", None, message, "give a causal language model (Qwen, Llama, Gemma ...)"))
    if own_code and not args.trust_remote_code:
        delattr(config, "auto_map")  # transformers' own class is used: what is saved must not name .py files it lacks
    return config


def _load_weights(folder: Path, config: PreTrainedConfig, args: ModelArguments, **how: Any) -> PreTrainedModel:
    """`how`: dtype, attn_implementation, device_map. Not one weight may be missing; those left over are said."""
    place = str(args.model_name_or_path)
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(
            str(folder), config=config, trust_remote_code=args.trust_remote_code, output_loading_info=True, **how
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


def attention_name(config: PreTrainedConfig, flash_attn: str, attention: str) -> str | None:
    """`flash_attn` → the name transformers takes; None lets it choose what the model can do (sdpa, else eager)."""
    if flash_attn in ("disabled", "off"):
        return "eager"
    if flash_attn == "sdpa":
        return "sdpa"
    if attention == "sdpa":
        return None
    if attention == ATTENTION_NAME:
        register()
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if known is not None and not known.is_backend_compatible():
        console.warn(f"{config.model_type} models bring their own attention: {attention} is not used")
        return None
    return attention


def scale_positions(config: PreTrainedConfig, kind: str, max_length: int | None, *, place: str) -> None:
    """Set `rope_parameters` so that a model of L positions reads `max_length`: factor = ceil(max_length / L).

    Assigning the old `rope_scaling` would drop `rope_theta`. A model whose layers rotate differently (Gemma 3) has one
    set per type of layer; those with a sliding window see no further than it and stay as they are.
    """
    positions = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or not positions:
        remedy = "leave rope_scaling out"
        raise UserError(Problem(place, "rope_scaling", kind, "needs rotary positions, which it does not have", remedy))
    if max_length is not None and max_length <= positions:
        console.warn(f"rope_scaling does nothing: the model reads {positions} tokens, {max_length} are asked for")
        return
    factor = ROPE_FACTOR if max_length is None else float(math.ceil(max_length / positions))
    if "rope_theta" in parameters or "rope_type" in parameters:
        scaled = _scaled(parameters, kind, factor, positions, place)
    else:
        scaled = {
            layers: _scaled(each, kind, factor, positions, place) if each and "sliding" not in layers else each
            for layers, each in parameters.items()
        }
    if scaled == parameters:
        return  # a model that was tuned and saved with these settings
    config.rope_parameters = scaled
    if kind != "dynamic":  # which finds its original length here
        config.max_position_embeddings = int(positions * factor)
    console.say(f"rope_scaling {kind}: {positions} positions stretched {factor:g} times")


def _scaled(parameters: dict[str, Any], kind: str, factor: float, positions: int, place: str) -> dict[str, Any]:
    already = parameters.get("rope_type", "default")
    if (already, parameters.get("factor")) == (kind, factor):
        return parameters
    if already != "default":
        message = f"would take the place of its own scaling ({already}, factor {parameters.get('factor')})"
        raise UserError(Problem(place, "rope_scaling", kind, message, "leave rope_scaling out"))
    scaled = {name: parameters[name] for name in ROPE_BASE if name in parameters}
    scaled |= {"rope_type": kind, "factor": factor}
    if kind in ("yarn", "llama3"):
        scaled["original_max_position_embeddings"] = positions
    if kind == "llama3":
        scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Llama 3.1's own
    return scaled


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
    with torch.no_grad():
        for table in (parameter for module in tables if module is not None for parameter in module.parameters()):
            table[before:] = table[:before].mean(dim=0, dtype=torch.float32).to(table.dtype)  # weight, or a head's bias
    console.say(f"vocabulary grown from {before} to {num_rows(model)} rows")


def num_rows(model: PreTrainedModel) -> int:
    """How many ids the embedding has a row for."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


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
    return str(folder) if Path(name).expanduser().is_dir() else name


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
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterTable(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))
