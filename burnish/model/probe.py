"""What a model's arithmetic allows, found by trying it on 16 tokens rather than by a list of model names.

Two questions, each answered by comparing numbers: do samples laid end to end give the hidden states that each gives by
itself (else: padded batches), and are the model's logits and loss those of its head applied to its hidden states
(else: the model's own forward)? So a model that this project has never heard of is trained right, on the fast path
where it can be. A model that keeps state between tokens fails the first question by itself, a capped head the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.model.attention import ATTENTION_NAME, register
from burnish.model.fp8 import Fp8Linear
from burnish.model.head import decoder_of, unwrap
from burnish.model.patch import shape_of
from burnish.model.source import first_line

PROBE_LENGTHS = (9, 7)  # tokens of the two documents; the first is odd so that no alignment helps
LOUD = 64.0  # what the head gives is multiplied by it: a cap hardly bends the small logits of a model with new weights


@dataclass(frozen=True)
class ForwardPath:
    """How a model is run: `padding_free` batches or padded ones, `fused_head` or the model's own; and why."""

    padding_free: bool
    fused_head: bool
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        batches = "samples end to end, no padding" if self.padding_free else "padded batches"
        head = "fused head" if self.fused_head else "the model's own head and loss"
        return f"{batches}; {head}" + "".join(f" ({reason})" for reason in self.reasons)


def choose_path(model: nn.Module, *, keep_padding: str = "") -> ForwardPath:
    """Try both questions on `model` and leave its attention set accordingly. Weights, modes and rng are untouched.

    `keep_padding` is the reason, if a setting asks for padded batches and the model's own attention.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ids = torch.randint(0, _vocabulary(model), (1, sum(PROBE_LENGTHS)), generator=_generator())
            ids = ids.to(next(model.parameters()).device)
            reasons = []
            padding_free, reason = (False, keep_padding) if keep_padding else _padding_free(model, ids)
            reasons += [reason] if reason else []
            fused, reason = _fused_head(model, ids)
            reasons += [reason] if reason else []
    finally:
        model.train(training)
    return ForwardPath(padding_free, fused, tuple(reasons))


def try_out(model: nn.Module) -> None:
    """One pass forward and backward as training makes them, of eight documents that mean nothing. Leaves no gradients.

    So many tokens that what is compiled for them suits thousands.
    """
    inner, training = unwrap(model), model.training
    ids = torch.randint(0, _vocabulary(model), (1, 2048), generator=_generator()).to(next(inner.parameters()).device)
    lengths = (301, 211, 256, 256, 200, 300, 400, 124)
    model.train()
    try:
        with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
            hidden = decoder_of(inner)(**packed_inputs(ids, lengths), use_cache=False).last_hidden_state
            hidden.float().square().mean().backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)


def _padding_free(model: nn.Module, ids: Tensor) -> tuple[bool, str]:
    inner = unwrap(model)
    own_attention = _own_attention(inner)
    lengths, border = PROBE_LENGTHS, PROBE_LENGTHS[0]
    alone = torch.cat([inner(input_ids=doc, use_cache=False).logits for doc in ids.split(lengths, dim=1)], dim=1)
    try:
        register()
        inner.set_attn_implementation(ATTENTION_NAME)
        if inner.config._attn_implementation != ATTENTION_NAME:
            return False, f"the attention of {type(inner).__name__} cannot be exchanged"
        packed = inner(**packed_inputs(ids, lengths), use_cache=False).logits
        apart = not _gradient_at_embeddings(inner, ids, lengths)[:, :border].any()
    except Exception as error:  # whatever a model raises here means one thing: not this way
        inner.set_attn_implementation(own_attention)
        return False, f"{type(inner).__name__}: {first_line(error)}"
    # Other kernels on other shapes: rounding may differ (in bf16 a router may even choose another expert).
    rounds = packed.dtype != torch.float32 or any(isinstance(module, Fp8Linear) for module in inner.modules())
    if apart and close(packed, alone, rounding=0.25 if rounds else 1e-3):
        return True, ""
    inner.set_attn_implementation(own_attention)
    return False, f"samples laid end to end are not what they are alone to {type(inner).__name__}"


def _gradient_at_embeddings(model: Any, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """What the last document's logits owe to each token's embedding, [1, T, H]; exactly zero where nothing leads there.

    Values would not do: state that leaks through a border of a model with new weights is less than their rounding.
    """
    embedded: list[Tensor] = []

    def begin_here(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # a model may go on in place

    with torch.enable_grad(), model.get_input_embeddings().register_forward_hook(begin_here):
        logits = model(**packed_inputs(ids, lengths), use_cache=False).logits
        return torch.autograd.grad(logits[:, -lengths[-1] :].float().square().sum(), embedded)[0]


def _fused_head(model: nn.Module, ids: Tensor) -> tuple[bool, str]:
    inner = unwrap(model)
    head = inner.get_output_embeddings()
    name = type(inner).__name__
    if type(head) is not nn.Linear:
        return False, f"the head of {name} is a {type(head).__module__.split('.')[0]} {type(head).__name__}"
    packed = inner.config._attn_implementation == ATTENTION_NAME
    inputs = packed_inputs(ids, (ids.shape[1],)) if packed else {"input_ids": ids}
    with head.register_forward_hook(_louder):
        own = inner(**inputs, labels=ids, use_cache=False)
    try:
        hidden = decoder_of(inner)(**inputs, use_cache=False).last_hidden_state
    except (AttributeError, TypeError) as error:
        return False, f"{name}: {first_line(error)}"
    if not close(head(hidden) * LOUD, own.logits, rounding=1e-3):
        return False, f"the logits of {name} are not its head's product alone"
    # From the model's own logits, so that what is compared is the rule alone, to float32's rounding in any dtype.
    if not torch.allclose(F.cross_entropy(own.logits[0, :-1].float(), ids[0, 1:]), own.loss.float(), rtol=1e-5):
        return False, f"{name} adds to its loss"
    return True, ""


def _louder(_module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
    return logits * LOUD


def packed_inputs(ids: Tensor, lengths: tuple[int, ...]) -> dict[str, Any]:
    """The keywords of a forward over documents laid end to end: ids [1, T]."""
    borders = torch.tensor([0, *lengths], dtype=torch.int32, device=ids.device).cumsum(0, dtype=torch.int32)
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n, device=ids.device) for n in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def close(a: Tensor, b: Tensor, rounding: float) -> bool:
    """Relative distance below `rounding`; not a number is never close."""
    difference = (a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12)
    return bool(torch.isfinite(difference)) and difference.item() < rounding


def _own_attention(model: Any) -> str:
    """The attention to go back to: what the model was loaded with, or sdpa where an earlier probe changed it."""
    name = model.config._attn_implementation
    if name != ATTENTION_NAME:
        return name
    model.set_attn_implementation("sdpa")
    return "sdpa"


def _vocabulary(model: nn.Module) -> int:
    return shape_of(unwrap(model).get_input_embeddings().weight)[0]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
