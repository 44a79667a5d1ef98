"""Every chat template that can be had, and what burnish makes of conversations with it.

`published()` lists them: llama.cpp's, TRL's and axolotl's collections, tokenizers with a template of their own, and
burnish's. `outcomes(one)` trains nothing and knows no template: it looks, for each conversation of `CASES`, at what is
trained, and holds it against the text that serving sends. A turn is exact or the row is refused; all else is an
AssertionError. tests/chat/test_published.py runs it, scripts/templates_table.py writes what it found.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import fixtures
from conversations import (
    LOOK_ALIKES,
    TOOL,
    assistant,
    calling,
    load_tokenizer,
    result,
    spans,
    system,
    text_of,
    user,
    with_markers,
)

from burnish.chat.named import named_templates
from burnish.chat.template import CannotRender, ChatTemplate, load_template
from burnish.types import Encoded, Message

COLLECTIONS = {"llama.cpp": "templates-llamacpp", "TRL": "templates-trl", "axolotl": "templates-axolotl"}
COUNTS = {"llama.cpp": 70, "TRL": 72, "axolotl": 36}
TOKENIZERS = {
    "SmolLM2": ("smollm2", None),
    "Qwen3": ("tokenizer-qwen3", None),
    "Llama 3": ("tokenizer-llama3", None),
    "Llama 3.1": ("tokenizer-llama3_1", None),
    "Gemma 3": ("tokenizer-gemma3", None),
    "DeepSeek-V3": ("tokenizer-deepseek_v3", None),
    "the first Qwen with chatml": ("qwen-tiktoken", "chatml"),
}
END_TOKENS = ("<|END_OF_TURN_TOKEN|>",)  # of tokenizers whose templates write other markers before it: Cohere's
MARKER = re.compile(
    r"<[|｜][^<>\s{}]{1,40}?[|｜]>|\[/?[A-Z_]{3,}\]|</?s>|<(?:bos|eos|start_of_turn|end_of_turn|turn\||\|turn)>|<sop>"
    r"|\[gMASK\]|\]~b\]|\[e~\[|\]~!b\[|<SPECIAL_\d+>|<seed:[be]os>|</?(?:beginning|end)_of_sentence>|<sep>|</?assistant>"
    r"|<end_of_utterance>|\[\|\w+\|\]|<\|[a-z_]+>|<[a-z_]+\|>"
)


# ---- templates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """`source`: a collection, "tokenizer" or "burnish"."""

    source: str
    name: str

    @property
    def fixture(self) -> str:
        """What must be fetched for it."""
        return TOKENIZERS[self.name][0] if self.source == "tokenizer" else COLLECTIONS.get(self.source, "")


def published() -> list[Published]:
    """Those whose fixture is here."""
    found = []
    for source, fixture in COLLECTIONS.items():
        if fixtures.is_fetched(fixture):
            found += [Published(source, path.stem) for path in _files(fixture)]
    found += [Published("tokenizer", name) for name, (of, _) in TOKENIZERS.items() if fixtures.is_fetched(of)]
    return [*found, *(Published("burnish", name) for name in named_templates())]


@cache
def load(one: Published, **settings: bool) -> tuple[ChatTemplate, Any]:
    if one.source == "tokenizer":
        fixture, name = TOKENIZERS[one.name]
        return load_template(_own(fixture), name, **settings), _own(fixture)
    if one.source == "burnish":
        return load_template(stand_in("burnish"), one.name, **settings), stand_in("burnish")
    jinja = _path(one).read_text(encoding="utf-8")
    tokenizer = stand_in(one.source, next((token for token in END_TOKENS if token in jinja), "<|im_end|>"))
    return load_template(tokenizer, str(_path(one)), **settings), tokenizer


@cache
def stand_in(source: str, end_token: str = "<|im_end|>") -> Any:
    """Qwen3's tokenizer with the markers of a whole collection in place of theirs."""
    if source == "burnish":
        markers = {marker for template in named_templates().values() for marker in template.special}
    else:
        files = _files(COLLECTIONS[source])
        markers = {marker for path in files for marker in MARKER.findall(path.read_text(encoding="utf-8"))}
    folder = fixtures.folder_of("tokenizer-qwen3")
    tokenizer = with_markers.__wrapped__(
        "tokenizer-qwen3", folder, tuple(sorted(markers | {"<s>"}))
    )  # not a shared one
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<s>", end_token, None
    return tokenizer


@cache
def _own(fixture: str) -> Any:
    return load_tokenizer(fixture, fixtures.folder_of)


@cache
def _files(fixture: str) -> list[Path]:
    return sorted(fixtures.folder_of(fixture).rglob("*.jinja"))


def _path(one: Published) -> Path:
    return next(path for path in _files(one.fixture) if path.stem == one.name)


# ---- conversations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A conversation. Words like Answer7one are the assistant's, words like Question7one are not."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    settings: dict[str, bool] = field(default_factory=dict)
    own_marker: bool = False  # `<END>` in it stands for the template's own end token


LEARNT = re.compile(r"(?:Answer|Thought|Said|Town)7\w+")
GIVEN = re.compile(r"(?:Question|Rule|Result|Unlearnt)7\w+")
MARKED = re.compile(r"7[a-z]\w+")  # either; without its first letters, which a token may share with what stands before

Q1, Q2, Q3 = user("Question7one?"), user("Question7two?"), user("Question7three?")
A1, A2, A3 = assistant("Answer7one."), assistant("Answer7two.\n\nMore."), assistant("答案 Answer7three. 🚀")
T1 = assistant("Answer7one.", reasoning_content="Thought7one.")
T2 = assistant("Answer7two.", reasoning_content="Thought7two,\n\nand more.")
CALL, CALL2 = calling("Town7one"), calling("Town7two")
SUNNY, RAINY = result("Result7one"), result("Result7two")
TALK = [system("Rule7one."), Q1, A1, Q2, A2, Q3, A3]


def silent(message: Message) -> Message:
    """The same turn out of the loss."""
    text = json.dumps(message, ensure_ascii=False)
    text = LEARNT.sub(lambda word: "Unlearnt7" + word[0].lower(), text)
    return {**json.loads(text), "train": False}


def parallel(content: str | None = None) -> Message:
    calls = [calling("Town7one")["tool_calls"][0], calling("Town7two")["tool_calls"][0]]  # type: ignore[typeddict-item]
    return assistant(content, tool_calls=[calls[0], {**calls[1], "id": "call00002"}])


def as_text(message: Message) -> Message:
    """The same calls with the arguments as OpenAI's API hands them over."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]  # type: ignore[typeddict-item]
    ]
    return {**message, "tool_calls": calls}


def bare(text: str) -> Message:
    """A result that does not say of what."""
    return {"role": "tool", "content": text}


PLAIN = {
    "question": Case([Q1, A1]),
    "system and turns": Case(TALK),
    "newlines and spaces": Case([Q1, assistant("\n  Answer7one.\n"), Q2, assistant("  Answer7two. ")]),
    "look-alikes": Case([user("Question7one? " + LOOK_ALIKES), A1, user("Question7two? " + LOOK_ALIKES), A2]),
    "an empty answer": Case([Q1, assistant(""), Q2, A2]),
    "its own end token in an answer": Case([Q1, assistant("Answer7one<END> and Answer7two."), Q2, A3], own_marker=True),
    "a tag in an answer": Case([Q1, assistant("Write <think> and </think>, Answer7one."), Q2, A2]),
    "an open tag in an answer": Case([Q1, assistant("Answer7one: <think>"), Q2, A2]),
}
MASKS = {
    "without the first": Case([Q1, silent(A1), Q2, A2, Q3, A3]),
    "without the middle": Case([Q1, A1, Q2, silent(A2), Q3, A3]),
    "without the last": Case([Q1, A1, Q2, A2, Q3, silent(A3)]),
    "mask_history": Case([Q1, silent(A1), Q2, silent(A2), Q3, A3], settings={"mask_history": True}),
    "train_on_prompt": Case(TALK, settings={"train_on_prompt": True}),
    "train_on_prompt without the middle": Case([Q1, A1, Q2, silent(A2), Q3, A3], settings={"train_on_prompt": True}),
}
SYSTEMS = {
    "system": Case([system("Rule7one."), Q1, A1]),
    "system in the middle": Case([system("Rule7one."), Q1, A1, system("Rule7two."), Q2, A2]),
}
THOUGHTS = {
    "a thought": Case([Q1, T1]),
    "thoughts": Case([Q1, T1, Q2, T2]),
    "a thought in tags": Case([Q1, assistant("<think>\nThought7one.\n</think>\n\nAnswer7one.")]),
    "a thought in the first turn only": Case([Q1, T1, Q2, A2]),
    "a thought in the last turn only": Case([Q1, A1, Q2, T2]),
    "thoughts without the first": Case([Q1, silent(T1), Q2, T2]),
    "thoughts without the last": Case([Q1, T1, Q2, silent(T2)]),
    "thoughts, mask_history": Case([Q1, silent(T1), Q2, T2], settings={"mask_history": True}),
    "thoughts, train_on_prompt": Case([Q1, T1, Q2, T2], settings={"train_on_prompt": True}),
    "thoughts, train_on_prompt without the first": Case([Q1, silent(T1), Q2, T2], settings={"train_on_prompt": True}),
}
TOOLS = {
    "a call": Case([Q1, CALL, SUNNY, A2], [TOOL]),
    "calls one after the other": Case([Q1, CALL, SUNNY, CALL2, RAINY, A3], [TOOL]),
    "parallel calls": Case([Q1, parallel(), SUNNY, {**RAINY, "tool_call_id": "call00002"}, A3], [TOOL]),
    "words beside a call": Case([Q1, calling("Town7one", "Said7one."), SUNNY, A2], [TOOL]),
    "an empty string beside a call": Case([Q1, calling("Town7one", ""), SUNNY, A2], [TOOL]),
    "arguments as text": Case([Q1, as_text(CALL), SUNNY, A2], [TOOL]),
    "a result that does not say of what": Case([Q1, CALL, bare("Result7one"), A2], [TOOL]),
    "ends in a call": Case([system("Rule7one."), Q1, A2, Q2, CALL], [TOOL]),
    "a call, then talk": Case([Q1, CALL, SUNNY, A2, Q2, A3], [TOOL]),
    "tools that nobody calls": Case([system("Rule7one."), Q1, A1, Q2, A2], [TOOL]),
    "a call of a tool that is not declared": Case([Q1, CALL, SUNNY, A2]),
    "a thought before a call": Case(
        [Q1, {**CALL, "reasoning_content": "Thought7one."}, SUNNY, {**A2, "reasoning_content": "Thought7two."}], [TOOL]
    ),
    "without the call": Case([Q1, silent(CALL), SUNNY, A2], [TOOL]),
    "without what follows the call": Case([Q1, CALL, SUNNY, silent(A2)], [TOOL]),
    "tools, mask_history": Case([Q1, silent(CALL), SUNNY, A2], [TOOL], {"mask_history": True}),
    "tools, train_on_prompt": Case([Q1, CALL, SUNNY, A2], [TOOL], {"train_on_prompt": True}),
}
CASES = PLAIN | MASKS | SYSTEMS | THOUGHTS | TOOLS


# ---- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of one conversation."""

    refused: str = ""  # the reason; "" where it is trained
    samples: int = 0
    texts: tuple[str, ...] = ()  # what is trained, turn by turn
    asks_otherwise: bool = False  # a prompt that is not what stands before the answer


def outcomes(one: Published, **settings: bool) -> dict[str, Outcome]:
    template, tokenizer = load(one, **settings)
    where = f"{one.source} {one.name}"
    return {name: outcome(template, tokenizer, case, f"{where}: {name}") for name, case in CASES.items()}


def outcome(template: ChatTemplate, tokenizer: Any, case: Case, where: str) -> Outcome:
    messages = _with_own_marker(template, tokenizer, case.messages) if case.own_marker else case.messages
    try:
        samples = template.encode(messages, case.tools, **case.settings)
    except CannotRender as error:
        return Outcome(refused=str(error))
    if case.settings.get("train_on_prompt"):
        _check_whole(template, tokenizer, samples, messages, case, where)
        return Outcome(samples=len(samples))
    wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
    runs = [(sample, start, end) for sample in samples for start, end in spans(sample)]
    if len(runs) < len(wanted):  # an empty answer that nothing ends: not one token of it
        wanted = [i for i in wanted if words_of(messages[i])]
    assert len(runs) == len(wanted), f"{where}: {len(runs)} spans for {len(wanted)} turns"
    asks_otherwise = [
        _check_turn(template, tokenizer, *run, messages, i, case, where) for run, i in zip(runs, wanted, strict=True)
    ]
    texts = tuple(text_of(tokenizer, sample.input_ids[start:end]) for sample, start, end in runs)
    return Outcome("", len(samples), texts, any(asks_otherwise))


def _check_turn(
    template: ChatTemplate,
    tokenizer: Any,
    sample: Encoded,
    start: int,
    end: int,
    messages: list[Message],
    index: int,
    case: Case,
    where: str,
) -> bool:
    """One span against the texts that serving sends before and after the turn. Says whether the prompt is another."""
    text = text_of(tokenizer, sample.input_ids[start:end])
    where = f"{where}, message {index}: {text!r}"
    message = messages[index]
    # 1. all of the turn, each word once, and nobody else's
    learnt, expected = LEARNT.findall(text), words_of(message)
    beside = LEARNT.findall(message["content"] or "") if message.get("tool_calls") else []
    assert sorted(learnt) in (sorted(expected), sorted(word for word in expected if word not in beside)), where
    assert not GIVEN.search(text), where
    assert not any(mark in text for mark in ('\\"town', "I am the answer", "'town'")), where
    # 2. to its end: the end token may be missing only where the conversation goes on, and the template writes none
    rest = text_of(tokenizer, sample.input_ids[end:])
    ends = sample.input_ids[end - 1] in template.stop_ids
    assert ends or GIVEN.search(rest) or LEARNT.search(rest), f"{where}: no end token"
    inside = [token for token in sample.input_ids[start : end - 1] if token in template.stop_ids]
    assert not inside or case.own_marker, f"{where}: goes on behind its end token"
    # 3. what stands before it is the prompt
    asked = template.prompt_text(messages[:index], case.tools)
    answered = _written(template, messages[: index + 1], case)
    exact = sample.input_ids[:start] == template.prompt(messages[:index], case.tools)
    if not exact:
        before = text_of(tokenizer, sample.input_ids[:start])
        assert not answered.startswith(asked), f"{where}: the prompt's ids are others"
        assert asked.startswith(before), f"{where}: stands behind {before[-40:]!r}"
    # 4. the words are what the template writes there, to the letter, and so is what closes them
    words = text.removesuffix(text_of(tokenizer, sample.input_ids[end - 1 : end])).rstrip() if ends else text
    close = text[len(words) :]
    if exact and answered.startswith(asked):
        assert answered[len(asked) :].startswith(words), f"{where}: {answered[len(asked) :]!r} is written"
    assert words in answered, f"{where}: {answered!r} is written"
    followed = [*messages[: index + 1], user("More?")], messages[: index + 2]
    texts = answered, *(_written(template, longer, case) for longer in followed)
    is_added = (not template._ending.marker or "tool_calls" in message) and sample.input_ids[
        end - 1
    ] == tokenizer.eos_token_id
    closes = is_added or any(close in text for text in texts)
    assert closes, f"{where}: closed by {close!r}"
    return not exact


def _written(template: ChatTemplate, messages: list[Message], case: Case) -> str:
    """What the template makes of a conversation that asks for nothing."""
    renderer = template._renderer
    try:
        return renderer.render(renderer.chat(messages), renderer.tools(case.tools)).text
    except CannotRender:
        return ""


def _check_whole(
    template: ChatTemplate, tokenizer: Any, samples: list[Encoded], messages: list[Message], case: Case, where: str
) -> None:
    """`train_on_prompt`: every token once, but for the turns that are left out."""
    silent_words = Counter(w for m in messages if not m.get("train", True) for w in MARKED.findall(str(m)))
    before: list[int] = []
    for sample in samples:
        new = next((i for i, (a, b) in enumerate(zip(before, sample.input_ids, strict=False)) if a != b), len(before))
        pairs = list(zip(sample.input_ids, sample.trained, strict=True))
        all_words = Counter(MARKED.findall(text_of(tokenizer, sample.input_ids[new:])))
        trained = Counter(MARKED.findall(text_of(tokenizer, [token for token, is_trained in pairs if is_trained])))
        assert not any(sample.trained[:new]), f"{where}: trained twice"
        assert all_words - trained <= silent_words, f"{where}: {all_words - trained} are not trained"
        assert not silent_words & trained, f"{where}: {silent_words & trained} are trained"
        if not silent_words:
            assert all(sample.trained[new:]), f"{where}: not all is trained"
        before = sample.input_ids
    if not silent_words:
        plain = template.encode(messages, case.tools)
        assert [sample.input_ids for sample in samples] == [sample.input_ids for sample in plain], where


def words_of(message: Message) -> list[str]:
    calls = [json.dumps(call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return LEARNT.findall(" ".join([message.get("reasoning_content", ""), message["content"] or "", *calls]))


def _with_own_marker(template: ChatTemplate, tokenizer: Any, messages: list[Message]) -> list[Message]:
    marker = text_of(tokenizer, template.stop_ids[:1])
    return [{**m, "content": (m["content"] or "").replace("<END>", marker)} for m in messages]
