"""Thoughts, tool calls, and templates that write history otherwise: every turn as it was when it was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conversations import (
    TOOL,
    assistant,
    calling,
    load_tokenizer,
    result,
    spans,
    system,
    text_of,
    trained_texts,
    user,
    with_markers,
)

from burnish.chat.template import CannotRender, load_template


@pytest.fixture(scope="module")
def qwen3(fixture_path: Callable[[str], Path]):
    return load_tokenizer("tokenizer-qwen3", fixture_path)


@pytest.fixture(scope="module")
def llama3_1(fixture_path: Callable[[str], Path]):
    return load_tokenizer("tokenizer-llama3_1", fixture_path)


@pytest.fixture(scope="module")
def deepseek(fixture_path: Callable[[str], Path]):
    return load_tokenizer("tokenizer-deepseek_v3", fixture_path)


@pytest.fixture(scope="module")
def published(fixture_path: Callable[[str], Path]) -> Path:
    return fixture_path("templates-llamacpp")


def test_a_template_that_forgets_thoughts_gives_one_sample_for_each_trained_turn(qwen3):
    template = load_template(qwen3, None)
    messages = [
        user("2+2?"),
        assistant("4", reasoning_content="Two and two."),
        user("And 3+3?"),
        assistant("<think>\nThree and three.\n</think>\n\n6"),
    ]
    first, second = template.encode(messages)
    assert trained_texts([first], qwen3) == ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"]
    assert trained_texts([second], qwen3) == ["<think>\nThree and three.\n</think>\n\n6<|im_end|>"]
    assert "Two and two" not in text_of(qwen3, second.input_ids)
    assert first.input_ids[: spans(first)[0][0]] == template.prompt(messages[:1])
    assert second.input_ids[: spans(second)[0][0]] == template.prompt(messages[:3])


def test_turns_of_one_exchange_that_keep_their_thoughts_share_a_sample(qwen3):
    template = load_template(qwen3, None)
    messages = [
        user("Weather in Rome?"),
        calling("Rome", reasoning_content="I must look."),
        result("sunny"),
        assistant("Sunny.", reasoning_content="Now I know."),
    ]
    (sample,) = template.encode(messages, [TOOL])
    assert trained_texts([sample], qwen3) == [
        '<think>\nI must look.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n'
        "</tool_call><|im_end|>",
        "<think>\nNow I know.\n</think>\n\nSunny.<|im_end|>",
    ]
    assert sample.input_ids[: spans(sample)[-1][0]] == template.prompt(messages[:3], [TOOL])
    assert sample.input_ids == qwen3.apply_chat_template(
        [messages[0], {**messages[1], "content": ""}, *messages[2:]], tools=[TOOL], return_dict=False
    )


def test_without_thinking_the_prompt_closes_the_thought_and_the_words_alone_are_trained(qwen3):
    template = load_template(qwen3, None, enable_thinking=False)
    (sample,) = template.encode([user("a"), assistant("b")])
    assert trained_texts([sample], qwen3) == ["b<|im_end|>"]
    assert template.prompt_text([user("a")]).endswith("<think>\n\n</think>\n\n")
    assert load_template(qwen3, "chatml", enable_thinking=False).notes[-1].endswith("it changes nothing")


def test_arguments_that_come_as_text_are_not_encoded_twice(qwen3):
    template = load_template(qwen3, None)
    as_object = calling("Rome")
    as_text = calling("Rome")
    as_text["tool_calls"][0]["function"]["arguments"] = '{"town": "Rome"}'
    as_text["tool_calls"][0]["function"].pop("name")
    as_text["tool_calls"][0]["function"]["name"] = "weather"
    assert template.encode([user("a"), as_text], [TOOL]) == template.encode([user("a"), as_object], [TOOL])
    as_text["tool_calls"][0]["function"]["arguments"] = "Rome"
    with pytest.raises(CannotRender, match="arguments of a call of weather are not a JSON object"):
        template.encode([user("a"), as_text], [TOOL])


def test_content_beside_tool_calls_is_kept_where_the_template_keeps_it(qwen3, llama3_1, published):
    messages = [user("Weather in Rome?"), calling("Rome", "Let me see.")]
    (text,) = trained_texts(load_template(qwen3, "qwen").encode(messages, [TOOL]), qwen3)
    assert text.startswith("Let me see.\n<tool_call>")
    template = load_template(llama3_1, str(published / "meta-llama-Llama-3.1-8B-Instruct.jinja"))
    (text,) = trained_texts(template.encode(messages, [TOOL]), llama3_1)
    assert text == '{"name": "weather", "parameters": {"town": "Rome"}}<|eot_id|>'


def test_deepseek_is_handed_arguments_as_the_text_that_its_template_wants(deepseek):
    template = load_template(deepseek, None)
    messages = [user("Weather in Rome?"), calling("Rome"), result("sunny"), assistant("Sunny.")]
    (sample,) = template.encode(messages, [TOOL])
    called, said = trained_texts([sample], deepseek)
    assert '```json\n{"town": "Rome"}\n```' in called
    assert said == "Sunny.<｜end▁of▁sentence｜>"
    assert sample.input_ids[: spans(sample)[-1][0]] == template.prompt(messages[:3], [TOOL])


def test_a_call_that_the_template_does_not_write_is_refused(llama3_1):
    with pytest.raises(CannotRender, match="leaves out a tool call"):
        load_template(llama3_1, None).encode([user("a"), calling("Rome")], [TOOL])


@pytest.mark.parametrize("name", ["qwen", "qwen3", "qwen3_nothink"])
def test_calls_in_qwens_format_are_read_back(name, qwen3):
    template = load_template(qwen3, name)
    (sample,) = template.encode([user("Weather?"), calling("Rome", "Let me see.")], [TOOL])
    start, end = spans(sample)[0]
    message = template.parse(sample.input_ids[start:end])
    function = {"name": "weather", "arguments": {"town": "Rome"}}
    assert message["tool_calls"] == [{"type": "function", "function": function}]
    assert message["content"] == "Let me see."


@pytest.mark.parametrize("file", [None, "meta-llama-Llama-3.1-8B-Instruct.jinja"])
def test_calls_in_llama_3s_format_are_read_back(file, llama3_1, published):
    template = load_template(llama3_1, str(published / file) if file else "llama3")
    (sample,) = template.encode([user("Weather?"), calling("Rome")], [TOOL])
    start, end = spans(sample)[0]
    (call,) = template.parse(sample.input_ids[start:end])["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"town": "Rome"}}


def test_json_that_is_no_call_stays_text(qwen3, llama3_1):
    for tokenizer, name in ((qwen3, "qwen"), (llama3_1, "llama3"), (qwen3, "chatml")):
        template = load_template(tokenizer, name)
        for text in ('{"name": "Rome"', '{"town": "Rome"}', "<tool_call>\nweather\n</tool_call>"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert template.parse(ids) == {"role": "assistant", "content": text}
    call = '{"name": "weather", "parameters": {}}'
    ids = qwen3(call, add_special_tokens=False)["input_ids"]
    assert load_template(qwen3, "qwen").parse(ids)["content"] == call, "another model's format"


def test_thoughts_are_read_back(qwen3, published):
    template = load_template(qwen3, None)
    answer = assistant("Four.", reasoning_content="Two and two…")
    (sample,) = template.encode([user("2+2?"), answer])
    start, end = spans(sample)[0]
    assert template.parse(sample.input_ids[start:end]) == answer
    opened = load_template(qwen3, str(published / "Qwen-QwQ-32B.jinja"), enable_thinking=True)
    ids = qwen3("Two and two…\n</think>\n\nFour.", add_special_tokens=False)["input_ids"]
    assert opened.parse(ids) == answer
    assert opened.parse(ids[:3])["content"] == "", "cut off while it thinks"


def test_a_prompt_that_opens_a_thought_is_told_and_the_answer_is_trained_from_where_they_part(qwen3, published):
    template = load_template(qwen3, str(published / "Qwen-QwQ-32B.jinja"))
    assert any("asks with other words" in note for note in template.notes)
    for words in ("Paris.", "<thinking> of it"):
        (sample,) = template.encode([user("a"), assistant(words)])
        assert trained_texts([sample], qwen3) == [f"{words}<|im_end|>"]


def test_a_prompt_and_an_answer_that_part_in_the_middle_of_a_token_part_before_it(qwen3, published):
    template = load_template(qwen3, str(published / "GLM-4.7-Flash.jinja"))
    assert template.prompt_text([user("a")]).endswith("<think>")
    (sample,) = template.encode([user("a"), assistant("b")])
    assert trained_texts([sample], qwen3) == ["</think>b<|im_end|>"]
    assert sample.straddled == 0


def test_the_end_token_is_what_ends_every_answer_and_not_what_ends_a_conversation(fixture_path, published):
    markers = ("<|end|>", "<|user|>", "<|assistant|>", "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>")
    tokenizer = with_markers("tokenizer-qwen3", fixture_path("tokenizer-qwen3"), markers)
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    template = load_template(tokenizer, str(published / "microsoft-Phi-3.5-mini-instruct.jinja"))
    assert trained_texts(template.encode(messages), tokenizer) == ["b<|end|>", "d<|end|>"]
    tokenizer.eos_token, before = "<|END_OF_TURN_TOKEN|>", tokenizer.eos_token
    try:
        template = load_template(tokenizer, str(published / "Cohere2MoE.jinja"))
        texts = trained_texts(template.encode(messages), tokenizer)
    finally:
        tokenizer.eos_token = before
    assert [text.rpartition("d")[2] for text in texts[1:]] == ["<|END_TEXT|><|END_OF_TURN_TOKEN|>"]


def test_a_template_that_moves_the_system_message_is_trained_behind_the_prompt_that_serving_sends(qwen3, published):
    template = load_template(qwen3, str(published / "mistralai-Mistral-Nemo-Instruct-2407.jinja"))
    qwen3.bos_token, before = "<|endoftext|>", qwen3.bos_token
    try:
        template = load_template(qwen3, str(published / "mistralai-Mistral-Nemo-Instruct-2407.jinja"))
    finally:
        qwen3.bos_token = before
    messages = [system("Be brief."), user("a"), assistant("b"), user("c"), assistant("d")]
    samples = template.encode(messages)
    assert trained_texts(samples, qwen3) == ["b<|im_end|>", "d<|im_end|>"]
    for sample, answer in zip(samples, (2, 4), strict=True):
        assert sample.input_ids[: spans(sample)[0][0]] == template.prompt(messages[:answer])
        assert "Be brief." in text_of(qwen3, sample.input_ids)


def test_an_end_token_that_the_template_writes_only_before_a_next_turn_is_put_behind_the_last_too(qwen3, tmp_path):
    path = tmp_path / "later.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' and not loop.last %}{{ '\\n<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = load_template(qwen3, str(path))
    (sample,) = template.encode([user("a"), assistant("b"), user("c"), assistant("d")])
    assert trained_texts([sample], qwen3) == ["b\n<|im_end|>", "d\n<|im_end|>"]
    assert not any("ends no answer" in note for note in template.notes)


def test_a_template_without_end_tokens_ends_the_last_answer_with_the_tokenizers(qwen3, tmp_path):
    path = tmp_path / "endless.jinja"
    path.write_text(
        "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}\nassistant:{% endif %}"
    )
    template = load_template(qwen3, str(path))
    assert "ends no answer" in template.notes[-1]
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    (sample,) = template.encode(messages)
    assert trained_texts([sample], qwen3) == [" b", " d<|im_end|>"]
    (sample,) = template.encode(messages[:3])
    assert trained_texts([sample], qwen3) == [" b"], "more follows: this is not the end"


def test_a_template_whose_turns_end_with_the_next_header_trains_that_header(fixture_path):
    markers = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    tokenizer = with_markers("tokenizer-qwen3", fixture_path("tokenizer-qwen3"), markers)
    template = load_template(tokenizer, "glm4")
    (sample,) = template.encode([user("a"), assistant("b"), user("c"), assistant("d")])
    assert trained_texts([sample], tokenizer) == ["\nb<|user|>", "\nd<|im_end|>"]
    assert {"<|user|>", "<|observation|>", "<|im_end|>"} == {tokenizer.decode([i]) for i in template.stop_ids}


def test_an_answer_that_the_template_swallows_is_refused(qwen3, tmp_path):
    path = tmp_path / "swallows.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'user' or m.content %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = load_template(qwen3, str(path))
    with pytest.raises(CannotRender, match="leaves out the answer"):
        template.encode([user("a"), assistant("")])
    path.write_text(path.read_text().replace("{{ m.content }}", "{{ m.content[:3] }}"))
    with pytest.raises(CannotRender, match="leaves out words"):
        load_template(qwen3, str(path)).encode([user("a"), assistant("Paris.")])


def test_arguments_keep_their_letters(qwen3):
    template = load_template(qwen3, "qwen")
    (text,) = trained_texts(template.encode([user("天气?"), calling("罗马")], [TOOL]), qwen3)
    assert json.loads(text.split("\n")[1])["arguments"] == {"town": "罗马"}
    assert "罗马" in text
