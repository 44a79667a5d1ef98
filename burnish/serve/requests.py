"""OpenAI's JSON, requests: each becomes what the engine is asked. What is written back is in replies.py.

Every field is honoured, or changes nothing and says so in OpenAI's reference, or is refused by name.
https://platform.openai.com/docs/api-reference/chat, …/completions
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from burnish.generate.arguments import RequestOptions
from burnish.serve.fields import Fields
from burnish.types import Message

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 128, 4, 20
COLDEST = 1e-4  # logits over less than this may be no numbers any more; it is the likeliest token then
COMPLETION_TOKENS = 16  # of /v1/completions, where nobody says how many

_NO_EFFECT = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
_NOT_FORCED = "what the model writes is not forced into a form; 'auto' lets it call, 'none' does not"
# Fields that are known and not built: (the values that ask for what happens anyway, why not)
_NOT_BUILT: dict[str, tuple[tuple[Any, ...], str]] = {
    "response_format": (({"type": "text"},), "what the model writes is not forced into a form; ask for JSON in words"),
    "parallel_tool_calls": ((True,), "how many tools a model calls in one answer is its own choice"),
    "logit_bias": (({},), "it is not built"),
    "modalities": ((["text"],), "this model writes text"),
    "functions": (([],), "it is what 'tools' was called"),
    **dict.fromkeys(("audio", "prediction", "verbosity", "web_search_options"), ((), "it is not built")),
    "reasoning_effort": ((), "a model thinks or not: chat_template_kwargs.enable_thinking"),
    "function_call": ((), "it is what 'tool_choice' was called"),
}
_ROLES = {"developer": "system", "function": "tool"} | {role: role for role in ("system", "user", "assistant", "tool")}


@dataclass(frozen=True)
class Request:
    """What both endpoints can be asked for."""

    model: str | None
    n: int
    stream: bool
    include_usage: bool
    max_tokens: int | None
    options: RequestOptions
    sampling: dict[str, Any]  # fields of GeneratingArguments that the request gives

    def choice(self, number: int) -> RequestOptions:
        """Each choice of a seeded request draws otherwise, and the same the next time."""
        seed = self.options.seed
        return self.options if seed is None else replace(self.options, seed=(seed + number) % 2**63)


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    enable_thinking: bool | None = None


def read_chat(body: Any) -> tuple[Request, Conversation]:
    fields = Fields(body)
    conversation = _conversation(fields)
    logprobs, top = fields.take("logprobs", bool), fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if top is not None and not logprobs:
        raise fields.refused("top_logprobs", "needs logprobs: true")
    asked = fields.integer("max_completion_tokens", 1)
    max_tokens = fields.integer("max_tokens", 1)
    if asked and max_tokens and asked != max_tokens:
        raise fields.refused("max_tokens", f"is {max_tokens} and max_completion_tokens {asked}; give one of them")
    for name, (values, why) in _NOT_BUILT.items():
        fields.only(name, values, why)
    return _request(fields, (top or 0) if logprobs else None, asked or max_tokens), conversation


def read_completion(body: Any) -> tuple[Request, list[str | list[int]]]:
    """The request, and its prompts: texts or ids."""
    fields = Fields(body)
    prompts = _prompts(fields)
    logprobs, max_tokens = fields.integer("logprobs", 0, MOST_LOGPROBS), fields.integer("max_tokens", 1)
    fields.only("echo", [False], "a prompt is not repeated")
    fields.only("suffix", [""], "text is written at the end alone")
    fields.only("best_of", [1], "as many choices are made as are given back: n")
    fields.only("logit_bias", [{}], "it is not built")
    return _request(fields, logprobs, max_tokens), prompts


def read_tokenize(body: Any) -> Conversation | str:
    fields = Fields(body)
    text = fields.take("prompt", str)
    fields.ignore("model")
    fields.only("add_generation_prompt", [True], "the ids are those that a model is asked with")
    if text is None:
        conversation = _conversation(fields)
        fields.finish()
        return conversation
    fields.finish()
    return text


def _request(fields: Fields, top_logprobs: int | None, max_tokens: int | None) -> Request:
    stream = fields.take("stream", bool) or False
    options = RequestOptions(
        stop_strings=fields.texts("stop", MOST_STOPS),
        seed=fields.integer("seed", -(2**63), 2**63 - 1),
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        top_logprobs=top_logprobs,
    )
    top_k, temperature = fields.integer("top_k", -1), fields.number("temperature", 0, 2)
    if temperature is not None and temperature < COLDEST:
        temperature = 0.0
    sampling = {
        "temperature": temperature,
        "top_p": fields.number("top_p", 0, 1),
        "top_k": 0 if top_k == -1 else top_k,
        "do_sample": fields.take("do_sample", bool),
    }
    request = Request(
        model=fields.take("model", str),
        n=fields.integer("n", 1, MOST_CHOICES) or 1,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        max_tokens=max_tokens,
        options=options,
        sampling={name: value for name, value in sampling.items() if value is not None},
    )
    fields.ignore(*_NO_EFFECT)
    fields.finish()
    return request


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options", dict)
    if options is None:
        return False
    if not stream:
        raise fields.refused("stream_options", "needs stream: true")
    inner = Fields(options, "stream_options.")
    inner.only("include_obfuscation", [False], "nothing is padded")
    include = inner.take("include_usage", bool) or False
    inner.finish()
    return include


def _prompts(fields: Fields) -> list[str | list[int]]:
    prompt = fields.any("prompt")
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(item, str) or _are_ids(item) for item in prompt):
        return prompt
    message = "must be a string, an array of strings, of token ids, or of arrays of token ids; none of them empty"
    raise fields.refused("prompt", message, "missing_required_parameter" if prompt is None else "invalid_type")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


def _conversation(fields: Fields) -> Conversation:
    given = fields.need("messages", list)
    if not given:
        raise fields.refused("messages", "is empty")
    messages = [_message(message, f"{fields.place}messages[{i}].") for i, message in enumerate(given)]
    tools = [_tool(tool, f"tools[{i}].") for i, tool in enumerate(fields.take("tools", list) or [])]
    choice = fields.any("tool_choice")
    if choice not in (None, "auto", "none"):
        raise fields.refused("tool_choice", f"cannot be {json.dumps(choice)}: {_NOT_FORCED}", "unsupported_parameter")
    template = Fields(fields.take("chat_template_kwargs", dict) or {}, "chat_template_kwargs.")
    enable_thinking = template.take("enable_thinking", bool)
    template.finish()
    return Conversation(messages, [] if choice == "none" else tools, enable_thinking)


def _message(given: Any, place: str) -> Message:
    fields = Fields(given, place)
    role = fields.need("role", str)
    if role not in _ROLES:
        raise fields.refused("role", f"is {role!r}; it must be one of {', '.join(_ROLES)}")
    content, calls = _content(fields), fields.take("tool_calls", list)
    if content is None and not calls:
        raise fields.refused("content", "is missing", "missing_required_parameter")
    message: Message = {"role": _ROLES[role], "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := fields.take(name, str)) is not None:
            message[name] = value
    if calls:
        message["tool_calls"] = [_call(call, f"{place}tool_calls[{i}].") for i, call in enumerate(calls)]
    fields.only("annotations", [[]], "a model reads none")  # an answer of OpenAI's own that is handed back has it
    fields.finish()
    return message


def _content(fields: Fields) -> str | None:
    """Text, or parts that are texts, joined."""
    content = fields.any("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise fields.refused("content", "must be a string or an array of parts", "invalid_type")
    texts = []
    for i, part in enumerate(content):
        inner = Fields(part, f"{fields.place}content[{i}].")
        kind = inner.need("type", str)
        if kind != "text":
            raise inner.refused("type", f"is {kind!r}; this model reads text", "unsupported_parameter")
        texts.append(inner.need("text", str))
        inner.finish()
    return "".join(texts)


def _call(given: Any, place: str) -> dict[str, Any]:
    fields = Fields(given, place)
    call_id, kind = fields.take("id", str), fields.take("type", str) or "function"
    if kind != "function":
        raise fields.refused("type", f"is {kind!r}; it must be function")
    function = Fields(fields.need("function", dict), f"{place}function.")
    name, arguments = function.need("name", str), function.take("arguments", str) or "{}"
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise function.refused("arguments", "is not the text of a JSON object")
    function.finish()
    fields.ignore("index")  # of a streamed call that is handed back
    fields.finish()
    call = {"type": "function", "function": {"name": name, "arguments": parsed}}
    return {"id": call_id, **call} if call_id else call


def _tool(given: Any, place: str) -> dict[str, Any]:
    fields = Fields(given, place)
    kind = fields.need("type", str)
    if kind != "function":
        raise fields.refused("type", f"is {kind!r}; it must be function", "unsupported_parameter")
    declared = fields.need("function", dict)
    function = Fields(declared, f"{place}function.")
    function.need("name", str)
    function.take("description", str)
    function.take("parameters", dict)
    function.only("strict", [False], "what the model writes is not forced into a form")
    function.finish()
    fields.finish()
    shown = {key: value for key, value in declared.items() if value is not None and key != "strict"}
    return {"type": "function", "function": shown}
