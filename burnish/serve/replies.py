"""OpenAI's JSON, replies: parts of answers become one whole reply or the chunks of a stream. Requests: requests.py."""

from __future__ import annotations

import json
import secrets
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from burnish.generate.stream import Token
from burnish.generate.vocabulary import TokenTexts
from burnish.serve.answer import Part
from burnish.serve.fields import Refused
from burnish.serve.requests import Request


@dataclass
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def json(self) -> dict[str, int]:
        return {**vars(self), "total_tokens": self.prompt_tokens + self.completion_tokens}


class Writer:
    """Parts → one whole reply, or the chunks of a stream."""

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, model: str, request: Request, texts: TokenTexts):
        self.request, self.texts = request, texts
        self._head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": model}

    def whole(self, parts: Sequence[Part], usage: Usage) -> dict[str, Any]:
        indices = dict.fromkeys(part.index for part in parts)
        choices = [self._choice(_joined([part for part in parts if part.index == index])) for index in indices]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage.json()}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What goes before the first part of a choice."""
        return []

    def chunk(self, part: Part) -> dict[str, Any]:
        return self._chunk([self._delta(part)])

    def closing(self, usage: Usage) -> list[dict[str, Any]]:
        return [{**self._chunk([]), "usage": usage.json()}] if self.request.include_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.request.include_usage else {}
        return {**self._head, "object": self.chunk_object, "choices": choices, **usage}

    def _ending(self, part: Part) -> dict[str, Any]:
        logprobs = None if self.request.options.top_logprobs is None else self._logprobs(part)
        return {"logprobs": logprobs, "finish_reason": part.finish_reason or None}

    def _choice(self, part: Part) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, part: Part) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, part: Part) -> dict[str, Any]:
        raise NotImplementedError


class ChatWriter(Writer):
    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return [self._chunk([{**choice, "finish_reason": None}])]

    def _choice(self, part: Part) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": part.text, "refusal": None}
        if part.reasoning:
            message["reasoning_content"] = part.reasoning
        if part.calls:
            message["content"] = part.text or None
            message["tool_calls"] = [_written_call(call) for call in part.calls]
        return {"index": part.index, "message": message, **self._ending(part)}

    def _delta(self, part: Part) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if part.text:
            delta["content"] = part.text
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        if part.calls:
            delta["tool_calls"] = [{"index": i, **_written_call(call)} for i, call in enumerate(part.calls)]
        return {"index": part.index, "delta": delta, **self._ending(part)}

    def _logprobs(self, part: Part) -> dict[str, Any]:
        return {"content": [self._logprob(token) for token in part.tokens], "refusal": None}

    def _logprob(self, token: Token) -> dict[str, Any]:
        likeliest = [self._token(token_id, logprob) for token_id, logprob in token.likeliest]
        return {**self._token(token.id, token.logprob), "top_logprobs": likeliest}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        known = self.texts.bytes_of(token_id)
        return {
            "token": self.texts.text_of(token_id),
            "logprob": _finite(logprob),
            "bytes": None if known is None else list(known),
        }


class CompletionWriter(Writer):
    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, request: Request, texts: TokenTexts):
        super().__init__(model, request, texts)
        self._written: dict[int, int] = {}  # characters of each choice

    def _choice(self, part: Part) -> dict[str, Any]:
        return {"index": part.index, "text": part.text, **self._ending(part)}

    _delta = _choice

    def _logprobs(self, part: Part) -> dict[str, Any]:
        texts = [self.texts.text_of(token.id) for token in part.tokens]
        offsets = []
        at = self._written.get(part.index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._written[part.index] = at
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in part.tokens],
            "top_logprobs": [
                {self.texts.text_of(token_id): _finite(logprob) for token_id, logprob in token.likeliest}
                for token in part.tokens
            ],
            "text_offset": offsets,
        }


def _joined(parts: Sequence[Part]) -> Part:
    return Part(
        parts[0].index,
        "".join(part.text for part in parts),
        "".join(part.reasoning for part in parts),
        tuple(call for part in parts for call in part.calls),
        tuple(token for part in parts for token in part.tokens),
        parts[-1].finish_reason,
    )


def _written_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    # nine letters and digits: the chat templates of Mistral's models take no other when the call is handed back
    call_id = "call" + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(5))
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI's API says −9999 for what cannot come."""
    return logprob if logprob is None else max(logprob, -9999.0)


def models(name: str, created: int) -> dict[str, Any]:
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "burnish"}


def tokens(ids: Sequence[int], max_length: int | None) -> dict[str, Any]:
    return {"count": len(ids), "max_model_len": max_length, "tokens": list(ids)}


def error(refused: Refused) -> dict[str, Any]:
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(refused), "type": kind, "param": refused.param, "code": refused.code}}
