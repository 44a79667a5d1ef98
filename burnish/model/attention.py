"""Attention over samples laid end to end, registered with transformers under the name "burnish".

One idea: a batch is one row of T tokens and `cu_seq_lens` says where each document begins, so no token is padding and
no mask exists. On CUDA in bf16/fp16 it is cuDNN's attention on a Hopper chip (kernels/cudnn_attention.py) and torch's
variable-length attention on others; elsewhere each document is attended to by itself. The CPU multiplies in float32
whatever the model's dtype: torch's bf16 attention there is far slower (benchmarks/cpu_attention.py: 13 times without
bf16 instructions), and float32 is the more exact.

What it cannot do (softcap, sinks, masks ...) it refuses by raising `UnsupportedAttention`; the probe
(`model/probe.py`) then leaves the model on its own path. Nothing is swallowed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from burnish.kernels import cudnn_attention
from burnish.model.source import first_line

ATTENTION_NAME = "burnish"

# Keywords that transformers hands every attention function and that change nothing once cu_seq_lens is known.
HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
     "is_causal", "num_items_in_batch", "cu_seq_lens_k", "max_length_k", "position_embeddings", "past_key_values",
     "output_router_logits"}
)  # fmt: skip


def grouping(varlen: Any) -> dict[str, Any]:
    """torch 2.11's varlen_attn groups heads by itself; later ones want to be told."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen).parameters else {}


GROUPED = grouping(varlen_attn)  # once: a compiled block must not look at signatures
# The heads for which cuDNN's attention was tried and found right (choose_kernel); to a compiled block a constant.
OF_CUDNN: tuple[int, int, int] | None = None


class UnsupportedAttention(ValueError):
    """This model asks something of attention that the packed form does not compute."""


def register() -> None:
    """Make `attn_implementation="burnish"` known to transformers. Calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def choose_kernel(config: Any, device: torch.device, dtype: torch.dtype, *, keep: str = "") -> str:
    """Let cuDNN attend for a model of this `config` where its chip asks for it; → why not, or "".

    `keep` is the reason, if there is one, to leave attention to torch.
    """
    global OF_CUDNN
    OF_CUDNN = None
    if not cudnn_attention.is_for(device, dtype):
        return ""
    heads = _heads_of(config)
    why = keep or ("" if heads else f"{type(config).__name__} does not say how many heads there are")
    if heads and not why:
        try:
            why = cudnn_attention.try_out(device, dtype, *heads)
        except Exception as error:  # whatever the library raises means one thing: not this way
            why = f"{type(error).__name__}: {first_line(error)}"
        OF_CUDNN = None if why else heads
    return why


def _heads_of(config: Any) -> tuple[int, int, int] | None:
    """(heads, heads of keys and values, head_dim), where all layers have the same."""
    try:
        config = config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
    except (AttributeError, RuntimeError, ValueError):  # transformers says so, too, where layers differ
        return None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, in the signature of transformers' attention functions.

    query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim] → [1, T, heads, head_dim].
    `sliding_window` W: a token sees itself and the W - 1 before it.
    """
    _refuse_what_is_not_computed(module, attention_mask, cu_seq_lens_q, others)
    assert cu_seq_lens_q is not None
    if not _varlen_fits(query, value, dropout):
        attended = _by_document(query, key, value, cu_seq_lens_q, scaling, sliding_window, dropout)  # pyright: ignore
    elif sliding_window is None and _cudnn_fits(query, key, value):
        attended = _cudnn(query, key, value, cu_seq_lens_q, max_length_q, scaling)
    else:
        attended = _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    return attended, None


def _refuse_what_is_not_computed(
    module: nn.Module, attention_mask: Tensor | None, cu_seq_lens: Tensor | None, others: dict[str, Any]
) -> None:
    if cu_seq_lens is None:
        raise UnsupportedAttention("no cu_seq_lens: this model does not pass them on to its attention")
    if attention_mask is not None:
        raise UnsupportedAttention("an attention mask beside cu_seq_lens")
    if others.get("is_causal") is False or (others.get("is_causal") is None and module.is_causal is False):
        raise UnsupportedAttention("attention that is not causal")
    unknown = sorted(name for name, value in others.items() if name not in HARMLESS and value is not None)
    if unknown:
        raise UnsupportedAttention(f"attention with {', '.join(unknown)}")


def _varlen_fits(query: Tensor, value: Tensor, dropout: float) -> bool:
    """What FlashAttention's kernels behind varlen_attn take."""
    head_dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_dim == value.shape[-1] <= 256
        and head_dim % 8 == 0
        and not dropout
    )


def _cudnn_fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if OF_CUDNN is None or (query.shape[1], key.shape[1], query.shape[3]) != OF_CUDNN:
        return False
    return cudnn_attention.fits(*_tokens_first(query, key, value))


def _cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    max_length: int | None,
    scaling: float | None,
) -> Tensor:
    q, k, v = _tokens_first(query, key, value)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return cudnn_attention.cudnn_attention(q, k, v, cu_seq_lens, _known(max_length), scale)[None]


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    max_length: int | None,
    scaling: float | None,
    sliding_window: int | None = None,
) -> Tensor:
    """torch.nn.attention.varlen over [T, heads, head_dim]; causal is the window (-1, 0)."""
    max_length = _known(max_length)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    q, k, v = _tokens_first(query, key, value)
    grouped = GROUPED if q.shape[1] != k.shape[1] else {}
    attended: Any = varlen_attn(
        q, k, v, cu_seq_lens, cu_seq_lens, max_length, max_length, scale=scaling, window_size=window, **grouped
    )
    return attended[None]  # [1, T, heads, head_dim]


def _tokens_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, heads, T, head_dim] → [T, heads, head_dim]."""
    return query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)


def _known(max_length: int | None) -> int:
    if max_length is None:
        raise UnsupportedAttention("no max_length: reading it off cu_seq_lens would stop the device in every layer")
    return max_length


@torch.compiler.disable  # a document more or less would be another graph
def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    dropout: float,
) -> Tensor:
    """Each document by itself through scaled_dot_product_attention; exact in any dtype on any device."""
    dtype = query.dtype
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    heads_per_kv = query.shape[1] // key.shape[1]
    if heads_per_kv > 1:
        key, value = (x.repeat_interleave(heads_per_kv, dim=1) for x in (key, value))
    lengths = [n for n in cu_seq_lens.diff().tolist() if n]
    # split, not slices: the gradient of a split is one concatenation, that of each slice a full-size tensor of zeros
    documents = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_band(q.shape[2], sliding_window, query.device),
            is_causal=sliding_window is None or q.shape[2] <= sliding_window,
            scale=scaling,
            dropout_p=dropout,
        )
        for q, k, v in documents
    ]
    return torch.cat(attended, dim=2).to(dtype).transpose(1, 2)  # [1, T, heads, head_dim]


def _band(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[length, length] True where a token may look, or None where plain causality says it all."""
    if sliding_window is None or length <= sliding_window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < sliding_window)
