"""The loss of a float16 model, scaled so that its gradients neither vanish nor overflow.

float16 ends at 65,504 and knows nothing below 6e-8, where most gradients are. So the loss is multiplied before the
backward pass by a number that follows the run (Micikevicius et al., arXiv 1710.03740): it starts at 2^16, is halved
where a gradient overflows, and doubled after 2,000 steps that did not. A step that overflows is left out and counted.
The numbers are those of torch.amp.GradScaler; they live on the device, and nobody waits for them but a log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

START, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
LEAST = 1.0  # where the loss itself, unscaled, gives gradients that overflow, it is not the scale


def computes_in_float16(model: nn.Module) -> bool:
    return any(weight.dtype == torch.float16 for weight in model.parameters())


class LossScale:
    """What the loss is multiplied by, and how many steps have overflowed since the run began."""

    def __init__(self, device: torch.device):
        self.value = torch.full((), START, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)  # since the scale last changed
        self.overflows = torch.zeros((), dtype=torch.int64, device=device)

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """The gradients (float32, added up over passes and processes) of the loss as it is: exact, a power of two."""
        if gradients:
            torch._foreach_mul_(list(gradients), self.value.reciprocal())

    def update(self, overflow: Tensor) -> None:
        """After each step; `overflow` is a bool on the device."""
        self.overflows += overflow
        torch._amp_update_scale_(self.value, self._good_steps, overflow.float(), GROWTH, BACKOFF, INTERVAL)

    def or_nan(self) -> Tensor:
        """The scale; not a number where it has fallen so low that something else is wrong (see `LEAST`)."""
        return torch.where(self.value >= LEAST, self.value, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Under the names of torch's GradScaler; waits for the device."""
        return {
            "scale": self.value.item(),
            "_growth_tracker": int(self._good_steps.item()),
            "overflows": int(self.overflows.item()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run that stopped because the scale had fallen too low begins again with the least."""
        self.value.fill_(max(state["scale"], LEAST))
        self._good_steps.fill_(state["_growth_tracker"])
        self.overflows.fill_(state["overflows"])
