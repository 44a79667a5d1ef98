"""DeepSpeed ZeRO 1 to 3: weights, gradients and optimizer state divided among the processes.

One idea: DeepSpeed divides and gathers, burnish decides. Loss, counts, schedule, optimizer and what is saved are those
of every other run; a user's JSON says the stage, the offloading and the sizes of buffers, and its `auto` values are
filled from the arguments by transformers (`HfTrainerDeepSpeedConfig`). Stage 0 divides nothing: it is plain data
parallelism and goes through distributed.py.

ZeRO: Rajbhandari et al., arXiv 1910.02054.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish import console
from burnish.errors import Problem, UserError
from burnish.model.head import CausalLoss, unwrap
from burnish.train.optimizer import Outcome, create_optimizer
from burnish.types import Batch

SAME_OPTIMIZERS = ("adam", "adamw")  # what a JSON may name: burnish's own `optim` does it
TAG = "zero"  # the folder inside checkpoint-N that holds every process's part


def take_over(backend: str, on_cuda: bool) -> None:
    """DeepSpeed takes over the process group that is there. On a CPU it would compile an all-reduce through shared
    memory first (more than a minute), which gives the same sums: gloo does them."""
    if not on_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that it looks for
        import deepspeed

        # By its name: as an attribute `deepspeed.comm.torch` is torch itself.
        of_torch: Any = importlib.import_module("deepspeed.comm.torch")
    if not on_cuda:
        of_torch.build_shm_op = lambda: None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch 2.13 has new names for two operations that DeepSpeed 0.19 calls by their old ones.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


class ZeroUpdate:
    """The optimizer of a run under ZeRO: the same four moments as `optimizer.LocalUpdate`."""

    def __init__(self, objective: CausalLoss, args: Any, *, max_steps: int, loraplus_lr_ratio: float | None = None):
        import deepspeed

        self.weights = {name: p for name, p in objective.model.named_parameters() if p.requires_grad}
        self.optimizer = create_optimizer(args, self.weights, loraplus_lr_ratio=loraplus_lr_ratio)
        config = _finished_config(args, unwrap(objective.model), max_steps)
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            self.engine: Any = deepspeed.initialize(model=objective, optimizer=self.optimizer, config=config)[0]
        self._processes = torch.distributed.get_world_size()
        self.scale = None  # fp16 computes in bf16 under ZeRO

    def forward(self, batch: Batch) -> Tensor:
        return self.engine(batch).loss

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """ZeRO averages over the processes where burnish adds up; the factor undoes that, exactly for powers of two."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self._processes, scale_wrt_gas=False)

    def gather_gradients(self, max_norm: float) -> None:
        """Has happened in the backward pass; the clipping is part of `step`."""

    def step(self, check: Callable[..., Tensor], loss: Tensor) -> Outcome:
        """One step of the engine; ZeRO itself leaves it out where the norm of the gradients is not finite."""
        must_not = check(loss)
        if must_not.item():
            return Outcome(False, must_not, torch.full_like(loss, float("nan")))
        self.engine.step()
        norm = torch.full_like(loss, float(self.engine.get_global_grad_norm()))
        return Outcome(not self.engine.optimizer.overflow, check(norm), norm)

    def zero_grad(self) -> None:
        self.engine.optimizer.zero_grad(set_to_none=True)

    def settle(self) -> None:
        """ZeRO-3 fetches weights ahead for a backward pass, which an evaluation does not have: those would still be
        under way where a checkpoint gathers them."""
        self.engine.empty_partition_cache()

    def release(self) -> None:
        self.engine.destroy()

    def save(self, folder: Path) -> None:
        """Every process's part of the optimizer and of the trained weights, in `folder/zero`."""
        with redirect_stdout(StringIO()):
            self.engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        if not (folder / TAG).is_dir():
            remedy = "begin anew from it with --model_name_or_path or --adapter_name_or_path"
            raise UserError(Problem(str(folder), "", None, "was not written under ZeRO and cannot be resumed", remedy))
        with redirect_stdout(StringIO()):
            self.engine.load_checkpoint(str(folder), load_module_strict=False, load_lr_scheduler_states=False)


def _finished_config(args: Any, model: Any, max_steps: int) -> dict[str, Any]:
    """The user's JSON with every `auto` filled in, and with what burnish does itself taken out of it."""
    whole = args.hf_deepspeed_config
    try:
        whole.trainer_config_finalize(args, model, max_steps)
    except ValueError as error:
        remedy = "set these to auto, or to what the arguments say"
        raise UserError(Problem("--deepspeed", "deepspeed", None, str(error).strip(), remedy)) from error
    config = dict(whole.config)
    optimizer = config.pop("optimizer", None)
    if optimizer and str(optimizer.get("type", "AdamW")).lower() not in SAME_OPTIMIZERS:
        remedy = "leave it out of the JSON and name one with --optim"
        raise UserError(Problem("--deepspeed", "optimizer", optimizer.get("type"), "is not built under ZeRO", remedy))
    if config.pop("scheduler", None):
        console.warn("the schedule in deepspeed's JSON is not used: lr_scheduler_type and warmup_steps say it")
    config["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW steps on the CPU where state is offloaded
    config["zero_allow_untested_optimizer"] = True
    config["gradient_accumulation_steps"] = 1  # where a step ends is said before each pass
    config["train_batch_size"] = args.world_size * args.per_device_train_batch_size
    config.setdefault("steps_per_print", 2**31)
    if config.get("bf16", {}).get("enabled"):
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        config["bf16"].setdefault("check_grad_overflow", True)
    return config
