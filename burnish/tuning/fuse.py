"""peft's LoRA layers compute through `kernels/`; q, k and v share products. Modules, names and files stay their own.

Only the plain case is taken over: one active adapter on a linear layer, no dropout while training, none of peft's
variants (DoRA, KaSA …), no trained bias below it. Whatever else a layer may be (merged, switched off, several adapters)
goes to peft's own forward, at each call. A layer on quantized weights has an operation of its own
(kernels/dequantized_linear.py).
A class takes the place of a class, not a function that of each layer's: torch.compile then compiles one for all.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from burnish.kernels.dequantized_linear import dequantized_lora_linear
from burnish.kernels.lora_linear import lora_linear
from burnish.kernels.lora_mlp import LoraWeights, lora_mlp
from burnish.model.fp8 import Fp8Linear
from burnish.model.patch import layers_of_one_input, swiglu_layers
from burnish.model.probe import close
from burnish.model.quantized import Dequantizing

Model = TypeVar("Model", bound=nn.Module)


def fuse_lora(model: Model) -> Model:
    """Let every LoRA layer of `model` that can be computed in one operation be so; q, k and v share x Aᵀ.

    Changes `model` itself.
    """
    for layer in model.modules():
        if _is_plain(layer):
            layer.__class__ = FusedLinear
            layer.given = None  # pyright: ignore
        elif isinstance(layer, LoraLayer) and isinstance(layer.base_layer, Dequantizing):
            layer.__class__ = _fused_quantized(type(layer))  # pyright: ignore[reportAttributeAccessIssue]
    return _share_input(model, FusedLinear)


def fuse_qkv(model: Model) -> Model:
    """Let q, k and v that are trained themselves be one product, and two backward in the place of six.

    k and v are narrow where heads are grouped: the gradients of their weights alone leave most of a GPU idle. For one:
    elsewhere nothing is gained. Changes `model` itself.
    """
    for module in model.modules():
        layers = layers_of_one_input(module)
        if all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in layers):
            for layer in layers:
                layer.__class__ = SharedLinear
                layer.given = None  # pyright: ignore
    return _share_input(model, SharedLinear)


def _share_input(model: Model, kind: type[nn.Module]) -> Model:
    for module in model.modules():
        layers = layers_of_one_input(module)
        if layers and all(isinstance(layer, kind) for layer in layers) and not isinstance(module, SharedInput):
            module.__class__ = _shared(type(module))
    return model


@cache
def _shared(own: type[nn.Module]) -> type[nn.Module]:
    return type(f"Shared{own.__name__}", (SharedInput, own), {})


def _is_plain(layer: Any) -> bool:
    if type(layer) is not Linear or type(layer.base_layer) not in (nn.Linear, Fp8Linear):
        return False
    return not layer.lora_variant


@cache
def _fused_quantized(own: type[nn.Module]) -> type[nn.Module]:
    """peft has a class for 4 bits and one for 8, and neither where bitsandbytes is absent."""
    return type(f"Fused{own.__name__}", (FusedQuantized, own), {})


def fuse_mlp(model: Model) -> Model:
    """Let every SwiGLU block whose three layers are such LoRA layers be one operation (kernels/lora_mlp.py).

    What a block computes is tried, not read off its name. For a GPU: elsewhere nothing is gained.
    """
    fused: dict[type[nn.Module], type[nn.Module]] = {}
    for module in model.modules():
        layers, own = swiglu_layers(module), type(module)
        if layers is None or any(plain_lora(layer) is None for layer in layers):
            continue
        if own not in fused:
            other = type(f"Fused{own.__name__}", (FusedMlp, own), {})
            fused[own] = other if _computes_the_same(module, other) else own
        module.__class__ = fused[own]
    return model


def _computes_the_same(module: nn.Module, fused: type[nn.Module]) -> bool:
    layers = swiglu_layers(module)
    assert layers is not None
    first: Any = layers[0]
    own, like = type(module), first.lora_A[first.active_adapters[0]].weight  # [r, K]
    if like.is_meta:  # no numbers to compare: a plan takes the names' word
        return True
    x = torch.randn(16, like.shape[1], generator=torch.Generator().manual_seed(0)).to(like)
    with torch.no_grad():
        expected = module(x)
        module.__class__ = fused
        try:
            return close(module(x), expected, rounding=1e-3 if x.dtype == torch.float32 else 2e-2)
        finally:
            module.__class__ = own


class PlainLora(NamedTuple):
    layer: LoraWeights
    bias: Tensor | None
    scale: float


def plain_lora(layer: Any) -> PlainLora | None:
    """The weights of a LoRA layer that is no more than x Wᵀ + bias + s·(x Aᵀ)Bᵀ now; else None."""
    name = _plain_adapter(layer) if isinstance(layer, FusedLinear) else None
    if name is None:
        return None
    base: Any = layer.base_layer
    a: Any = layer.lora_A[name].weight
    b: Any = layer.lora_B[name].weight
    if isinstance(base, Fp8Linear):
        return PlainLora(LoraWeights(base.frozen, a, b), base.bias, layer.scaling[name])
    if base.weight.requires_grad or base.weight.dtype != a.dtype:
        return None
    return PlainLora(LoraWeights([base.weight], a, b), base.bias, layer.scaling[name])


def _plain_adapter(layer: Any) -> str | None:
    """The one adapter that a LoRA layer adds now, if it adds no more than s·(x Aᵀ)Bᵀ."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    drops = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    base_bias = layer.get_base_layer().bias
    trains_bias = base_bias is not None and base_bias.requires_grad  # peft's `bias`: the operations give it no gradient
    more = drops or trains_bias or name in layer.lora_variant or layer.lora_B[name].bias is not None
    return None if more else name


class FusedLinear(Linear):
    """peft's LoRA layer with another forward."""

    # An input x, and x Aᵀ. `fuse_lora` sets it on every layer: None on the class and a value on a layer are two states
    # to compiled code, which would be compiled again for each.
    given: tuple[Tensor, Tensor] | None

    def shares(self) -> tuple[Tensor, Tensor | None] | None:
        """The weight and bias of what it does first, if another layer may do it for it."""
        plain = plain_lora(self)
        return None if plain is None else (plain.layer.a, None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = plain_lora(self)
        if args or kwargs or plain is None or x.dtype != plain.layer.a.dtype:
            return super().forward(x, *args, **kwargs)
        weight, a, b = plain.layer
        inner = self.given[1] if self.given is not None and self.given[0] is x else x @ a.T
        return lora_linear(x, weight, plain.bias, inner, b, plain.scale)


class SharedLinear(nn.Linear):
    """A linear layer that may be given its output."""

    given: tuple[Tensor, Tensor] | None  # an input x, and x Wᵀ + bias

    def shares(self) -> tuple[Tensor, Tensor | None] | None:
        return self.weight, self.bias

    def forward(self, input: Tensor) -> Tensor:
        if self.given is None or self.given[0] is not input:
            return super().forward(input)
        return self.given[1].contiguous()  # kept for the backward pass, a part would keep the whole


SHARING = (FusedLinear, SharedLinear)


class SharedInput(nn.Module):
    """Attention whose q, k and v read x once: another forward; its own class stands behind it.

    What they do first, x Aᵀ of an adapter or x Wᵀ, is one product with their matrices below each other: one forward and
    two backward, in the place of three and six.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "ds_id"):  # ZeRO-3 gives each layer an x of its own, and would hold here what is read here
            return super().forward(*args, **kwargs)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(args), None)
        layers: Any = layers_of_one_input(self)
        found = [layer.shares() for layer in layers if isinstance(layer, SHARING)]
        found = [shared for shared in found if shared is not None]
        biases = [bias for _, bias in found if bias is not None]
        alike = len(found) == len(layers) and len(biases) in (0, len(layers))
        if not isinstance(x, Tensor) or not alike or not all(_fits(x, weight) for weight, _ in found):
            return super().forward(*args, **kwargs)
        together = F.linear(x, torch.cat([weight for weight, _ in found]), torch.cat(biases) if biases else None)
        parts = together.split([weight.shape[0] for weight, _ in found], dim=-1)
        for layer, own in zip(layers, parts, strict=True):
            layer.given = (x, own)
        try:
            return super().forward(*args, **kwargs)
        finally:  # also where memory did not suffice: the layers would keep x alive
            for layer in layers:
                layer.given = None


def _fits(x: Tensor, weight: Tensor) -> bool:
    return weight.dtype == x.dtype and weight.shape[1] == x.shape[-1]


class FusedQuantized(nn.Module):
    """Another forward for a LoRA layer on quantized weights; peft's class stands behind it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        name = _plain_adapter(layer)
        if args or kwargs or name is None or x.dtype != layer.lora_A[name].weight.dtype:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        return dequantized_lora_linear(x, base.dequantized, base.bias, a, b, layer.scaling[name])


class FusedMlp(nn.Module):
    """Another forward for a block of gate, up and down; the block's own class stands behind it."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = plain_lora(self.gate_proj), plain_lora(self.up_proj), plain_lora(self.down_proj)
        if not (gate and up and down) or not _go_together(x, gate, up, down):
            return super().forward(x)  # type: ignore[misc]
        return lora_mlp(x, gate.layer, up.layer, down.layer, gate.scale)


LARGEST_RANK = 64  # of the fused block: above it the tiles of its kernels do not fit


def _go_together(x: Tensor, *layers: PlainLora) -> bool:
    first = layers[0]
    rank = first.layer.a.shape[0]
    return rank <= LARGEST_RANK and all(
        each.bias is None
        and each.scale == first.scale
        and each.layer.a.shape[0] == rank
        and each.layer.a.dtype == x.dtype
        and len(each.layer.weight) == len(first.layer.weight)
        for each in layers
    )
