"""Noise on the embeddings while a model trains: `neftune_noise_alpha` (NEFTune; Jain et al., arXiv 2310.05914).

Uniform in ±alpha / √(L·d), where L is a document's length and d the size of an embedding. L is each document's own
length, however it lies: alone, padded beside longer ones, or end to end with others in a row (transformers takes the
length of the padded batch, and of a whole packed row would make next to no noise). So a document meets the same noise,
in expectation, in a padded batch, in a packed one, and however a step is cut into passes. Evaluation has none.

The noise comes from the device's own generator, as dropout does, and goes on exactly after a resume.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from burnish.model.head import CausalLoss, unwrap
from burnish.types import Batch


class EmbeddingNoise:
    """Hooks at the embedding of `objective`'s model, and at `objective` itself, which is told each batch."""

    def __init__(self, objective: CausalLoss, alpha: float):
        self._alpha = alpha
        self._lengths: Tensor | None = None  # of each token's document: [1, T], or [B, 1] of a padded batch
        embedding = unwrap(objective.model).get_input_embeddings()
        self._hooks = [
            objective.register_forward_pre_hook(self._note_lengths),
            embedding.register_forward_hook(self._add),
        ]

    def _note_lengths(self, objective: nn.Module, given: tuple[Batch, ...]) -> None:
        self._lengths = lengths_of(given[0]) if objective.training else None

    def _add(self, embedding: nn.Module, inputs: Any, embedded: Tensor) -> Tensor | None:
        """→ [B, S, H], in the dtype of what was embedded; None leaves it."""
        if not embedding.training or self._lengths is None:
            return None
        most = self._alpha / (self._lengths.float() * embedded.shape[-1]).sqrt()
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * most.to(embedded.dtype)[..., None]

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()


def lengths_of(batch: Batch) -> Tensor:
    """The length of the document that each token is of, padding not counted."""
    if "cu_seq_lens_q" in batch.inputs:
        lengths = batch.inputs["cu_seq_lens_q"].diff()
        return lengths.repeat_interleave(lengths, output_size=batch.labels.shape[1])[None]
    return batch.inputs["attention_mask"].sum(1, keepdim=True)
