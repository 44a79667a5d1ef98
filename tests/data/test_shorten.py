"""What is shortened, with every published template: headers whole, no end token behind half an answer, oldest first."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import sweep
from conversations import TOOL, assistant, calling, result, spans, system, text_of, user

from burnish.chat.template import CannotRender, ChatTemplate
from burnish.data.arguments import DataArguments
from burnish.data.encode import TOO_LONG, encode_sft
from burnish.data.shorten import END_OF_ANSWER, HEAD_OF_USER, NO_ROOM, OLDEST_ROUNDS, needed, shorten
from burnish.types import Encoded, Example, Message

CUTOFFS = (8, 24, 45, 70, 100, 140, 190, 250, 320, 400)


def words(count: int) -> str:
    return " ".join(f"w{number}" for number in range(count))


RULE = system("Rule7one.")
TALK = [
    user(f"Question7one {words(60)}"),
    assistant(f"Answer7one {words(12)}"),
    user(f"Question7two {words(40)}"),
    assistant(f"Answer7two {words(25)}"),
    user(f"Question7three {words(30)}"),
    assistant(f"Answer7three {words(20)}"),
]
THOUGHTS = [
    *TALK[:2],
    TALK[2],
    assistant(f"Answer7two {words(15)}", reasoning_content=f"Thought7two {words(20)}"),
    TALK[4],
    assistant(f"Answer7three {words(15)}", reasoning_content=f"Thought7three {words(20)}"),
]
CALLS = [
    *TALK[:2],
    user(f"Question7two {words(40)}"),
    calling("Town7one"),
    result(f"Result7one {words(15)}"),
    assistant(f"Answer7two {words(20)}"),
]
CONVERSATIONS: dict[str, tuple[list[Message], list[dict[str, Any]] | None]] = {
    "talk": (TALK, None),
    "thoughts": (THOUGHTS, None),
    "calls": (CALLS, [TOOL]),
}


def encoder(template: ChatTemplate, tools: list | None, *, last_only: bool) -> Any:
    def encode(messages, *, train_on_prompt=None) -> list[Encoded]:
        return template.encode(messages, tools, mask_history=last_only, train_on_prompt=bool(train_on_prompt))

    return encode


@pytest.mark.parametrize("one", sweep.published(), ids=lambda one: f"{one.source}-{one.name}".replace(" ", "-"))
def test_what_is_shortened_is_what_the_template_gives_for_less_and_half_an_answer_has_no_end(one, fixture_path):
    if one.source != "tokenizer":
        fixture_path("tokenizer-qwen3")
    template, tokenizer = sweep.load(one)
    number = sum(map(ord, one.name))  # every template a few of the lengths, every length many templates
    for talk, (messages, tools) in CONVERSATIONS.items():
        whole = with_system(template, messages, tools)
        if not whole:
            continue
        for step in (0, 5):
            cutoff_len = CUTOFFS[(number + step + len(talk)) % len(CUTOFFS)]
            check(template, tokenizer, whole, tools, cutoff_len, f"{one.source} {one.name}: {talk} at {cutoff_len}")


@pytest.mark.parametrize("one", sweep.published()[::3], ids=lambda one: f"{one.source}-{one.name}".replace(" ", "-"))
def test_every_sample_of_a_row_fits_or_is_counted(one, fixture_path):
    if one.source != "tokenizer":
        fixture_path("tokenizer-qwen3")
    template, _ = sweep.load(one)
    messages = with_system(template, TALK, None)
    if not messages:  # test_published.py lists the templates that take no such conversation
        return
    example, whole = Example(tuple(messages)), template.encode(messages)
    cutoff_len = CUTOFFS[sum(map(ord, one.name)) % len(CUTOFFS)]
    long = sum(needed(encoded) > cutoff_len for encoded in whole)

    outcome = encode_sft(example, template, DataArguments(cutoff_len=cutoff_len))
    assert len(outcome.samples) + outcome.dropped.count(NO_ROOM) == len(whole)
    assert all(len(sample) <= cutoff_len and sample.num_trained for sample in outcome.samples)
    outcome = encode_sft(example, template, DataArguments(cutoff_len=cutoff_len, overlong="drop"))
    assert (len(outcome.samples), outcome.dropped, outcome.cut) == (len(whole) - long, (TOO_LONG,) * long, ())
    outcome = encode_sft(example, template, DataArguments(cutoff_len=cutoff_len, train_on_prompt=True))
    assert all(len(sample) <= cutoff_len and sample.num_trained for sample in outcome.samples)


def with_system(template: ChatTemplate, messages: list[Message], tools: list | None) -> list[Message]:
    """With a system message where the template takes one; nothing where it refuses the conversation."""
    for whole in ([RULE, *messages], messages):
        try:
            template.encode(whole, tools)
        except CannotRender:
            continue
        return whole
    return []


def check(template: ChatTemplate, tokenizer: Any, messages: list, tools: Any, cutoff_len: int, where: str) -> None:
    last_only = len(template.encode(messages, tools)) > 1  # as encode_sft does: a sample an answer
    encode = encoder(template, tools, last_only=last_only)
    if needed(encode(messages)[-1]) <= cutoff_len:
        return
    try:
        short = shorten(messages, encode, cutoff_len)
    except CannotRender:  # a bad row. That template writes the thoughts of a second answer, and not those of a first
        assert "Kimi-K2-Thinking: thoughts" in where
        return
    rounds = [i for i, message in enumerate(messages) if message["role"] == "user"]
    first = messages[:1] if messages[0]["role"] == "system" else []
    last_round = [*first, *messages[rounds[-1] :]]
    if short.dropped:
        assert short.dropped == NO_ROOM, where
        assert least_prompt(encode, last_round) >= cutoff_len, where
        return
    ids, trained = short.encoded.input_ids, short.encoded.trained
    start, end = spans(short.encoded)[-1]
    text = text_of(tokenizer, ids)
    assert needed(short.encoded) <= cutoff_len, where
    if "Rule7one." in text_of(tokenizer, encode(last_round)[-1].input_ids):  # Mistral's moves it out of some
        assert "Rule7one." in text, f"{where}: the system message is gone"
    # 1. the oldest rounds went, and no more than had to
    left = [i for i in rounds if f"{messages[i]['content'].split()[0]} w0" in text]
    lost = [i for i in rounds if i not in left]
    assert (lost and lost != rounds[-1:]) == (OLDEST_ROUNDS in short.cut), where
    assert left in (rounds[len(rounds) - len(left) :], []) or HEAD_OF_USER in short.cut, where
    kept = [*first, *messages[(left or rounds[-1:])[0] :]] if HEAD_OF_USER not in short.cut else last_round
    if OLDEST_ROUNDS in short.cut and len(kept) < len(last_round):
        longer = [*first, *messages[rounds[rounds.index(left[0]) - 1] :]]
        assert needed(encode(longer)[-1]) > cutoff_len, f"{where}: too much is gone"
    # 2. the ids are those of the shortened conversation, to where they end
    cuts = with_tail_of_question(kept, text) if HEAD_OF_USER in short.cut else [kept]
    same = next((same for cut in cuts if (same := encode(cut)[-1]).input_ids[: len(ids)] == ids), None)
    assert same is not None, f"{where}: {text!r}"
    assert same.trained[: len(ids)] == trained, where
    assert spans(same)[len(spans(short.encoded)) - 1][0] == start, f"{where}: the header is cut"
    # 3. an end token stands behind whole answers alone
    if END_OF_ANSWER in short.cut:
        in_result = end < spans(same)[-1][0]  # the cut fell behind a whole turn
        assert in_result or (end == len(ids) and ids[-1] not in template.stop_ids), where
        assert needed(same) > cutoff_len, where
    else:
        assert end == needed(same), where


def least_prompt(encode: Any, last_round: list) -> int:
    """Tokens before the first answer of the round when no more than the end of its question is left."""
    at = next(i for i, message in enumerate(last_round) if message["role"] == "user")
    content = last_round[at]["content"]
    least = [*last_round[:at], user(content[-8:]), *last_round[at + 1 :]]
    return encode(least)[-1].trained.index(True)


def with_tail_of_question(messages: list, text: str) -> list[list]:
    """Conversations whose question ends as that in the text does: white space before it may be the template's."""
    at = next(i for i, message in enumerate(messages) if message["role"] == "user")
    content = messages[at]["content"]
    tails = (content[start:] for start in range(len(content) - 7))
    found = islice((tail for tail in tails if tail.strip() in text), 3)
    return [[*messages[:at], {**messages[at], "content": tail}, *messages[at + 1 :]] for tail in found]


@pytest.mark.parametrize("cutoff_len", range(20, 60, 3))
def test_a_question_is_never_emptied_to_make_room_for_half_an_answer(cutoff_len, fixture_path):
    fixture_path("tokenizer-qwen3")
    template, tokenizer = sweep.load(sweep.Published("burnish", "chatml"))
    messages = [RULE, user(words(50)), assistant(words(80))]
    outcome = encode_sft(Example(tuple(messages)), template, DataArguments(cutoff_len=cutoff_len))
    assert outcome.samples or outcome.dropped == (NO_ROOM,)
    for sample in outcome.samples:
        assert "w48 w49<|im_end|>" in text_of(tokenizer, sample.input_ids.tolist())
