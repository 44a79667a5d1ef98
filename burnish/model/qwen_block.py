"""One block of the first Qwen: attention and MLP, each after its norm, each added to the residual stream.

The names of the modules are those of the published weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from burnish.model.qwen_config import QWenConfig
from burnish.model.qwen_rotary import turn

FLOWS_BACK = "flows_back"


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normal.to(x.dtype) * self.weight


def flowing_back(layer: nn.Linear) -> nn.Linear:
    """Marks a layer whose output is added to the residual stream, for `_init_weights`, which is told no names."""
    setattr(layer, FLOWS_BACK, True)
    return layer


class QWenAttention(nn.Module):
    is_causal = True

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.width = config.num_attention_heads * self.head_dim
        self.c_attn = nn.Linear(config.hidden_size, 3 * self.width, bias=True)
        self.c_proj = flowing_back(nn.Linear(self.width, config.hidden_size, bias=not config.no_bias))

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        sharpening: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        apart = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (
            each.view(apart).transpose(1, 2)  # [B, heads, T, head_dim]
            for each in self.c_attn(hidden).split(self.width, dim=-1)
        )
        query, key = turn(query, *rotation), turn(key, *rotation)
        if sharpening is not None:
            query = query * sharpening.to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), plain_attention
        )
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attn_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.c_proj(attended.reshape(*hidden.shape[:-1], self.width)), weights


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`attn_implementation: eager`: in the signature of transformers' attention functions, with its weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)  # [B, heads, T, S]
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class QWenMLP(nn.Module):
    def __init__(self, config: QWenConfig):
        super().__init__()
        half = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, half, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, half, bias=not config.no_bias)  # the gate
        self.c_proj = flowing_back(nn.Linear(half, config.hidden_size, bias=not config.no_bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QWenBlock(GradientCheckpointingLayer):
    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden: Tensor, **context: Any) -> Tensor:
        hidden = hidden + self.attn(self.ln_1(hidden), **context)[0]
        return hidden + self.mlp(self.ln_2(hidden))
