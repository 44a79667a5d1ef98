"""Single tokens as text and bytes, with the tokenizers of real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from burnish.generate.vocabulary import TokenTexts


@pytest.mark.parametrize("name", ["smollm2", "tokenizer-qwen3", "tokenizer-llama3", "tokenizer-gemma3"])
def test_the_bytes_of_tokens_are_the_bytes_of_their_text(fixture_path: Callable[[str], Path], name: str):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path(name))
    texts = TokenTexts(tokenizer)
    text = "Once upon  a time，你好 龘 🦊👩‍👩‍👧\n\té — x"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert any("\ufffd" in texts.text_of(i) for i in ids)  # some are half a character
    assert b"".join(texts.bytes_of(i) or b"?" for i in ids).decode() == text


def test_a_special_token_has_its_name_for_a_text(fixture_path: Callable[[str], Path]):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("tokenizer-qwen3"))
    texts = TokenTexts(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (texts.text_of(end), texts.bytes_of(end)) == ("<|im_end|>", b"<|im_end|>")
