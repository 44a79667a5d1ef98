"""What comes off a connection and goes onto it: a body as JSON, a reply as JSON or as events, a client that leaves.

Plain starlette: a body is read whatever its content type says, as `curl -d` sends none that fits.
"""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from burnish.errors import UserError
from burnish.serve import replies
from burnish.serve.fields import Refused

T = TypeVar("T")

MOST_BYTES = 32 * 2**20  # of a request
EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientLeft(Exception):
    """Nobody is there any more to be answered."""


async def read_body(http: Request) -> Any:
    """The JSON of the body."""
    received = bytearray()
    try:
        async for chunk in http.stream():
            received += chunk
            if len(received) > MOST_BYTES:
                raise Refused(f"The body has more than {MOST_BYTES:,} bytes.", None, "request_too_large", 413)
    except ClientDisconnect as error:
        raise ClientLeft from error
    try:
        content = json.loads(received)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text, though JSON can write it
    except (ValueError, RecursionError) as error:
        raise Refused(f"The body is not JSON: {error}.", None, "invalid_json") from error
    return content


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(content), status, headers, "application/json")


def json_bytes(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


class EventStream:
    """A response of server-sent events. What goes wrong once they flow is the last of them."""

    def __init__(self, events: AsyncGenerator[Any, None]):
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in EVENTS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async def event(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})

        async with aclosing(self._events) as events:
            try:
                async for content in events:
                    await event(json_bytes(content))
            except Exception as error:
                await event(json_bytes(replies.error(as_refused(error))), more=False)
            else:
                await event(b"[DONE]", more=False)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work comes to. It is cancelled when the client goes away, and ClientLeft is raised."""
    task, watch = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ---- refusals --------------------------------------------------------------------------------------------------------


def as_refused(error: Exception) -> Refused:
    """What a client hears of an error. One that nobody foresaw is told to whoever runs the server, in full."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UserError):
        return Refused(str(error))
    traceback.print_exception(error)
    return Refused(f"The server failed: {type(error).__name__}. Its output tells more.", None, "internal_error", 500)


def refusal(refused: Refused, headers: dict[str, str] | None = None) -> Response:
    return json_response(replies.error(refused), refused.status, headers)


async def no_such_route(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "There is nothing at", 405: f"{http.method} is not for"}.get(error.status_code, error.detail)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    refused = Refused(f"{words} {http.url.path[:80]}.", None, code, error.status_code)
    return refusal(refused, dict(error.headers or {}))
