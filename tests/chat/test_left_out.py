"""What is left out: turns that are not to be trained, in texts that rewrite them, and calls that a template drops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sweep
from conversations import TOOL, assistant, calling, load_tokenizer, text_of, user
from sweep import Published

from burnish.chat.template import CannotRender, load_template


def trained(sample, tokenizer) -> str:
    pairs = zip(sample.input_ids, sample.trained, strict=True)
    return text_of(tokenizer, [token for token, is_trained in pairs if is_trained])


def test_a_turn_that_is_not_trained_stays_out_of_a_trained_prompt_that_writes_it_otherwise(
    fixture_path: Callable[[str], Path],
):
    tokenizer = load_tokenizer("tokenizer-qwen3", fixture_path)
    template = load_template(tokenizer, None)
    messages = [user("a"), assistant("wrong", reasoning_content="hm", train=False), user("c"), assistant("d")]
    (sample,) = template.encode(messages, train_on_prompt=True)
    assert "<|im_start|>assistant\nwrong<|im_end|>" in text_of(tokenizer, sample.input_ids), "its thought is forgotten"
    assert trained(sample, tokenizer) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>\n"
    )


def test_a_call_that_is_not_trained_stays_out_too(fixture_path: Callable[[str], Path]):
    tokenizer = load_tokenizer("tokenizer-qwen3", fixture_path)
    template = load_template(tokenizer, None)
    messages = [user("a"), calling("Rome", "", reasoning_content="hm", train=False), user("c"), assistant("d")]
    (sample,) = template.encode(messages, [TOOL], train_on_prompt=True)
    assert '{"town": "Rome"}' in text_of(tokenizer, sample.input_ids)
    assert "Rome" not in trained(sample, tokenizer)
    assert trained(sample, tokenizer).count("<|im_start|>assistant\n") == 2


@pytest.mark.parametrize("name", ["GigaChat3.1-10B-A1.8B", "openai-gpt-oss-120b"])
def test_several_calls_of_which_the_template_writes_one_are_refused(name, fixture_path: Callable[[str], Path]):
    fixture_path("templates-llamacpp")
    template, _ = sweep.load(Published("llama.cpp", name))
    both = [user("a"), sweep.parallel()]
    with pytest.raises(CannotRender, match="leaves out a tool call"):
        template.encode(both, [TOOL])
    assert template.encode([user("a"), calling("Rome")], [TOOL])


def test_a_marker_that_also_stands_before_the_words_ends_no_answer(fixture_path: Callable[[str], Path]):
    fixture_path("templates-llamacpp")
    template, tokenizer = sweep.load(Published("llama.cpp", "Kimi-K3"))
    (sample,) = template.encode([user("a"), assistant("b")])
    assert trained(sample, tokenizer).startswith("<|close|>think"), "an answer without a thought closes it"
    assert trained(sample, tokenizer).endswith("b<|close|>response<|sep|><|close|>message<|sep|><|end_of_msg|>")
    assert "<|close|>" not in {tokenizer.decode([token]) for token in template.stop_ids}


@pytest.mark.parametrize("name", ["NVIDIA-Nemotron-Nano-v2", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"])
def test_words_that_the_template_ends_before_the_call_are_refused_beside_it(name, fixture_path: Callable[[str], Path]):
    fixture_path("templates-llamacpp")
    template, _ = sweep.load(Published("llama.cpp", name))
    with pytest.raises(CannotRender, match="goes on behind the end token"):
        template.encode([user("a"), calling("Rome", "Let me see.")], [TOOL])
    (sample,) = template.encode([user("a"), calling("Rome")], [TOOL])
    ends = [token for token, is_trained in zip(sample.input_ids, sample.trained, strict=True) if is_trained]
    assert sum(token in template.stop_ids for token in ends) == 1, "no empty answer behind the call"
