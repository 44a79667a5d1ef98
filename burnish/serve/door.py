"""What stands around every request: who may come in, what is counted, the one line that is printed. No prompt is."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import traceback
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from burnish import console
from burnish.errors import UserError
from burnish.serve import protocol
from burnish.serve.fields import Refused
from burnish.serve.metrics import Metrics

T = TypeVar("T")

LEFT = 499  # what nginx writes for a client that went away; nobody receives it
QUIET = ("/health", "/metrics")  # asked every few seconds by machines


class ClientLeft(Exception):
    """Nobody is there any more to be answered."""


@dataclass
class Tally:
    """What one request came to; endpoints fill it in."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    left: bool = False


class Door:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None, paths: frozenset[str]):
        self._app, self._metrics, self._key, self._paths = app, metrics, key, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin, status, tally = time.monotonic(), 0, Tally()
        scope["tally"] = tally

        async def note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self._metrics.in_flight += 1
        try:
            await self._answer(scope)(scope, receive, note)
        except ClientLeft:
            tally.left = True
        except Exception as error:
            refused = as_refused(error)
            if not status:
                await refusal(refused)(scope, receive, note)
        finally:
            self._metrics.in_flight -= 1
            self._account(scope, LEFT if tally.left or not status else status, time.monotonic() - begin, tally)

    def _answer(self, scope: Scope) -> ASGIApp:
        if self._key is None or scope["path"] == "/health":
            return self._app
        given = Request(scope).headers.get("authorization", "")
        scheme, _, key = given.partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key.encode()):
            return self._app
        message = "The API key is wrong." if given else "An API key is needed: Authorization: Bearer KEY."
        return refusal(Refused(message, None, "invalid_api_key", 401), {"www-authenticate": "Bearer"})

    def _account(self, scope: Scope, status: int, seconds: float, tally: Tally) -> None:
        path = scope["path"]
        known = path if path in self._paths else "/v1/models/{id}" if path.startswith("/v1/models/") else "other"
        self._metrics.count(known, status, seconds, tally.prompt_tokens, tally.generated_tokens)
        if path not in QUIET:
            tokens = f" {tally.prompt_tokens}+{tally.generated_tokens} tokens" if tally.prompt_tokens else ""
            with suppress(OSError, SystemExit):  # whoever read our lines may have gone; the server stays
                console.say(f"{scope['method']} {quote(path[:80])} {status}{tokens} {seconds:.2f} s")


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


def as_refused(error: Exception) -> Refused:
    """What a client hears of an error. One that nobody foresaw is told to whoever runs the server, in full."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UserError):
        return Refused(str(error))
    traceback.print_exception(error)
    return Refused(f"The server failed: {type(error).__name__}. Its output tells more.", None, "internal_error", 500)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(content), status, headers, "application/json")


def json_bytes(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def refusal(refused: Refused, headers: dict[str, str] | None = None) -> Response:
    return json_response(protocol.error(refused), refused.status, headers)
