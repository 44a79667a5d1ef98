"""What a template writes around an answer. It is nowhere declared: the template is asked, with small conversations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from burnish.chat.pieces import is_one_token
from burnish.chat.render import QUESTION, RESULT, TOOL, CannotRender, Chat, Renderer, Tools, common_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = "burnish7answer"
_ANSWER = {"role": "assistant", "content": _WORDS}
_RULE = {"role": "system", "content": "A rule."}
_IN_PARTS: Chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (QUESTION, _ANSWER)]

# What published templates put behind tool calls to end them, where it is not what ends other answers
_CALL_ENDS = ("<|eom_id|>", "<|call|>", "<|calls|>", "<|tool_response>", "<|observation|>")

# Some templates take no conversation without tools, or no content but in parts
_QUESTIONS: tuple[tuple[Chat, Tools], ...] = (
    ([QUESTION, _ANSWER], None),
    ([_RULE, QUESTION, _ANSWER], [TOOL]),
    (_IN_PARTS, None),
)


@dataclass(frozen=True)
class Ending:
    """What stands behind the words of an answer.

    ChatML: tail "<|im_end|>\\n", marker "<|im_end|>". Some templates write the marker only once another turn follows
    (`in_tail` is False). GLM's write none: there the header of the next turn, `<|user|>`, ends an answer.
    """

    tail: str | None = None  # what follows the last answer; None where the template refused every question
    marker: str = ""  # the end token's text, "" where there is none
    before: str = ""  # what the template puts between the words and the marker
    in_tail: bool = True
    after_calls: bool = True  # whether a marker that is not in the tail follows tool calls too
    headers: tuple[str, ...] = ()  # of turns that follow, where there is no marker
    known: tuple[str, ...] = ()  # every text that may end a turn, if one ends otherwise than a plain answer does

    def close(self, text: str, start: int, *, calls: bool) -> tuple[str, int, bool]:
        """Where the turn ends that begins at `start` and is the last of `text`, and whether an end token stands there.

        The text comes back with its end token where the template would add it only later. Raises CannotRender.
        """
        words_end = len(text) - len(self.tail or "")
        plain = not calls or (self.marker and self.in_tail)
        if self.tail is not None and plain and words_end >= start and text.endswith(self.tail):
            if self.marker and not self.in_tail:
                return self._with_marker(text, words_end)
            end = words_end + len(self.before) + len(self.marker) if self.marker else words_end
            return text, end, bool(self.marker)
        ends = [at + len(end) for end in self.known if (at := text.rfind(end, start)) >= 0]
        if ends:
            return text, max(ends), True
        words_end = max(start, len(text.rstrip()))
        if not calls and (self.marker or words_end == start):
            raise CannotRender("the chat template leaves out the answer")
        if self.marker and not self.in_tail and self.after_calls:
            return self._with_marker(text, words_end)
        return text, words_end, False

    def _with_marker(self, text: str, words_end: int) -> tuple[str, int, bool]:
        text = text[:words_end] + self.before + self.marker
        return text, len(text), True


def find_ending(renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> Ending:
    ending = _ask_for_ending(renderer, tokenizer)
    call_ends = (text for text in _CALL_ENDS if text in renderer.source([TOOL]))
    known = dict.fromkeys([str(tokenizer.eos_token or ""), ending.marker, *call_ends])
    return replace(ending, known=tuple(text for text in known if text and is_one_token(text, tokenizer)))


def _ask_for_ending(renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> Ending:
    for chat, tools in _QUESTIONS:
        tail = _behind_words(renderer, chat, tools)
        if tail is None:
            continue
        question = next(message for message in chat if message["role"] == "user")
        follows = _behind_words(renderer, [*chat, question], tools) or ""
        at, marker = _end_marker(tail, follows, tokenizer, _before_words(renderer, chat, tools))
        if marker:
            return Ending(tail, marker, tail[:at])
        return _ending_by_what_follows(renderer, tokenizer, tail, follows, question)
    return Ending()


def find_lead(renderer: Renderer) -> str | None:
    """What stands between the prompt and the words: " " for Mistral's, mostly "".

    None where the prompt is not what the template writes before an answer: R1's opens a thought.
    """
    try:
        text = renderer.render([QUESTION, _ANSWER]).text
        prompt = renderer.render([QUESTION], generation=True).text
    except CannotRender:
        return ""
    return text[len(prompt) :].partition(_WORDS)[0] if text.startswith(prompt) else None


def _before_words(renderer: Renderer, chat: Chat, tools: Tools) -> str:
    """What the assistant itself writes before the words of an answer: `<|close|>think…` for Kimi K3, mostly nothing."""
    try:
        asked = renderer.render(chat[:-1], tools, generation=True).text
    except CannotRender:
        return ""
    text = _text(renderer, chat, tools).rpartition(_WORDS)[0]
    return text[common_length(asked, text) :]


def _end_marker(tail: str, follows: str, tokenizer: PreTrainedTokenizerBase, before: str) -> tuple[int, str]:
    """The end token in what stands behind an answer, and its place.

    It is the tokenizer's where that stands there always (for Cohere behind another marker), else the first marker that
    does not stand before the words as well: Phi-3 puts the tokenizer's behind the last answer only, and `<|end|>`
    behind each.
    """
    eos = str(tokenizer.eos_token or "")
    at = tail.find(eos) if eos else -1
    if at >= 0 and tail[: at + len(eos)] == follows[: at + len(eos)]:
        return at, eos
    return _first_marker(tail, tokenizer, but=before)


def _first_marker(text: str, tokenizer: PreTrainedTokenizerBase, but: str = "") -> tuple[int, str]:
    """The first token that was added to the vocabulary, the longest if several begin there; none that is in `but`."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    found = [(text.find(m), -len(m), m) for m in added if m.strip() and m in text and m not in but]
    if found:
        return min(found)[0], min(found)[2]
    marker = text.strip()  # it may be a token without having been added, as in some sentencepiece vocabularies
    token = tokenizer.convert_tokens_to_ids(marker) if marker else None
    return (0, "") if token is None or token == tokenizer.unk_token_id else (text.index(marker), marker)


def _ending_by_what_follows(
    renderer: Renderer, tokenizer: PreTrainedTokenizerBase, tail: str, follows: str, question: dict
) -> Ending:
    at, marker = _first_marker(follows, tokenizer)
    behind_call = _behind_call(renderer)
    header = _text(renderer, [question], None).partition(QUESTION["content"])[0]
    if marker and marker not in header:
        before = follows[:at]
        return Ending(tail, marker, before, in_tail=False, after_calls=behind_call.startswith(before + marker))
    header_of_result = _first_marker(behind_call, tokenizer)[1]
    return Ending(tail, headers=tuple(text for text in (marker, header_of_result) if text))


def _behind_words(renderer: Renderer, chat: Chat, tools: Tools) -> str | None:
    text = _text(renderer, chat, tools)
    return text.rpartition(_WORDS)[2] if _WORDS in text else None


def _behind_call(renderer: Renderer) -> str:
    chat = [QUESTION, renderer.call_shape.turn()]
    called, answered = _text(renderer, chat, [TOOL]), _text(renderer, [*chat, RESULT], [TOOL])
    return answered[common_length(called, answered) :]


def _text(renderer: Renderer, chat: Chat, tools: Tools) -> str:
    try:
        return renderer.render(chat, tools).text
    except CannotRender:
        return ""
