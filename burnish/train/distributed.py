"""Several processes that train one model: how they meet, what they tell each other, how their gradients are added.

One idea: every process computes its share of each optimizer step's rows, divides by the *whole* step's number of
trained tokens, and the gradients are added up. So a step over N processes is the step of one process with N times the
batch, to rounding. Counts and decisions travel between CPUs (gloo) and nobody waits for a device; losses and gradients
travel between the devices (NCCL, or gloo on the CPU).

Plain data parallelism is here; DeepSpeed is in deepspeed.py. More machines are the launcher's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from burnish import ranks
from burnish.errors import Problem, RunStopped, UserError

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings

MIB = 2**20
BUCKET_MIB = 25  # gradients travel in pieces of about this size, as in torch's DistributedDataParallel

T = TypeVar("T")


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
        dist.destroy_process_group()


def _choose_gpu() -> None:
    if ranks.local_rank() >= torch.cuda.device_count():
        message = f"is the place of this process, and there are {torch.cuda.device_count()} GPUs here"
        raise UserError(Problem("LOCAL_RANK", "", ranks.local_rank(), message, "start one process a GPU"))
    torch.cuda.set_device(ranks.local_rank())


class Peers:
    """What the processes of a run tell each other. All of them must call the same method at the same point."""

    def __init__(self) -> None:
        self.count = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._of_cpus: Any = None
        if self.count > 1:
            self._of_cpus = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """Each number summed over the processes; no device is asked."""
        if self.count == 1:
            return list(numbers)
        together = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(together, group=self._of_cpus)
        return together.tolist()

    def add(self, tensor: Tensor) -> Tensor:
        """`tensor`, on the device, becomes the sum of all processes' (in place)."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item: T) -> list[T]:
        """Every process's item, in the order of ranks."""
        if self.count == 1:
            return [item]
        items: list[Any] = [None] * self.count
        dist.all_gather_object(items, item, group=self._of_cpus)
        return items

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier(group=self._of_cpus)

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives in the main process, in all of them; what it raises there ends them all."""
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (UserError, RunStopped) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._of_cpus)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def add_gradients(weights: Sequence[nn.Parameter], peers: Peers, bucket_mib: float | None = None) -> None:
    """The gradient of every weight becomes the sum of all processes' gradients.

    A weight that has a gradient in one process has one in all of them (zero where nothing led there), and one that has
    none anywhere stays without: the optimizer passes it by, as it does in a single process.
    """
    if peers.count == 1:
        return
    has_gradient = peers.sums([weight.grad is not None for weight in weights])
    moving = [weight for weight, count in zip(weights, has_gradient, strict=True) if count]
    for weight in moving:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in moving if weight.grad is not None]
    for bucket in _buckets(gradients, (bucket_mib or BUCKET_MIB) * MIB):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(gradients: Sequence[Tensor], size: float) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype, each list of about `size` bytes."""
    bucket: list[Tensor] = []
    filled = 0
    for gradient in gradients:
        if bucket and (filled >= size or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(gradient)
        filled += gradient.numel() * gradient.element_size()
    if bucket:
        yield bucket
