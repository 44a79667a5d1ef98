"""What stands around every request: who may come in, what is counted, the one line that is printed. No prompt is."""

from __future__ import annotations

import hmac
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from burnish import console
from burnish.serve.fields import Refused
from burnish.serve.wire import ClientLeft, as_refused, refusal

LEFT = 499  # what nginx writes for a client that went away; nobody receives it
QUIET = ("/health", "/metrics")  # asked every few seconds by machines
OF_METRICS = "text/plain; version=0.0.4; charset=utf-8"  # content type


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
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._key.encode()):
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


class Metrics:
    """What /metrics tells, in Prometheus's text format.

    https://prometheus.io/docs/instrumenting/exposition_formats/
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._prompt_tokens = self._generated_tokens = 0

    def count(self, path: str, status: int, seconds: float, prompt_tokens: int, generated_tokens: int) -> None:
        """One request that is over. `path` is one of few: each is a series of its own."""
        self._requests[path, status] += 1
        self._seconds[path] += seconds
        self._prompt_tokens += prompt_tokens
        self._generated_tokens += generated_tokens

    def text(self, waiting: int) -> str:
        return "".join(f"{line}\n" for line in self._lines(waiting))

    def _lines(self, waiting: int) -> Iterator[str]:
        yield from _head("burnish_requests_total", "counter", "Requests that are over, by path and HTTP status.")
        for (path, status), number in sorted(self._requests.items()):
            yield f'burnish_requests_total{{path="{path}",status="{status}"}} {number}'
        yield from _head("burnish_request_seconds", "summary", "Seconds from a request's head to its answer's end.")
        for path, seconds in sorted(self._seconds.items()):
            times = sum(number for (of_path, _), number in self._requests.items() if of_path == path)
            yield f'burnish_request_seconds_sum{{path="{path}"}} {seconds:.6f}'
            yield f'burnish_request_seconds_count{{path="{path}"}} {times}'
        for name, kind, help_text, value in (
            ("burnish_prompt_tokens_total", "counter", "Tokens of prompts.", self._prompt_tokens),
            ("burnish_generated_tokens_total", "counter", "Tokens of answers.", self._generated_tokens),
            ("burnish_requests_in_flight", "gauge", "Requests that are being answered or wait.", self.in_flight),
            ("burnish_answers_waiting", "gauge", "Answers that wait for their turn on the model.", waiting),
        ):
            yield from _head(name, kind, help_text)
            yield f"{name} {value}"


def _head(name: str, kind: str, help_text: str) -> Iterator[str]:
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"
