"""What transformers' own Trainer needs to train on the rows of tests/small.py: a data set, and a collator."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from burnish.types import IGNORE_INDEX


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
