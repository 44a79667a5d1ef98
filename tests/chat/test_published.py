"""Seventy published templates, none of them known to burnish: each turn is trained exactly, or the row is refused.

One real tokenizer with the markers of all of them stands in for theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conversations import (
    CONVERSATIONS,
    TOOL,
    assistant,
    calling,
    result,
    spans,
    system,
    text_of,
    trained_texts,
    user,
    with_markers,
)

from burnish.chat.template import CannotRender, load_template

MARKER = re.compile(
    r"<[|｜][^<>\s{}]{1,40}?[|｜]>|\[/?[A-Z_]{3,}\]|</?s>|<(?:bos|eos|start_of_turn|end_of_turn|turn\||\|turn)>|<sop>"
    r"|\[gMASK\]|\]~b\]|\[e~\[|\]~!b\[|<SPECIAL_\d+>|<seed:[be]os>|</?(?:beginning|end)_of_sentence>|<sep>|</?assistant>"
)
# Answers with a word that stands nowhere else, to be looked for in what is trained
CHATS = {
    "question": ([user("Q one?"), assistant("Answer7one.")], None),
    "turns": (
        [system("Rule."), user("Q one?"), assistant("Answer7one."), user("Q two?"), assistant("答案7二。🚀")],
        None,
    ),
    "newline": ([user("Q one?"), assistant("\n  Answer7one.\n"), user("Q two?"), assistant("Answer7two.")], None),
    "look-alikes": (CONVERSATIONS["look-alikes"], None),
    "thoughts": ([user("Q one?"), assistant("Answer7one.", reasoning_content="Thought7one.")], None),
    "forgotten": (
        [
            user("Q one?"),
            assistant("Answer7one.", reasoning_content="Thought7one."),
            user("Q two?"),
            assistant("Answer7two.", reasoning_content="Thought7two."),
        ],
        None,
    ),
    "tools": (
        [
            user("Q one?"),
            calling("Town7one"),
            result("sunny"),
            assistant("Answer7two."),
            user("Q two?"),
            assistant("Answer7three."),
        ],
        [TOOL],
    ),
}
PLAIN = ("question", "turns", "newline", "look-alikes")  # nothing but words
# Published for conversations with tools alone, or with variables that nobody passes
NEEDS_MORE = ("firefunction", "Hermes-2-Pro", "Hermes-3", "command-r-plus")
WORD = re.compile(r"(?:Answer|Thought|Town|答案)7\w+")


@pytest.fixture(scope="module")
def templates(fixture_path: Callable[[str], Path]) -> list[Path]:
    return sorted(fixture_path("templates-llamacpp").rglob("*.jinja"))


@pytest.fixture(scope="module")
def tokenizer(fixture_path: Callable[[str], Path], templates: list[Path]):
    markers = {marker for path in templates for marker in MARKER.findall(path.read_text(encoding="utf-8"))}
    tokenizer = with_markers("tokenizer-qwen3", fixture_path("tokenizer-qwen3"), tuple(sorted(markers)))
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = None
    return tokenizer


def words_of(message: dict) -> list[str]:
    calls = [call["function"]["arguments"]["town"] for call in message.get("tool_calls", ())]
    return [*WORD.findall(message.get("reasoning_content", "")), *WORD.findall(message["content"] or ""), *calls]


@pytest.mark.parametrize("chat", CHATS)
def test_every_turn_is_trained_just_once_and_nothing_else_is_or_the_row_is_refused(chat, templates, tokenizer):
    messages, tools = CHATS[chat]
    assert len(templates) == 70
    refused = {}
    for path in templates:
        try:
            template = load_template(tokenizer, str(path))
            samples = template.encode(messages, tools)
        except CannotRender as error:
            refused[path.stem] = str(error)
            continue
        turns = trained_texts(samples, tokenizer)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        assert [WORD.findall(turn) for turn in turns] == [words_of(messages[i]) for i in answers], path.stem
        for turn, i in zip(turns, answers, strict=True):
            assert (messages[i]["content"] or "").strip() in turn, path.stem
            assert "Q one?" not in turn and "I am the answer" not in turn, path.stem
        for sample in samples:
            (start, end) = spans(sample)[-1]
            assert sample.input_ids[end - 1] in template.stop_ids, path.stem
            before = text_of(tokenizer, sample.input_ids[:start])
            assert any(template.prompt_text(messages[:i], tools).startswith(before) for i in answers), path.stem
            if chat in PLAIN and not any("asks with other words" in note for note in template.notes):
                assert sample.input_ids[:start] in [template.prompt(messages[:i], tools) for i in answers], path.stem
    if chat in PLAIN:
        without_system = {"google-gemma-2-2b-it"} if chat == "turns" else set()
        needs_more = {name for name in refused if any(part in name for part in NEEDS_MORE)}
        assert set(refused) == needs_more | without_system
