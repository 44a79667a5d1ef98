"""How the first Qwen's queries and keys know where they stand, and what it does beyond the length it was trained on.

Queries and keys are turned by angles that grow with the position. Two things more are done only when the model is
asked, never in training, and only beyond `seq_length` tokens: the turning is slowed down (`use_dynamic_ntk`) and
queries are sharpened (`use_logn_attn`). How much depends on the length of a text, so each text of a batch is looked at
by itself, be it padded or laid end to end with others. (The published code counts padding on the left of a text as
part of it, and sharpens by the whole row; here a text gets what it gets alone.)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from burnish.model.qwen_config import QWenConfig

KEPT = "rotary_frequencies"  # the name under which a cache keeps those of its prompt


class Rotary:
    """Computes what it is asked for anew each time: a model has no buffers that would have to be loaded or moved."""

    def __init__(self, config: QWenConfig):
        assert config.seq_length is not None
        self.channels = int(config.kv_channels * config.rotary_pct)
        self.base = config.rotary_emb_base
        self.trained_length = config.seq_length
        self.use_dynamic_ntk = config.use_dynamic_ntk

    def frequencies(self, device: torch.device, doublings: int = 0) -> Tensor:
        """[channels / 2] float32, for a text of up to `trained_length * 2**doublings` tokens.

        NTK-aware: the base grows by alpha**(d / (d - 2)), where alpha is 1, 3, 7, 15 ... with every doubling.
        """
        d = self.channels
        alpha = 2 ** (doublings + 1) - 1
        base = self.base * alpha ** (d / (d - 2)) if alpha > 1 else self.base
        return 1.0 / (base ** (torch.arange(0, d, 2, device=device, dtype=torch.float32) / d))

    def frequencies_when_asked(
        self, position_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """[channels / 2], or for each text [B, 1, channels / 2], or for each token [B, T, channels / 2].

        Keys stay turned as they were, so an answer goes on with the frequencies of its prompt, which the cache keeps.
        """
        num_tokens, device = position_ids.shape[1], position_ids.device
        if not self.use_dynamic_ntk:
            return self.frequencies(device)
        if cache is not None and cache.get_seq_length():
            kept = vars(cache).get(KEPT)
            return self.frequencies(device) if kept is None else kept
        if num_tokens <= self.trained_length:
            chosen = self.frequencies(device)
        elif attention_mask is not None and attention_mask.ndim == 2:
            chosen = self._frequencies_of(attention_mask.sum(-1, keepdim=True), longest=num_tokens)
        else:
            chosen = self._frequencies_of(lengths(position_ids), longest=num_tokens)
        if cache is not None:
            vars(cache)[KEPT] = chosen[:, -1:] if chosen.ndim == 3 else chosen  # one text in each row
        return chosen

    def _frequencies_of(self, lengths: Tensor, longest: int) -> Tensor:
        """Lengths of texts → their frequencies, [*lengths.shape, channels / 2]."""
        borders = [self.trained_length]
        while borders[-1] < longest:
            borders.append(2 * borders[-1])
        by_doublings = torch.stack([self.frequencies(lengths.device, n) for n in range(len(borders) + 1)])
        return by_doublings[torch.bucketize(lengths, torch.tensor(borders, device=lengths.device))]

    def sharpening(self, position_ids: Tensor) -> Tensor:
        """log(p) / log(trained_length) for the p-th token of a text where that is above 1, else 1; float32."""
        return ((position_ids + 1).double().log() / math.log(self.trained_length)).clamp_min(1.0).float()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of x by their angles, in float32. The first half of them is paired with the second."""
    channels = cos.shape[-1]
    first, second = x[..., :channels].float().chunk(2, dim=-1)
    turned = (x[..., :channels].float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return turned if channels == x.shape[-1] else torch.cat((turned, x[..., channels:]), dim=-1)


def positions(attention_mask: Tensor | None, num_tokens: int, num_before: int, device: torch.device) -> Tensor:
    """Where each token stands in its own text, [1 or B, T]: padding before it does not count."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -num_tokens:]
    return torch.arange(num_before, num_before + num_tokens, device=device)[None]


def lengths(position_ids: Tensor) -> Tensor:
    """The length of the text that each token belongs to, [B, T].

    >>> lengths(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[3, 3, 3, 2, 2]])
    """
    goes_on = F.pad(position_ids[:, 1:] == position_ids[:, :-1] + 1, (1, 0))
    text = (~goes_on).long().cumsum(-1) - 1
    longest = torch.zeros_like(position_ids).scatter_reduce(1, text, position_ids + 1, "amax")
    return longest.gather(1, text)
