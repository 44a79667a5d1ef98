"""`burnish api` as its users meet it: the openai client, curl and bare sockets against a real server."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from serving import Script, Server, serving, small_engine
from transformers import AutoModelForCausalLM, AutoTokenizer

from burnish.chat.template import load_template
from burnish.generate.arguments import GeneratingArguments
from burnish.generate.engine import Engine
from burnish.serve import requests

FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        },
    }
]


@pytest.fixture(scope="module")
def tokenizer(fixture_path: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(fixture_path("smollm2"))


@pytest.fixture(scope="module")
def smollm2(tokenizer: Any, fixture_path: Callable[[str], Path]) -> Iterator[Server]:
    """The real model."""
    model = AutoModelForCausalLM.from_pretrained(fixture_path("smollm2"), dtype=torch.float32)
    engine = Engine(model, tokenizer, load_template(tokenizer, None), GeneratingArguments())
    with serving(engine) as server:
        yield server


@pytest.fixture(scope="module")
def small(tokenizer: Any) -> Iterator[Server]:
    """Random weights, 256 positions, quick."""
    with serving(small_engine(tokenizer)) as server:
        yield server


@pytest.fixture(scope="module")
def written(tokenizer: Any) -> Iterator[tuple[Server, Callable[[str], None]]]:
    """A server, and what sets the text that its model writes."""
    yield from scripted(tokenizer)


def scripted(tokenizer: Any, template: str | None = None) -> Iterator[tuple[Server, Callable[[str], None]]]:
    engine = small_engine(tokenizer, template, positions=4096)
    script = Script(engine)

    def write(text: str) -> None:
        script.ids = [*tokenizer(text, add_special_tokens=False).input_ids, engine.template.stop_ids[0]]

    with serving(engine, template=template) as server:
        yield server, write


def ask(client: OpenAI, **how: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "any", "messages": FRANCE, "temperature": 0, "max_tokens": 12, **how}
    )


# ---- the openai client -----------------------------------------------------------------------------------------------


def test_the_openai_client_is_answered_as_burnish_chat_answers(smollm2: Server):
    reply = ask(smollm2.client())
    said = "".join(smollm2.engine.chat(FRANCE, temperature=0, max_new_tokens=12))
    assert reply.choices[0].message.content == said == "The capital of France is Paris."
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.model, reply.object) == ("any", "chat.completion")
    assert reply.id.startswith("chatcmpl-")
    prompt = smollm2.engine.template.prompt(FRANCE)
    [ids] = smollm2.engine.generate([prompt], temperature=0)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), len(ids))
    assert reply.usage.total_tokens == len(prompt) + len(ids)


def test_a_stream_holds_what_the_whole_reply_holds(smollm2: Server):
    client = smollm2.client()
    whole = ask(client, logprobs=True, top_logprobs=2, stop=["Paris"])
    stream = ask(
        client, logprobs=True, top_logprobs=2, stop=["Paris"], stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The capital of France is "
    assert whole.choices[0].message.content == "The capital of France is "
    tokens = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert tokens == whole.choices[0].logprobs.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert len(chunks) > 5


def test_completions_go_on_with_a_text(smollm2: Server):
    client = smollm2.client()
    reply = client.completions.create(
        model="any", prompt=["1, 2, 3,", "a, b, c,"], temperature=0, max_tokens=6, logprobs=1
    )
    assert [choice.text for choice in reply.choices] == [" 4, 5,", " d, e, f,"]
    assert [(choice.index, choice.finish_reason) for choice in reply.choices] == [(0, "length"), (1, "length")]
    assert reply.usage.completion_tokens == 12
    assert reply.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4, 5]
    assert "".join(reply.choices[0].logprobs.tokens) == " 4, 5,"
    ids = smollm2.engine.tokenizer("1, 2, 3,").input_ids
    stream = client.completions.create(model="any", prompt=ids, temperature=0, max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == " 4, 5,"
    assert client.completions.create(model="any", prompt="a").usage.completion_tokens <= 16


def test_a_seed_draws_the_same_again_and_choices_differ(small: Server):
    def texts(**how: Any) -> list[str]:
        reply = ask(small.client(), temperature=1, n=3, max_tokens=6, **how)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert reply.usage.completion_tokens == 18
        return [choice.message.content for choice in reply.choices]

    seeded = texts(seed=7)
    assert len(set(seeded)) == 3
    assert texts(seed=7) == seeded
    assert texts(seed=8) != seeded
    assert texts() != texts()


def test_sampling_is_openais_where_nobody_says_otherwise(small: Server):
    def config(**asked: Any) -> tuple[Any, ...]:
        request, _ = requests.read_chat({"messages": FRANCE, **asked})
        overrides = small.api._overrides(request)
        base = GeneratingArguments(**{**vars(small.engine.generating), **overrides})
        config, _ = small.engine.model._prepare_generation_config(small.engine.generation_config(base, 10))
        return config.do_sample, config.temperature, config.top_p, config.top_k

    assert config() == (True, 1.0, 1.0, 0)
    assert config(temperature=0.5, top_k=7) == (True, 0.5, 1.0, 7)
    assert config(temperature=0)[0] is False
    own = small.engine.model.generation_config
    try:
        own.do_sample, own.temperature, own.top_k = True, 0.6, 20
        assert config() == (True, 0.6, 1.0, 20)
        own.do_sample, own.temperature, own.top_k = False, None, None
        assert config()[0] is False
        assert config(top_p=0.5) == (True, 1.0, 0.5, 0)
    finally:
        own.do_sample = own.temperature = own.top_k = None


def test_models_are_listed_and_looked_up(small: Server):
    client = small.client()
    assert [model.id for model in client.models.list()] == ["a-model"]
    assert client.models.retrieve("a-model").owned_by == "burnish"
    with pytest.raises(openai.NotFoundError, match="no model 'another'"):
        client.models.retrieve("another")


def test_chinese_is_streamed_in_whole_characters(written: tuple[Server, Callable[[str], None]]):
    server, write = written
    write("你好，世界 🦊！")
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(server.client(), max_tokens=50, stream=True)]
    assert "".join(pieces) == "你好，世界 🦊！"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) >= 7
    reply = ask(server.client(), max_tokens=50, logprobs=True)
    assert b"".join(bytes(token.bytes) for token in reply.choices[0].logprobs.content).decode() == "你好，世界 🦊！"


def test_parts_of_text_developers_and_names_are_read(smollm2: Server):
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Be brief."}, *FRANCE]
    ids = [smollm2.send("POST", "/tokenize", {"messages": each}).json()["tokens"] for each in (messages, plain)]
    assert ids[0] == ids[1] == smollm2.engine.template.prompt(plain)


def test_fields_without_effect_are_accepted(small: Server):
    ask(
        small.client(),
        user="u",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        max_tokens=None,
        max_completion_tokens=2,
        extra_body={"top_k": 5, "unknown": None, "logit_bias": {}},
    )


# ---- curl ------------------------------------------------------------------------------------------------------------


def curl(*words: str) -> Any:
    result = subprocess.run(["curl", "-sS", *words], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(result.stdout)


def test_the_curl_of_2024_works(smollm2: Server):
    reply = curl(
        *(
            "-X",
            "POST",
            f"http://0.0.0.0:{smollm2.port}/v1/chat/completions",
            "-H",
            "content-type:application/json",
            "-d",
        ),
        '{"messages":[{"role":"user","content":"xinqingbuhao,请将拼音转化汉字"}],"model":"qwen","stream":false,"max_tokens":8}',
    )
    assert reply["model"] == "qwen"
    assert 1 <= reply["usage"]["completion_tokens"] <= 8
    assert reply["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_body_is_read_whatever_its_content_type_says(small: Server):
    body = json.dumps({"messages": FRANCE, "max_tokens": 2})
    for header in ("content-type: application/x-www-form-urlencoded", "content-type: text/plain", "content-type:"):
        reply = curl(f"{small.url}/v1/chat/completions", "-H", header, "-d", body)
        assert reply["choices"][0]["message"]["role"] == "assistant"


# ---- thoughts and tools ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3(fixture_path: Callable[[str], Path]) -> Iterator[tuple[Server, Callable[[str], None]]]:
    yield from scripted(AutoTokenizer.from_pretrained(fixture_path("tokenizer-qwen3")))


@pytest.fixture(scope="module")
def llama3(fixture_path: Callable[[str], Path]) -> Iterator[tuple[Server, Callable[[str], None]]]:
    yield from scripted(AutoTokenizer.from_pretrained(fixture_path("tokenizer-llama3_1")), "llama3")


def both_ways(server: Server, **how: Any) -> tuple[Any, list[Any]]:
    """The whole reply's message and the deltas of a stream, which must come to the same."""
    whole = ask(server.client(), max_tokens=200, **how).choices[0]
    chunks = list(ask(server.client(), max_tokens=200, stream=True, **how))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == (whole.message.content or "")
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning == (getattr(whole.message, "reasoning_content", None) or "")
    calls = [call.function for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.name, call.arguments) for call in calls] == [
        (call.function.name, call.function.arguments) for call in whole.message.tool_calls or ()
    ]
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    return whole, deltas


def test_thoughts_and_calls_of_qwen3_come_apart(qwen3: tuple[Server, Callable[[str], None]]):
    server, write = qwen3
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"town": "上海"}}\n</tool_call>'
    write(f"<think>\nThe weather, then.\n</think>\n\nLet me look.\n{call}\n{call}")
    whole, deltas = both_ways(server, tools=WEATHER)
    assert whole.finish_reason == "tool_calls"
    assert whole.message.reasoning_content == "The weather, then."
    assert whole.message.content == "Let me look."
    assert [json.loads(each.function.arguments) for each in whole.message.tool_calls] == [{"town": "上海"}] * 2
    assert len({each.id for each in whole.message.tool_calls}) == 2
    assert not any("<" in (delta.content or "") for delta in deltas)
    assert sum(bool(delta.content) for delta in deltas) > 1  # words come as they are made
    [indices] = [[each.index for each in delta.tool_calls] for delta in deltas if delta.tool_calls]
    assert indices == [0, 1]


def test_a_stop_string_behind_a_call_is_left_out_to_its_first_letter(qwen3: tuple[Server, Callable[[str], None]]):
    server, write = qwen3
    write('Sure. <tool_call>\n{"name": "get_weather", "arguments": {"town": "Bonn"}}\n</tool_call> STOP more')
    whole, _ = both_ways(server, tools=WEATHER, stop=["STOP"])
    assert whole.message.content.rstrip() == "Sure."
    assert len(whole.message.tool_calls) == 1


def test_a_call_is_handed_back_with_its_result(qwen3: tuple[Server, Callable[[str], None]]):
    server, write = qwen3
    write('<tool_call>\n{"name": "get_weather", "arguments": {"town": "Bonn"}}\n</tool_call>')
    message = ask(server.client(), max_tokens=100, tools=WEATHER).choices[0].message
    assert message.content is None
    write("It rains.")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    reply = ask(server.client(), messages=[*FRANCE, message, result], tools=WEATHER)
    assert (reply.choices[0].message.content, reply.choices[0].message.tool_calls) == ("It rains.", None)


def test_a_call_of_llama3_is_an_answer_of_its_own(llama3: tuple[Server, Callable[[str], None]]):
    server, write = llama3
    write('{"name": "get_weather", "parameters": {"town": "Bonn"}}')
    whole, deltas = both_ways(server, tools=WEATHER)
    assert whole.message.tool_calls[0].function.name == "get_weather"
    assert whole.message.content is None
    assert not any(delta.content for delta in deltas)


@pytest.mark.parametrize(
    "text", ["a < b, and <tool is no call", "<tool_call>\nno JSON\n</tool_call>", "{ a set }", " {"]
)
def test_what_only_looks_like_a_call_stays_text(qwen3: tuple[Server, Callable[[str], None]], text: str):
    server, write = qwen3
    write(text)
    whole, _ = both_ways(server, tools=WEATHER)
    assert (whole.message.content, whole.message.tool_calls, whole.finish_reason) == (text, None, "stop")


@pytest.mark.parametrize("choice", ["none", None])
def test_without_tools_nothing_is_a_call(qwen3: tuple[Server, Callable[[str], None]], choice: str | None):
    server, write = qwen3
    text = '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'
    write(text)
    whole, _ = both_ways(server, **({"tools": WEATHER, "tool_choice": choice} if choice else {}))
    assert (whole.message.content, whole.message.tool_calls) == (text, None)


@pytest.mark.parametrize(
    "text",
    [
        "Hello", "  Hello \n", "\n\n", "", "<think>\n\n</think>\n\nHi", "<think>cut off", "<th>", "a </think> b",
        "<think>a</think>", "<think>\na < b </th\n</think>\n\n\nc\n",
    ],
)  # fmt: skip
def test_an_answer_is_parted_as_the_template_parts_it(qwen3: tuple[Server, Callable[[str], None]], text: str):
    server, write = qwen3
    write(text)
    whole, _ = both_ways(server)
    parsed = server.engine.template.parse(server.engine.tokenizer(text, add_special_tokens=False).input_ids)
    if text == "a </think> b":  # nothing opened a thought; what has been streamed as words stays words
        parsed = {"content": text}
    assert whole.message.content == parsed["content"]
    assert getattr(whole.message, "reasoning_content", "") == parsed.get("reasoning_content", "")


def test_a_thought_that_the_prompt_has_opened_is_one(fixture_path: Callable[[str], Path]):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("tokenizer-qwen3"))
    template = str(fixture_path("templates-llamacpp") / "Qwen3.5-4B.jinja")
    for server, write in scripted(tokenizer, template):
        write("Hm, a < b.\n</think>\n\nYes.")
        whole, deltas = both_ways(server)
        assert (whole.message.reasoning_content, whole.message.content) == ("Hm, a < b.", "Yes.")
        assert sum(bool(getattr(delta, "reasoning_content", "")) for delta in deltas) > 3
        write("No thought.")
        whole, _ = both_ways(server, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        assert whole.message.content == "No thought."


def test_thinking_is_turned_off_for_one_request(qwen3: tuple[Server, Callable[[str], None]]):
    server, _ = qwen3

    def ids(**kwargs: Any) -> list[int]:
        reply = server.send("POST", "/tokenize", {"messages": FRANCE, "tools": WEATHER, "chat_template_kwargs": kwargs})
        return reply.json()["tokens"]

    quiet = load_template(server.engine.tokenizer, None, enable_thinking=False)
    assert ids(enable_thinking=False) == quiet.prompt(FRANCE, WEATHER)
    assert ids() == server.engine.template.prompt(FRANCE, WEATHER) != ids(enable_thinking=False)


def test_a_template_without_a_place_for_tools_refuses_them_by_name(small: Server):
    with pytest.raises(openai.BadRequestError, match="no place for tools") as caught:
        ask(small.client(), tools=WEATHER)
    assert caught.value.param == "tools"
    call = {"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": "{}"}}
    with pytest.raises(openai.BadRequestError, match="no place for tools") as caught:
        ask(small.client(), messages=[*FRANCE, {"role": "assistant", "tool_calls": [call]}, *FRANCE])
    assert caught.value.param == "messages"
    ask(small.client(), tools=WEATHER, tool_choice="none", max_tokens=1)


@pytest.mark.parametrize("param", ["tools", "messages"])
def test_words_of_the_conversation_are_not_taken_for_tools_and_calls(small: Server, param: str):
    words = [{"role": "user", "content": "Should I get_weather in Rome?"}]
    call = {"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": "{}"}}
    called = [*words, {"role": "assistant", "tool_calls": [call]}, *words]
    with pytest.raises(openai.BadRequestError, match="no place for tools") as caught:
        ask(small.client(), **({"messages": words, "tools": WEATHER} if param == "tools" else {"messages": called}))
    assert caught.value.param == param


def test_a_template_that_shows_tools_and_leaves_out_their_calls_refuses_those(fixture_path: Callable[[str], Path]):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("tokenizer-qwen3"))
    call = {"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": "{}"}}
    called = [*FRANCE, {"role": "assistant", "tool_calls": [call]}, *FRANCE]
    for server, write in scripted(tokenizer, str(fixture_path("templates-llamacpp") / "LFM2-8B-A1B.jinja")):
        write("Yes.")
        assert ask(server.client(), tools=WEATHER).choices[0].message.content == "Yes."
        with pytest.raises(openai.BadRequestError, match="no place for tools") as caught:
            ask(server.client(), messages=called, tools=WEATHER)
        assert caught.value.param == "messages"


def test_a_template_that_takes_nothing_without_tools_takes_them(fixture_path: Callable[[str], Path]):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("tokenizer-qwen3"))
    file = "NousResearch-Hermes-3-Llama-3.1-8B-tool_use.jinja"
    for server, write in scripted(tokenizer, str(fixture_path("templates-llamacpp") / file)):
        write("Yes.")
        assert ask(server.client(), tools=WEATHER).choices[0].message.content == "Yes."


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_the_ids_of_a_prompt_are_those_of_training(small: Server):
    messages = [*FRANCE, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "Sure?"}]
    reply = small.send("POST", "/tokenize", {"model": "any", "messages": messages}).json()
    trained = small.engine.template.encode([*messages, {"role": "assistant", "content": "Yes."}], mask_history=True)
    start = trained[0].trained.index(True)
    assert reply == {"count": start, "max_model_len": 256, "tokens": trained[0].input_ids[:start]}
    text = small.send("POST", "/tokenize", {"prompt": "Once upon a time"}).json()
    assert text["tokens"] == small.engine.tokenizer("Once upon a time", add_special_tokens=False).input_ids


# ---- what is refused -------------------------------------------------------------------------------------------------

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": None}, "messages", "is missing"),
        ({"messages": []}, "messages", "is empty"),
        ({"messages": "hi"}, "messages", "must be an array"),
        ({"messages": ["hi"]}, "messages[0]", "must be a JSON object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "is 'robot'"),
        ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages[0].mood", "is not known"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0].type", "this model reads text"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}]},
         "messages[0].tool_calls[0].function.arguments", "JSON object"),
        ({"messages": [{"role": "assistant",
                        "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[" * 100_000}}]}]},
         "messages[0].tool_calls[0].function.arguments", "JSON object"),
        ({"temperature": 2.1}, "temperature", "from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": float("nan")}, "temperature", "from 0 to 2"),
        ({"top_p": 1.5}, "top_p", "from 0 to 1"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": True}, "max_tokens", "must be an integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one of them"),
        ({"n": 0}, "n", "from 1 to 128"),
        ({"stop": ["a"] * 5}, "stop", "4 are the most"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"seed": 1.5}, "seed", "must be an integer"),
        ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not forced"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "not forced"),
        ({"tools": WEATHER, "tool_choice": "required"}, "tool_choice", "not forced"),
        ({"tools": WEATHER, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
         "tool_choice", "not forced"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "must be function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
         "tools[0].function.strict", "not forced"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "its own choice"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not built"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options.a", "not known"),
        ({"chat_template_kwargs": {"enable_thinking": True}},
         "chat_template_kwargs.enable_thinking", "does not know it"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs.a", "not known"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "enable_thinking"),
        ({"best_of": 2}, "best_of", "not known"),
        ({"max_tokens": 250}, "max_tokens", "256 positions"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, None, "256 positions"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_name(small: Server, body: dict[str, Any], param: str | None, words: str):
    reply = small.send("POST", "/v1/chat/completions", {"messages": FRANCE, **body})
    assert reply.status == 400
    [(name, error)] = reply.json().items()
    assert name == "error" and error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert param is None or param in error["message"] or "positions" in words


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "must be a string"),
        ({"prompt": [[]]}, "prompt", "none of them empty"),
        ({"prompt": [[49152]]}, "prompt", "the highest is 49151"),
        ({"prompt": ""}, None, "is empty"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "at the end"),
        ({"prompt": "a", "echo": True}, "echo", "not repeated"),
        ({"prompt": "a", "best_of": 3}, "best_of", "as many choices"),
        ({"prompt": "a", "messages": FRANCE}, "messages", "not known"),
        ({"prompt": [5] * 300}, None, "256 positions"),
    ],
)
def test_completions_are_refused_by_name_too(small: Server, body: dict[str, Any], param: str | None, words: str):
    reply = small.send("POST", "/v1/completions", body)
    assert (reply.status, reply.json()["error"]["param"]) == (400, param)
    assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"messages": [{"role": "user", "content": "\\ud800"}]}']
)
def test_a_body_that_is_no_json_object_is_refused(small: Server, content: bytes):
    reply = small.send("POST", "/v1/chat/completions", content)
    assert reply.status == 400
    assert "JSON" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_without_a_row_is_refused(tokenizer: Any, stream: bool):
    engine = small_engine(tokenizer)
    engine.model.resize_token_embeddings(len(tokenizer) - 1)
    token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    text = tokenizer.convert_tokens_to_string([token])
    assert tokenizer(text).input_ids == [len(tokenizer) - 1]
    with serving(engine) as server:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "stream": stream}
        reply = server.send("POST", "/v1/chat/completions", body)
        assert reply.status == 400
        assert f"the token {token!r} (id {len(tokenizer) - 1})" in reply.json()["error"]["message"]
        assert ask(server.client(), max_tokens=1).choices


def test_other_faults_have_the_same_shape(small: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("burnish.serve.wire.MOST_BYTES", 1000)
    replies = [
        small.send("GET", "/v1/nowhere"),
        small.send("GET", "/v1/chat/completions"),
        small.send("POST", "/v1/chat/completions", b"x" * 1001),
    ]
    assert [reply.status for reply in replies] == [404, 405, 413]
    assert all(reply.json()["error"].keys() == {"message", "type", "param", "code"} for reply in replies)
    assert replies[1].headers["allow"] == "POST"


def test_a_key_is_asked_for(tokenizer: Any):
    with serving(small_engine(tokenizer), key="secret") as server:
        assert ask(server.client("secret"), max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError, match="API key is wrong"):
            server.client("guess").models.list()
        assert server.send("GET", "/v1/models").status == 401
        assert server.send("GET", "/metrics").status == 401
        assert server.send("GET", "/health").json() == {"status": "ok"}


def test_any_web_page_may_ask(small: Server):
    asks = {"origin": "http://a.page", "access_control_request_method": "POST", "access_control_request_headers": "x-a"}
    preflight = small.send("OPTIONS", "/v1/chat/completions", **asks)
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-headers"] == "x-a"
    reply = small.send("POST", "/v1/chat/completions", {"messages": []}, origin="http://a.page")
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (400, "http://a.page")


# ---- many at once ----------------------------------------------------------------------------------------------------


def in_threads(work: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(work)
    threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, work[i]())) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_eight_at_once_are_answered_as_each_alone_and_a_failing_one_stops_no_other(
    small: Server, capfd: pytest.CaptureFixture[str]
):
    bad = small.engine.tokenizer("catastrophe", add_special_tokens=False).input_ids[0]

    def fail(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if bad in kwargs["input_ids"]:
            raise RuntimeError("the device is gone")

    def question(number: int, stream: bool) -> str:
        text = "catastrophe" if number == 3 else f"Question {number}"
        reply = ask(small.client(), messages=[{"role": "user", "content": text}], stream=stream)
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        return reply.choices[0].message.content

    def outcome(number: int, stream: bool) -> str:
        try:
            return question(number, stream)
        except openai.APIError as error:
            return f"{type(error).__name__}: {error.message}"

    hook = small.engine.model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        alone = [outcome(number, False) for number in range(8)]
        together = in_threads([lambda number=number: outcome(number, number % 2 == 1) for number in range(8)])
    finally:
        hook.remove()
    failure = "The server failed: RuntimeError. Its output tells more."
    assert alone.pop(3) == f"InternalServerError: Error code: 500 - {failure}"
    assert together.pop(3) == f"APIError: {failure}"
    assert together == alone
    assert len(set(alone)) > 1
    assert "the device is gone" in capfd.readouterr().err


def test_who_came_first_is_answered_first(tokenizer: Any):
    """The first is held up until all have come, one after the other."""
    engine = small_engine(tokenizer)
    order: list[int] = []
    lengths: dict[int, int] = {}
    all_there = threading.Event()

    def note(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            order.append(lengths[kwargs["input_ids"].shape[1]])
        assert all_there.wait(60)

    with serving(engine) as server:
        questions: list[list[Any]] = [[{"role": "user", "content": "a " * (i + 1)}] for i in range(5)]
        lengths.update({len(engine.template.prompt(each)): i for i, each in enumerate(questions)})
        engine.model.register_forward_pre_hook(note, with_kwargs=True)

        def come(i: int) -> None:
            wait_for(lambda: i == 0 or (bool(order) and server.api.dispatcher.num_waiting == i - 1))
            ask(server.client(), messages=questions[i], max_tokens=20)

        def let_go() -> None:
            wait_for(lambda: server.api.dispatcher.num_waiting == 4)
            all_there.set()

        in_threads([*(lambda i=i: come(i) for i in range(5)), let_go])
    assert order == [0, 1, 2, 3, 4]


@pytest.fixture
def slow(tokenizer: Any) -> Iterator[tuple[Server, list[int]]]:
    """A server whose model takes 30 ms a token and never ends by itself; one entry a forward pass."""
    engine = small_engine(tokenizer, positions=2000)
    engine.template.stop_ids = []
    engine.model.generation_config.eos_token_id = None
    passes: list[int] = []

    def note(*_: Any) -> None:
        passes.append(1)
        time.sleep(0.03)

    engine.model.register_forward_pre_hook(note)
    with serving(engine) as server:
        yield server, passes


@pytest.fixture
def half_open(slow: tuple[Server, list[int]]) -> Iterator[Callable[..., socket.socket]]:
    """Sends a request over a bare socket, and reads nothing of its answer."""
    with ExitStack() as opened:

        def send(**body: Any) -> socket.socket:
            content = json.dumps({"messages": FRANCE, "temperature": 0, "max_tokens": 1000, **body}).encode()
            connection = opened.enter_context(socket.create_connection(("127.0.0.1", slow[0].port)))
            connection.settimeout(20)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            return connection

        yield send


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(
    slow: tuple[Server, list[int]], half_open: Callable[..., socket.socket], stream: bool
):
    server, passes = slow
    connection = half_open(stream=stream)
    if stream:
        received_until(b"data:", connection)
    wait_for(lambda: len(passes) > 3)
    waiting = half_open(max_tokens=500)
    wait_for(lambda: server.api.dispatcher.num_waiting == 1)
    waiting.close()
    wait_for(lambda: server.api.dispatcher.num_waiting == 0)
    before = len(passes)
    connection.close()
    wait_for(lambda: server.api.metrics.in_flight == 0)
    time.sleep(0.3)
    assert len(passes) <= before + 5
    reply = ask(server.client(), max_tokens=2)
    assert reply.usage.completion_tokens == 2
    metrics = server.send("GET", "/metrics").text
    assert 'burnish_requests_total{path="/v1/chat/completions",status="499"} 2' in metrics


def test_a_client_that_does_not_read_holds_nobody_up(tokenizer: Any):
    with serving(small_engine(tokenizer, positions=2000), send_buffer=4096) as server:
        body = {"messages": FRANCE, "max_tokens": 300, "stream": True, "logprobs": True, "top_logprobs": 20}
        content = json.dumps(body).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            wait_for(lambda: server.api.metrics.in_flight == 1)
            assert ask(server.client(), max_tokens=2).usage.completion_tokens == 2
            wait_for(lambda: server.api.metrics.in_flight == 1)  # the first's answer is made, and not sent yet
        wait_for(lambda: server.api.metrics.in_flight == 0)


def test_a_line_that_is_too_long_is_told(
    slow: tuple[Server, list[int]], half_open: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
):
    server, _ = slow
    monkeypatch.setattr("burnish.serve.dispatch.LONGEST_LINE", 1)
    for _ in range(2):
        half_open()
    wait_for(lambda: server.api.dispatcher.num_waiting == 1)
    reply = server.send("POST", "/v1/chat/completions", {"messages": FRANCE})
    assert (reply.status, reply.json()["error"]["code"]) == (503, "overloaded")


def test_a_server_that_ends_tells_those_who_wait(
    slow: tuple[Server, list[int]], half_open: Callable[..., socket.socket]
):
    server, passes = slow
    connections = [half_open(stream=stream) for stream in (True, False)]
    wait_for(lambda: len(passes) > 3 and server.api.dispatcher.num_waiting == 1)
    replies = in_threads(
        [lambda c=c: received_until(b"shutting down", c) for c in connections] + [lambda: shut(server)]
    )
    assert all("shutting down" in reply for reply in replies[:2])
    assert " 503 " in replies[1].splitlines()[0]


def received_until(words: bytes, connection: socket.socket) -> str:
    received = b""
    while words not in received:
        more = connection.recv(65536)
        assert more, f"the connection ended without {words!r}: {received!r}"
        received += more
    return received.decode()


def shut(server: Server) -> None:
    time.sleep(0.2)
    server.uvicorn.loop.call_soon_threadsafe(server.api.dispatcher.close)


# ---- the page about it -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_page_names_every_field_and_variable():
    fields = {*requests._NOT_BUILT, *requests._NO_EFFECT, *vars(requests.read_chat({"messages": FRANCE})[0].options)}
    fields -= {"stop_strings"}
    fields |= {"stop", "API_HOST", "API_PORT", "API_KEY", "API_MODEL_NAME", "echo", "suffix", "best_of", "do_sample"}
    assert [name for name in sorted(fields) if not re.search(f"`{name}[`:]", PAGE)] == []


def test_the_examples_of_the_page_run(smollm2: Server):
    page = PAGE.replace("http://127.0.0.1:8000", smollm2.url)
    [program] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    [command] = re.findall(r"```bash\n(curl .*?)```", page, flags=re.DOTALL)
    how: Any = {"capture_output": True, "text": True, "check": True, "timeout": 60}
    assert subprocess.run([sys.executable, "-c", program], **how).stdout == "The capital of France is Paris.\n" * 2
    reply = json.loads(subprocess.run(command, shell=True, **how).stdout)
    assert reply["choices"][0]["message"]["content"]


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_count_requests_and_tokens(tokenizer: Any):
    with serving(small_engine(tokenizer)) as server:
        usage = ask(server.client(), max_tokens=3).usage
        list(ask(server.client(), max_tokens=4, stream=True))
        server.send("POST", "/v1/chat/completions", {})
        server.send("GET", "/v1/models/a-model")
        server.send("GET", "/no/such/place")
        reply = server.send("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in reply.text.splitlines() if not line.startswith("#"))
    assert values['burnish_requests_total{path="/v1/chat/completions",status="200"}'] == "2"
    assert values['burnish_requests_total{path="/v1/chat/completions",status="400"}'] == "1"
    assert values['burnish_requests_total{path="/v1/models/{id}",status="200"}'] == "1"
    assert values['burnish_requests_total{path="other",status="404"}'] == "1"
    assert values["burnish_prompt_tokens_total"] == str(2 * usage.prompt_tokens)
    assert values["burnish_generated_tokens_total"] == "7"
    assert values['burnish_request_seconds_count{path="/v1/chat/completions"}'] == "3"
    assert float(values['burnish_request_seconds_sum{path="/v1/chat/completions"}']) > 0
    assert values["burnish_requests_in_flight"] == "1"  # the one that asks
