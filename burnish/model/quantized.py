"""`quantization_bit`: the linear layers of the blocks held in 4 or 8 bits by bitsandbytes, through transformers.

One idea: a layer's weight is dequantized by one function, for the forward and for the backward, and multiplied in the
model's dtype (kernels/dequantized_linear.py). Training, evaluation and answers therefore compute the same.
bitsandbytes' own forward does not: on a CPU with AVX512_BF16 its 4-bit layer repacks the weight at the first evaluation
(which fails on narrow layers) and has no gradient afterwards, and its 8-bit layer rounds the activations too. Its
classes, parameters and state-dict names stay. Embeddings, head and norms are not quantized.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from burnish.kernels.dequantized_linear import dequantized_linear
from burnish.model.arguments import ModelArguments


def quantization(args: ModelArguments, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What transformers is told: None where nothing is quantized."""
    if args.quantization_bit is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=args.quantization_bit == 4,
        load_in_8bit=args.quantization_bit == 8,
        bnb_4bit_quant_type=args.quantization_type,
        bnb_4bit_use_double_quant=args.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


class Dequantizing(nn.Module):
    """Another forward for a quantized layer; bitsandbytes' class stands behind it."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        bias: Any = self.bias
        return dequantized_linear(x, self.dequantized, None if bias is None else bias.to(x.dtype))


class FourBit(Dequantizing):
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """As one long row: on a CPU bitsandbytes 0.50 mistakes the scales where rows are no whole number of blocks."""
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

        weight: Any = self.weight
        state = copy(weight.quant_state)
        state.shape = torch.Size([weight.quant_state.shape.numel()])
        return dequantize_4bit(weight.data, state).view(weight.quant_state.shape).to(dtype)


class EightBit(Dequantizing):
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """One scale a row: the largest number of the row is 127 of them."""
        weight: Any = self.weight
        return weight.data.to(dtype).mul_(weight.SCB.mul(1 / 127).unsqueeze(1))


def exchange_forwards(model: nn.Module) -> None:
    """Every quantized layer of `model` computes as this file says, whether it is trained or asked."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # pyright: ignore[reportMissingImports]

    ours = {
        Linear4bit: type("DequantizingLinear4bit", (FourBit, Linear4bit), {}),
        Linear8bitLt: type("DequantizingLinear8bitLt", (EightBit, Linear8bitLt), {}),
    }
    for module in model.modules():
        module.__class__ = ours.get(type(module), type(module))


def is_dequantized(model: nn.Module) -> bool:
    """Whether a model has layers whose weights are dequantized at each use."""
    return any(isinstance(each, Dequantizing) for each in model.modules())


def is_quantized(model: nn.Module) -> bool:
    """Whether a model, bare or with adapters, holds quantized weights: bitsandbytes' or those of fp8.py."""
    return any(not each.is_floating_point() for each in model.parameters())
