"""`base_dtype: fp8`: the frozen linear layers of the blocks held and multiplied in fp8 (kernels/frozen_linear.py).

One idea: the weights are rounded once, when the model has been loaded, and from there on training, evaluation and
answers compute with the same numbers. Embedding, head, norms, routers, experts in one parameter and what is trained
keep their dtype. A layer's `weight` holds bytes, as bitsandbytes' do, so that whatever asks whether a weight is
quantized (quantized.py) is answered alike.

Which channels of a layer's input are the largest, and held in two numbers each, the model itself says: it reads some
tokens before it is rounded. In one dtype on one kind of device it says the same at every start. In another a few
channels may be others (of SmolLM2 in float32 and in bf16 about one in a hundred), which moves less than rounding does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from burnish import console
from burnish.errors import Problem, UserError
from burnish.kernels.frozen_linear import (
    Frozen,
    fits_fp8,
    frozen_linear,
    has_fp8_units,
    hold_in_fp8,
    how_many_twice,
)

TOKENS = (2, 64)  # rows and length of what the model reads to find its largest channels, drawn at random


class Fp8Linear(nn.Linear):
    """A frozen linear layer in fp8. `weight` is Q' of the kernel's formula, as bytes [out, in + 2c]."""

    scales: Tensor  # [out]
    transposed: Tensor  # Qᵗ [in, out], bytes
    transposed_scales: Tensor  # [in]
    channels: Tensor  # [c]

    @property
    def frozen(self) -> Frozen:
        return [self.weight, self.scales, self.transposed, self.transposed_scales, self.channels]

    def forward(self, input: Tensor) -> Tensor:
        return frozen_linear(input, self.frozen, self.bias)


def hold_layers_in_fp8(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """Let each plain linear layer among `layers` of `model` become an Fp8Linear, where it stands; the others are
    counted. Raises UserError where there is no layer to hold.
    """
    layers = list(layers)
    fitting = [layer for layer in layers if type(layer) is nn.Linear and fits_fp8(layer.weight)]
    dtype = model.dtype  # before weights become bytes
    largest = _largest_channels(model, fitting)
    for layer in fitting:
        _hold(layer, largest[layer])
    left = len(layers) - len(fitting)
    held = [layer for layer in layers if isinstance(layer, Fp8Linear)]
    if not held:
        message = "holds no layer of this model: none is a plain linear one whose sides are whole numbers of 16"
        raise UserError(Problem("base_dtype", "", "fp8", message, "leave it out"))
    line = f"{len(held)} layers held in fp8"
    if left:
        line += f", {left} as they are (no plain linear layer, or a side that is no whole number of 16)"
    slower = "; multiplied in more bits, and slower than without: "
    if not has_fp8_units(held[0].weight.device):
        line += f"{slower}this device has no fp8 matrix units with a scale for every row"
    elif dtype != torch.bfloat16:
        line += f"{slower}fp8 units give bf16, and this is {dtype}"
    console.say(line)


@torch.no_grad()
def _largest_channels(model: Any, layers: Sequence[nn.Linear]) -> dict[nn.Linear, Tensor]:
    """For each layer the channels [c] of its input whose squares are the largest on average.

    Layers that are handed one tensor (q, k and v) get one tensor here, so that it is rounded for all of them once.
    """
    places = {(layer.in_features, layer.weight.device) for layer in layers}
    first = {place: torch.arange(how_many_twice(place[0]), dtype=torch.int32, device=place[1]) for place in places}
    found = {layer: first[layer.in_features, layer.weight.device] for layer in layers}  # of what no token meets
    if not layers or layers[0].weight.is_meta:  # no numbers to look at: a plan asks for sizes alone
        return found
    last: list[tuple[Tensor, Tensor]] = []  # an input, and its channels

    def look(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        if not last or last[0][0] is not x:
            squares = x.flatten(0, -2).float().square().mean(0)  # [in]
            chosen = squares.topk(how_many_twice(layer.in_features)).indices.sort().values.int()
            last[:] = [(x, chosen)]
        found[layer] = last[0][1]

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(rows, TOKENS, generator=torch.Generator().manual_seed(0))
    try:
        model(input_ids=tokens.to(layers[0].weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def _hold(layer: nn.Linear, channels: Tensor) -> None:
    rows, scales, transposed, transposed_scales, channels = hold_in_fp8(layer.weight, channels)
    weight: Any = nn.Parameter(rows, requires_grad=False)
    weight.stands_for = layer.weight.numel()  # patch.size_of
    layer.__class__ = Fp8Linear
    held = cast(Any, layer)
    held.weight = weight
    # Not in a state dict: what is saved of such a model is its adapters.
    buffers = {"scales": scales, "transposed": transposed, "transposed_scales": transposed_scales, "channels": channels}
    for name, value in buffers.items():
        held.register_buffer(name, value, persistent=False)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
