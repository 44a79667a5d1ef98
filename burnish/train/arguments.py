"""TrainingArguments as data: every field of transformers' class with what burnish does about it. No torch here.

`TrainingFields` mirrors the class of the installed transformers (train/fields.py), with our few defaults and fields.
The object itself, which costs torch, is made last and only by training: train/training_args.py.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from burnish.train.fields import TransformersField, transformers_fields

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings
    from burnish.errors import Problem

HIDDEN = {"use_cache"}  # what a user writes as use_cache is ModelArguments.use_kv_cache

# The names under which gradient checkpointing is known; burnish says the older, whatever transformers is installed.
CHECKPOINTING = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}

DEFAULTS: dict[str, Any] = {
    "logging_nan_inf_filter": False,  # a loss that is not a number is told, never hidden
    "report_to": ["none"],
    "gradient_checkpointing": None,
    "torch_compile": None,
}

_AGAIN = (
    "Compute blocks again in the backward pass: less memory, more time. Not given: as few of them as a GPU's memory "
    "needs, and none on the CPU."
)
OUR_HELP = {
    "gradient_checkpointing": _AGAIN,
    "gradient_checkpointing_kwargs": "Handed to the model's gradient checkpointing.",
    "activation_checkpointing": "The newer name of gradient_checkpointing.",
    "activation_checkpointing_kwargs": "The newer name of gradient_checkpointing_kwargs.",
    "torch_compile": "Compile the blocks of the model. Not given: on a GPU, where it can be.",
    "output_dir": "The folder for checkpoints, logs and the tuned model.",
    "do_train": "Train; true unless only do_eval is asked for.",
    "do_eval": "Evaluate at the end.",
    "resume_from_checkpoint": "The checkpoint to go on from.",
    "deepspeed": "DeepSpeed's settings: a JSON file, such as examples/deepspeed/ds_z3_config.json, or the JSON itself.",
    "neftune_noise_alpha": "Noise on the embeddings while training (NEFTune), up to this over the root of "
    "a document's length times their size; 5 is usual.",
    "fp16": "Compute in float16 on a GPU (bfloat16 with deepspeed), the loss scaled; in float32 on the CPU.",
}
# What transformers' annotation says too loosely.
HINTS: dict[str, Any] = {"deepspeed": str | dict}  # a path or a mapping

OURS = (
    TransformersField("overwrite_output_dir", bool, False, "Begin anew in an output_dir that holds a run."),
    TransformersField(
        "warmup_ratio", float | None, None, "Share of the steps in which the learning rate rises; see warmup_steps."
    ),
    TransformersField(
        "micro_batch_tokens",
        str,
        "auto",
        "The most tokens of a pass forward and backward; a step may take several. "
        "auto: as many as a GPU gains from and has the memory for; on the CPU each batch is a pass.",
    ),
    TransformersField(
        "cuda_graphs",
        bool | None,
        None,
        "Record a pass over the blocks as a CUDA graph and replay it, which spares the CPU its launches. "
        "Not given: on a GPU, where the model is so small that the GPU would wait for them.",
    ),
    TransformersField("logging_dir", str | None, None, "Folder of TensorBoard's files."),
)

words = str.split

HONOURED = frozenset(
    words("""
    output_dir do_train do_eval per_device_train_batch_size per_device_eval_batch_size num_train_epochs max_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2
    adam_epsilon gradient_accumulation_steps max_grad_norm label_smoothing_factor bf16 fp16 tf32
    gradient_checkpointing
    gradient_checkpointing_kwargs logging_strategy logging_steps logging_first_step disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start
    save_strategy save_steps save_total_limit save_only_model load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism
    seed data_seed use_cpu dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor
    resume_from_checkpoint include_num_input_tokens_seen log_level log_level_replica
    log_on_each_node train_sampling_strategy deepspeed ddp_backend ddp_timeout ddp_bucket_cap_mb
    overwrite_output_dir warmup_ratio logging_dir torch_compile micro_batch_tokens
    cuda_graphs
    neftune_noise_alpha
    """)
)

NOTHING_TO_CHANGE = {
    "local_rank": "a launcher says it in LOCAL_RANK too",
    "average_tokens_across_devices": "a step is always divided by the trained tokens of all processes",
    "ddp_find_unused_parameters": "gradients are added after the last pass, whichever weights have one",
    "ddp_static_graph": "gradients are added after the last pass, whatever the graph was",
    "ddp_broadcast_buffers": "buffers do not change while a model trains",
    "remove_unused_columns": "a batch holds what the model takes",
    "use_liger_kernel": "the head never holds tokens × vocabulary, whatever this says",
    "length_column_name": "the lengths of samples are known, no column is asked for them",
    "prediction_loss_only": "evaluation keeps sums, never predictions",
    "enable_jit_checkpoint": "SIGTERM always saves a checkpoint",
}

TRANSLATED = {
    **{old: f"the newer name of {new}" for old, new in CHECKPOINTING.items()},
    "use_cache": "means use_kv_cache; training never keeps keys and values",
}

# name → (what is so, what to do); refused unless it is left at its default, or off.
REFUSED: dict[str, tuple[str, str]] = {
    "fp16_full_eval": ("is not built yet", "evaluation computes as training does"),
    "bf16_full_eval": ("does nothing by itself", "with bf16: true evaluation is in bf16 already"),
    "logging_nan_inf_filter": ("would hide a loss that is not a number", "leave it out; such a step is told and named"),
    "optim_target_modules": ("is of GaLore and APOLLO, which burnish does not have", "leave it out"),
    "liger_kernel_config": ("has no kernels to configure", "leave it out"),
    "torch_empty_cache_steps": ("is not built", "leave it out"),
    "auto_find_batch_size": ("is not built yet", "lower per_device_train_batch_size"),
    "accelerator_config": ("has no Accelerator to configure", "leave it out"),
    "parallelism_config": ("is not built yet", "leave it out"),
    "save_on_each_node": ("is not built", "leave it out; give an output_dir that all machines share"),
    "skip_memory_metrics": ("is not built", "leave it out"),
    "dataloader_multiprocessing_context": ("is not built", "leave it out; workers are started as torch does"),
    "dataloader_in_order": ("would let the order of rows depend on time", "leave it out"),
    "label_names": ("does nothing", "leave it out; labels are called labels"),
    "debug": ("is not built", "leave it out; a loss that is not a number is traced to its module anyway"),
    "do_predict": ("is not built yet", "ask the tuned model with burnish chat"),
    "sortish_sampler": ("is not built", "leave it out"),
    **dict.fromkeys(
        words("torch_compile_backend torch_compile_mode"), ("is not built", "leave it out; torch_compile is inductor's")
    ),
    **dict.fromkeys(
        words("fsdp fsdp_config"),
        ("is not built yet", "deepspeed: examples/deepspeed/ds_z3_config.json divides a model among devices too"),
    ),
    **dict.fromkeys(
        words("""
        predict_with_generate generation_max_length generation_num_beams generation_config
        """),
        ("is not built yet", "ask the tuned model with burnish chat"),
    ),
    **dict.fromkeys(
        words("""
        eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
        """),
        ("has nothing to gather", "leave it out; evaluation keeps sums, not predictions"),
    ),
    **dict.fromkeys(
        words("""
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
        """),
        ("is not built", "upload output_dir with `hf upload`"),
    ),
}

# Other values of these lead to another model; everything else in this room is about telling and keeping (A5).
TRAINS = frozenset(
    words("""
    per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm label_smoothing_factor bf16 fp16 tf32 seed data_seed
    neftune_noise_alpha dataloader_drop_last train_sampling_strategy load_best_model_at_end
    """)
)
# These change training only where the course of evaluation decides something.
TRAINS_BY_EVALUATION = frozenset(
    words("eval_strategy eval_steps eval_delay metric_for_best_model greater_is_better save_strategy save_steps")
)


def mirror() -> tuple[TransformersField, ...]:
    """The fields that a user can name: transformers' own with our defaults, then ours."""
    theirs = [field for field in transformers_fields() if field.name not in HIDDEN]
    named = [
        dataclasses.replace(
            f,
            hint=HINTS.get(f.name, f.hint),
            default=DEFAULTS.get(f.name, f.default),
            help=OUR_HELP.get(f.name, f.help),
        )
        for f in theirs
    ]
    return (*(_optional_where_none(f) for f in named), *OURS)


def _optional_where_none(field: TransformersField) -> TransformersField:
    return dataclasses.replace(field, hint=field.hint | None) if field.default is None else field


def make_training_fields() -> type:
    """A dataclass with the fields of `mirror()`, for HfArgumentParser."""

    def declare(field: TransformersField) -> tuple[str, Any, Any]:
        help_text = field.help
        if field.name in REFUSED:
            help_text += f" Refused for now: it {REFUSED[field.name][0]}."
        metadata = {"help": help_text}
        if isinstance(field.default, list):
            return field.name, field.hint, dataclasses.field(default_factory=field.default.copy, metadata=metadata)
        return field.name, field.hint, dataclasses.field(default=field.default, metadata=metadata)

    return dataclasses.make_dataclass("TrainingArguments", [declare(field) for field in mirror()])


def problems(settings: Settings) -> list[Problem]:
    from burnish.train import checks

    return checks.problems(settings)
