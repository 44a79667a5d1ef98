"""The names of other years and of other tools: what they are called today, and what is done without them.

One table each; what is refused stands in refused.py. `translate` looks a setting up in them; what it changed is
printed once when a command starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from burnish.arguments.coerce import Unfit, to_type
from burnish.arguments.given import Given
from burnish.arguments.refused import OF_EXPORT, REFUSED, REFUSED_VALUES, as_text, asks_for_nothing, is_off
from burnish.errors import Problem
from burnish.model.arguments import OF_EXPORT as OF_EXPORT_TODAY


def _inverse(value: Any) -> bool:
    return not to_type(value, bool)


def _same(value: Any) -> Any:
    return value


def _where_on(word: str) -> Callable[[Any], str | None]:
    """A switch of the past that is one word of today's setting; off, it says nothing."""
    return lambda value: word if to_type(value, bool) else None


def _where_it_is_on(value: Any) -> Any:
    """A switch that turns today's switch on; off, it says nothing."""
    return value if to_type(value, bool) else None


# old name → (today's name, today's value)
RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "num_layer_trainable": ("freeze_trainable_layers", _same),
    "name_module_trainable": ("freeze_trainable_modules", _same),
    "evaluation_strategy": ("eval_strategy", _same),
    "checkpoint_dir": ("adapter_name_or_path", _same),
    "new_special_tokens": ("add_special_tokens", _same),
    "use_cache": ("use_kv_cache", _same),
    "resume_lora_training": ("create_new_adapter", _inverse),
    "disable_gradient_checkpointing": ("gradient_checkpointing", _inverse),
    "use_reentrant_gc": ("gradient_checkpointing_kwargs", lambda value: {"use_reentrant": to_type(value, bool)}),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", _same),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", _same),
    "no_cuda": ("use_cpu", _same),
    "adafactor": ("optim", _where_on("adafactor")),
    "group_by_length": ("train_sampling_strategy", _where_on("group_by_length")),
    "disable_shuffling": ("train_sampling_strategy", _where_on("sequential")),
    "train_last_turn_only": ("mask_history", _same),
    "lora_lr_ratio": ("loraplus_lr_ratio", _same),
    "ref_model_checkpoint": ("ref_model_adapters", _same),
    "reward_model_checkpoint": ("reward_model_adapters", _same),
    "dpo_beta": ("pref_beta", _same),
    "orpo_beta": ("pref_beta", _same),
    "dpo_loss": ("pref_loss", _same),
    "dpo_ftx": ("pref_ftx", _same),
    "sft_packing": ("packing", _where_it_is_on),
    "neat_packing": ("packing", _where_it_is_on),  # off, it lets samples see each other, and `packing` is still on
    "cache_path": ("tokenized_path", _same),
}

# The same setting under the name of a newer transformers: nothing worth telling.
ALSO_CALLED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}

# (name, old value) → today's value
VALUES: dict[tuple[str, str], str] = {
    ("flash_attn", "true"): "auto",
    ("flash_attn", "false"): "disabled",
    ("quantization_method", "bitsandbytes"): "bnb",
}

_ARITHMETIC = "PyTorch's own arithmetic is the only one"
# Accepted, does nothing: what happens anyway or instead.
TOLD: dict[str, str] = {
    "preprocessing_num_workers": "the number of workers is chosen by itself",
    "preprocessing_batch_size": "rows are read one by one",
    "low_cpu_mem_usage": "weights are always read without a second copy",
    "print_param_status": "the table of parameters is always printed",
    "enable_liger_kernel": "the fused head and packed attention are always on",
    "use_unsloth": "the fused head and packed attention are always on",
    "use_unsloth_gc": "memory is saved by gradient_checkpointing",
    "use_v1_kernels": "the fused head and packed attention are always on",
    "upcast_layernorm": "weights that are trained always have float32 masters",
    "upcast_lmhead_output": "the loss is always computed in float32",
    "include_effective_tokens_per_second": "tokens per second are always logged",
    "include_tokens_per_second": "tokens per second are always logged",
    "data_shared_file_system": "tokens are made by one process, for all that find them in the same folder",
    "ray_num_workers": "one process a GPU is started without Ray",
    **dict.fromkeys(("half_precision_backend", "fp16_backend", "fp16_opt_level"), _ARITHMETIC),
    "lora_bf16_mode": "weights that are trained always have float32 masters",
    "dispatch_batches": "every process reads its own rows",
    "fsdp_min_num_params": "is of fsdp, which is off",
    "fsdp_transformer_layer_cls_to_wrap": "is of fsdp, which is off",
    "reserved_label_len": "the prompt is cut before the answer, see cutoff_len",
}

# Accepted at this value, with a word about it; refused at any other.
TOLD_AT: dict[str, tuple[str, str, str]] = {  # name → (value, what happens, why not another)
    "save_safetensors": ("true", "weights are always safetensors", "weights are always saved as safetensors"),
    "export_legacy_format": ("false", "weights are always safetensors", "weights are always saved as safetensors"),
    "visual_inputs": ("false", "burnish reads text only", "burnish reads text only"),
    "infer_backend": ("huggingface", "it is the only engine for now", "the only engine for now is huggingface"),
}

ALL_NAMES = frozenset({*RENAMED, *ALSO_CALLED, *TOLD, *TOLD_AT, *REFUSED})


@dataclass(frozen=True)
class Translation:
    """What became of a setting: `given` under today's name (None: nothing is left of it), and a line to tell."""

    given: Given | None
    told: tuple[str, str, str] | None = None  # (old, new, note)
    problem: Problem | None = None


def translate(given: Given, command: str = "train") -> Translation:
    """Looks a setting up in the tables; one that stands in none comes back as it is."""
    name, text = given.name, as_text(given.value)
    if command == "train" and name in {*OF_EXPORT, *OF_EXPORT_TODAY}:
        return Translation(None, (name, "", "is for burnish export"))
    if name in ALSO_CALLED:
        return Translation(replace(given, name=ALSO_CALLED[name], typed=given.typed or name))
    if name in RENAMED:
        return _rename(given)
    if name in TOLD:
        return Translation(None, None if is_off(given.value) else (name, "", TOLD[name]))
    if name in TOLD_AT:
        value, note, why_not = TOLD_AT[name]
        if text in (value, "hf" if value == "huggingface" else value):
            return Translation(None, (name, "", note))
        return Translation(None, problem=given.problem("is refused", why_not))
    if name in REFUSED:
        return _refuse(given)
    if (name, text) in VALUES:
        new = VALUES[name, text]
        return Translation(replace(given, value=new), (f"{name}: {text}", f"{name}: {new}", ""))
    if (name, text) in REFUSED_VALUES:
        return Translation(None, problem=given.problem(*REFUSED_VALUES[name, text]))
    return Translation(given)


def _rename(given: Given) -> Translation:
    new, convert = RENAMED[given.name]
    try:
        value = None if given.value is None else convert(given.value)
    except Unfit as unfit:
        return Translation(None, problem=given.problem(unfit.message, unfit.remedy))
    typed = given.typed or given.name
    renamed = replace(given, name=new, value=value, typed=typed)
    if new in REFUSED:
        return _refuse(renamed)
    return Translation(renamed, (f"{given.name}: {given.value}", f"{new}: {value}", "") if value is not None else None)


def _refuse(given: Given) -> Translation:
    asks = not asks_for_nothing(given.name, given.value)
    return Translation(None, problem=given.problem(*REFUSED[given.name]) if asks else None)


def same_setting(name: str) -> str:
    """Today's name of a setting that takes the same words under both names; else the name itself."""
    new, convert = RENAMED.get(name, (name, _same))
    return ALSO_CALLED.get(name, new) if convert in (_same, _inverse) else name
