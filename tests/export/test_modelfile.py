"""The Modelfile: its Go template says what the chat template says, or is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from burnish.chat.template import ChatTemplate, load_template
from burnish.export.modelfile import find_turns, modelfile, stop_texts

Fixtures = Callable[[str], Path]

CHATML = '''\
# ollama create NAME -f Modelfile
FROM .
TEMPLATE """{{ $system := .System }}{{ if $system }}<|im_start|>system
{{ $system }}<|im_end|>
{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
"""
PARAMETER stop "<|im_end|>"
'''
GEMMA = '''\
TEMPLATE """{{ $system := .System }}{{ range .Messages }}{{ if eq .Role "user" }}<start_of_turn>user
{{ if $system }}{{ $system }}

{{ $system = "" }}{{ end }}{{ .Content }}<end_of_turn>
{{ else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}<end_of_turn>
{{ end }}{{ end }}<start_of_turn>model
"""
'''


def load(fixture_path: Fixtures, tokenizer: str, name: str | None) -> tuple[ChatTemplate, Any]:
    loaded = AutoTokenizer.from_pretrained(fixture_path(tokenizer))
    return load_template(loaded, name), loaded


def test_chatml(fixture_path: Fixtures):
    assert modelfile(*load(fixture_path, "smollm2", "chatml")) == CHATML


def test_a_system_message_of_the_templates_own_stands_where_the_user_gives_none(fixture_path: Fixtures):
    text = modelfile(*load(fixture_path, "smollm2", None))
    assert "{{ else }}<|im_start|>system\nYou are a helpful AI assistant named SmolLM" in text


def test_a_system_message_inside_the_first_question(fixture_path: Fixtures):
    """Gemma. Its tokenizer puts <bos> before every text, and so does Ollama."""
    text = modelfile(*load(fixture_path, "tokenizer-gemma3", None))
    assert GEMMA in text and "<bos>" not in text


def test_llama3(fixture_path: Fixtures):
    text = modelfile(*load(fixture_path, "tokenizer-llama3_1", None))
    assert "{{ $system }}<|eot_id|>{{ end }}" in text and "<|begin_of_text|>" not in text
    assert text.endswith('<|start_header_id|>assistant<|end_header_id|>\n\n"""\nPARAMETER stop "<|eot_id|>"\n')


@pytest.mark.parametrize("tokenizer", ["smollm2", "tokenizer-qwen3"])
def test_a_template_that_forgets_thoughts_has_no_exact_form(fixture_path: Fixtures, tokenizer: str):
    text = modelfile(*load(fixture_path, tokenizer, "qwen3"))
    assert 'TEMPLATE """' not in text and "# No TEMPLATE: " in text and 'PARAMETER stop "<|im_end|>"' in text


@pytest.mark.parametrize("name", ["chatml", "qwen", "smollm2", "vicuna", "alpaca", "default", "mistral", "llama2"])
def test_what_is_found_writes_long_conversations_as_the_template_does(fixture_path: Fixtures, name: str):
    template, tokenizer = load(fixture_path, "smollm2", name)
    chat: list[Any] = [{"role": "system", "content": "Be brief."}]
    for number in range(4):
        chat += [{"role": "user", "content": f"Why {number}?"}, {"role": "assistant", "content": f"So, {number}."}]
    chat.append({"role": "user", "content": "And now?"})
    turns = find_turns(template, stop_texts(template, tokenizer), "")
    assert turns is not None
    for conversation in (chat, chat[1:]):
        assert turns.render(conversation) == template.prompt_text(conversation)


def test_words_that_go_would_read_as_its_own_have_no_exact_form(fixture_path: Fixtures):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("smollm2"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}"
    )
    assert "# No TEMPLATE" in modelfile(load_template(tokenizer, None), tokenizer)


def test_a_model_without_a_chat_template_has_its_end_token_alone(fixture_path: Fixtures):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("smollm2"))
    assert modelfile(None, tokenizer) == '# ollama create NAME -f Modelfile\nFROM .\nPARAMETER stop "<|im_end|>"\n'
