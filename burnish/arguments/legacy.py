"""The names of other years and of other tools: what they are called today, what is done without them, what is refused.

One table each. `translate` looks a setting up in them; what it changed is printed once when a run starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from burnish.arguments.coerce import Unfit, to_type
from burnish.arguments.given import Given
from burnish.errors import Problem


def _inverse(value: Any) -> bool:
    return not to_type(value, bool)


def _same(value: Any) -> Any:
    return value


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
    "adafactor": ("optim", lambda value: "adafactor" if to_type(value, bool) else None),
    "dpo_beta": ("pref_beta", _same),
    "orpo_beta": ("pref_beta", _same),
    "dpo_loss": ("pref_loss", _same),
    "dpo_ftx": ("pref_ftx", _same),
    "sft_packing": ("packing", _same),
    "neat_packing": ("packing", _same),
    "cache_path": ("tokenized_path", _same),
}

# The same setting under the name of a newer transformers: nothing worth telling.
ALSO_CALLED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}

# (name, old value) → today's value
VALUES: dict[tuple[str, str], str] = {("flash_attn", "true"): "auto", ("flash_attn", "false"): "disabled"}

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
    "data_shared_file_system": "one process prepares the data",
    "half_precision_backend": "PyTorch's own arithmetic is the only one",
    "fp16_backend": "PyTorch's own arithmetic is the only one",
    "dispatch_batches": "one process needs no dispatch",
    "reserved_label_len": "the prompt is cut before the answer, see cutoff_len",
}

# Accepted at this value, with a word about it; refused at any other.
TOLD_AT: dict[str, tuple[str, str, str]] = {  # name → (value, what happens, why not another)
    "save_safetensors": ("true", "weights are always safetensors", "weights are always saved as safetensors"),
    "export_legacy_format": ("false", "weights are always safetensors", "weights are always saved as safetensors"),
    "visual_inputs": ("false", "burnish reads text only", "burnish reads text only"),
    "infer_backend": ("huggingface", "it is the only engine for now", "the only engine for now is huggingface"),
}

# Of another command: a file that serves several commands may hold them.
OF_EXPORT = (
    *("export_dir", "export_size", "export_device", "export_hub_model_id"),
    *("export_quantization_bit", "export_quantization_dataset", "export_quantization_nsamples"),
    "export_quantization_maxlen",
)


def _names(text: str, reason: str, remedy: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(text.split(), (reason, remedy))


# What burnish does not have, or not yet: (what is so, what to do). At these values they ask for nothing:
OFF_VALUES = {"", "false", "no", "none", "null", "0", "0.0", "[]", "{}"}
REFUSED: dict[str, tuple[str, str]] = {
    **_names("packing", "is not built yet", "leave it out; samples are laid end to end without padding anyway"),
    **_names("tokenized_path", "is not built yet", "leave it out; tokens are made anew by every run"),
    **_names("pure_bf16", "is not built yet", "use bf16: true"),
    **_names("cross_document_attention", "is not built yet", "leave it out; documents do not see each other"),
    **_names(
        "quantization_bit quantization_method quantization_type double_quantization quantization_device_map",
        "is not built yet",
        "leave it out and train with bf16: true",
    ),
    **_names("base_dtype micro_batch_tokens", "is not built yet", "leave it out"),
    **_names("group_by_length", "is not built yet", "leave it out; without padding nothing is won by grouping"),
    **_names("split_batches", "has no peers to split a batch with", "leave it out"),
    **_names(
        """pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight
        simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model
        ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters
        reward_model_quantization_bit reward_model_type ld_alpha""",
        "is of preference training, which is not built yet",
        "train with stage: sft",
    ),
    **_names(
        """use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise
        use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type
        apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode
        badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose use_adam_mini use_muon""",
        "is an optimizer that burnish does not have",
        "choose another with optim, such as adafactor",
    ),
    **_names(
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret",
        "is set through SwanLab itself",
        "set report_to: swanlab, and SwanLab's environment variables",
    ),
    **_names(
        """image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels
        video_fps video_maxlen use_audio_in_video audio_sampling_rate media_dir freeze_vision_tower
        freeze_multi_modal_projector freeze_language_model""",
        "is of images and sounds, and burnish reads text only",
        "leave it out",
    ),
    **_names(
        """vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction
        sglang_tp_size sglang_config sglang_lora_backend""",
        "is of another engine",
        "leave it out; the only engine for now is huggingface",
    ),
    **_names(
        """use_kt kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num
        kt_lora_expert_intermediate_size use_mca use_hyper_parallel hyper_parallel_args ray_num_workers ray_init_kwargs
        ray_storage_path ray_storage_filesystem ray_run_name resources_per_worker placement_strategy master_addr
        master_port fp8 fp8_backend fp8_enable_fsdp_float8_all_gather""",
        "is a way of training that burnish does not have",
        "leave it out",
    ),
    **_names(
        """enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps
        profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules""",
        "is not built",
        "leave it out",
    ),
    **_names(
        """shift_attn mixture_of_depths moe_aux_loss_coef train_from_scratch use_llama_pro use_dft_loss use_asft_loss
        asft_alpha use_eaft_loss eaft_alpha disable_shuffling module_dropout oft_rank oft_block_size oft_target
        pissa_iter pissa_convert loraplus_lr_embedding new_special_tokens_config init_special_tokens adapter_folder
        offload_folder tool_format preserve_thinking eval_num_beams ms_hub_token om_hub_token""",
        "is not something burnish has",
        "leave it out",
    ),
    **_names(
        """use_mps_device jit_mode_eval use_ipex fp16_opt_level push_to_hub_model_id push_to_hub_organization
        push_to_hub_token torchdynamo ray_scope past_index mp_parameters tpu_num_cores tpu_metrics_debug
        use_legacy_prediction_loop sharded_ddp include_inputs_for_metrics fsdp_min_num_params
        fsdp_transformer_layer_cls_to_wrap""",
        "is gone from transformers",
        "leave it out",
    ),
}
# Settings of something that is off: their own defaults ask for nothing either.
DEFAULTS_OF_REFUSED: dict[str, str] = {
    "quantization_method": "bnb", "quantization_type": "nf4", "double_quantization": "true",
    "pref_beta": "0.1", "pref_loss": "sigmoid", "image_max_pixels": "589824", "image_min_pixels": "1024",
    "freeze_vision_tower": "true", "freeze_multi_modal_projector": "true", "offload_folder": "offload",
    "pissa_iter": "16", "loraplus_lr_embedding": "1e-6", "ray_num_workers": "1",
}  # fmt: skip

# Values that a field does not take, with more to say than "is not one of".
REFUSED_VALUES: dict[tuple[str, str], tuple[str, str]] = {
    **{("stage", stage): ("is not built yet", "choose pt or sft") for stage in ("rm", "dpo", "kto", "ppo")},
    ("finetuning_type", "oft"): ("is not something burnish has", "choose full, freeze or lora"),
    ("mix_strategy", "interleave_once"): ("is not built", "choose interleave_under or interleave_over"),
}

ALL_NAMES = frozenset({*RENAMED, *ALSO_CALLED, *TOLD, *TOLD_AT, *OF_EXPORT, *REFUSED})


@dataclass(frozen=True)
class Translation:
    """What became of a setting: `given` under today's name (None: nothing is left of it), and a line to tell."""

    given: Given | None
    told: tuple[str, str, str] | None = None  # (old, new, note)
    problem: Problem | None = None


def translate(given: Given) -> Translation:
    """Looks a setting up in the tables; one that stands in none comes back as it is."""
    name, text = given.name, _text(given.value)
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
    if name in OF_EXPORT:
        return Translation(None, (name, "", "is for burnish export"))
    if name in REFUSED:
        return _refuse(given, text)
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
        return _refuse(renamed, _text(value))
    return Translation(renamed, (f"{given.name}: {given.value}", f"{new}: {value}", "") if value is not None else None)


def _refuse(given: Given, text: str) -> Translation:
    if is_off(given.value) or text == DEFAULTS_OF_REFUSED.get(given.name):
        return Translation(None)
    return Translation(None, problem=given.problem(*REFUSED[given.name]))


def same_setting(name: str) -> str:
    """Today's name of a setting that takes the same words under both names; else the name itself."""
    new, convert = RENAMED.get(name, (name, _same))
    return ALSO_CALLED.get(name, new) if convert in (_same, _inverse) else name


def is_off(value: Any) -> bool:
    """A value that asks for nothing: of a setting that burnish does not have, it is welcome."""
    return _text(value) in OFF_VALUES


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip().lower()
