"""SIGTERM and Ctrl-C ask the loop to save and leave; they never cut an optimizer step in two."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from burnish.console import warn

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Within the block a first SIGTERM or Ctrl-C is only noted (`signal`); a second one acts as it always does."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # handlers can only be set there
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._before[self.signal])
        warn(f"{self.signal.name}: finishing this step and saving a checkpoint; once more stops at once")
