"""What a plan needs to know of a run, read from its settings: nothing else of them bears on memory or time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from burnish.errors import UserError
from burnish.plan.memory import Held
from burnish.plan.model import Asked
from burnish.plan.steps import Batching
from burnish.prepare import why_padded
from burnish.train.checks import AGAINST_GRAPHS
from burnish.train.passes import AUTO
from burnish.train.zero import read_deepspeed

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings

AUTO_STAGE = 2  # what accelerate makes of "auto"


@dataclass(frozen=True)
class Run:
    """What the settings ask for, as far as memory and time depend on it."""

    asked: Asked
    held: Held
    batching: Batching
    cutoff_len: int
    most_tokens: int | None  # None: a batch is a pass
    recompute: bool | None  # None: as memory needs
    record: bool | None = False  # passes as CUDA graphs; None: where it pays

    @classmethod
    def of(cls, settings: Settings, ranks: int) -> Run:
        """Raises UserError for attention that holds lengths × lengths."""
        if settings.model.flash_attn in ("disabled", "off"):
            message = "is not planned: its memory is the square of lengths"
            raise UserError(settings.problem("flash_attn", message, "leave it out"))
        stage, offloaded = _zero(settings.value("deepspeed"))
        padded = bool(why_padded(settings))
        dtype = _dtype(settings)
        wanted = settings.value("torch_compile") is not False
        bits = settings.model.quantization_bit
        asked_tokens = settings.value("micro_batch_tokens")
        packs = settings.data.packing and settings.finetuning.stage == "sft"
        return cls(
            asked=Asked(
                settings.model,
                settings.finetuning,
                dtype,
                compiled=wanted and not (stage or padded or bits),
            ),
            held=Held(
                settings.value("optim"),
                settings.finetuning.pure_bf16 and dtype == torch.bfloat16,
                stage,
                ranks,
                offloaded,
            ),
            batching=Batching(
                batch_size=settings.value("per_device_train_batch_size"),
                accumulation=settings.value("gradient_accumulation_steps"),
                pack_to=settings.data.cutoff_len if packs else None,
                padded=padded,
                ranks=ranks,
                seed=settings.value("seed") if settings.value("data_seed") is None else settings.value("data_seed"),
                strategy=settings.value("train_sampling_strategy"),
                max_steps=settings.value("max_steps"),
                epochs=settings.value("num_train_epochs"),
            ),
            cutoff_len=settings.data.cutoff_len,
            most_tokens=None if stage or padded else AUTO if asked_tokens == "auto" else int(asked_tokens),
            recompute=settings.value("gradient_checkpointing"),
            record=_may_record(settings, dtype, stage, padded),
        )


def _dtype(settings: Settings) -> torch.dtype:
    if (
        settings.value("bf16")
        or settings.finetuning.pure_bf16
        or (settings.value("fp16") and settings.value("deepspeed"))
    ):
        return torch.bfloat16
    return torch.float16 if settings.value("fp16") else torch.float32


def _may_record(settings: Settings, dtype: torch.dtype, stage: int, padded: bool) -> bool | None:
    """What `cuda_graphs` says, where nothing that training would name stands against it; the plan is for a GPU."""
    against = any(settings.value(name) for name in AGAINST_GRAPHS.keys() - {"use_cpu", "deepspeed"})
    return False if dtype.itemsize > 2 or stage or padded or against else settings.value("cuda_graphs")


def _zero(deepspeed: Any) -> tuple[int, bool]:
    """(stage, whether the optimizer is on the CPU) of DeepSpeed's settings: a mapping, or the path of one."""
    zero = read_deepspeed(deepspeed)["zero_optimization"] or {} if deepspeed else {}
    stage, offload = zero.get("stage", 0), zero.get("offload_optimizer") or {}
    return AUTO_STAGE if stage == "auto" else int(stage), offload.get("device", "none") in ("cpu", "nvme")
