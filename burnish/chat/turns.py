"""Where the words of an assistant turn stand in the rendered text: found by rendering prefixes of the conversation.

    P  the conversation before the turn, with the header of the answer    …<|im_start|>assistant\\n
    R  the conversation up to and with the turn                           …<|im_start|>assistant\\nHi!<|im_end|>\\n

What R has beyond P, up to its end token, is what the model must learn to write. No template has to be known for that.
A text that looks like a marker, typed by a user, moves nothing: it stands inside P.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from burnish.chat.ending import Ending
from burnish.chat.pieces import Rendered
from burnish.chat.render import QUESTION, CannotRender, Chat, Renderer, Tools, common_length
from burnish.chat.tools import calls_for_template

_PROBE = "\ue000burnish\ue000"  # begins like no answer that a person wrote


@dataclass(frozen=True)
class Turn:
    """`rendered.text[start:end]` is the turn: words and end token."""

    rendered: Rendered  # R
    start: int
    end: int
    ended: bool  # whether an end token stands at `end`
    after_prompt: bool = True  # whether P, as serving sends it, is what stands before `start`


def find_turn(renderer: Renderer, ending: Ending, chat: Chat, index: int, tools: Tools, whole: Rendered) -> Turn:
    """The turn `chat[index]`, as it is when it is the answer that has just been given. Raises CannotRender."""
    message = chat[index]
    rendered = whole if index == len(chat) - 1 else renderer.render(chat[: index + 1], tools)
    prompt = renderer.render(chat[:index], tools, generation=True)
    if rendered.text.startswith(prompt.text):
        turn = _with_end(ending, message, rendered, len(prompt.text))
    else:
        start = _common_start(renderer, chat, index, tools, prompt.text, rendered.text)
        if start is None:
            turn = _behind_prompt(renderer, ending, message, tools, prompt, rendered)
        else:
            turn = replace(_with_end(ending, message, rendered, start), after_prompt=False)
    _require_words(renderer, message, turn)
    if message.get("tool_calls"):
        _require_one_end(ending, message, turn)
    if len(message.get("tool_calls") or ()) > 1:
        _require_each_call(renderer, chat, index, tools, rendered.text)
    return turn


def place_in_history(renderer: Renderer, chat: Chat, index: int, tools: Tools) -> tuple[int, int]:
    """[start, end) of the words of an earlier turn, `chat[index]`, in the text of the whole conversation.

    There a template may write them otherwise than when they were given. Other words in their place show where they
    stand: all that the two texts do not share. Raises CannotRender.
    """
    text = renderer.render(chat, tools).text
    other = _with_other_words(renderer, chat, index, tools)
    start = common_length(text, other)
    rest = min(len(text), len(other)) - start
    return start, len(text) - min(rest, common_length(text[::-1], other[::-1]))


def _with_other_words(renderer: Renderer, chat: Chat, index: int, tools: Tools) -> str:
    words = {"role": "assistant", "content": _PROBE}
    call = {"id": "call00001", "function": {"name": _PROBE, "arguments": {}}}  # results may not stand without a call
    for other in (words, {"role": "assistant", "tool_calls": calls_for_template([call], as_text=False)}):
        try:
            return renderer.render([*chat[:index], other, *chat[index + 1 :]], tools).text
        except CannotRender:
            continue
    raise CannotRender("it does not show where an answer stands that is to be left out")


def split_reasoning(text: str, *, opened: bool = False) -> tuple[str, str]:
    """Thoughts between <think> tags, and the answer behind them. `opened`: the prompt wrote the first tag.

    >>> split_reasoning("<think>\\nTwo and two…\\n</think>\\n\\nFour.")
    ('Two and two…', 'Four.')
    """
    before, closed, after = text.partition("</think>")
    if closed:
        return before.removeprefix("<think>").strip(), after.lstrip("\n")
    if opened or text.startswith("<think>"):  # cut off while thinking
        return text.removeprefix("<think>").strip(), ""
    return "", text


def _common_start(renderer: Renderer, chat: Chat, index: int, tools: Tools, prompt: str, text: str) -> int | None:
    """Where the turn begins if the prompt's header is not what stands before it.

    R1-like templates ask with `<|Assistant|><think>\\n` and write an answer without thoughts as `<|Assistant|>Hi`.
    The answer may begin by chance as the prompt goes on; an answer that does not shows where they part.
    None where they part before the header.
    """
    probe = renderer.render([*chat[:index], {**chat[index], "content": _PROBE}], tools).text
    start = min(common_length(prompt, text), common_length(prompt, probe))
    history = renderer.render(chat[:index], tools).text
    if history == prompt:  # a template that always asks; what it writes for a user shows where its header begins
        try:
            history = renderer.render([*chat[:index], {"role": "user", "content": _PROBE}], tools).text
        except CannotRender:
            return None
    return start if start >= common_length(prompt, history) else None


def _behind_prompt(
    renderer: Renderer, ending: Ending, message: dict[str, Any], tools: Tools, prompt: Rendered, rendered: Rendered
) -> Turn:
    """The turn behind the prompt that serving sends, where the template writes that otherwise once it is answered.

    Mistral Nemo's leaves the system message out then, Hermes's moves a line break. How the template writes the turn
    itself is seen in a conversation of one question; the text must end with just that.
    """
    question = [QUESTION]
    asked = renderer.render(question, tools, generation=True).text
    alone = renderer.render([*question, message], tools)
    written = alone.text[len(asked) :]
    if not (alone.text.startswith(asked) and rendered.text.endswith(written)):
        raise CannotRender("the chat template renders what stands before the answer differently once it is given")
    start = len(prompt.text)
    shift = start - (len(rendered.text) - len(written))
    plain = tuple((low + shift, high + shift) for low, high in rendered.plain if low + shift >= start)
    return _with_end(ending, message, Rendered(prompt.text + written, prompt.plain + plain), start)


def _with_end(ending: Ending, message: dict[str, Any], rendered: Rendered, start: int) -> Turn:
    text, end, ended = ending.close(rendered.text, start, calls=bool(message.get("tool_calls")))
    return Turn(rendered if text == rendered.text else Rendered(text, rendered.plain), start, end, ended)


def _require_words(renderer: Renderer, message: dict[str, Any], turn: Turn) -> None:
    """A template may leave a turn's words out without a word. What cannot be trained whole is refused.

    Content beside tool calls is the exception: several published templates drop it, by design.
    """
    written = turn.rendered.text[turn.start : turn.end]
    content, calls = message.get("content"), message.get("tool_calls")
    thoughts, words = split_reasoning(renderer.written(content.strip())) if isinstance(content, str) else ("", "")
    thoughts = renderer.written(message.get("reasoning_content") or thoughts)
    if not calls and words.strip() not in written:
        raise CannotRender("the chat template leaves out words of the answer")
    if thoughts.strip() not in written:
        raise CannotRender("the chat template leaves out the answer's reasoning")
    for call in calls or ():
        if renderer.written(call["function"]["name"]) not in written:
            raise CannotRender("the chat template leaves out a tool call")


def _require_one_end(ending: Ending, message: dict[str, Any], turn: Turn) -> None:
    """Nemotron's writes words beside a call as an answer of their own: a model that answers stops there."""
    if not ending.marker or ending.marker in str(message):
        return
    if ending.marker in turn.rendered.text[turn.start : turn.end - len(ending.marker)]:
        raise CannotRender("the chat template goes on behind the end token of the answer")


def _require_each_call(renderer: Renderer, chat: Chat, index: int, tools: Tools, text: str) -> None:
    """Of several calls in a turn a template may write one alone: gpt-oss's the first, GigaChat's as well."""
    calls = chat[index]["tool_calls"]
    for fewer in (calls[:-1], calls[1:]):
        try:
            without = renderer.render([*chat[:index], {**chat[index], "tool_calls": fewer}], tools).text
        except CannotRender:
            continue
        if without == text:
            raise CannotRender("the chat template leaves out a tool call")
