"""Several processes that train one model: how they meet, and how they end.

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

from burnish import console, ranks
from burnish.errors import Problem, RunStopped, UserError
from burnish.train.peers import meet, part

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings

END = "burnish/end"  # in the processes' store: who ended the run first, and with which status


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
    if backend == "nccl" and not on_cuda:
        raise UserError(settings.problem("ddp_backend", "needs GPUs, and the run is on the CPU", "leave it out"))
    store = meet(backend, timedelta(seconds=settings.value("ddp_timeout")))
    try:
        with _one_voice(store):
            if on_cuda:
                _choose_gpu()
            if uses_deepspeed:
                from burnish.train.deepspeed import take_over

                take_over(backend, on_cuda)
            yield
    except BaseException:
        part(in_peace=False)
        raise
    part()


def _choose_gpu() -> None:
    if ranks.local_rank() >= torch.cuda.device_count():
        message = f"is the place of this process, and there are {torch.cuda.device_count()} GPUs here"
        raise UserError(Problem("LOCAL_RANK", "", ranks.local_rank(), message, "start one process a GPU"))
    torch.cuda.set_device(ranks.local_rank())


@contextmanager
def _one_voice(store: dist.Store) -> Iterator[None]:
    """What ends a run is told once: by the process that met it first, whichever that is, and whose status all take.

    The others have met the same, or find that a peer is gone: their words would only hide the ones that matter.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        first, status = _first_to_end(store, _status_of(error))
        if not first:
            raise SystemExit(status) from error
        if not isinstance(error, (UserError, RunStopped)):
            raise
        console.fail(str(error))
        raise SystemExit(status) from error


def _first_to_end(store: dist.Store, status: int) -> tuple[bool, int]:
    try:
        rank, status_of_all = store.compare_set(END, "", f"{ranks.rank()} {status}").decode().split()
    except RuntimeError:  # the process that keeps the store has gone: it was the first
        return False, status
    return int(rank) == ranks.rank(), int(status_of_all)


def _status_of(error: BaseException) -> int:
    """As in cli.main."""
    if isinstance(error, RunStopped):
        return error.status
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
