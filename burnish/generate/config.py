"""What is asked for, over what the model itself says: GeneratingArguments → transformers' GenerationConfig.

One idea: what nobody asked for stays None, and transformers fills it in from the model's own generation config (`own`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from burnish.errors import Problem, UserError
from burnish.generate.arguments import GeneratingArguments

DEFAULT_NEW_TOKENS = 1024  # where neither the user nor the model's generation config says how long an answer may be


def make_config(asked: GeneratingArguments, own: Any, most_new: int, prompt_length: int) -> GenerationConfig:
    """How an answer of at most `most_new` tokens is drawn; which tokens end it is for the engine to add."""
    samples = draws(asked, own)
    settings: dict[str, Any] = {
        "do_sample": samples,
        "num_beams": asked.num_beams or own.num_beams or 1,
        "repetition_penalty": asked.repetition_penalty,
    }
    if samples:
        settings |= {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k}
    else:  # values that mean nothing: transformers would warn of the model's own, which greedy decoding cannot use
        settings |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0}
    if settings["num_beams"] > 1:
        settings["length_penalty"] = asked.length_penalty
    # max_new_tokens wins over max_length, and transformers warns when both are set, even if one is the model's own
    if own.max_length is None or own.max_new_tokens is not None:
        settings["max_new_tokens"] = most_new
    else:
        settings["max_length"] = prompt_length + most_new
    return GenerationConfig(**{name: value for name, value in settings.items() if value is not None})


def draws(asked: GeneratingArguments, own: Any) -> bool:
    """Is the next token drawn, or the likeliest taken? A temperature of 0 is OpenAI's word for the latter."""
    if (own.temperature if asked.temperature is None else asked.temperature) == 0:
        return False
    if asked.do_sample is not None:
        return asked.do_sample
    if any(value is not None for value in (asked.temperature, asked.top_p, asked.top_k)):
        return True  # who sets how to draw wants to draw
    return bool(own.do_sample)


def new_tokens(asked: GeneratingArguments, own: Any, prompt_length: int, limit: int | None) -> int:
    """How many tokens may follow a prompt: as asked, else the model's habit, and never past its positions (`limit`)."""
    if asked.max_new_tokens is not None:
        most_new = asked.max_new_tokens
    elif asked.max_length is not None:
        most_new = asked.max_length - prompt_length
    elif own.max_new_tokens is not None:
        most_new = own.max_new_tokens
    elif own.max_length is not None and own.max_length > prompt_length:
        most_new = own.max_length - prompt_length
    else:
        most_new = DEFAULT_NEW_TOKENS
    if most_new < 1:
        name = "max_length" if asked.max_new_tokens is None else "max_new_tokens"
        problem = f"leaves no room for an answer to a prompt of {prompt_length:,} tokens"
        raise UserError(Problem("generation", name, vars(asked)[name], problem, "make it larger"))
    return most_new if limit is None else min(most_new, limit - prompt_length)


def as_list(ids: int | Sequence[int] | None) -> list[int]:
    """Token ids as generation configs hold them: none, one or several."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def num_positions(config: Any) -> int | None:
    """The longest text the model was made for; None where it has no such bound (recurrent models).

    `dynamic` scaling keeps the original length in the config, others write the stretched one there.
    """
    text = config.get_text_config(decoder=True)
    if not hasattr(text, "max_position_embeddings"):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    sets = [each for each in (rope, *rope.values()) if isinstance(each, dict)]  # Gemma 3 has one per type of layer
    factors = [each["factor"] for each in sets if each.get("rope_type") == "dynamic"]
    return int(text.max_position_embeddings * max(factors, default=1))
