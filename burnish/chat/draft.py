"""Turns → samples: as few texts as hold every turn as it was given, and in each the tokens that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from burnish.chat.pieces import Rendered, TextEncoder, Tokens
from burnish.chat.turns import Turn
from burnish.types import Encoded


@dataclass
class Draft:
    """A sample in the making: a rendered text and the turns that are trained in it."""

    encoder: TextEncoder
    rendered: Rendered
    turns: list[Turn] = field(default_factory=list)

    @cached_property
    def _uncut(self) -> Tokens:
        return self.encoder.encode(self.rendered)

    @cached_property
    def _cuts(self) -> list[int]:
        """Where a token straddles a border of the last trained turn.

        Only there may the text be cut: what stands before that turn's answer is a prompt, which serving tokenizes
        whole. An earlier turn that a token straddles gets a sample of its own.
        """
        if not self.turns:
            return []
        last = self.turns[-1]
        found = zip((last.start, last.end), _borders(self._uncut, last), strict=True)
        return [place for place, index in found if index is None]

    @cached_property
    def tokens(self) -> Tokens:
        return self.encoder.encode(self.rendered, self._cuts) if self._cuts else self._uncut

    def holds(self, turn: Turn) -> bool:
        """Whether the turn stands in this text as it was given, within borders of tokens."""
        return self.indices(turn) is not None if self.turns else self._begins_with(turn)

    def indices(self, turn: Turn) -> range | None:
        """Which tokens the turn is; None where `holds` says no."""
        if not self._begins_with(turn):
            return None
        start, end = _borders(self.tokens, turn)
        return None if start is None or end is None else range(start, end)

    def holding(self, start: int, end: int, stop_ids: Sequence[int]) -> range:
        """Tokens that hold `text[start:end]`, whole or in part, and the end token behind them."""
        if start >= end:
            return range(0)
        ids, places = self.tokens.ids, range(len(self.rendered.text))
        first = next(n for n in map(self.tokens.index_of, places[start::-1]) if n is not None)
        last = next((n for n in map(self.tokens.index_of, places[end - 1 :]) if n is not None), len(ids) - 1)
        ended = last + 1 < len(ids) and ids[last + 1] in stop_ids
        return range(first, last + 2 if ended else last + 1)

    def encoded(self, eos_id: int | None, stop_ids: Sequence[int]) -> Encoded:
        ids = self.tokens.ids
        trained = [False] * len(ids)
        for turn in self.turns:
            span = self.indices(turn)
            assert span is not None, "draft_samples() put the turn where it can be found"
            stop = span.stop
            if not turn.ended and stop < len(ids) and ids[stop] in stop_ids:
                stop += 1  # the header of the next turn is the end token, as GLM has it
            elif not turn.ended and eos_id is not None and self._ends_with(turn):
                ids, trained = [*ids[:stop], eos_id], [*trained[:stop], True]
                stop += 1
            trained[span.start : stop] = [True] * (stop - span.start)
        return Encoded(ids, trained, len(self._cuts))

    def _begins_with(self, turn: Turn) -> bool:
        return turn.rendered is self.rendered or self.rendered.text.startswith(turn.rendered.text[: turn.end])

    def _ends_with(self, turn: Turn) -> bool:
        """Whether nothing follows the turn but what the template puts behind the last one."""
        return self.rendered.text[turn.end :] == turn.rendered.text[turn.end :]


def _borders(tokens: Tokens, turn: Turn) -> tuple[int | None, int | None]:
    """The first token of the turn, and the first behind it."""
    start = tokens.index_at(turn.start) if turn.after_prompt else tokens.index_of(turn.start)
    return start, tokens.index_at(turn.end, after_marker=turn.ended)


def draft_samples(encoder: TextEncoder, whole: Rendered, turns: Sequence[Turn]) -> list[Draft]:
    """From the last turn to the first, each into the text of the one that follows it if it stands there unchanged."""
    drafts: list[Draft] = []
    for turn in reversed(turns):
        home = drafts[0] if drafts else Draft(encoder, whole)
        if home.holds(turn):
            home.turns.insert(0, turn)
        else:
            home = Draft(encoder, turn.rendered, [turn])
        if not drafts or home is not drafts[0]:
            drafts.insert(0, home)
    return drafts


def with_prompts(
    drafts: Sequence[Draft], left_out: Sequence[Sequence[range]], eos_id: int | None, stop_ids: Sequence[int]
) -> list[Encoded]:
    """Samples with every token trained, but for what an earlier sample began with too, and turns that are left out.

    `left_out`: for each draft, the tokens of such turns.
    """
    samples: list[Encoded] = []
    for draft, ranges in zip(drafts, left_out, strict=True):
        sample = draft.encoded(eos_id, stop_ids)
        known = _common_length(sample.input_ids, samples[-1].input_ids) if samples else 0
        trained = [i >= known for i in range(len(sample.input_ids))]
        for i in (i for tokens in ranges for i in tokens):
            trained[i] = False
        samples.append(Encoded(sample.input_ids, trained, sample.straddled))
    return samples


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
