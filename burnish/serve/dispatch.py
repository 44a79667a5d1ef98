"""The line before the one engine: whoever came first is answered first, one answer at a time.

An answer is made in a thread of its own and handed to the event loop piece by piece. It is made as fast as the device
makes it, however slowly its client reads, so that nobody who reads slowly holds the others up. Who goes away, waiting
or being answered, frees the place: what was waiting is taken out, what is being made ends at its next token.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from burnish.generate.arguments import RequestOptions
from burnish.generate.engine import Engine
from burnish.generate.stream import Piece
from burnish.serve.fields import Refused

LONGEST_LINE = 256  # choices that wait; more would only wait in vain


class Dispatcher:
    """To be used in one event loop."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._worker = ThreadPoolExecutor(1, "generate")  # its queue is the line
        self._open: dict[threading.Event, Callable[[BaseException], None]] = {}
        self.is_closing = False

    @property
    def num_waiting(self) -> int:
        return max(0, len(self._open) - 1)

    def check(self) -> None:
        """Raises Refused where nothing more is taken."""
        if self.is_closing:
            raise _shutting_down()
        if self.num_waiting >= LONGEST_LINE:
            raise Refused(f"{LONGEST_LINE} requests are waiting; try again later.", None, "overloaded", 503)

    async def answer(
        self, prompt: Sequence[int], options: RequestOptions, **overrides: Any
    ) -> AsyncGenerator[Piece, None]:
        """As Engine.stream; closing it, or cancelling the task that reads it, gives up the place."""
        if self.is_closing:
            raise _shutting_down()
        loop, stop = asyncio.get_running_loop(), threading.Event()
        pieces = self._engine.stream(prompt, options, stop=stop, **overrides)
        arrived: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

        def hand(item: Piece | BaseException) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, item)

        self._open[stop] = arrived.put_nowait
        place = self._worker.submit(_make, pieces, hand)
        try:
            while True:
                item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason:
                    return
        finally:
            del self._open[stop]
            stop.set()
            place.cancel()

    def close(self) -> None:
        """No answer is begun any more, and those that are being made end at their next token."""
        self.is_closing = True
        for stop, tell in self._open.items():
            stop.set()
            tell(_shutting_down())
        self._worker.shutdown(wait=False, cancel_futures=True)


def _make(pieces: Generator[Piece, None, None], hand: Callable[[Piece | BaseException], None]) -> None:
    try:
        with closing(pieces):
            for piece in pieces:
                hand(piece)
    except BaseException as error:
        hand(error)


def _shutting_down() -> Refused:
    return Refused("The server is shutting down.", None, "shutting_down", 503)
