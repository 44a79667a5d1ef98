"""What the processes of one run tell each other, and how their gradients are added up.

Counts and decisions travel between CPUs (gloo), so that nobody waits for a device; losses and gradients travel between
the devices (NCCL, or gloo on the CPU). A single process asks nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _abort_process_group
from torch.distributed.rendezvous import rendezvous

from burnish import ranks
from burnish.errors import Problem, RunStopped, UserError

MIB = 2**20
BUCKET_MIB = 25  # gradients travel in pieces of about this size (one that is larger is one), as in torch's DDP

T = TypeVar("T")

# The group between CPUs where the devices have one of their own. Held here alone, for `part` to let go of: a gloo group
# that outlives `destroy_process_group` ends the process with an abort at its exit.
_cpus: list[Any] = []


def _of_cpus() -> Any:
    """None is the group of all, which is over gloo itself where there is no other."""
    return _cpus[0] if _cpus else None


def meet(backend: str, timeout: timedelta) -> dist.Store:
    """The groups of all processes that a launcher started; → the store through which they found each other."""
    try:
        store, rank, count = next(rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        message = f"is no port at which processes can meet ({str(error).splitlines()[0]})"
        remedy = "another run may have it: give the launcher another --master_port"
        raise UserError(Problem("MASTER_PORT", "", ranks.master_port(), message, remedy)) from error
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    if count > 1 and backend != "gloo":
        _cpus.append(dist.new_group(backend="gloo", timeout=timeout))
    return store


def part(*, in_peace: bool = True) -> None:
    """The end of all groups: of all processes at once, or else of this one alone.

    Not in peace NCCL's goodbye would wait for peers, and they wait in a collective.
    """
    if in_peace:
        Peers().wait()
    _cpus.clear()
    if in_peace:
        dist.destroy_process_group()
    else:
        _abort_process_group()


class Peers:
    """What the processes of a run tell each other. All of them must call the same method at the same point."""

    def __init__(self) -> None:
        self.count = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """Each number summed over the processes; no device is asked."""
        if self.count == 1:
            return list(numbers)
        together = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(together, group=_of_cpus())
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
        dist.all_gather_object(items, item, group=_of_cpus())
        return items

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier(group=_of_cpus())

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives in the main process, in all of them; a mistake that it finds there ends them all."""
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (UserError, RunStopped) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=_of_cpus())
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def share_weights(weights: Sequence[Tensor], peers: Peers) -> None:
    """Every process begins with the main one's weights: new ones are drawn at random, and nothing else would say that
    all of them drew the same."""
    if peers.count > 1:
        for weight in weights:
            dist.broadcast(weight.data, src=0)


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
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(gradients: Sequence[Tensor], size: float) -> Iterator[list[Tensor]]:
    """Lists of gradients of one dtype, of about `size` bytes; one that is as large comes by itself, before smaller ones
    near it, for it need not be copied."""
    bucket: list[Tensor] = []
    filled = 0
    for gradient in gradients:
        own = gradient.numel() * gradient.element_size()
        if own >= size:
            yield [gradient]
            continue
        if bucket and (filled >= size or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(gradient)
        filled += own
    if bucket:
        yield bucket
