"""The object that transformers' callbacks and habits know as TrainingArguments. Importing it imports torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments

from burnish import console
from burnish.environment import cpu_multiplies_bf16
from burnish.errors import Problem, UserError
from burnish.train.arguments import CHECKPOINTING, mirror


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """transformers' arguments, on the one device that a process trains on.

    Without an accelerator `use_cpu` is set: transformers would else refuse bf16, and start no process group.
    """

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Begin anew in an output_dir that holds a run."}
    )
    micro_batch_tokens: str = field(default="auto", metadata={"help": "The most tokens of a pass."})
    cuda_graphs: bool | None = None  # record passes and replay them; None: where it pays
    compile_blocks: bool | None = None  # torch_compile, of which transformers would set up accelerate

    def __post_init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            self.use_cpu = True
        elif accelerator.type != "cuda" and not self.use_cpu:
            message = "is a device that burnish does not train on"
            raise UserError(Problem("this machine", accelerator.type, None, message, "set use_cpu: true"))
        on_cpu = self.use_cpu or accelerator is None
        if self.fp16 and (on_cpu or self.deepspeed):
            self.fp16 = False
            self.bf16 = not on_cpu
            instead = "float32" if on_cpu else "bf16, which has the range of float32 and needs no scaling of the loss"
            console.warn(f"fp16 is not used: computing in {instead}")
        if self.bf16 and on_cpu and not cpu_multiplies_bf16():
            self.bf16 = False
            console.warn("this CPU has no bf16 instructions and would emulate them far slower: computing in float32")
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """Always 1: transformers would multiply the batch by every GPU it sees (torch's old DataParallel)."""
        return 1


def build(values: dict[str, Any], **more: Any) -> TrainingArguments:
    """From checked values, `TrainingFields` names. Raises UserError with what transformers still has against them."""
    values = {**values, **more}
    if folder := values.pop("logging_dir", None):
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)  # where transformers' callback looks
    if ratio := values.pop("warmup_ratio", None):
        values["warmup_steps"] = ratio  # below 1 it is a share
    values["compile_blocks"] = values.pop("torch_compile", None)
    if values.get("include_num_input_tokens_seen") in ("true", "false"):
        values["include_num_input_tokens_seen"] = values["include_num_input_tokens_seen"] == "true"
    if values.get("save_strategy") == "best":
        values.setdefault("metric_for_best_model", "loss")
    if str(values.get("metric_for_best_model")).endswith("perplexity"):
        values.setdefault("greater_is_better", False)  # transformers takes all but a loss for the larger the better
    if values.get("deepspeed") and not values.get("do_train"):
        del values["deepspeed"]
        console.warn("deepspeed is not used: it divides what is trained, and this run only evaluates")
    installed = {one.name for one in mirror()}
    for new, old in CHECKPOINTING.items():
        if new in installed and old in values:
            values[new] = values.pop(old)
    values = {name: value for name, value in values.items() if value is not None}
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            Problem("training", "", None, str(error).strip(), "change or leave out that setting")
        ) from error
