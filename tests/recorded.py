"""A recorder that any machine has: it does the work anew where a CUDA graph would do what it recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Again:
    """`fail_at`: the number of the recording (counted from 1) that breaks down."""

    def __init__(self, fail_at: int = 0, error: Exception | None = None):
        self.fail_at, self.error = fail_at, error or RuntimeError("operation not permitted\nsecond line")
        self.recorded = self.replayed = self.rehearsed = self.forgotten = 0

    def rehearse(self, work: Callable[[], None]) -> None:
        self.rehearsed += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        if self.recorded == self.fail_at:
            raise self.error

        def replay() -> None:
            self.replayed += 1
            with torch.enable_grad():  # a replay is no business of autograd's; what stands in for it is
                work()

        return replay

    def forget(self) -> None:
        self.forgotten += 1
