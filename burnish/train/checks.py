"""Combinations of training settings that cannot be, told before torch is loaded.

transformers' class raises some of them too, but one at a time and late.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.errors import Problem
from burnish.train.fields import reporters
from burnish.train.zero import read_deepspeed, wrong_in_deepspeed

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings

OPTIMIZERS = (  # those of train/optimizer.py, which cannot be imported here
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
)
OF_TORCH = OPTIMIZERS[:6]  # the others are of bitsandbytes
OF_PURE_BF16 = OPTIMIZERS[:2]  # those that round at random
# report_to → packages of which one must be here; what stands nowhere here is left to transformers to look for.
PACKAGES_OF_REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{name: (name,) for name in ("wandb", "swanlab", "trackio", "mlflow", "comet_ml", "clearml", "neptune")},
    **{name: (name,) for name in ("codecarbon", "dvclive")},
}
NEEDS_KWARGS = {  # schedules that are nothing without these in lr_scheduler_kwargs: one of each group
    "cosine_with_min_lr": (("min_lr", "min_lr_rate"),),
    "cosine_warmup_with_min_lr": (("min_lr", "min_lr_rate"),),
    "warmup_stable_decay": (("num_decay_steps",),),
}


def problems(settings: Settings) -> list[Problem]:
    found = _ranges(settings)
    if not settings.value("output_dir") and not settings.is_faulty("output_dir"):
        found.append(settings.missing("output_dir", "give the folder for the tuned model"))
    elif settings.value("output_dir") and os.path.isfile(os.path.expanduser(settings.value("output_dir"))):
        found.append(settings.problem("output_dir", "is a file", "give a folder, which need not exist"))
    found += _optimizer(settings) + _schedule(settings) + _evaluation(settings) + _best_model(settings)
    translated = any("use_reentrant_gc" in old for old, _, _ in settings.translated)  # harmless by itself there
    if settings.value("gradient_checkpointing_kwargs") and not (settings.value("gradient_checkpointing") or translated):
        remedy = "set gradient_checkpointing: true"
        found.append(settings.problem("gradient_checkpointing_kwargs", "does nothing by itself", remedy))
    found += _precision(settings) + _graphs(settings)
    return found + _loading(settings) + _processes(settings) + _reporting(settings)


def _ranges(settings: Settings) -> list[Problem]:
    def steps_or_share(value: float) -> bool:
        return 0 < value < 1 or (value >= 1 and value == int(value))

    steps = (steps_or_share, "is neither a number of steps nor a share below 1", "10 is every ten steps")
    at_least_1 = (lambda v: v >= 1, "is not at least 1", "1 is the least")
    share = (lambda v: 0 <= v < 1, "is not in [0, 1)", "leave it out for the usual value")
    not_negative = (lambda v: v >= 0, "is below 0", "0 is the least")
    found = settings.out_of_range(
        per_device_train_batch_size=at_least_1,
        per_device_eval_batch_size=at_least_1,
        gradient_accumulation_steps=at_least_1,
        num_train_epochs=(lambda v: v > 0, "is not above 0", "3 is usual"),
        max_steps=(lambda v: v == -1 or v >= 1, "is not at least 1", "leave it out to train num_train_epochs"),
        learning_rate=(lambda v: v > 0, "is not above 0", "1e-4 is usual for lora, 1e-5 for full"),
        warmup_steps=not_negative,
        warmup_ratio=share,
        weight_decay=not_negative,
        adam_beta1=share,
        adam_beta2=share,
        adam_epsilon=not_negative,
        max_grad_norm=not_negative,
        label_smoothing_factor=share,
        neftune_noise_alpha=not_negative,
        eval_delay=not_negative,
        save_total_limit=at_least_1,
        ddp_timeout=(lambda v: v >= 1, "is not at least 1", "give a number of seconds"),
        ddp_bucket_cap_mb=at_least_1,
        dataloader_num_workers=not_negative,
        micro_batch_tokens=(lambda v: v == "auto" or (v.isdecimal() and int(v) > 0), "is no number", "16384, or auto"),
        seed=(lambda v: 0 <= v < 2**32, "is not in [0, 2**32)", "42 is usual"),  # what numpy takes
        data_seed=not_negative,
    )
    for name in ("logging", "eval", "save"):
        if settings.value(f"{name}_strategy") == "steps":
            found += settings.out_of_range(**{f"{name}_steps": steps})
    return found


def _precision(settings: Settings) -> list[Problem]:
    if settings.value("fp16") and settings.value("bf16"):
        return [settings.problem("fp16", "and bf16 exclude each other", "leave one of them out")]
    if not settings.value("pure_bf16"):
        return []
    found = []
    if settings.value("fp16"):
        found.append(settings.problem("pure_bf16", "and fp16 exclude each other", "leave one of them out"))
    if settings.value("deepspeed"):
        message = "is not built with deepspeed, which keeps float32 of what it divides"
        found.append(settings.problem("pure_bf16", message, "use bf16: true with deepspeed, or leave deepspeed out"))
    if settings.value("optim") in OPTIMIZERS and settings.value("optim") not in OF_PURE_BF16:
        remedy = f"choose one of {', '.join(OF_PURE_BF16)}, or bf16 in the place of pure_bf16"
        found.append(settings.problem("optim", "is not built for pure_bf16", remedy))
    return found


AGAINST_GRAPHS = {  # a setting that is not off, and what is said of it beside cuda_graphs
    "use_cpu": "and the run is on the CPU",
    "deepspeed": "and DeepSpeed, which divides the model, exclude each other",
    "pure_bf16": "and pure_bf16, which rounds gradients at random, exclude each other",
    "quantization_bit": "and quantized weights exclude each other",
    "gradient_checkpointing": "and gradient_checkpointing, which looks at random states, exclude each other",
    "neftune_noise_alpha": "and neftune_noise_alpha, whose noise is drawn anew in each pass, exclude each other",
    "lora_dropout": "and lora_dropout, which is drawn anew in each pass, exclude each other",
    "full_determinism": "and full_determinism, which launches kernels one by one, exclude each other",
}


def _graphs(settings: Settings) -> list[Problem]:
    """What a recorded pass cannot do, where one is asked for."""
    value = settings.value
    if not value("cuda_graphs"):
        return []
    found = [
        settings.problem("cuda_graphs", text, "leave it out") for name, text in AGAINST_GRAPHS.items() if value(name)
    ]
    if not (value("bf16") or value("fp16") or value("pure_bf16")):
        found.append(settings.problem("cuda_graphs", "is for models in 16 bits", "set bf16: true, or leave it out"))
    return found


def _processes(settings: Settings) -> list[Problem]:
    """Several processes, or a model that DeepSpeed divides among them."""
    found = _deepspeed(settings)
    if settings.value("ddp_backend") not in (None, "nccl", "gloo"):
        found.append(settings.problem("ddp_backend", "is of a device that burnish does not train on", "leave it out"))
    return found


def _deepspeed(settings: Settings) -> list[Problem]:
    """A file that is none. Numbers in it that contradict other settings are found by transformers, later."""
    config = settings.value("deepspeed")
    if not config:
        return []
    if isinstance(config, str) and not Path(config).is_file():
        remedy = f"looked for the file {Path(config).absolute()}; examples/deepspeed holds some"
        return [settings.problem("deepspeed", "is not there", remedy)]
    try:
        config = read_deepspeed(config)
    except ValueError as error:
        return [settings.problem("deepspeed", "is not JSON", f"correct it: {error}")]
    if found := wrong_in_deepspeed(settings, config):
        return found
    if find_spec("deepspeed") is None:
        remedy = "pip install 'burnish[deepspeed]'"
        return [settings.problem("deepspeed", "needs the package deepspeed, which is not here", remedy)]
    zero = config.get("zero_optimization")
    held = settings.value("quantization_bit") or settings.value("base_dtype")
    if held and isinstance(zero, dict) and zero.get("stage") == 3:
        remedy = "set deepspeed: examples/deepspeed/ds_z2_config.json, which divides the optimizer"
        return [settings.problem("deepspeed", "divides weights (stage 3), which quantized ones cannot be", remedy)]
    return []


def _optimizer(settings: Settings) -> list[Problem]:
    optim = settings.value("optim")
    if optim not in OPTIMIZERS:
        return [settings.problem("optim", "is not built", f"choose one of {', '.join(OPTIMIZERS)}")]
    if optim not in OF_TORCH and find_spec("bitsandbytes") is None:
        return [settings.problem("optim", "needs bitsandbytes, which is not here", "pip install 'burnish[quant]'")]
    return []


def _schedule(settings: Settings) -> list[Problem]:
    found = []
    if settings.value("warmup_ratio") and settings.value("warmup_steps"):
        found.append(settings.problem("warmup_ratio", "and warmup_steps exclude each other", "leave one of them out"))
    schedule, kwargs = settings.value("lr_scheduler_type"), settings.value("lr_scheduler_kwargs") or {}
    for group in NEEDS_KWARGS.get(schedule, ()):
        if not set(group) & set(kwargs) and not settings.is_faulty("lr_scheduler_kwargs"):
            found.append(
                settings.problem(
                    "lr_scheduler_type",
                    f"needs {' or '.join(group)}",
                    f'set lr_scheduler_kwargs: {{"{group[0]}": …}}',
                )
            )
    if kwargs and schedule in ("constant", "constant_with_warmup"):  # transformers passes them over without a word
        does_nothing = f"does nothing with lr_scheduler_type: {schedule}"
        found.append(settings.problem("lr_scheduler_kwargs", does_nothing, "leave it out"))
    return found


def _evaluation(settings: Settings) -> list[Problem]:
    """Evaluation with nothing to evaluate on, and what needs evaluation without it."""
    value, found = settings.value, []
    if settings.is_faulty("val_size", "eval_dataset", "eval_strategy"):
        return []
    strategy, has_rows = value("eval_strategy"), bool(value("eval_dataset") or value("val_size"))
    asks = {"eval_strategy": strategy != "no", "do_eval": value("do_eval"), "eval_on_start": value("eval_on_start")}
    asking = [name for name, asked in asks.items() if asked]
    if asking and not has_rows:
        found.append(settings.problem(asking[0], "has no rows to evaluate on", "set val_size: 0.1, or eval_dataset"))
    needs = {
        "load_best_model_at_end": value("load_best_model_at_end"),
        "early_stopping_steps": value("early_stopping_steps"),
        "lr_scheduler_type": value("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"),
        "save_strategy": value("save_strategy") == "best",
    }
    if strategy != "no" and any(needs.values()):
        found += _metric_is_measured(settings)
    if strategy == "no":
        for name in (name for name, needed in needs.items() if needed):
            found.append(settings.problem(name, "needs evaluation while training", "set eval_strategy: steps or epoch"))
    return found


def _metric_is_measured(settings: Settings) -> list[Problem]:
    """Each of several sets has measures of its own name only; accuracy is counted where it is asked for."""
    metric = settings.value("metric_for_best_model") or "loss"
    named = "metric_for_best_model"
    if metric.removeprefix("eval_").endswith("accuracy") and not settings.value("compute_accuracy"):
        return [settings.problem(named, "is not measured", "set compute_accuracy: true")]
    sets = [Path(name).stem for name in settings.value("eval_dataset") or ()]
    if not settings.value("eval_on_each_dataset") or any(metric.removeprefix("eval_").startswith(s) for s in sets):
        return []
    remedy = f"with eval_on_each_dataset it is of one set: {', '.join(f'{name}_loss' for name in sets)}"
    return [settings.problem(named, "is not measured", remedy, value=metric)]


def _best_model(settings: Settings) -> list[Problem]:
    """The best checkpoint must have been evaluated: saving happens where evaluation does."""
    value = settings.value
    saving, evaluating = value("save_strategy"), value("eval_strategy")
    if not value("load_best_model_at_end") or evaluating == "no" or saving == "best":
        return []
    if settings.is_faulty("save_strategy", "eval_strategy", "save_steps", "eval_steps", "logging_steps"):
        return []
    if saving != evaluating:
        message = f"needs save_strategy and eval_strategy to be the same, not {saving} and {evaluating}"
        return [settings.problem("load_best_model_at_end", message, f"set save_strategy: {evaluating}")]
    if saving == "steps":
        every, evaluated = value("save_steps"), value("eval_steps") or value("logging_steps")
        whole = (every < 1) == (evaluated < 1) and abs(every / evaluated - round(every / evaluated)) < 1e-6
        if not whole or every < evaluated:
            message = f"needs save_steps ({every:g}) to be a multiple of eval_steps ({evaluated:g})"
            return [settings.problem("load_best_model_at_end", message, f"set save_steps: {evaluated:g}")]
    return []


def _reporting(settings: Settings) -> list[Problem]:
    found, names = [], settings.value("report_to") or []
    known = ("none", "all", *reporters()) if names != ["none"] else ("none",)
    for name in names:
        packages = PACKAGES_OF_REPORTERS.get(name, ())
        if name not in known:
            near = get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
            found.append(settings.problem("report_to", "is not something transformers reports to", remedy, name))
        elif packages and not any(find_spec(package) for package in packages):
            found.append(settings.problem("report_to", "is not installed", f"pip install {packages[0]}", name))
    return found


def _loading(settings: Settings) -> list[Problem]:
    found = []
    strategy = settings.value("train_sampling_strategy")
    if strategy == "batch_rebalance":
        remedy = "choose random, sequential or group_by_length"
        found.append(settings.problem("train_sampling_strategy", "is not built", remedy))
    elif strategy != "random" and settings.value("streaming"):
        remedy = "leave it out; a stream is shuffled within buffer_size rows"
        found.append(settings.problem("train_sampling_strategy", "needs all rows at hand, not a stream", remedy))
    checkpoint = settings.value("resume_from_checkpoint")
    is_named = checkpoint and checkpoint.lower() not in ("true", "yes", "1")
    if is_named and not os.path.isdir(os.path.expanduser(checkpoint)):
        remedy = "give a checkpoint-N folder, true for the newest in output_dir, or leave it out"
        found.append(settings.problem("resume_from_checkpoint", "is not there", remedy))
    if not settings.value("dataloader_num_workers"):
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if settings.value(name):
                found.append(settings.problem(name, "needs workers", "set dataloader_num_workers: 2, or leave it out"))
    if settings.value("include_num_input_tokens_seen") not in ("no", "all", "non_padding", "true", "false"):
        found.append(
            settings.problem(
                "include_num_input_tokens_seen", "is not one of no, all, non_padding", "choose one of these"
            )
        )
    return found
