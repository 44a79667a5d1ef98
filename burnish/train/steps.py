"""How many optimizer steps a run has: pure arithmetic, what transformers' Trainer counts on the same arguments."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Steps:
    """43 rows, batch 2, accumulation 2, 8 epochs: 22 batches an epoch, 11 steps an epoch, 88 steps."""

    batches_per_epoch: int
    per_epoch: int  # optimizer steps an epoch; the last may hold fewer batches
    epochs: int
    total: int
    accumulation: int

    def batches_in(self, step_of_epoch: int) -> int:
        """How many batches the step with this number (from 0) holds."""
        return min(self.accumulation, self.batches_per_epoch - step_of_epoch * self.accumulation)

    def position(self, global_step: int) -> tuple[int, int]:
        """After so many steps: (epoch, steps done in it)."""
        return divmod(global_step, self.per_epoch)


def count_steps(args: Any, batches_per_epoch: int | None) -> Steps:
    """`args`: transformers' names. `batches_per_epoch` None: a stream, whose length `max_steps` gives."""
    accumulation = args.gradient_accumulation_steps
    if batches_per_epoch is None:  # one endless epoch of exactly max_steps steps; a shorter stream is begun again
        return Steps(args.max_steps * accumulation, args.max_steps, sys.maxsize, args.max_steps, accumulation)
    per_epoch = max(math.ceil(batches_per_epoch / accumulation), 1)
    if args.max_steps > 0:
        return Steps(batches_per_epoch, per_epoch, math.ceil(args.max_steps / per_epoch), args.max_steps, accumulation)
    total = math.ceil(args.num_train_epochs * per_epoch)
    return Steps(batches_per_epoch, per_epoch, math.ceil(args.num_train_epochs), total, accumulation)
