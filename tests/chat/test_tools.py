"""Calls of every format of data, in every template's own words: one conversation, written down in three ways."""

from __future__ import annotations

import json

import pytest
import sweep
from conversations import TOOL, text_of, trained_texts
from sweep import Published

from burnish.chat.template import CannotRender
from burnish.data.entry import OPENAI_COLUMNS, OPENAI_TAGS, DatasetAttr
from burnish.data.formats import align_dataset

SHAREGPT = DatasetAttr("it", "file", "it.json", "sharegpt")
OPENAI = DatasetAttr("it", "file", "it.json", "openai", columns=OPENAI_COLUMNS, tags=OPENAI_TAGS)

WEATHER = TOOL["function"]
ARGUMENTS = {"town": 'Rome "Roma" 罗马', "days": [1, 2], "unit": None}
QUESTION, RESULT, ANSWER = "Weather?", '{"sky": "clear"}', "Clear."


def openai_row(arguments, *, content=None, **more) -> dict:
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": RESULT, "tool_call_id": "call00001", **more},
        {"role": "assistant", "content": ANSWER},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": WEATHER}]}


def sharegpt_row() -> dict:
    call = json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False)
    turns = (("human", QUESTION), ("function_call", call), ("observation", RESULT), ("gpt", ANSWER))
    return {"conversations": [{"from": r, "value": v} for r, v in turns], "tools": json.dumps([WEATHER])}


ROWS = {
    "OpenAI's, arguments as text": (openai_row(json.dumps(ARGUMENTS)), OPENAI),
    "OpenAI's, as an object": (openai_row(ARGUMENTS, content=""), OPENAI),
    "sharegpt": (sharegpt_row(), SHAREGPT),
}
TEMPLATES = [
    *(Published("burnish", name) for name in ("qwen", "qwen3", "qwen3_nothink", "llama3")),
    Published("tokenizer", "Qwen3"),
    Published("tokenizer", "DeepSeek-V3"),
    *(Published("llama.cpp", name) for name in ("meta-llama-Llama-3.1-8B-Instruct", "GLM-4.6", "MiniMax-M2")),
    *(Published("TRL", name) for name in ("gptoss", "qwen3_6", "gemma4_v5")),
]


@pytest.mark.parametrize("one", TEMPLATES, ids=lambda one: one.name)
def test_a_call_is_the_same_tokens_whichever_format_its_row_has(one, fixture_path):
    fixture_path(one.fixture or "tokenizer-qwen3")
    fixture_path("tokenizer-qwen3")
    template, tokenizer = sweep.load(one)
    examples = [align_dataset(row, attr) for row, attr in ROWS.values()]
    samples = [template.encode(list(example.messages), list(example.tools)) for example in examples]
    texts = trained_texts(samples[0], tokenizer)
    assert [trained_texts(sample, tokenizer) for sample in samples] == [texts] * 3
    called, answered = texts
    assert "罗马" in called and '\\\\"' not in called, "encoded twice"
    assert ANSWER in answered and "clear" not in called + answered
    if "call00001" not in text_of(tokenizer, samples[0][-1].input_ids):  # sharegpt has no ids
        assert samples[0] == samples[1] == samples[2]


@pytest.mark.parametrize("one", TEMPLATES, ids=lambda one: one.name)
def test_words_beside_a_call_of_a_row_are_trained_where_the_template_has_a_place_for_them(one, fixture_path):
    fixture_path(one.fixture or "tokenizer-qwen3")
    fixture_path("tokenizer-qwen3")
    template, tokenizer = sweep.load(one)
    example = align_dataset(openai_row(ARGUMENTS, content="Let me see."), OPENAI)
    try:
        called, _ = trained_texts(template.encode(list(example.messages), list(example.tools)), tokenizer)
    except CannotRender:
        assert one.name == "DeepSeek-V3"
        return
    assert ("Let me see." in called) == ("Llama" not in one.name and one.name != "llama3")
