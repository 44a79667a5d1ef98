"""Modelfile: what `ollama create NAME -f Modelfile` reads.

Its TEMPLATE is a Go template, and a jinja one cannot be translated in general. So the chat template is asked with small
conversations what stands around each turn; a Go template of one of two plain shapes is made of the answers, and kept
only if it writes longer conversations exactly as the jinja does. Tools are no part of it. A begin token that the
tokenizer puts before every text is left out: Ollama puts it there too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from burnish.chat.render import common_length
from burnish.chat.template import CannotRender, ChatTemplate
from burnish.types import Message


@dataclass(frozen=True)
class Turns:
    """What stands around the words of each turn: system S, question U, answer A.

    own block    [before_system S after_system | no_system] before_user U after_user before_answer A after_answer …
    in question  before_user [before_system S after_system | no_system] U after_user …
    """

    before_system: str
    after_system: str
    no_system: str  # in place of the three where there is no system message
    before_user: str
    after_user: str
    before_answer: str
    after_answer: str
    asks: str  # after the last question's after_user
    in_question: bool

    def render(self, chat: Sequence[Message]) -> str:
        """What Ollama makes of `go`, for a conversation that ends with a question."""
        system = "".join(message["content"] or "" for message in chat if message["role"] == "system")
        system = self.before_system + system + self.after_system if system else self.no_system
        text = "" if self.in_question else system
        for message in chat:
            if message["role"] == "user":
                text += f"{self.before_user}{system if self.in_question else ''}{message['content']}{self.after_user}"
                system = ""
            elif message["role"] == "assistant":
                text += f"{self.before_answer}{message['content']}{self.after_answer}"
        return text + self.asks

    @property
    def go(self) -> str:
        used_up = '{{ $system = "" }}' if self.in_question else ""
        ask = "{{ if $system }}" + self.before_system + "{{ $system }}" + self.after_system + used_up
        ask += ("{{ else }}" + self.no_system if self.no_system else "") + "{{ end }}"
        above, inside = ("", ask) if self.in_question else (ask, "")
        question = self.before_user + inside + "{{ .Content }}" + self.after_user
        answer = self.before_answer + "{{ .Content }}" + self.after_answer
        return (
            "{{ $system := .System }}" + above + '{{ range .Messages }}{{ if eq .Role "user" }}' + question
            + '{{ else if eq .Role "assistant" }}' + answer + "{{ end }}{{ end }}" + self.asks
        )  # fmt: skip


def modelfile(template: ChatTemplate | None, tokenizer: PreTrainedTokenizerBase) -> str:
    lines = ["# ollama create NAME -f Modelfile", "FROM ."]
    stops = stop_texts(template, tokenizer)
    if template is not None:
        begin, is_added = _begin(template, tokenizer)
        turns = find_turns(template, stops, begin)
        if turns is not None:
            lines.append(f'TEMPLATE """{"" if is_added else begin}{turns.go}"""')
        else:
            lines.append("# No TEMPLATE: this model's chat template has no exact form in Ollama's language.")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop and stop.strip()]
    return "\n".join(lines) + "\n"


def stop_texts(template: ChatTemplate | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that end an answer, as text."""
    if template is None:
        return [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    return [str(tokenizer.convert_ids_to_tokens(id)) for id in template.stop_ids]


def _begin(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """The begin token that the template writes first, "" if none; and whether Ollama would put it there as well."""
    bos, is_added = str(tokenizer.bos_token or ""), False
    if bos:
        ids: Any = tokenizer("a")["input_ids"]
        is_added = ids[:1] == [tokenizer.bos_token_id]
    text = _text(template, [_QUESTION], "")
    # SmolLM2 calls <|im_start|> its begin token; there it is a part of every turn
    return (bos if bos and text.startswith(bos) and (is_added or text.count(bos) == 1) else ""), is_added


def find_turns(template: ChatTemplate, stops: Sequence[str], begin: str) -> Turns | None:
    """The shape that writes conversations as the template does, character by character; None where neither does."""
    try:
        for turns in (_in_question(template, stops, begin), _own_block(template, stops, begin)):
            if turns is not None and _is_plain(turns) and all(_agree(turns, template, chat, begin) for chat in _TRIALS):
                return turns
    except CannotRender:
        pass
    return None


# Words that no template writes, so that what stands between them can be found.
_RULE: Message = {"role": "system", "content": "burnish7rule"}
_QUESTION: Message = {"role": "user", "content": "burnish7question"}
_ANSWER: Message = {"role": "assistant", "content": "burnish7answer"}
_THOUGHT: Message = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nburnish7answer"}  # some forget it later

_TRIALS: tuple[list[Message], ...] = (
    [_QUESTION],
    [_RULE, _QUESTION],
    [_QUESTION, _ANSWER, _QUESTION],
    [_RULE, _QUESTION, _ANSWER, _QUESTION, _ANSWER, _QUESTION],
    [_QUESTION, _THOUGHT, _QUESTION],
)


def _own_block(template: ChatTemplate, stops: Sequence[str], begin: str) -> Turns | None:
    """ChatML, Llama 3, Phi: the system message is a turn like the others."""
    parts = _around_words(template, begin)
    if parts is None:
        return None
    head, asks, before_system, between, to_answer, to_question = parts
    before_user = _behind_stop(_common_end(head, between, to_question), stops)
    after_answer = to_question.removesuffix(before_user)
    after_user = _through_stop(_common_start(asks, to_answer, after_answer), stops)
    return Turns(
        before_system=before_system,
        after_system=between.removesuffix(before_user),
        no_system=head.removesuffix(before_user),
        before_user=before_user,
        after_user=after_user,
        before_answer=to_answer.removeprefix(after_user),
        after_answer=after_answer,
        asks=asks.removeprefix(after_user),
        in_question=False,
    )


def _in_question(template: ChatTemplate, stops: Sequence[str], begin: str) -> Turns | None:
    """Gemma, Mistral: the system message stands at the head of the first question."""
    parts = _around_words(template, begin)
    if parts is None:
        return None
    head, asks, before_system, between, to_answer, to_question = parts
    after_answer = to_question.removesuffix(head)
    after_user = _through_stop(_common_start(asks, to_answer, after_answer), stops)
    return Turns(
        before_system=before_system.removeprefix(head),
        after_system=between,
        no_system="",
        before_user=head,
        after_user=after_user,
        before_answer=to_answer.removeprefix(after_user),
        after_answer=after_answer,
        asks=asks.removeprefix(after_user),
        in_question=True,
    )


def _around_words(template: ChatTemplate, begin: str) -> tuple[str, str, str, str, str, str] | None:
    """head U asks;  before_system S between U …;  … U to_answer A to_question U …"""
    words = "burnish7rule|burnish7question|burnish7answer"
    alone, ruled, longer = (re.split(words, _text(template, chat, begin)) for chat in _TRIALS[:3])
    if (len(alone), len(ruled), len(longer)) != (2, 3, 4):
        return None
    return alone[0], alone[1], ruled[0], ruled[1], longer[1], longer[2]


def _text(template: ChatTemplate, chat: list[Message], begin: str) -> str:
    return template.prompt_text(chat).removeprefix(begin)


def _agree(turns: Turns, template: ChatTemplate, chat: list[Message], begin: str) -> bool:
    return turns.render(chat) == _text(template, chat, begin)


def _is_plain(turns: Turns) -> bool:
    """Whether it can stand between triple quotes, and Go finds no action of its own in it."""
    literals = [value for value in astuple(turns) if isinstance(value, str)]
    return not any("{{" in literal or '"""' in literal for literal in literals)


def _common_start(*texts: str) -> str:
    start = texts[0]
    for text in texts[1:]:
        start = start[: common_length(start, text)]
    return start


def _common_end(*texts: str) -> str:
    return _common_start(*(text[::-1] for text in texts))[::-1]


def _behind_stop(text: str, stops: Sequence[str]) -> str:
    """What stands behind the last stop in it, which ends the turn before."""
    return text[len(_through_stop(text, stops)) :]


def _through_stop(text: str, stops: Sequence[str]) -> str:
    """Up to its last stop and the line breaks behind it; "" where it has none."""
    end = max((text.rindex(stop) + len(stop) for stop in stops if stop and stop in text), default=0)
    return text[: len(text) - len(text[end:].lstrip("\n"))] if end else ""
