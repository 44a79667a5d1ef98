"""GeneratingArguments: how an answer is drawn. The names are transformers'.

None means: as the model's own generation config says, else transformers' default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings
    from burnish.errors import Problem


@dataclass
class GeneratingArguments:
    """How the model's answers are drawn; what is not given is the model's own habit."""

    do_sample: bool | None = field(
        default=None, metadata={"help": "Draw tokens by chance; false always takes the likeliest."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Below 1 answers are surer, above 1 wilder; 0 takes the likeliest."}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "Draw from the fewest tokens whose probabilities reach this sum."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Draw from this many likeliest tokens; 0 is all."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams of beam search; 1 is none."})
    max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of prompt and answer together; max_new_tokens goes before it."}
    )
    max_new_tokens: int | None = field(default=None, metadata={"help": "Most tokens of an answer."})
    repetition_penalty: float | None = field(
        default=None, metadata={"help": "Above 1 what was said is said less often."}
    )
    length_penalty: float | None = field(default=None, metadata={"help": "With beams: above 0 favours long answers."})
    skip_special_tokens: bool = field(default=True, metadata={"help": "Leave special tokens out of the text."})


@dataclass(frozen=True)
class RequestOptions:
    """What one answer may be asked for that is no setting of a run."""

    stop_strings: tuple[str, ...] = ()  # the answer ends before the first of them
    seed: int | None = None  # the same one, with all else the same, draws the same answer
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None  # this many of the likeliest tokens beside each; None is no logprobs at all


NOTHING_TO_CHANGE: dict[str, str] = {}


def problems(settings: Settings) -> list[Problem]:
    found = settings.out_of_range(
        temperature=(lambda v: v >= 0, "is below 0", "0.7 is usual, 0 takes the likeliest"),
        top_p=(lambda v: 0 < v <= 1, "is not in (0, 1]", "0.9 is usual, 1 turns it off"),
        top_k=(lambda v: v >= 0, "is below 0", "50 is usual, 0 turns it off"),
        num_beams=(lambda v: v >= 1, "is not at least 1", "1 is no beam search"),
        max_length=(lambda v: v >= 1, "is not at least 1", "give a number of tokens"),
        max_new_tokens=(lambda v: v >= 1, "is not at least 1", "give a number of tokens"),
        repetition_penalty=(lambda v: v > 0, "is not above 0", "1.0 is no penalty"),
    )
    if settings.value("length_penalty") not in (None, 1) and (settings.value("num_beams") or 1) == 1:
        found.append(settings.problem("length_penalty", "does nothing without beams", "set num_beams, or leave it out"))
    return found
