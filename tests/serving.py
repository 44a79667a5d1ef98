"""A real server on a free port for tests of the API, and a small model that writes what a test wants it to."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from openai import OpenAI
from small import small_model

from burnish.chat.template import load_template
from burnish.generate.arguments import GeneratingArguments
from burnish.generate.engine import Engine
from burnish.serve.app import Api, Served
from burnish.serve.server import Place, make_server, open_place


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


class Server:
    def __init__(self, api: Api, place: Place, uvicorn: Any):
        self.api, self.engine, self.url, self.uvicorn = api, api.engine, place.url, uvicorn
        self.port = place.socket.getsockname()[1]

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Without the openai client. A body of bytes is sent as it is, another as JSON."""
        content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, content, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Reply(response.status, response.headers, response.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, error.headers, error.read().decode())

    def client(self, key: str = "nobody looks at it") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def serving(
    engine: Engine, *, key: str | None = None, template: str | None = None, send_buffer: int = 0
) -> Iterator[Server]:
    """The server as `burnish api` runs it, in a thread of this process."""
    place = open_place({"API_PORT": "0", **({"API_KEY": key} if key else {})})
    if send_buffer:
        place.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # its connections inherit it
    template_for = partial(_thinking, engine.tokenizer, template)
    api = Api(Served("a-model", engine, template_for, key=place.address.key))
    server = make_server(api)
    place.listen()
    thread = threading.Thread(target=server.run, args=([place.socket],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Server(api, place, server)
    server.loop.call_soon_threadsafe(api.dispatcher.close)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def _thinking(tokenizer: Any, template: str | None, enable_thinking: bool) -> Any:
    return load_template(tokenizer, template, enable_thinking=enable_thinking)


def small_engine(tokenizer: Any, template: str | None = None, *, positions: int = 256, **generating: Any) -> Engine:
    """Random weights; greedy answers are some text or other, always the same."""
    model = small_model("llama", vocab_size=len(tokenizer), max_position_embeddings=positions)
    return Engine(model, tokenizer, load_template(tokenizer, template), GeneratingArguments(**generating))


class Script:
    """Makes a model write these ids one after the other, whatever it is asked, from the beginning of each prompt on."""

    def __init__(self, engine: Engine, ids: Sequence[int] = ()):
        self.ids = list(ids)
        self._step = 0
        engine.model.register_forward_pre_hook(self._count, with_kwargs=True)
        engine.model.register_forward_hook(self._write)

    def _count(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._step = 0 if kwargs["input_ids"].shape[1] > 1 else self._step + 1

    def _write(self, model: Any, args: Any, output: Any) -> None:
        if self._step < len(self.ids):
            output.logits[:, -1, self.ids[self._step]] = torch.finfo(output.logits.dtype).max / 2
