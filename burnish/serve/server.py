"""`burnish api` as a process: where it listens, what it says at the start, how it ends.

Where it listens is looked at before the model is loaded, which may take minutes. starlette and uvicorn are an extra and
are imported late.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import ipaddress
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from burnish import console
from burnish.errors import Problem, UserError

if TYPE_CHECKING:
    import uvicorn

    from burnish.chat.template import ChatTemplate
    from burnish.generate.engine import Engine
    from burnish.serve.app import Api


@dataclass(frozen=True)
class Address:
    """What the environment says: API_HOST, API_PORT, API_KEY, API_MODEL_NAME."""

    host: str
    port: int
    key: str | None
    name: str | None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Address:
        port = environment.get("API_PORT") or "8000"
        if not (port.isdecimal() and int(port) < 2**16):
            problem = Problem(
                "the environment", "API_PORT", port, "is not a port", "8000 is usual, 0 takes any free one"
            )
            raise UserError(problem)
        host = environment.get("API_HOST") or "127.0.0.1"
        return cls(host, int(port), environment.get("API_KEY") or None, environment.get("API_MODEL_NAME") or None)


@dataclass(frozen=True)
class Place:
    """A socket that is bound, not yet listening: until the model is loaded, connections are refused."""

    address: Address
    socket: socket.socket

    @property
    def url(self) -> str:
        """As a program on this machine reaches it."""
        host, port = self.socket.getsockname()[:2]
        host = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def listen(self) -> None:
        try:
            self.socket.listen(2048)
        except OSError as error:
            raise _cannot_listen(self.address, error) from error


def open_place(environment: Mapping[str, str]) -> Place:
    """Raises UserError where it cannot be listened, or where what serves is not installed."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        message = f"needs {' and '.join(missing)}, not installed here"
        raise UserError(Problem("burnish api", "", None, message, "pip install 'burnish[api]'"))
    address = Address.of(environment)
    try:
        bound = _bound(address)
    except (OSError, UnicodeError) as error:  # the second for a name that can be none, such as "a..b"
        raise _cannot_listen(address, error) from error
    return Place(address, bound)


def _bound(address: Address) -> socket.socket:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, where = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a moment ago is free
        bound.bind(where)
    except OSError:
        bound.close()
        raise
    return bound


def serve(
    engine: Engine,
    place: Place,
    *,
    name: str,
    template_for: Callable[[bool], ChatTemplate],
    split_special_tokens: bool = False,
) -> None:
    """Answer until Ctrl-C or SIGTERM; what is being answered then ends at its next token.

    `template_for` makes the engine's chat template anew, thinking or not.
    """
    from burnish.serve.app import Api, Served

    served = Served(name, engine, template_for, split_special_tokens, place.address.key)
    server = make_server(Api(served))
    place.listen()
    for line in start_lines(name, place):
        console.say(line)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):  # uvicorn has ended by then, and raises the signal once more for its caller
            server.run(sockets=[place.socket])
    finally:
        signal.signal(signal.SIGTERM, before)
    console.say("ended")


def make_server(api: Api) -> uvicorn.Server:
    """uvicorn without its own words: the door prints a line for each request."""
    import uvicorn

    class Server(uvicorn.Server):
        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().serve(sockets)

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.loop.call_soon_threadsafe(api.dispatcher.close)  # else it would wait for every answer
            super().handle_exit(sig, frame)

    how: dict[str, Any] = {"lifespan": "off", "ws": "none", "log_config": None, "access_log": False}
    return Server(uvicorn.Config(api.asgi, server_header=False, **how))


def start_lines(name: str, place: Place) -> list[str]:
    """What is served, where, who can reach it, and a question to try."""
    host, has_key = place.address.host, place.address.key is not None
    if _is_loopback(host):
        reach = "this machine alone; API_HOST=0.0.0.0 opens it to others"
    else:
        reach = "other machines too" + ("" if has_key else "; anyone may ask: API_KEY=… asks for a key")
    key = ' -H "Authorization: Bearer $API_KEY"' if has_key else ""
    question = """'{"messages": [{"role": "user", "content": "Hello!"}]}'"""
    return [
        f"{name} is served at {place.url} ({reach})",
        f"curl {place.url}/v1/chat/completions{key} -d {question}",
        "Ctrl-C ends it",
    ]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _cannot_listen(address: Address, error: OSError | UnicodeError) -> UserError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        remedy = "end the program that has it, or give another port: API_PORT=8001"
        return UserError(Problem("burnish api", "API_PORT", address.port, "is in use", remedy))
    if number == errno.EACCES:
        return UserError(Problem("burnish api", "API_PORT", address.port, "is not allowed", "give one above 1023"))
    reason = error.strerror if isinstance(error, OSError) else "it is no name of a machine"
    message = f"cannot be listened on: {reason}"
    return UserError(Problem("burnish api", "API_HOST", address.host, message, "127.0.0.1 is this machine"))
