"""The proof of an export: the folder, loaded from disk, answers as base and adapter did, and not as the base does.

All answers are compared in float32 arithmetic (precision.py), so what is left between them is the rounding of the
merged weights, which the tolerance is made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from burnish.chat.template import CannotRender, ChatTemplate
from burnish.export.precision import in_float32
from burnish.generate.config import num_positions
from burnish.types import Message

CHATS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "请将拼音转化汉字：ni hao"},
        {"role": "assistant", "content": "你好"},
        {"role": "user", "content": "xin qing bu hao"},
    ],
)
TEXTS = ("The old clock on the wall struck twelve, and", "def add(a, b):\n    return a + b\n\nprint(add(2, 40))  #")
SPREAD = 48  # ids from the first to the last of the vocabulary
LONGEST = 128  # tokens of a prompt; enough to tell two models apart

LOST_IS_MUCH = 0.25  # of what the adapter does, from which on the rounding is said


def make_prompts(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, limit: int) -> list[list[int]]:
    """The same ids every time: conversations where there is a template, texts, and the vocabulary from end to end.

    `limit` is the number of rows of the embedding; published tokenizers may have tokens without one.
    """
    prompts = [list(tokenizer.encode(text, add_special_tokens=True)) for text in TEXTS]
    for chat in CHATS if template is not None else ():
        try:
            prompts.append(template.prompt(chat))  # type: ignore[union-attr]
        except CannotRender:  # a template for one turn
            continue
    last = min(limit, len(tokenizer)) - 1
    prompts.append([round(n * last / (SPREAD - 1)) for n in range(SPREAD)])
    kept = [[id for id in prompt if id < limit] for prompt in prompts]
    return [prompt for prompt in kept if prompt]


@torch.no_grad()
def answers(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits after every token of every prompt, one after the other.  # [T, V] float32 on the CPU"""
    longest = min(num_positions(model.config) or LONGEST, LONGEST)
    rows = []
    with in_float32(model):
        for prompt in prompts:
            ids = torch.tensor([prompt[:longest]], device=model.device)  # [1, S]
            # Some models set what they never say to -inf, where a difference would be no number.
            rows.append(model(input_ids=ids, use_cache=False).logits[0].float().clamp(-1e4, 1e4).cpu())
    return torch.cat(rows)


@dataclass(frozen=True)
class Difference:
    relative: float  # ‖a − b‖ / ‖b‖ over all logits, each row's mean taken off: softmax does not see it
    largest: float  # of one logit
    same_choice: float  # share of positions where both find the same token likeliest

    def within(self, tolerance: float) -> bool:
        return self.relative <= tolerance  # false where it is no number


def difference(a: Tensor, b: Tensor) -> Difference:
    centred_a, centred_b = (each - each.mean(dim=-1, keepdim=True) for each in (a, b))
    apart = centred_a - centred_b
    return Difference(
        relative=(apart.norm() / centred_b.norm().clamp(min=1e-30)).item(),
        largest=apart.abs().max().item(),
        same_choice=(a.argmax(-1) == b.argmax(-1)).float().mean().item(),
    )


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference that rounding explains: 1e-4 in float32, 0.4 % in fp16, 3 % in bf16.

    Rounding moves each merged weight by at most half a unit in its last place, eps/2, at random; a layer's output moves
    by about eps/4, and such moves add up as their root over layers. Measured, all linear layers changed: 0.66 % for
    30 layers in bf16 (eps 0.78 %), 0.09 % in fp16; 0.2 to 0.5 % for three, 0.7 % for 48 with 64 experts each. In
    float32 the order of additions counts for more than rounding: 2.5e-6 for 30 layers.
    """
    return max(4 * torch.finfo(dtype).eps, 1e-4)


FROM_DISK = 1e-5  # the same weights, computed with twice: only the order of additions may differ


@dataclass(frozen=True)
class AdapterProof:
    """One adapter, put on and merged."""

    name: str
    tensors: int
    unused: list[str]
    effect: Difference  # with it, against without
    merged: Difference  # merged, against unmerged
    allowed: float  # tolerance of the dtype that it was merged in

    def faults(self) -> list[str]:
        found = []
        if self.unused:
            found.append(f"{len(self.unused)} of {self.tensors} tensors of {self.name} were not used: {self.unused[0]}")
        if not self.merged.within(self.allowed):
            found.append(f"merged, {self.name} answers differently: {_of(self.merged, self.allowed)}")
        if self.changes_nothing:
            found.append(f"{self.name} changes no answer: it is untrained, or of another model")
        return found

    @property
    def changes_nothing(self) -> bool:
        return self.effect.within(FROM_DISK)


@dataclass
class Proof:
    """Everything that was compared. It holds when `faults` is empty."""

    dtype: torch.dtype
    adapters: list[AdapterProof] = field(default_factory=list)
    effect: Difference | None = None  # base and adapters, against the base alone
    from_disk: Difference | None = None  # loaded from the folder, against the model that was written
    from_adapter: Difference | None = None  # … against base and adapters, the last one unmerged
    from_base: Difference | None = None  # … against the base alone
    in_files: list[str] = field(default_factory=list)  # what is wrong with keys, shapes, dtypes

    @property
    def tolerance(self) -> float:
        return tolerance(self.dtype)

    @property
    def differs_from_base(self) -> bool | None:
        """Whether it is nearer to the adapter than to the base; None without adapters.

        Not "by more than the tolerance": that is a bound for every model, and an adapter that changes answers by 2 %
        is not lost when rounding really moved them by 0.5 %.
        """
        if not self.adapters or self.from_base is None or self.from_adapter is None:
            return None
        return self.from_base.relative > self.from_adapter.relative

    @property
    def lost(self) -> float:
        """How far rounding moved the answers, over how far the adapters did."""
        if self.effect is None or self.from_adapter is None or not self.effect.relative:
            return 0.0
        return self.from_adapter.relative / self.effect.relative

    def faults(self) -> list[str]:
        found = [*self.in_files]
        for adapter in self.adapters:
            found += adapter.faults()
        if self.from_disk is not None and not self.from_disk.within(FROM_DISK):
            found.append(f"the files do not hold what was written: {_of(self.from_disk, FROM_DISK)}")
        if self.from_adapter is not None and not self.from_adapter.within(self.tolerance):
            found.append(f"it does not answer as base and adapter: {_of(self.from_adapter, self.tolerance)}")
        elif self.differs_from_base is False and not any(adapter.changes_nothing for adapter in self.adapters):
            found.append(
                f"it is nearer to the base than to the adapter: {dtype_name(self.dtype)} rounds away what it learned, "
                "infer_dtype: float32 keeps it"
            )
        return found


def _of(apart: Difference, allowed: float) -> str:
    return f"logits differ by {apart.relative:.2e}, {allowed:.0e} is allowed"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prove_from_disk(proof: Proof, model: nn.Module, prompts: list[list[int]], seen: Seen) -> None:
    """Compare what was loaded from the folder with what was seen before it was written."""
    now = answers(model, prompts)
    proof.effect = difference(seen.with_adapter, seen.base)
    proof.from_disk = difference(now, seen.written)
    proof.from_adapter = difference(now, seen.with_adapter)
    proof.from_base = difference(now, seen.base)


@dataclass(frozen=True)
class Seen:
    """Answers of the models that are gone when the folder is read again.  # [T, V] each"""

    base: Tensor
    with_adapter: Tensor
    written: Tensor
