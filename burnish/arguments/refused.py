"""What burnish does not have, or not yet: settings that are refused by name, unless they ask for nothing.

One table: name → (what is so, what to do). A setting that gets built leaves it, and becomes a field of its room.
"""

from __future__ import annotations

from typing import Any

# Of another command, as are the fields of model/arguments.py: OF_EXPORT. A file that serves several may hold them.
OF_EXPORT = (
    *("export_quantization_bit", "export_quantization_dataset"),
    *("export_quantization_nsamples", "export_quantization_maxlen"),
)


def _names(text: str, reason: str, remedy: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(text.split(), (reason, remedy))


# At these values nothing is asked for.
OFF_VALUES = {"", "false", "no", "none", "null", "0", "0.0", "[]", "{}"}
REFUSED: dict[str, tuple[str, str]] = {
    **_names("quantization_device_map", "is not built", "leave it out: the model is held by one device"),
    **_names(" ".join(OF_EXPORT), "is not built yet", "leave it out; the weights are exported in their own dtype"),
    **_names("eval_num_beams", "is not built yet", "ask the tuned model with burnish chat, and set num_beams"),
    **_names("master_addr master_port", "is said to the launcher", "set MASTER_ADDR and MASTER_PORT"),
    **_names("split_batches", "is not built", "divide per_device_train_batch_size by the number of processes"),
    **_names(
        """pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight
        simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model
        ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters
        reward_model_quantization_bit reward_model_type ld_alpha ppo_logger""",
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
        freeze_multi_modal_projector freeze_language_model train_mm_proj_only image_resolution video_resolution""",
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
        kt_lora_expert_intermediate_size use_mca use_hyper_parallel hyper_parallel_args ray_init_kwargs
        ray_storage_path ray_storage_filesystem ray_run_name resources_per_worker placement_strategy
        fp8 fp8_backend fp8_enable_fsdp_float8_all_gather""",
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
        asft_alpha use_eaft_loss eaft_alpha module_dropout oft_rank oft_block_size oft_target
        pissa_iter pissa_convert loraplus_lr_embedding new_special_tokens_config init_special_tokens adapter_folder
        offload_folder tool_format preserve_thinking ms_hub_token om_hub_token""",
        "is not something burnish has",
        "leave it out",
    ),
    **_names("max_source_length max_target_length", "is one length today", "set cutoff_len to the sum of the two"),
    # Gone from transformers:
    **_names("use_mps_device", "is a device that burnish does not train on", "leave it out, or set use_cpu: true"),
    **_names("tpu_num_cores tpu_metrics_debug", "is of TPUs, which burnish does not train on", "leave it out"),
    **_names(
        "push_to_hub_model_id push_to_hub_organization push_to_hub_token",
        "is not built",
        "upload output_dir with `hf upload`",
    ),
    **_names("jit_mode_eval use_ipex torchdynamo", "is a compiler that burnish does not use", "leave it out"),
    **_names("sharded_ddp", "is gone", "deepspeed: examples/deepspeed/ds_z2_config.json divides the optimizer"),
    **_names("include_inputs_for_metrics", "has nothing to gather", "leave it out; evaluation keeps sums only"),
    **_names(
        "ray_scope past_index mp_parameters use_legacy_prediction_loop",
        "is gone from transformers",
        "leave it out",
    ),
}
# Settings of something that is off: their own defaults ask for nothing either.
DEFAULTS_OF_REFUSED: dict[str, str] = {
    "export_quantization_nsamples": "128", "export_quantization_maxlen": "1024",
    "pref_beta": "0.1", "pref_loss": "sigmoid", "kto_chosen_weight": "1", "kto_rejected_weight": "1",
    "simpo_gamma": "0.5", "ppo_buffer_size": "1", "ppo_epochs": "4", "ppo_target": "6", "reward_model_type": "lora",
    "galore_target": "all", "galore_rank": "16", "galore_update_interval": "200", "galore_scale": "2",
    "galore_proj_type": "std", "apollo_target": "all", "apollo_rank": "16", "apollo_update_interval": "200",
    "apollo_scale": "32", "apollo_proj": "random", "apollo_proj_type": "std", "apollo_scale_type": "channel",
    "badam_mode": "layer", "badam_switch_mode": "ascending", "badam_switch_interval": "50",
    "badam_update_ratio": "0.05", "badam_mask_mode": "adjacent",
    "swanlab_project": "llamafactory", "swanlab_mode": "cloud",
    "image_max_pixels": "589824", "image_min_pixels": "1024", "video_max_pixels": "65536", "video_min_pixels": "256",
    "video_fps": "2", "video_maxlen": "128", "audio_sampling_rate": "16000",
    "freeze_vision_tower": "true", "freeze_multi_modal_projector": "true",
    "vllm_maxlen": "4096", "vllm_gpu_util": "0.7", "vllm_max_lora_rank": "32",
    "sglang_maxlen": "4096", "sglang_mem_fraction": "0.7", "sglang_tp_size": "-1", "sglang_lora_backend": "triton",
    "fp8_backend": "auto", "profiler_wait_steps": "1", "profiler_warmup_steps": "1", "profiler_active_steps": "1",
    "profiler_repeat": "1", "profiler_record_shapes": "true", "profiler_profile_memory": "true",
    "profiler_with_stack": "true",
    "asft_alpha": "0.1", "eaft_alpha": "1", "oft_block_size": "32", "oft_target": "all", "pissa_iter": "16",
    "loraplus_lr_embedding": "0.000001", "init_special_tokens": "noise_init", "offload_folder": "offload",
    "ray_scope": "last", "past_index": "-1",
}  # fmt: skip
# Switches that ask for something when they are off.
ASK_WHEN_OFF = {"freeze_vision_tower", "freeze_multi_modal_projector"}

# Values that a field does not take, with more to say than "is not one of".
REFUSED_VALUES: dict[tuple[str, str], tuple[str, str]] = {
    **{("stage", stage): ("is not built yet", "choose pt or sft") for stage in ("rm", "dpo", "kto", "ppo")},
    ("finetuning_type", "oft"): ("is not something burnish has", "choose full, freeze or lora"),
    **{
        ("quantization_method", method): ("is a library that burnish does not use", "leave it out: bnb is the only one")
        for method in ("hqq", "eetq")
    },
    ("mix_strategy", "interleave_once"): ("is not built", "choose interleave_under or interleave_over"),
}


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a setting of REFUSED is off, or what it would be anyway: then it is welcome.

    >>> asks_for_nothing("video_fps", "2.0"), asks_for_nothing("video_fps", 3), asks_for_nothing("use_badam", "true")
    (True, False, False)
    """
    if is_off(value):
        return value is None or name not in ASK_WHEN_OFF
    default, text = DEFAULTS_OF_REFUSED.get(name), as_text(value)
    if default is None:
        return False
    try:
        return float(text) == float(default)
    except ValueError:
        return text == default


def is_off(value: Any) -> bool:
    return as_text(value) in OFF_VALUES


def as_text(value: Any) -> str:
    return "" if value is None else str(value).strip().lower()
