"""The templates of burnish: what each writes, that it is the published format, and which tokenizers it fits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import llamafactory
import pytest
from conversations import (
    CONVERSATIONS,
    TOOL,
    assistant,
    calling,
    load_tokenizer,
    result,
    spans,
    system,
    trained_texts,
    user,
    with_markers,
)

from burnish.chat.named import fitting_names, named_templates
from burnish.chat.template import CannotRender, load_template
from burnish.errors import UserError

PROMISED = {
    *("default", "alpaca", "vicuna", "chatml", "qwen", "qwen3", "qwen3_nothink", "smollm2", "llama2", "llama3"),
    *("mistral", "gemma", "phi", "deepseek", "glm4", "baichuan2", "yi", "internlm2", "empty"),
}
EVERY_MARKER = tuple(dict.fromkeys(marker for t in named_templates().values() for marker in t.special))
FITS_ANY = {"alpaca", "default", "deepseek", "empty", "llama2", "mistral", "vicuna"}

# [system "S", user "Q1", assistant "A1", user "Q2", assistant "A2"] with </s> as end token and <s> as begin token
WRITTEN = {
    "default": "S\nHuman: Q1\nAssistant: A1</s>\nHuman: Q2\nAssistant: A2</s>\n",
    "alpaca": "S\n\n### Instruction:\nQ1\n\n### Response:\nA1</s>\n\n### Instruction:\nQ2\n\n### Response:\nA2</s>\n\n",
    "vicuna": "S USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
    "qwen3": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA2<|im_end|>\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Q1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>",
    "mistral": "<s>[INST] S\n\nQ1[/INST] A1</s>[INST] Q2[/INST] A2</s>",
    "gemma": "<s><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n<start_of_turn>"
    "user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
    "phi": "<|system|>\nS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\nA2"
    "<|end|>\n",
    "deepseek": "<s>S\n\nUser: Q1\n\nAssistant: A1</s>User: Q2\n\nAssistant: A2</s>",
    "deepseek3": "<s>S<｜User｜>Q1<｜Assistant｜>A1</s><｜User｜>Q2<｜Assistant｜>A2</s>",
    "glm4": "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2",
    "baichuan2": "S<reserved_106>Q1<reserved_107>A1<reserved_106>Q2<reserved_107>A2",
    "empty": "SQ1A1Q2A2",
}
WRITTEN["qwen"] = WRITTEN["qwen3_nothink"] = WRITTEN["smollm2"] = WRITTEN["yi"] = WRITTEN["chatml"]
WRITTEN["internlm2"] = "<s>" + WRITTEN["chatml"]
# How the last answer is trained, from where the prompt ends
TRAINED = {
    **dict.fromkeys(("chatml", "qwen", "qwen3_nothink", "smollm2", "yi", "internlm2"), "{}<|im_end|>"),
    **dict.fromkeys(("default", "vicuna", "deepseek", "mistral"), " {}</s>"),
    **dict.fromkeys(("alpaca", "deepseek3", "baichuan2", "empty"), "{}</s>"),
    "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>",
    "llama2": " {} </s>",
    "llama3": "{}<|eot_id|>",
    "gemma": "{}<end_of_turn>",
    "phi": "{}<|end|>",
    "glm4": "\n{}</s>",
}
ENDLESS = {
    "baichuan2": "A1<reserved_106>",
    "empty": "A1",
    "glm4": "\nA1<|user|>",
}  # how the first one is, where otherwise
CHAT = [system("S"), user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]


@pytest.fixture(scope="module")
def everything(fixture_path: Callable[[str], Path]):
    """SmolLM2's tokenizer with the markers of every model, <s> and </s>."""
    tokenizer = with_markers("smollm2", fixture_path("smollm2"), (*EVERY_MARKER, "<s>", "</s>"))
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<s>", "</s>", None
    return tokenizer


@pytest.fixture
def smollm2(fixture_path: Callable[[str], Path]):
    return load_tokenizer("smollm2", fixture_path)


def test_every_promised_name_is_there_and_says_where_its_format_comes_from():
    assert set(named_templates()) >= PROMISED
    for template in named_templates().values():
        assert template.jinja.startswith("{#- ")
        assert "Format:" in template.jinja.partition("#}")[0] or template.name == "empty"


@pytest.mark.parametrize("name", named_templates())
def test_a_named_template_writes_the_published_format(name, everything):
    template = load_template(everything, name)
    text = everything.apply_chat_template(CHAT, chat_template=template.jinja, tokenize=False)
    assert text == WRITTEN[name]
    assert template.notes == [note for note in template.notes if "ends no answer" in note]


@pytest.mark.parametrize("name", named_templates())
def test_with_a_named_template_the_answers_and_their_end_tokens_are_trained(name, everything):
    template = load_template(everything, name)
    samples = template.encode(CHAT)
    first = ENDLESS.get(name, TRAINED[name].format("A1"))
    assert trained_texts(samples, everything) == [first, TRAINED[name].format("A2")]
    for sample in samples:
        start, end = spans(sample)[-1]
        assert sample.input_ids[end - 1] in template.stop_ids
        assert sample.input_ids[:start] in (template.prompt(CHAT[:2]), template.prompt(CHAT[:4]))


def same_text(tokenizer, name: str, own: str | None, conversations: list, tools=None) -> list[str]:
    named = load_template(tokenizer, name)
    for messages in conversations:
        for prompt in (False, True):
            one, other = (
                tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=jinja, tokenize=False, add_generation_prompt=prompt
                )
                for jinja in (named.jinja, own)
            )
            assert one == other
    return [note for note in named.notes if "renders differently" in note]


PLAIN = list(CONVERSATIONS.values())


def test_smollm2_is_smollm2s_own(smollm2):
    assert same_text(smollm2, "smollm2", None, PLAIN) == []


def test_qwen3_is_qwen3s_own_with_thoughts_and_tools(fixture_path):
    tokenizer = load_tokenizer("tokenizer-qwen3", fixture_path)
    thinking = [
        [user("a"), assistant("b", reasoning_content="c"), user("d"), assistant("<think>\ne\n</think>\n\nf")],
        [user("a"), calling("Rome", "Let me see.", reasoning_content="c"), result("1"), result("2"), assistant("e")],
        [system("s"), user("a"), calling("Rome", ""), result("1"), assistant("\n\ne"), user("f"), assistant("g")],
        [user("a"), user("<tool_response>\n1\n</tool_response>"), assistant("b"), system("late"), user("c")],
    ]
    assert same_text(tokenizer, "qwen3", None, PLAIN + thinking) == []
    assert same_text(tokenizer, "qwen3", None, PLAIN + thinking, [TOOL, TOOL]) == []


def test_gemma_is_gemma_3s_own(fixture_path):
    assert same_text(load_tokenizer("tokenizer-gemma3", fixture_path), "gemma", None, PLAIN) == []


def test_llama3_is_llama_3s_own(fixture_path):
    assert same_text(load_tokenizer("tokenizer-llama3_1", fixture_path), "llama3", None, PLAIN) == []


def test_deepseek3_is_deepseek_v3s_own(fixture_path):
    assert same_text(load_tokenizer("tokenizer-deepseek_v3", fixture_path), "deepseek3", None, PLAIN) == []


def test_qwen_writes_tools_as_qwen2_5_does(fixture_path):
    tokenizer = load_tokenizer("tokenizer-qwen3", fixture_path)
    own = (fixture_path("templates-llamacpp") / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text(encoding="utf-8")
    calls = [
        [system("s"), user("a"), calling("Rome", "Let me see."), result("1"), result("2"), assistant("b")],
        [system("s"), user("a"), calling("Rome", ""), result("1"), assistant("b"), user("c"), assistant("d")],
    ]
    same_text(tokenizer, "qwen", own, calls, [TOOL])


def test_a_template_whose_markers_are_no_tokens_of_the_tokenizer_is_refused_with_those_that_fit(smollm2):
    with pytest.raises(UserError) as refused:
        load_template(smollm2, "llama3")
    assert "<|start_header_id|>, <|end_header_id|>, <|eot_id|> are not one token of it each" in str(refused.value)
    fitting = str(refused.value).rpartition("fit this tokenizer: ")[2].split(", ")
    chatml = {"chatml", "internlm2", "qwen", "qwen3", "qwen3_nothink", "smollm2", "yi"}
    assert set(fitting) == chatml | FITS_ANY == set(fitting_names(smollm2))
    for name in fitting:
        load_template(smollm2, name)


def test_a_name_that_is_not_there_is_refused_with_the_one_that_was_meant(smollm2):
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        load_template(smollm2, "alpacca")


def test_a_tokenizer_without_a_template_is_told_which_names_fit(smollm2):
    smollm2.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template of its own; name one with --template.*smollm2"):
        load_template(smollm2, None)


def test_a_named_template_wins_over_the_tokenizers_own_and_one_line_says_so(smollm2):
    assert load_template(smollm2, None).notes == []
    template = load_template(smollm2, "alpaca")
    (note,) = template.notes
    assert note == "template alpaca renders differently from the tokenizer's own chat template, which is not used"
    assert "### Instruction" in template.jinja
    assert template.prompt_text([user("a")]).startswith("Below is an instruction")


def test_a_jinja_file_is_a_template_and_its_mistake_is_told_with_its_line(smollm2, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }}{{ eos_token }}\n{% endfor %}")
    assert load_template(smollm2, str(path)).prompt_text([user("a")]) == "a<|im_end|>\n"
    path.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(UserError, match=r"mine\.jinja:2: is not a jinja template"):
        load_template(smollm2, str(path))
    with pytest.raises(UserError, match="cannot be read"):
        load_template(smollm2, str(tmp_path / "missing.jinja"))


def test_a_plain_template_begins_with_the_begin_token_where_the_tokenizer_itself_does(fixture_path):
    llama = load_tokenizer("tokenizer-llama3_1", fixture_path)
    qwen = load_tokenizer("tokenizer-qwen3", fixture_path)
    assert load_template(llama, "alpaca").prompt_text([user("a")]).startswith("<|begin_of_text|>Below")
    assert load_template(qwen, "alpaca").prompt_text([user("a")]).startswith("Below")


@pytest.mark.parametrize("name", sorted(set(named_templates()) - {"qwen", "qwen3", "qwen3_nothink", "llama3"}))
def test_a_template_without_a_place_for_tools_says_so(name, everything):
    template = load_template(everything, name)
    for messages, tools in (([user("a"), assistant("b")], [TOOL]), ([user("a"), calling("Rome")], None)):
        with pytest.raises(CannotRender, match="no place for"):
            template.encode(messages, tools)
    with pytest.raises(CannotRender, match="no place for"):
        template.encode([user("a"), result("1"), assistant("b")])


# ---- beside LLaMA-Factory's of the same name (docs/templates.md tells the differences, and why) ----------------------

THOUGHT = "<think>\n\n</think>\n\n"
# What burnish writes → what LLaMA-Factory 0.9.5 writes in its place; templates that are not named write the same
DIFFERENT = {
    "alpaca": {"S\n\n###": "S###"},
    "deepseek": {"Assistant: ": "Assistant:"},
    "default": {
        "S\nHuman": "System: S</s>\nHuman",
        "Q1\n": "Q1</s>\n",
        "Q2\n": "Q2</s>\n",
        "Assistant: ": "Assistant:",
    },
    "internlm2": {"<s><|im_start|>user": "<s><|im_start|>system\n{default_system}<|im_end|>\n<|im_start|>user"},
    "llama2": {" A1 ": "A1", " A2 ": "A2"},
    "qwen": {"You are a helpful assistant": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant"},
    "qwen3": {"assistant\nA1": f"assistant\n{THOUGHT}A1", "assistant\n<tool_call>": f"assistant\n{THOUGHT}<tool_call>"},
    "smollm2": {"Hugging Face<": "Hugging Face.<"},
    "vicuna": {"S USER": "SUSER", "ASSISTANT: ": "ASSISTANT:", "questions. USER": "questions.USER"},
}
NO_TEMPLATE_OF_THEIRS = {"baichuan2"}  # gone by 0.9.5
CALL = '[{"name": "weather", "arguments": {"town": "Rome"}}]'
TURNS_OF_THEIRS = {"assistant": ("function", CALL), "tool": ("observation", "sunny")}


@pytest.fixture(scope="module")
def theirs(fixture_path: Callable[[str], Path]) -> dict:
    return llamafactory.templates_of(fixture_path("llamafactory-templates"))


def their_name(name: str) -> str:
    return {"internlm2": "intern2"}.get(name, name)


def ours_as_theirs(text: str, name: str, default_system: str) -> str:
    for ours, their in DIFFERENT.get(name, {}).items():
        text = text.replace(ours, their.replace("{default_system}", default_system))
    return text


@pytest.mark.parametrize("name", sorted(set(named_templates()) - NO_TEMPLATE_OF_THEIRS))
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:]], ids=["system", "no system"])
def test_a_named_template_writes_what_llamafactorys_does_but_for_what_is_listed(name, messages, theirs, everything):
    template, their = load_template(everything, name), theirs[their_name(name)]
    ours = everything.apply_chat_template(messages, chat_template=template.jinja, tokenize=False)
    text = llamafactory.text_with(their, everything, messages)
    assert text == ours_as_theirs(ours, name, their.default_system)


@pytest.mark.parametrize("name", ["qwen", "qwen3", "qwen3_nothink", "llama3"])
def test_tools_and_calls_are_written_as_llamafactory_does(name, theirs, everything):
    messages = [system("S"), user("Q1"), calling("Rome", ""), result("sunny"), assistant("A2")]
    jinja = load_template(everything, name).jinja
    ours = everything.apply_chat_template(messages, tools=[TOOL], chat_template=jinja, tokenize=False)
    turns = [
        system("S"),
        user("Q1"),
        *({"role": r, "content": c} for r, c in TURNS_OF_THEIRS.values()),
        assistant("A2"),
    ]
    text = llamafactory.text_with(theirs[name], everything, turns, json.dumps([TOOL]))
    if name == "llama3":  # theirs puts the system message before the tools, and a date between them
        text = re.sub(r"SCutting.*?\n\n", "", text, flags=re.DOTALL)
        ours = ours.replace("}\n\nS<|eot_id|>", "}\n\n<|eot_id|>")
    assert text == ours_as_theirs(ours, name, theirs[name].default_system)


def test_the_names_that_have_tools_there_and_not_here_are_these(theirs):
    theirs_have = {n for n in named_templates() if n in theirs and theirs[n].format_function.tool_format != "default"}
    ours_have = {name for name, template in named_templates().items() if "tool_calls or []" in template.jinja}
    assert theirs_have - ours_have - {"llama3"} == {"glm4", "mistral"}


@pytest.mark.parametrize("name", [name for name, template in named_templates().items() if template.special])
def test_each_template_with_markers_is_refused_where_they_are_no_tokens(name, fixture_path):
    other = "smollm2" if "<|im_start|>" not in named_templates()[name].special else "tokenizer-llama3_1"
    tokenizer = load_tokenizer(other, fixture_path)
    with pytest.raises(UserError, match="not one token of it each") as refused:
        load_template(tokenizer, name)
    named = str(refused.value).rpartition("fit this tokenizer: ")[2].split(", ")
    assert named == fitting_names(tokenizer) and name not in named and set(named) >= FITS_ANY
