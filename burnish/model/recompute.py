"""Gradient checkpointing of as few blocks as memory needs (Chen et al., arXiv 1604.06174).

A block that is checkpointed keeps its input alone and is computed again in the backward pass: a third more work for it,
and a tenth of the memory. Frozen blocks below the first trained one keep nothing for the backward pass, and to compute
them again would free nothing. Of the others the first are taken first; which of them it is makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from burnish.model.head import unwrap
from burnish.model.patch import checkpoint_only

_PARTS = 4  # at a time a quarter of the blocks


class Recompute:
    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module]):
        all_blocks = list(blocks)
        self._model, self._blocks = model, _with_gradients(model, all_blocks)
        self._of = f"{'the last ' if len(self._blocks) < len(all_blocks) else ''}{len(self._blocks)}"
        self.count = 0  # blocks that are computed again

    def more(self) -> bool:
        """A quarter of the blocks more; False where all are computed again already, or the model cannot."""
        if self.count == len(self._blocks):
            return False
        step = -(-len(self._blocks) // _PARTS)
        return self.set(min(self.count + step, len(self._blocks)))

    def set(self, count: int) -> bool:
        count = min(count, len(self._blocks))  # an older run's may be of all blocks
        if not checkpoint_only(self._model, self._blocks[:count]):
            return False
        self.count = count
        return True

    def __str__(self) -> str:
        return f"{self.count} of {self._of} blocks"


def _with_gradients(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """From the first trained block on; all of them where anything else is trained that may stand before the blocks."""
    inner = unwrap(model)
    within = {weight for block in blocks for weight in block.parameters()}
    behind = set(_weights(inner.get_output_embeddings())) - set(_weights(inner.get_input_embeddings()))
    if any(weight.requires_grad for weight in set(model.parameters()) - within - behind):
        return blocks
    trained = (number for number, block in enumerate(blocks) if any(w.requires_grad for w in block.parameters()))
    return blocks[next(trained, 0) :]


def _weights(module: nn.Module | None) -> Iterable[nn.Parameter]:
    return () if module is None else module.parameters()
