"""The nouns that every room shares: a message, an example, a sample, a batch.

One row of a file becomes an `Example` (messages), then one or more `Sample`s (token ids), then a part of a `Batch`
(tensors). Nothing here knows a file format, a template or a model.

Letters of shapes, used in comments at the end of lines:
    T  tokens of a batch laid end to end        B  rows of a padded batch       S  positions of a padded row
    D  documents (samples) in a batch           M  trained positions            H  hidden size       V  vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100  # a label that is not trained (torch's cross_entropy and transformers use the same)


class Message(TypedDict):
    """One turn, in the shape of OpenAI's chat API. `train: False` takes an assistant turn out of the loss."""

    role: str  # system | user | assistant | tool
    content: str | None
    tool_calls: NotRequired[list[dict[str, Any]]]  # [{"type": "function", "function": {"name", "arguments": dict}}]
    reasoning_content: NotRequired[str]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    train: NotRequired[bool]


@dataclass(frozen=True)
class Example:
    """A conversation (sft) or a text (pt) as it stood in a file, in one shape for every format.

    `prompt`, `response`, `system` and `tools_text` show it as the four columns that LLaMA-Factory aligns rows to.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas, as OpenAI's `tools`
    place: str = ""  # "data/pairs.jsonl:17", for messages about this row

    @property
    def system(self) -> str:
        first = self.messages[0] if self.messages else None
        return (first["content"] or "") if first and first["role"] == "system" else ""

    @property
    def prompt(self) -> list[Message]:
        return [m for m in self.messages[: self._answer_index] if m["role"] != "system"]

    @property
    def response(self) -> list[Message]:
        return list(self.messages[self._answer_index :])

    @property
    def tools_text(self) -> str:
        return json.dumps(list(self.tools), ensure_ascii=False) if self.tools else ""

    @property
    def _answer_index(self) -> int:
        """Where the last assistant turn stands (a pt text is all response)."""
        answers = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        return answers[-1] if answers else len(self.messages)


@dataclass(frozen=True)
class Encoded:
    """What a chat template makes of a conversation: ids, and for each id whether it is trained."""

    input_ids: list[int]
    trained: list[bool]
    straddled: int = 0  # borders of trained spans where one token had to be cut in two (D5)


@dataclass(frozen=True)
class Sample:
    """One row for the model. `labels[i]` is `input_ids[i]` where that token is trained, else IGNORE_INDEX.

    Labels stand where their ids stand; the loss shifts them by one. labels[0] is never trained: nothing predicts it.
    """

    input_ids: np.ndarray  # [S] int32
    labels: np.ndarray  # [S] int32
    place: str = ""
    documents: tuple[int, ...] = ()  # lengths of the texts that a row of several holds (pt); () where it is all one

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def attention_mask(self) -> np.ndarray:
        """All ones: a sample holds no padding; padding is the collator's."""
        import numpy as np

        return np.ones_like(self.input_ids)

    @property
    def num_trained(self) -> int:
        return int((self.labels[1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    Padding-free (the usual way): `inputs` holds input_ids [1, T], position_ids [1, T] restarting at each sample,
    cu_seq_lens_q/k [D+1] int32, max_length_q/k. Padded: input_ids [B, S], attention_mask [B, S].
    """

    inputs: dict[str, Any]  # keywords of the model's forward
    labels: torch.Tensor  # like input_ids, IGNORE_INDEX where not trained and at each sample's first token
    trained_at: torch.Tensor  # [M] flat positions whose *next* token is trained
    targets: torch.Tensor  # [M] that next token
    num_trained: int  # M, known without asking the device
    num_tokens: int  # real tokens, padding not counted
    places: tuple[str, ...]  # where each sample came from

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Page-locked, so that the copy to the device need not wait; torch's DataLoader calls it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        def move(value: Any) -> Any:
            return change(value) if hasattr(value, "to") else value

        return replace(
            self,
            inputs={name: move(value) for name, value in self.inputs.items()},
            labels=move(self.labels),
            trained_at=move(self.trained_at),
            targets=move(self.targets),
        )


class EncodesMessages(Protocol):
    """What `data/encode.py` needs of a chat template, so that data and chat need not know each other."""

    def encode(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        train_on_prompt: bool = False,
        mask_history: bool = False,
    ) -> list[Encoded]: ...

    def identity(self) -> dict[str, Any]:
        """All that decides what it makes of a conversation, but for the tokenizer, in values that JSON can hold."""
        ...
