"""What is trained, against the real tokenizers and templates: serving's ids, then the answer and its end token."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from conversations import (
    CONVERSATIONS,
    LOOK_ALIKES,
    assistant,
    load_tokenizer,
    spans,
    system,
    text_of,
    trained_texts,
    user,
)

from burnish.chat.template import CannotRender, ChatTemplate, load_template
from burnish.errors import UserError
from burnish.types import Message


@dataclass(frozen=True)
class Family:
    """A tokenizer, a template (None: its own), and how that template writes an answer that is the last."""

    tokenizer: str
    template: str | None
    words: Callable[[str], str]
    end: str


def as_it_is(words: str) -> str:
    return words


def behind_a_thought(words: str) -> str:
    return "<think>\n\n</think>\n\n" + words.lstrip("\n")


FAMILIES = {
    "SmolLM2": Family("smollm2", None, as_it_is, "<|im_end|>"),
    "Qwen3": Family("tokenizer-qwen3", None, behind_a_thought, "<|im_end|>"),
    "Qwen3 as qwen": Family("tokenizer-qwen3", "qwen", as_it_is, "<|im_end|>"),
    "the first Qwen": Family("qwen-tiktoken", "qwen", as_it_is, "<|im_end|>"),
    "Llama 3": Family("tokenizer-llama3", None, str.strip, "<|eot_id|>"),
    "Llama 3.1": Family("tokenizer-llama3_1", None, str.strip, "<|eot_id|>"),
    "Gemma 3": Family("tokenizer-gemma3", None, str.strip, "<end_of_turn>"),
    "DeepSeek-V3": Family("tokenizer-deepseek_v3", None, as_it_is, "<｜end▁of▁sentence｜>"),
}


@pytest.fixture(scope="module")
def load(fixture_path: Callable[[str], Path]) -> Callable[[str], tuple]:
    @cache
    def tokenizer_of(name: str):
        return load_tokenizer(name, fixture_path)

    def loaded(family: str, **settings) -> tuple:
        tokenizer = tokenizer_of(FAMILIES[family].tokenizer)
        return tokenizer, load_template(tokenizer, FAMILIES[family].template, **settings)

    return loaded


def transformers_ids(tokenizer, template: ChatTemplate, messages: list[Message], **more) -> list[int]:
    """What plain transformers makes of a conversation."""
    return tokenizer.apply_chat_template(
        messages, chat_template=template.jinja, tokenize=True, return_dict=False, **more
    )


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_the_ids_that_serving_sends_and_then_the_answer(family, conversation, load):
    tokenizer, template = load(family)
    messages = CONVERSATIONS[conversation]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    last_turns = []
    for sample in template.encode(messages):
        start, end = spans(sample)[-1]
        prompts = {i: template.prompt(messages[:i]) for i in answers}
        last = [i for i in answers if prompts[i] == sample.input_ids[:start]]
        assert len(last) == 1
        last_turns += last
        assert prompts[last[0]] == transformers_ids(
            tokenizer, template, messages[: last[0]], add_generation_prompt=True
        )
        assert tokenizer.decode([sample.input_ids[end - 1]]) == FAMILIES[family].end
        prefixes = [messages[:i] for i in range(last[0] + 1, len(messages) + 1)]
        if sample.straddled:
            wholes = [tokenizer.apply_chat_template(p, chat_template=template.jinja, tokenize=False) for p in prefixes]
            assert unicodedata.normalize("NFC", text_of(tokenizer, sample.input_ids)) in map(nfc, wholes)
        else:
            assert sample.input_ids in [transformers_ids(tokenizer, template, prefix) for prefix in prefixes]
    assert last_turns == sorted(set(last_turns))
    assert last_turns[-1] == answers[-1]


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)  # as Qwen's tokenizers do


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_words_of_the_assistant_and_its_end_token_are_trained(family, conversation, load):
    tokenizer, template = load(family)
    messages = CONVERSATIONS[conversation]
    answers = [str(message["content"]) for message in messages if message["role"] == "assistant"]
    expected = [FAMILIES[family].words(words) + FAMILIES[family].end for words in answers]
    assert trained_texts(template.encode(messages), tokenizer) == [nfc(text) for text in expected]


@pytest.mark.parametrize("family", ["Qwen3 as qwen", "the first Qwen", "Gemma 3"])
def test_a_token_that_straddles_the_border_is_cut_there_and_counted(family, load):
    tokenizer, template = load(family)
    header = "<start_of_turn>model" if family == "Gemma 3" else "<|im_start|>assistant"
    answer = "\nprint(1)"
    if family == "Gemma 3":  # its own template trims answers; one that does not shows what its tokenizer does
        template.jinja = template.jinja.replace("| trim", "")
        tokenizer.chat_template, own = template.jinja, tokenizer.chat_template
        template = load_template(tokenizer, None)
        tokenizer.chat_template = own
    (sample,) = template.encode([user("Code?"), assistant(answer)])
    prompt = template.prompt([user("Code?")])
    merged = tokenizer(f"{header}\n{answer}", add_special_tokens=False)["input_ids"]
    assert text_of(tokenizer, merged) == f"{header}\n{answer}"
    assert "\n\n" in [tokenizer.decode([i]) for i in merged], "this tokenizer has one token for both newlines"
    assert sample.straddled == 1
    assert sample.input_ids[: len(prompt)] == prompt
    assert sample.trained.index(True) == len(prompt)
    assert "\n\n" not in [tokenizer.decode([i]) for i in sample.input_ids]


def test_a_straddled_turn_in_the_history_gets_a_sample_of_its_own_because_serving_does_not_cut_it(load):
    tokenizer, template = load("Qwen3 as qwen")
    messages = CONVERSATIONS["newlines in history"]
    first, second = template.encode(messages)
    assert (first.straddled, second.straddled) == (1, 0)
    assert trained_texts([first], tokenizer) == ["\n\nb<|im_end|>"]
    assert trained_texts([second], tokenizer) == ["d<|im_end|>"]
    assert second.input_ids == transformers_ids(tokenizer, template, messages)


@pytest.mark.parametrize("split_special_tokens", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_look_alike_in_a_question_never_moves_what_is_trained(family, split_special_tokens, load):
    _, template = load(family, split_special_tokens=split_special_tokens)

    def trained_ids(question: str) -> list[list[int]]:
        samples = template.encode([user(question), assistant("One."), user(question), assistant("Two.")])
        return [sample.input_ids[a:b] for sample in samples for a, b in spans(sample)]

    assert trained_ids(LOOK_ALIKES) == trained_ids("A question?")


@pytest.mark.parametrize("family", FAMILIES)
def test_look_alikes_are_plain_text_with_split_special_tokens_and_markers_are_not(family, load):
    tokenizer, template = load(family, split_special_tokens=True)
    end_id = tokenizer.convert_tokens_to_ids(FAMILIES[family].end)
    _, as_served = load(family)
    question, answer = user(LOOK_ALIKES), assistant(f"You typed {FAMILIES[family].end}!")
    (sample,) = template.encode([question, answer])
    markers = as_served.encode([user("a"), assistant("b")])[0].input_ids.count(end_id)
    assert sample.input_ids.count(end_id) == markers
    assert as_served.encode([question, answer])[0].input_ids.count(end_id) > markers
    assert text_of(tokenizer, sample.input_ids) == text_of(tokenizer, as_served.encode([question, answer])[0].input_ids)
    assert sample.input_ids[: spans(sample)[-1][0]] == template.prompt([question])


def test_train_false_takes_a_turn_out_and_mask_history_all_but_the_last(load):
    tokenizer, template = load("SmolLM2")
    messages = [user("a"), assistant("b", train=False), user("c"), assistant("d"), user("e"), assistant("f")]
    assert trained_texts(template.encode(messages), tokenizer) == ["d<|im_end|>", "f<|im_end|>"]
    assert trained_texts(template.encode(messages, mask_history=True), tokenizer) == ["f<|im_end|>"]
    messages[-1]["train"] = False
    with pytest.raises(CannotRender, match="no turn of the assistant"):
        template.encode(messages, mask_history=True)


def test_train_on_prompt_trains_every_token_once(load):
    tokenizer, template = load("SmolLM2")
    messages = CONVERSATIONS["system and many turns"]
    (sample,) = template.encode(messages, train_on_prompt=True)
    assert all(sample.trained)
    kept_out = [*messages[:2], {**messages[2], "train": False}, *messages[3:]]
    (sample,) = template.encode(kept_out, train_on_prompt=True)
    not_trained = [i for i, trained in zip(sample.input_ids, sample.trained, strict=True) if not trained]
    assert text_of(tokenizer, not_trained) == "Hello. How can I help?<|im_end|>"
    with pytest.raises(UserError, match="mask_history"):
        template.encode(messages, train_on_prompt=True, mask_history=True)


def test_train_on_prompt_does_not_train_again_what_an_earlier_sample_began_with(load):
    tokenizer, template = load("Qwen3")
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    first, second = template.encode(messages, train_on_prompt=True)
    assert all(first.trained)
    known = second.trained.index(True)
    assert text_of(tokenizer, second.input_ids[:known]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert all(second.trained[known:])


def test_the_default_system_message_stands_where_there_is_none(load):
    _, template = load("SmolLM2", default_system="Be kind.")
    assert template.prompt_text([user("a")]).startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    assert template.prompt_text([system("Be brief."), user("a")]).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    (sample,) = template.encode([user("a"), assistant("b", train=False), user("c"), assistant("d")])
    assert (
        sample.input_ids
        == template.encode([system("Be kind."), user("a"), assistant("b", train=False), user("c"), assistant("d")])[
            0
        ].input_ids
    )


def test_an_answer_that_nobody_asked_for_is_not_trained(load):
    tokenizer, template = load("SmolLM2")
    messages = [assistant("Welcome!"), user("a"), assistant("b")]
    assert trained_texts(template.encode(messages), tokenizer) == ["b<|im_end|>"]
    with pytest.raises(CannotRender, match="no turn"):
        template.encode(messages[:1])


def test_what_a_template_refuses_is_told_in_its_own_words(load):
    _, template = load("Gemma 3")
    with pytest.raises(CannotRender, match="must alternate user/assistant"):
        template.encode([user("a"), user("b"), assistant("c")])
    assert issubclass(CannotRender, ValueError)


def test_words_that_a_template_leaves_out_are_refused(load):
    _, template = load("Llama 3.1")
    with pytest.raises(CannotRender, match="leaves out the answer's reasoning"):
        template.encode([user("a"), assistant("b", reasoning_content="Because.")])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_read_back_is_the_answer_that_was_given(family, load):
    _, template = load(family)
    for words in ("Paris.", "Four.\n\nAnything else?", "我是一个助手。🚀👩‍🚀"):
        (sample,) = template.encode([user("a"), assistant(words)])
        start, end = spans(sample)[-1]
        assert template.parse(sample.input_ids[start:end]) == {"role": "assistant", "content": words}
        assert template.parse(sample.input_ids[start : end - 1])["content"] == words, "cut off before its end"


def test_generation_stops_at_the_tokenizers_end_token_and_at_the_templates(load):
    tokenizer, template = load("Llama 3")
    assert [tokenizer.decode([i]) for i in template.stop_ids] == ["<|end_of_text|>", "<|eot_id|>"]
    tokenizer, template = load("the first Qwen")
    assert [tokenizer.decode([i]) for i in template.stop_ids] == ["<|endoftext|>", "<|im_end|>"]
