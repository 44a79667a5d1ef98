"""A conversation that is longer than `cutoff_len` → one that fits, losing what matters least first.

    1. its oldest rounds (a user's turn and all up to the next one); the system message stays
    2. the head of the last user message, when that lets the answer fit whole
    3. the end of the answer; then its end token is neither placed nor trained, so that no half answer learns to stop

What stands after the last trained token teaches nothing and goes before anything else. Each loss is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

from burnish.types import Encoded, Message

OLDEST_ROUNDS = "oldest turns"
HEAD_OF_USER = "head of the last user message"
END_OF_ANSWER = "end of the answer"
NO_ROOM = "its prompt leaves no room for an answer"

_LEAST = 8  # characters of a user message that stay: an answer to nothing teaches nothing
_SLACK = 4  # tokens: how much more than needed may be cut from a user message, to tokenize it less often


class Encode(Protocol):
    """A chat template with everything set but the messages."""

    def __call__(self, messages: list[Message], *, train_on_prompt: bool | None = None) -> list[Encoded]: ...


@dataclass(frozen=True)
class Shortened:
    encoded: Encoded
    cut: tuple[str, ...] = ()  # what was lost
    dropped: str = ""  # why it is not used after all


def needed(encoded: Encoded) -> int:
    """How many tokens must stay: up to the last trained one. 0 when nothing is trained."""
    return next((index + 1 for index in reversed(range(len(encoded.trained))) if encoded.trained[index]), 0)


def shorten(messages: list[Message], encode: Encode, cutoff_len: int) -> Shortened:
    """Messages that end with an answer and do not fit → a sample of those that do, or why there is none."""
    part, num_rounds = _without_oldest_rounds(_up_to_last_trained(messages), encode, cutoff_len)
    cut = [OLDEST_ROUNDS] if num_rounds else []
    encoded = encode(part)[-1]
    if needed(encoded) > cutoff_len:
        part, is_cut = _without_head_of_user(part, encode, cutoff_len)
        cut += [HEAD_OF_USER] if is_cut else []
        encoded = encode(part)[-1]
    if needed(encoded) > cutoff_len:
        if _prompt_length(part, encode) >= cutoff_len:
            return Shortened(encoded, dropped=NO_ROOM)
        cut.append(END_OF_ANSWER)
        encoded = replace(encoded, input_ids=encoded.input_ids[:cutoff_len], trained=encoded.trained[:cutoff_len])
        end = needed(encoded)  # the cut may have fallen into a tool's result
        encoded = replace(encoded, input_ids=encoded.input_ids[:end], trained=encoded.trained[:end])
    return Shortened(encoded, tuple(cut))


def trained_turns(messages: list[Message]) -> list[int]:
    """Indices of the answers that the loss is on."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)]


def _up_to_last_trained(messages: list[Message]) -> list[Message]:
    ends = trained_turns(messages)
    return messages[: ends[-1] + 1] if ends else messages


def _without_oldest_rounds(messages: list[Message], encode: Encode, cutoff_len: int) -> tuple[list[Message], int]:
    """As few rounds left out as do, or all but the last one where even that does not fit."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    rounds = [index for index, message in enumerate(messages) if message["role"] == "user"]

    def without(count: int) -> list[Message]:
        return [*system, *messages[rounds[count] :]] if count else messages

    low, high = 0, len(rounds) - 1  # leaving out `low` does not do; leaving out `high` does, or is all there is
    while high - low > 1:
        middle = (low + high) // 2
        if needed(encode(without(middle))[-1]) > cutoff_len:
            low = middle
        else:
            high = middle
    return without(high), high


def _without_head_of_user(messages: list[Message], encode: Encode, cutoff_len: int) -> tuple[list[Message], bool]:
    """The last user message, shortened so that all fits.

    Where no shortening lets the answer fit whole, the answer is cut in any case: then the message may still fill half
    of the room that they share, rather than vanish.
    """
    at = max(index for index, message in enumerate(messages) if message["role"] == "user")
    text = messages[at]["content"] or ""

    def from_character(start: int) -> list[Message]:
        return [*messages[:at], {**messages[at], "content": text[start:]}, *messages[at + 1 :]]

    @cache
    def whole_length(start: int) -> int:
        return needed(encode(from_character(start))[-1])

    @cache
    def prompt_length(start: int) -> int:
        return _prompt_length(from_character(start), encode)

    most = max(len(text) - _LEAST, 0)
    if whole_length(most) <= cutoff_len:
        return from_character(_first_fitting(whole_length, most, cutoff_len)), True
    frame = prompt_length(len(text))  # what the template, the system message and tools take
    limit = (frame + cutoff_len) // 2
    if not most or frame >= cutoff_len or prompt_length(0) <= limit:
        return messages, False
    start = most if prompt_length(most) >= limit else _first_fitting(prompt_length, most, limit)
    return from_character(start), True


def _prompt_length(messages: list[Message], encode: Encode) -> int:
    """Tokens before the first trained answer."""
    trained = encode(messages, train_on_prompt=False)[-1].trained
    return trained.index(True) if True in trained else len(trained)


def _first_fitting(length: Callable[[int], int], end: int, limit: int) -> int:
    """About the smallest start with length(start) <= limit, where length falls and length(0) > limit >= length(end).

    Guesses by the slope and halves by turns: few calls, for each one tokenizes.
    """
    low, high = 0, end
    at_low, at_high = length(low), length(high)
    by_slope = True
    while high - low > 1 and limit - at_high > _SLACK:
        share = (at_low - limit) / (at_low - at_high) if by_slope else 0.5
        middle = min(max(low + round((high - low) * share), low + 1), high - 1)
        tokens, by_slope = length(middle), not by_slope
        if tokens > limit:
            low, at_low = middle, tokens
        else:
            high, at_high = middle, tokens
    return high
