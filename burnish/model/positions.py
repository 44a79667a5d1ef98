"""How far a model's positions reach: said or refused where samples are longer, stretched where the user asks for it.

One idea: rotary positions can be computed beyond their end, which a model has not learned; a table of learned ones just
ends. `rope_scaling` is written into the model's configuration, so what is saved reads as far as what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from burnish import console
from burnish.errors import Problem, UserError
from burnish.model.arguments import ModelArguments
from burnish.model.patch import rotary_by_length
from burnish.model.source import find_model, read_json

ROPE_FACTOR = 2.0  # where no length says how far positions must reach
# What a rotary embedding keeps of itself when it is scaled.
ROPE_BASE = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


def check_positions(model: PreTrainedModel, cutoff_len: int, *, scaled: bool) -> None:
    """Say that samples may be longer than the model was made for. Raises UserError where it has no such positions."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or cutoff_len <= positions or scaled:
        return
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    if any(positions <= table.num_embeddings <= positions + 2 for table in tables):  # OPT keeps two rows more
        message = f"is more than the {positions} positions that the model has"
        raise UserError(Problem("settings", "cutoff_len", cutoff_len, message, f"set cutoff_len: {positions}"))
    advice = "; rope_scaling stretches them" if getattr(config, "rope_parameters", None) else ""
    console.warn(
        f"cutoff_len {cutoff_len} is beyond the model's {positions} positions: it has not learned more{advice}"
    )


def warn_of_positions(args: ModelArguments, cutoff_len: int) -> None:
    """Say it from the configuration alone, where no model is loaded."""
    config = read_json(find_model(args, weights=False) / "config.json")
    positions = (config.get("text_config") or config).get("max_position_embeddings")
    if isinstance(positions, int) and cutoff_len > positions and args.rope_scaling is None:
        console.warn(f"cutoff_len {cutoff_len} is beyond the model's {positions} positions")


def scale_positions(config: PreTrainedConfig, kind: str, max_length: int | None, *, place: str) -> None:
    """Set `rope_parameters` so that a model of L positions reads `max_length`: factor = ceil(max_length / L).

    Assigning the old `rope_scaling` would drop `rope_theta`. A model whose layers rotate differently (Gemma 3) has one
    set per type of layer; those with a sliding window see no further than it and stay as they are.
    """
    positions = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or not positions:
        remedy = "leave rope_scaling out"
        message = f"is not possible: {config.model_type} models have no rope_parameters to set it in"
        raise UserError(Problem(place, "rope_scaling", kind, message, remedy))
    if max_length is not None and max_length <= positions:
        console.warn(f"rope_scaling does nothing: the model reads {positions} tokens, {max_length} are asked for")
        return
    factor = ROPE_FACTOR if max_length is None else float(math.ceil(max_length / positions))
    if "rope_theta" in parameters or "rope_type" in parameters:
        scaled = _scaled(parameters, kind, factor, positions, place)
    else:
        scaled = {
            layers: _scaled(each, kind, factor, positions, place) if each and "sliding" not in layers else each
            for layers, each in parameters.items()
        }
    if scaled == parameters:
        return  # a model that was tuned and saved with these settings
    config.rope_parameters = scaled
    if kind != "dynamic":  # which finds its original length here
        config.max_position_embeddings = int(positions * factor)
    console.say(f"rope_scaling {kind}: {positions} positions stretched {factor:g} times")


def _scaled(parameters: dict[str, Any], kind: str, factor: float, positions: int, place: str) -> dict[str, Any]:
    already = parameters.get("rope_type", "default")
    if (already, parameters.get("factor")) == (kind, factor):
        return parameters
    if already != "default":
        message = f"would take the place of its own scaling ({already}, factor {parameters.get('factor')})"
        raise UserError(Problem(place, "rope_scaling", kind, message, "leave rope_scaling out"))
    scaled = {name: parameters[name] for name in ROPE_BASE if name in parameters}
    scaled |= {"rope_type": kind, "factor": factor}
    if kind in ("yarn", "llama3"):
        scaled["original_max_position_embeddings"] = positions
    if kind == "llama3":
        scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Llama 3.1's own
    return scaled


def rotate_by_document(model: nn.Module, cutoff_len: int, *, padding_free: bool) -> None:
    """Rotary frequencies chosen by the length of each document, not by the longest that lies in the same pass.

    Types `dynamic` and `longrope` choose by the largest position of a forward pass, so what a document teaches would
    hang on its neighbours and on how a step is cut. One choice for the whole run, by cutoff_len, would end that too,
    but texts within the model's own length are served with its own frequencies, and would be trained with others. Rows
    of a padded batch have one set of positions, which does not say where each ends: there it can only be said.
    """
    for rotary, kind, length in rotary_by_length(model):
        if cutoff_len <= length:
            continue
        if not padding_free:
            console.warn(
                f"rope_type {kind}: a row of more than {length:,} tokens changes the positions of all rows of its "
                "padded batch, and so what they teach; per_device_train_batch_size: 1 keeps them apart"
            )
            return
        rotary.forward = partial(_each_document, rotary.forward, length)


def _each_document(
    rotate: Callable[..., tuple[Tensor, Tensor]], length: int, x: Tensor, position_ids: Tensor, *layer: Any, **how: Any
) -> tuple[Tensor, Tensor]:
    """cos and sin [1, T, D] of documents laid end to end, each of which begins at position 0."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    if position_ids.shape[0] > 1 or starts[:1] != [0]:  # no documents: a callback that generates
        return rotate(x, position_ids, *layer, **how)

    def from_short(positions: Tensor) -> tuple[Tensor, Tensor]:
        rotate(x, position_ids[:, :1], *layer, **how)  # what has grown for a longer document is put back
        return rotate(x, positions, *layer, **how)

    cos, sin = from_short(position_ids.clamp(max=length - 1))
    for start, end in pairwise([*starts, position_ids.shape[1]]):
        if end - start > length:
            cos[:, start:end], sin[:, start:end] = from_short(position_ids[:, start:end])
    return cos, sin
