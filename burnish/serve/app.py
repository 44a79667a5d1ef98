"""The HTTP application: from a request to a prompt, to the line before the engine, and back as JSON or as events.

It reads top to bottom as a request goes: `Api.chat` → `_prompt` → `_reply` → `_parts`. What OpenAI's JSON looks like is
known to requests.py and replies.py alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from burnish.chat.template import CannotRender, ChatTemplate
from burnish.data.encode import DocumentFrame
from burnish.generate.config import draws
from burnish.generate.engine import Engine
from burnish.generate.stream import Piece
from burnish.generate.vocabulary import TokenTexts
from burnish.serve import replies, requests
from burnish.serve.answer import ChatReader, Part, TextReader, special_tokens
from burnish.serve.dispatch import Dispatcher
from burnish.serve.door import OF_METRICS, Door, Metrics, Tally
from burnish.serve.fields import Refused
from burnish.serve.wire import EventStream, json_response, no_such_route, read_body, while_connected

EVERYBODY = {"allow_origins": ["*"], "allow_methods": ["*"], "allow_headers": ["*"], "allow_credentials": True}

T = TypeVar("T")


class Reader(Protocol):
    def read(self, piece: Piece) -> Part: ...


@dataclass(frozen=True)
class Served:
    """What is served. `template_for` makes the chat template anew, thinking or not."""

    name: str
    engine: Engine
    template_for: Callable[[bool], ChatTemplate]
    split_special_tokens: bool = False
    key: str | None = None


@dataclass(frozen=True)
class Plan:
    """An answer that is to be made: n choices for each prompt, how each is read, and how all are written."""

    request: requests.Request
    prompts: list[list[int]]
    overrides: dict[str, Any]  # fields of GeneratingArguments
    reader: Callable[[int, list[int]], Reader]
    writer: replies.Writer


class Api:
    """`Api(served).asgi` is the application."""

    def __init__(self, served: Served):
        self.served, self.engine = served, served.engine
        self.dispatcher = Dispatcher(served.engine)
        self.metrics = Metrics()
        self._aside = ThreadPoolExecutor(1, "tokenize")  # a long prompt must not hold up the event loop
        tokenizer = self.engine.tokenizer
        self._frame = DocumentFrame.of(tokenizer, split_special_tokens=served.split_special_tokens)
        self._left_out = special_tokens(tokenizer) if self.engine.generating.skip_special_tokens else None
        self._texts = TokenTexts(tokenizer)
        self._templates: dict[bool, ChatTemplate] = {}
        self._created = int(time.time())
        self.asgi = self._application()

    def _application(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
        ]
        paths = frozenset(route.path for route in routes)
        door = Middleware(Door, metrics=self.metrics, key=self.served.key, paths=paths)
        application = Starlette(
            routes=routes,
            middleware=[Middleware(CORSMiddleware, **EVERYBODY), door],
            exception_handlers={HTTPException: no_such_route},
        )
        application.router.redirect_slashes = False
        return application

    # ---- endpoints ----

    async def chat(self, http: Request) -> ASGIApp:
        request, conversation = requests.read_chat(await read_body(http))
        template, prompt = await self._off_loop(self._prompt, conversation)

        def reader(index: int, prompt: list[int]) -> Reader:
            opened = self.engine.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
            calls = bool(conversation.tools)
            return ChatReader(index, template, self._left_out, opened=opened, calls=calls)

        # special tokens come too: some models mark thoughts and calls with them; the reader leaves them out
        overrides = self._overrides(request) | {"skip_special_tokens": False}
        writer = replies.ChatWriter(request.model or self.served.name, request, self._texts)
        return await self._reply(http, Plan(request, [prompt], overrides, reader, writer))

    async def complete(self, http: Request) -> ASGIApp:
        request, given = requests.read_completion(await read_body(http))
        prompts = [await self._off_loop(self._ids, prompt) for prompt in given]
        overrides = self._overrides(request)
        own = self.engine.generating
        if request.max_tokens is None and own.max_new_tokens is None and own.max_length is None:
            overrides["max_new_tokens"] = requests.COMPLETION_TOKENS
        writer = replies.CompletionWriter(request.model or self.served.name, request, self._texts)
        return await self._reply(http, Plan(request, prompts, overrides, lambda i, _: TextReader(i), writer))

    async def tokenize(self, http: Request) -> Response:
        asked = requests.read_tokenize(await read_body(http))
        if isinstance(asked, requests.Conversation):
            _, ids = await self._off_loop(self._prompt, asked)
        else:
            ids = await self._off_loop(self._ids, asked)
        return json_response(replies.tokens(ids, self.engine.max_positions))

    async def models(self, http: Request) -> Response:
        return json_response(replies.models(self.served.name, self._created))

    async def model(self, http: Request) -> Response:
        name = http.path_params["name"]
        if name != self.served.name:
            message = f"There is no model {name[:80]!r}; the one that is served is {self.served.name!r}."
            raise Refused(message, "model", "model_not_found", 404)
        return json_response(replies.model(name, self._created))

    async def health(self, http: Request) -> Response:
        self.dispatcher.check()
        return json_response({"status": "ok"})

    async def show_metrics(self, http: Request) -> Response:
        headers = {"content-type": OF_METRICS}
        return Response(self.metrics.text(self.dispatcher.num_waiting), headers=headers)

    # ---- from a request to a prompt ----

    def _prompt(self, asked: requests.Conversation) -> tuple[ChatTemplate, list[int]]:
        template = self._template(asked.enable_thinking)
        try:
            self._check_calls(template, asked)
            return template, template.prompt(asked.messages, asked.tools or None)
        except CannotRender as error:
            raise Refused(f"The conversation cannot be asked: {error}.", "messages", "invalid_value") from error

    def _template(self, enable_thinking: bool | None) -> ChatTemplate:
        if enable_thinking is None:
            return self.engine.template
        name = "chat_template_kwargs.enable_thinking"
        if "enable_thinking" not in self.engine.template.jinja:
            message = f"'{name}' changes nothing: the model's chat template does not know it."
            raise Refused(message, name, "unsupported_parameter")
        if enable_thinking not in self._templates:
            self._templates[enable_thinking] = self.served.template_for(enable_thinking)
        return self._templates[enable_thinking]

    def _check_calls(self, template: ChatTemplate, asked: requests.Conversation) -> None:
        """A template that knows nothing of tools or of calls may leave them out without a word.

        That a name is in the text is not enough: the conversation may hold it, and a call's is that of a tool.
        """
        calls = [call for message in asked.messages for call in message.get("tool_calls", ())]
        if not (asked.tools or calls):
            return
        text = template.prompt_text(asked.messages, asked.tools or None)
        takes_tools = text != _text_without_tools(template, asked)
        both = (("tools", asked.tools, takes_tools), ("messages", calls, template.writes_calls))
        for param, named, has_place in both:
            if named and not (has_place and all(each["function"]["name"] in text for each in named)):
                message = f"'{param}' cannot be sent: the model's chat template has no place for tools and their calls."
                raise Refused(message, param, "unsupported_parameter")

    def _ids(self, prompt: str | list[int]) -> list[int]:
        """A text begins as a document does in pre-training."""
        if isinstance(prompt, str):
            how = {"split_special_tokens": self._frame.split_special_tokens, "verbose": False}
            ids = self.engine.tokenizer(prompt, add_special_tokens=False, **how)["input_ids"]
            return [*self._frame.start, *ids]
        if (highest := max(prompt)) >= self.engine.vocabulary_size:
            raise Refused(
                f"'prompt' holds the id {highest}; the highest is {self.engine.vocabulary_size - 1}.", "prompt"
            )
        return prompt

    def _overrides(self, request: requests.Request) -> dict[str, Any]:
        """What the engine is asked otherwise than the server's own settings say.

        Where neither request, settings nor the model's generation config say how to draw, it is OpenAI's way: from all
        tokens at temperature 1.
        """
        own, base, asked = self.engine.model.generation_config, self.engine.generating, dict(request.sampling)
        given = [*asked.values(), base.do_sample, base.temperature, base.top_p, base.top_k]
        given += [own.do_sample, own.temperature, own.top_p, own.top_k]
        if all(value is None for value in given):
            asked["do_sample"] = True
        elif asked and "do_sample" not in asked:
            asked["do_sample"] = None  # who sets how to draw wants to draw, whatever the server's settings say
        if asked.get("top_k", base.top_k) is None and own.top_k is None and draws(replace(base, **asked), own):
            asked["top_k"] = 0  # where transformers would take the 50 likeliest
        return asked if request.max_tokens is None else asked | {"max_new_tokens": request.max_tokens}

    # ---- from a prompt to a reply ----

    async def _reply(self, http: Request, plan: Plan) -> ASGIApp:
        self.dispatcher.check()
        for prompt in plan.prompts:
            self._check_room(prompt, plan)
        tally: Tally = http.scope["tally"]
        tally.prompt_tokens = sum(map(len, plan.prompts))
        if plan.request.stream:
            return EventStream(self._events(plan, tally))
        return json_response(await while_connected(http.receive, self._whole(plan, tally)))

    def _check_room(self, prompt: list[int], plan: Plan) -> None:
        """Raises where the answer can not be made as it is asked for, before anything is sent."""
        limit, wanted = self.engine.max_positions, plan.request.max_tokens
        if limit is not None and len(prompt) + (wanted or 1) > limit:
            more = f" and {wanted:,} more are asked for" if wanted else ""
            message = f"The prompt has {len(prompt):,} tokens{more}; the model has {limit:,} positions for both."
            raise Refused(message, "max_tokens" if wanted else None, "context_length_exceeded")
        self.engine.stream(prompt, plan.request.options, **plan.overrides).close()

    async def _parts(self, plan: Plan, tally: Tally) -> AsyncIterator[Part]:
        """Choice after choice; each begins with an empty part. In between others may have their turn."""
        for index, (prompt, number) in enumerate(product(plan.prompts, range(plan.request.n))):
            yield Part(index)
            reader, before = plan.reader(index, prompt), tally.generated_tokens
            answer = self.dispatcher.answer(prompt, plan.request.choice(number), **plan.overrides)
            async with aclosing(answer) as pieces:
                async for piece in pieces:
                    tally.generated_tokens = before + piece.num_generated
                    if part := reader.read(piece):
                        yield part

    async def _whole(self, plan: Plan, tally: Tally) -> dict[str, Any]:
        parts = [part async for part in self._parts(plan, tally)]
        return plan.writer.whole(parts, replies.Usage(tally.prompt_tokens, tally.generated_tokens))

    async def _events(self, plan: Plan, tally: Tally) -> AsyncGenerator[Any, None]:
        writer = plan.writer
        async for part in self._parts(plan, tally):
            for chunk in [writer.chunk(part)] if part else writer.opening(part.index):
                yield chunk
        for chunk in writer.closing(replies.Usage(tally.prompt_tokens, tally.generated_tokens)):
            yield chunk

    async def _off_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._aside, function, *arguments)


def _text_without_tools(template: ChatTemplate, asked: requests.Conversation) -> str | None:
    """None where the template takes no conversation without tools."""
    try:
        return template.prompt_text(asked.messages)
    except CannotRender:
        return None
