"""Several processes that train one model: how they meet.

One idea: every process computes its share of each optimizer step's rows, divides by the *whole* step's number of
trained tokens, and the gradients are added up (peers.py). So a step over N processes is the step of one process with N
times the batch, to rounding. DeepSpeed is in deepspeed.py; more machines are the launcher's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from burnish import ranks
from burnish.errors import Problem, UserError
from burnish.train.peers import part

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings


def stage_of(args: Any) -> int:
    """How much DeepSpeed divides, 0 to 3: 0 without it, or where its JSON asks for no division."""
    if not args.deepspeed:
        return 0
    return int(args.hf_deepspeed_config.get_value("zero_optimization.stage", 0))


@contextmanager
def together(settings: Settings) -> Iterator[None]:
    """Within the block the processes of this run know each other. One process by itself needs nothing."""
    uses_deepspeed = bool(settings.value("deepspeed"))
    if ranks.world_size() == 1 and not uses_deepspeed:
        yield
        return
    ranks.be_the_only_one()  # does nothing under a launcher
    on_cuda = torch.cuda.is_available() and not settings.value("use_cpu")
    backend = settings.value("ddp_backend") or ("nccl" if on_cuda else "gloo")
    if on_cuda:
        _choose_gpu()
    dist.init_process_group(backend, timeout=timedelta(seconds=settings.value("ddp_timeout")))
    try:
        if uses_deepspeed:
            from burnish.train.deepspeed import meet

            meet(backend, on_cuda)
        yield
    finally:
        part()


def _choose_gpu() -> None:
    if ranks.local_rank() >= torch.cuda.device_count():
        message = f"is the place of this process, and there are {torch.cuda.device_count()} GPUs here"
        raise UserError(Problem("LOCAL_RANK", "", ranks.local_rank(), message, "start one process a GPU"))
    torch.cuda.set_device(ranks.local_rank())
