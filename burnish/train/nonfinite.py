"""A loss or gradient that is not finite: noticed on the device, never applied, and traced to its rows and module.

transformers' Trainer hides such a step (`logging_nan_inf_filter`). Here the step's update is left out, every later one
too, and as soon as the device is asked anyway (the next log, save or evaluation; on the CPU at once) the run stops with
the weights from before the step, runs its rows again and says which of them, and which module first, gave the value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.model.compile import uncompiled
from burnish.types import Batch

NOT_AGAIN = "  run again, the same rows gave finite values (dropout or the device's own rounding)"


@dataclass(frozen=True)
class StepRecord:
    """What is needed to come back to the moment before an optimizer step."""

    step: int  # number of the step, counted from 1
    epoch: float  # before it
    scheduler: dict[str, Any]  # the learning rate's state before it
    batches: list[Batch]
    stream: dict[str, Any] | None = None  # where a stream stood before them


class FiniteGuard:
    """Remembers, on the device, the first step that was not finite. Asking (`first_bad`) waits for the device."""

    def __init__(self, device: torch.device):
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)
        self._records: list[StepRecord] = []

    def check(self, record: StepRecord, *values: Tensor) -> Tensor:
        """Note one step, perhaps again; → whether its update must be left out (a bool on the device)."""
        if not self._records or self._records[-1] is not record:
            self._records.append(record)
        finite = torch.stack([torch.isfinite(value) for value in values]).all()
        self._first_bad = torch.where(finite | self.bad, self._first_bad, record.step)
        self.bad = self.bad | ~finite
        return self.bad

    def first_bad(self) -> StepRecord | None:
        """The step to go back to, if any; forgets the good ones."""
        number = int(self._first_bad.item())
        records, self._records = self._records, []
        return next((record for record in records if record.step == number), None)


def diagnose(model: nn.Module, record: StepRecord, loss_of: Callable[[Batch], Tensor], device: torch.device) -> str:
    """Run the step's passes again, one by one, and describe what is not finite in them; "" if nothing is."""
    lines = []
    for batch in record.batches:
        with uncompiled():
            where = _first_fault(model, lambda batch=batch: loss_of(batch.to(device)))
        if where is not None:
            lines.append(f"  rows {', '.join(batch.places)}: {where}")
    model.zero_grad(set_to_none=True)
    return "\n".join(lines)


def _first_fault(model: nn.Module, loss_of: Callable[[], Tensor]) -> str | None:
    """The first module, in the order of computation, whose output or gradient is not finite."""
    faults: list[str] = []

    def forward_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not faults and not _finite(output):
                faults.append(f"the first value that is not finite comes out of {name} ({type(module).__name__})")

        return hook

    def backward_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            if not faults and not _finite(grad_input):
                faults.append(f"the first gradient that is not finite comes out of {name} ({type(module).__name__})")

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if name and next(m.children(), None) is None]
    handles = [m.register_forward_hook(forward_hook(name)) for name, m in leaves]
    handles += [m.register_full_backward_hook(backward_hook(name)) for name, m in leaves]
    try:
        loss = loss_of()
        if not faults and not torch.isfinite(loss):
            faults.append(f"the loss itself is {loss.item()}")
        if not faults:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")  # embeddings: ids have no gradient
                loss.backward()
            weights = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
            if weights and not faults:
                faults.append(f"the gradient of {weights[0]} is not finite")
    finally:
        for handle in handles:
            handle.remove()
    return faults[0] if faults else None


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(_finite(part) for part in value)
    if isinstance(value, dict):
        return all(_finite(part) for part in value.values())
    return True
