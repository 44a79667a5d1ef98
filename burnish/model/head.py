"""Hidden states and labels → the loss, through `kernels/linear_cross_entropy.py`.

`CausalLoss` wraps a causal language model (bare or with adapters) and gives the *sum* of the losses of a batch's
trained tokens. Dividing by their number is the trainer's: only it knows how many a whole optimizer step holds.

Fused: the decoder's hidden states at trained positions go through the head tile by tile. Where a model's own logits
are something else than `hidden @ head.T` (scaled, capped, with an auxiliary loss) the model's own forward is used;
which one is decided once, on 16 tokens, by `model/probe.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from burnish.kernels.linear_cross_entropy import linear_cross_entropy
from burnish.types import Batch


class LossSum(NamedTuple):
    loss: Tensor  # scalar float32: sum over the trained tokens of the batch
    correct: Tensor | None  # scalar int64: how many of them are the model's first choice


class CausalLoss(nn.Module):
    """`loss = CausalLoss(model, fused=...)(batch).loss`, a sum over `batch.num_trained` tokens."""

    def __init__(self, model: nn.Module, *, fused: bool, label_smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.fused = fused
        self.label_smoothing = label_smoothing
        self.graphs: Callable[[dict[str, Any]], Tensor] | None = None  # in the place of hidden_states (graphs.py)

    def forward(self, batch: Batch, *, count_correct: bool = False) -> LossSum:
        if self.fused:
            return self._fused(batch, count_correct)
        return self._own(batch, count_correct)

    @property
    def _smoothing(self) -> float:
        """Labels are smoothed to train on them; evaluation measures the plain loss, of which perplexity is made."""
        return self.label_smoothing if self.training else 0.0

    def _fused(self, batch: Batch, count_correct: bool) -> LossSum:
        head = unwrap(self.model).get_output_embeddings()
        hidden = (self.graphs or self.hidden_states)(batch.inputs)  # [B, S, H]
        trained = hidden.flatten(0, 1).index_select(0, batch.trained_at)  # [M, H]
        loss, correct = linear_cross_entropy(
            trained,
            head.weight,
            batch.targets,
            head.bias,
            label_smoothing=self._smoothing,
            count_correct=count_correct,
        )
        return LossSum(loss, correct if count_correct else None)

    def hidden_states(self, inputs: dict[str, Any]) -> Tensor:
        return decoder_of(unwrap(self.model))(**inputs, use_cache=False).last_hidden_state

    def _own(self, batch: Batch, count_correct: bool) -> LossSum:
        """The model's own loss is a mean over the batch's trained tokens, auxiliary losses included: times M."""
        outputs = self.model(**batch.inputs, labels=batch.labels, use_cache=False)
        # The mean of nothing is not a number: an empty sum keeps the graph.
        loss = outputs.loss.float() * batch.num_trained if batch.num_trained else outputs.logits[:0].float().sum()
        if not (self._smoothing or count_correct):
            return LossSum(loss, None)
        logits = outputs.logits.flatten(0, 1).index_select(0, batch.trained_at).float()  # [M, V]
        if self._smoothing:
            plain = F.cross_entropy(logits, batch.targets, reduction="sum")
            loss = (
                loss - plain + F.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=self._smoothing)
            )
        return LossSum(loss, (logits.argmax(-1) == batch.targets).sum() if count_correct else None)


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a peft one. Its layers are the same objects, adapters included."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_of(model: Any) -> nn.Module:
    """The stack of blocks that gives hidden states: `model.model` of a Llama, `model.transformer` of a GPT-2."""
    return getattr(model, model.base_model_prefix)
