"""Plain transformers and peft on the rows of tests/small.py: a data set and a collator, a gradient, a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from burnish.types import IGNORE_INDEX, Sample


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row.input_ids.tolist(), "attention_mask": [1] * len(row), "labels": row.labels.tolist()}


class Padding:
    """The least of a tokenizer that DataCollatorForSeq2Seq asks for: pads with id 0 on the right."""

    padding_side, pad_token_id, deprecation_warnings = "right", 0, {}

    def pad(self, features, padding=True, max_length=None, pad_to_multiple_of=None, return_tensors=None):
        longest = max(len(f["input_ids"]) for f in features)
        longest = -(-longest // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        return {
            key: torch.tensor(
                [f[key] + [0 if key != "labels" else IGNORE_INDEX] * (longest - len(f[key])) for f in features]
            )
            for key in features[0]
        }

    def save_pretrained(self, folder) -> None:
        """transformers' Trainer saves what its collator pads with."""


def collator() -> DataCollatorForSeq2Seq:
    return DataCollatorForSeq2Seq(Padding(), pad_to_multiple_of=8)


def padded(rows: Sequence[Sample], device: torch.device) -> dict[str, torch.Tensor]:
    """What a model's own forward takes; its loss is the mean over the trained tokens."""
    return {name: value.to(device) for name, value in collator()([Rows(rows)[i] for i in range(len(rows))]).items()}


def run_of_plain(
    model: Any, steps: Sequence[Sequence[Sample]], *, learning_rate: float, max_grad_norm: float = 1.0
) -> list[float]:
    """Losses of one AdamW step for each padded batch, clipped, at a constant learning rate. No line of burnish."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    losses = []
    for rows in steps:
        loss = model(**padded(rows, weights[0].device), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()
