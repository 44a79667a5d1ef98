"""`base_dtype: fp8`: the frozen linear layers of the blocks held and multiplied in fp8 (kernels/frozen_linear.py).

One idea: the weights are rounded once, when the model has been loaded, and from there on training, evaluation and
answers compute with the same numbers. Embedding, head, norms, routers, experts in one parameter and what is trained
keep their dtype. A layer's `weight` holds bytes, as bitsandbytes' do, so that whatever asks whether a weight is
quantized (quantized.py) is answered alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from burnish import console
from burnish.errors import Problem, UserError
from burnish.kernels.frozen_linear import Frozen, fits_fp8, frozen_linear, has_fp8_units, hold_in_fp8


class Fp8Linear(nn.Linear):
    """A frozen linear layer in fp8. `weight` is Q of the kernel's formula, as bytes [out, in]."""

    scales: Tensor  # [out]
    transposed: Tensor  # Qᵗ [in, out], bytes
    transposed_scales: Tensor  # [in]

    @property
    def frozen(self) -> Frozen:
        return [self.weight, self.scales, self.transposed, self.transposed_scales]

    def forward(self, input: Tensor) -> Tensor:
        return frozen_linear(input, self.frozen, self.bias)


def hold_layers_in_fp8(layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Let each plain linear layer among `layers` become an Fp8Linear, where it stands; the others are counted.
    `dtype`: of what the model computes. Raises UserError where there is no layer to hold.
    """
    layers = list(layers)
    left = 0
    for layer in layers:
        if type(layer) is nn.Linear and fits_fp8(layer.weight):
            _hold(layer)
        else:
            left += 1
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
def _hold(layer: nn.Linear) -> None:
    weight, scales, transposed, transposed_scales = hold_in_fp8(layer.weight)
    layer.__class__ = Fp8Linear
    held = cast(Any, layer)
    held.weight = nn.Parameter(weight, requires_grad=False)
    # Not in a state dict: what is saved of such a model is its adapters.
    for name, value in [("scales", scales), ("transposed", transposed), ("transposed_scales", transposed_scales)]:
        held.register_buffer(name, value, persistent=False)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
