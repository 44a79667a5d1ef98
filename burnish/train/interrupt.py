"""SIGTERM and Ctrl-C ask the loop to save and leave; they never cut an optimizer step in two."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from burnish import ranks
from burnish.console import warn

STOPPING = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 2.0  # DeepSpeed's launcher passes one Ctrl-C on up to three times


class Interrupt:
    """Within the block a first SIGTERM or Ctrl-C is only noted (`signal`); a second one acts as it always does.

    Under a launcher what comes right after the first is the same one again, passed on.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._heard: dict[signal.Signals, float] = {}  # when each came first
        self._process = os.getpid()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # handlers can only be set there
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        heard, now = signal.Signals(number), time.monotonic()
        if heard not in self._heard:
            self._heard[heard] = now
            if self.signal is None:
                self.signal = heard
                if os.getpid() == self._process:  # a data loader's workers were forked with this, and hear it too
                    warn(f"{heard.name}: finishing this step and saving a checkpoint; once more stops at once")
        elif not ranks.launched() or now > self._heard[heard] + ECHO_SECONDS:
            signal.signal(number, self._before[heard])
            signal.raise_signal(number)
