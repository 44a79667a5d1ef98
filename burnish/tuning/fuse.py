"""peft's LoRA layers compute through `kernels/lora_linear.py`. Modules, names and files stay peft's.

Only the plain case is taken over: one active adapter on an unquantized linear layer, no dropout while training, no
DoRA. Whatever else a layer may be (merged, switched off, several adapters) goes to peft's own forward, at each call.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from peft.tuners.lora import Linear
from torch import Tensor, nn

from burnish.kernels.lora_linear import lora_linear

Model = TypeVar("Model", bound=nn.Module)


def fuse_lora(model: Model) -> Model:
    """Let every LoRA layer of `model` that can be computed in one operation be so. Changes `model` itself."""
    for layer in model.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear and not any(layer.use_dora.values()):
            layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
    return model


def _forward(layer: Any, peft_forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    plain = not (args or kwargs or layer.disable_adapters or layer.merged) and len(layer.active_adapters) == 1
    if not plain:
        return peft_forward(x, *args, **kwargs)
    name = layer.active_adapters[0]
    base, a, b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    drops = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    trains_base = base.weight.requires_grad or (b.bias is not None)
    if drops or trains_base or not x.dtype == base.weight.dtype == a.weight.dtype:
        return peft_forward(x)
    return lora_linear(x, base.weight, base.bias, a.weight, b.weight, layer.scaling[name])
