"""Passes over the blocks recorded as CUDA graphs and replayed: for models so small that a GPU waits for its launches.

One idea: what turns ids into hidden states, and what turns the gradient of those into gradients of weights, is the same
list of kernels whenever a pass has the same shape. The CPU needs about 6 ms a block to name them one by one; recorded,
it names the list. Head and loss stay as they are: how many tokens are trained differs from pass to pass.

    tokens 4,100    → 4,608   a multiple of 512: one more document, which nobody trains on
    documents 17    → 31      one less than a power of two: the others have no tokens
    longest 700     → 2,048   a power of two, and at least this

Every training pass is filled up so (`fill`), recorded or not, and its backward pass stops at the hidden states and
begins there again, so that a run's numbers do not depend on what has been recorded: a matrix that is head and embedding
has its two gradients added in this order, and not to each other. A shape is recorded when it comes for the second time.
Whatever goes wrong there (work that waits for a value, no memory) ends the recording, not the run. Gradients stay where
they are from step to step, as the recorded additions to them do; a weight or gradient that has moved all the same is
noticed, and what was recorded is forgotten.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from burnish import console
from burnish.kernels.cudnn_plan import power_of_two
from burnish.model.head import CausalLoss, decoder_of, unwrap
from burnish.model.patch import size_of
from burnish.model.source import first_line
from burnish.types import IGNORE_INDEX, Batch

TOKENS = 512  # passes are filled up to a multiple of so many
BORDERS, LONGEST = 16, 2048  # and these, at least, to a power of two; a longest that none is costs next to nothing
MOST = 32  # recordings at a time; other shapes stay as they are

# Of an H100 and its CPU (docs/performance.md); a slower GPU gains less from what is recorded.
LAUNCHING = 6e-3  # seconds to launch a block's kernels, forward and backward
SPEED = 400e12  # FLOP/s at matrix products

Inputs = dict[str, Any]  # keywords of the decoder's forward


class CannotRecord(RuntimeError):
    """A pass that would not be the same when it is replayed."""


class Recorder(Protocol):
    """Keeps work, so that it can be done again without its Python (cuda_recorder.py)."""

    def rehearse(self, work: Callable[[], None]) -> None:
        """Do it as it will be recorded. Raises where it cannot be."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """→ what does the work; nothing has been done yet."""
        ...

    def forget(self) -> None:
        """Let go of all that was recorded, and of its memory."""
        ...


class Gradients(Protocol):
    """What `train/optimizer.py` does about the gradients that recorded passes add to."""

    def keep_places(self, keep: bool) -> None:
        """Whether they become zero where they are after a step, in the place of nothing."""
        ...

    def places(self) -> tuple[int, ...]:
        """The address of each, 0 where there is none."""
        ...


# ---- shapes ------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What must be the same for a recorded pass to be the pass."""

    tokens: int
    borders: int  # entries of cu_seq_lens
    longest: int

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Shape:
        return cls(inputs["input_ids"].shape[1], len(inputs["cu_seq_lens_q"]), inputs["max_length_q"])


def fill(batch: Batch) -> Batch:
    """The batch with a document of id 0 at its end, documents of no tokens, and a longest that is rounded up.

    Its trained positions, targets and counts stay. All ids that were added stand at position 0, which any model has.
    """
    borders, tokens = batch.inputs["cu_seq_lens_q"], batch.labels.shape[1]
    most = -(-tokens // TOKENS) * TOKENS
    added = (0, most - tokens)
    filled = torch.full((power_of_two(len(borders) + 1, BORDERS),), most, dtype=borders.dtype)
    filled[: len(borders)] = borders
    longest = power_of_two(batch.inputs["max_length_q"], LONGEST)
    inputs = {
        "input_ids": nn.functional.pad(batch.inputs["input_ids"], added),
        "position_ids": nn.functional.pad(batch.inputs["position_ids"], added),
        "cu_seq_lens_q": filled,
        "cu_seq_lens_k": filled,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return replace(batch, inputs=inputs, labels=nn.functional.pad(batch.labels, added, value=IGNORE_INDEX))


def pays(blocks: Iterable[nn.Module], tokens: float) -> bool:
    """Whether a GPU computes every block for so many tokens faster than a CPU launches it."""

    def flops(block: nn.Module) -> float:
        return sum((6 if weight.requires_grad else 4) * size_of(weight) for weight in block.parameters())

    return waits_for_launches(max((flops(block) for block in blocks), default=math.inf) * tokens)


def waits_for_launches(flops: float) -> bool:
    """Whether a block of so many FLOPs, forward and backward, is computed before its kernels are launched."""
    return flops / SPEED < LAUNCHING


def has_dropout(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


# ---- recorded passes -----------------------------------------------------------------------------------------------


class Recording:
    """One shape: hidden states from ids, and gradients of weights from the gradient of the hidden states.

    `hidden` and `gradient` [1, T, H] are what it writes and reads; recordings share them, as one pass is over before
    the next begins.
    """

    def __init__(
        self, run: Callable[[Inputs], Tensor], inputs: Inputs, hidden: Tensor, gradient: Tensor, recorder: Recorder
    ):
        self._run, self._hidden, self._gradient = run, hidden, gradient
        self._inputs = _copied(inputs)
        self._root: Tensor | None = None  # of autograd's graph, between the two
        self._replay_forward = recorder.record(self._do_forward)
        self._replay_backward = recorder.record(self._do_backward)

    def _do_forward(self) -> None:
        self._root = self._run(self._inputs)
        self._hidden.copy_(self._root.detach())

    def _do_backward(self) -> None:
        root, self._root = self._root, None
        assert root is not None
        torch.autograd.backward(root, self._gradient)

    def forward(self, inputs: Inputs) -> Tensor:
        for name, mine in self._inputs.items():
            if isinstance(mine, Tensor):
                mine.copy_(inputs[name], non_blocking=True)
        self._replay_forward()
        return self._hidden.detach()

    def backward(self, gradient: Tensor) -> None:
        self._gradient.copy_(gradient)
        self._replay_backward()


def _copied(inputs: Inputs) -> Inputs:
    """Tensors of their own; one that stands under two names stays one, or compiled blocks would be compiled again."""
    copies = {id(each): each.clone() for each in inputs.values() if isinstance(each, Tensor)}
    return {name: copies.get(id(each), each) for name, each in inputs.items()}


class Unrecorded:
    """A pass as it is, in the place of a recording."""

    def __init__(self, hidden: Tensor):
        self._hidden = hidden

    def forward(self, _inputs: Inputs) -> Tensor:
        return self._hidden.detach()

    def backward(self, gradient: Tensor) -> None:
        torch.autograd.backward(self._hidden, gradient)


class _Joined(torch.autograd.Function):
    """Joins a pass to the head's autograd graph. `anchor` is what asks for the gradient; it gets none."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, one_pass: Recording | Unrecorded, inputs: Inputs) -> Tensor:
        ctx.one_pass = one_pass
        return one_pass.forward(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        one_pass, ctx.one_pass = ctx.one_pass, None  # what it keeps is let go of before the next is computed
        one_pass.backward(gradient)
        return None, None, None


class PassGraphs:
    """The passes of `objective` while it trains: those of a shape that has come before are replayed."""

    def __init__(self, objective: CausalLoss, gradients: Gradients, recorder: Recorder):
        self._objective, self._gradients, self._recorder = objective, gradients, recorder
        self._weights = [*objective.model.parameters(), *objective.model.buffers()]
        self._anchor = torch.zeros((), device=self._weights[0].device, requires_grad=True)
        self._may_record = True
        self._seen: set[Shape] = set()
        self._recordings: dict[Shape, Recording] = {}
        self._places: tuple[int, ...] = ()  # of all that a recording reads and writes, when it was made
        self._like: Tensor | None = None  # one hidden state, once it has been rehearsed
        self._exchanged: tuple[Tensor, Tensor] | None = None  # hidden states and their gradient, flat
        objective.graphs = self

    @property
    def count(self) -> int:
        """Recordings that are held."""
        return len(self._recordings)

    def __call__(self, inputs: Inputs) -> Tensor:
        """→ hidden states [1, T, H]."""
        if not torch.is_grad_enabled():
            return self._objective.hidden_states(inputs)
        one_pass = self._recording(inputs) if self._may_record else None
        if one_pass is None:
            hidden = self._objective.hidden_states(inputs)
            if not hidden.requires_grad:  # nothing before the head is trained
                return hidden
            one_pass = Unrecorded(hidden)
        return _Joined.apply(self._anchor, one_pass, inputs)  # type: ignore[return-value]

    def stop(self, why: str = "") -> bool:
        """Forget what was recorded and record no more; → whether there was anything. `why` is said, if it is given."""
        had_any = bool(self._recordings)
        self._may_record = False
        self._forget()
        self._gradients.keep_places(False)
        if why:
            console.warn(f"passes are not recorded as CUDA graphs: {why}")
        return had_any

    def release(self) -> None:
        """The objective computes by itself again."""
        self.stop()
        self._objective.graphs = None

    def _forget(self) -> None:
        self._recordings.clear()
        self._exchanged = None
        self._recorder.forget()

    def _recording(self, inputs: Inputs) -> Recording | None:
        shape = Shape.of(inputs)
        if self._recordings and self._has_moved():
            self._forget()
        if shape not in self._recordings and shape in self._seen and len(self._recordings) < MOST:
            self._record(shape, inputs)
        self._seen.add(shape)
        return self._recordings.get(shape)

    def _has_moved(self) -> bool:
        """Whether anything that is read or added to is elsewhere now. What had no gradient then has none from there."""
        return any(then and then != now for then, now in zip(self._places, self._places_now(), strict=True))

    def _places_now(self) -> tuple[int, ...]:
        of_weights = (weight.data_ptr() if weight.requires_grad else -weight.data_ptr() for weight in self._weights)
        return (*of_weights, *self._gradients.places())

    def _record(self, shape: Shape, inputs: Inputs) -> None:
        before = [(weight, weight.grad) for weight in self._weights if weight.requires_grad]
        try:
            if not self._recordings:
                self._rehearse(inputs)
            self._recordings[shape] = Recording(
                self._objective.hidden_states, inputs, *self._exchange(shape), self._recorder
            )
            self._places = self._places_now()
            return
        except Exception as error:  # whatever a model or the device raises here means one thing: not this way
            why = first_line(error)
        # Here, and not above: while the error is handled it holds the tensors of what was tried.
        for weight, gradient in before:
            weight.grad = gradient
        gc.collect()  # nodes of autograd that belong to the stream aside
        self.stop(why)

    def _rehearse(self, inputs: Inputs) -> None:
        """Passes whose gradients are zero: nothing is added to what there is, and what is missing is made."""
        decoder = decoder_of(unwrap(self._objective.model))
        hooked = next((name for name, module in decoder.named_modules() if _has_hooks(module)), None)
        if hooked is not None:
            raise CannotRecord(f"a hook at {hooked or 'the decoder'} would not be called")
        self._gradients.keep_places(True)
        self._recorder.rehearse(lambda: self._pass_for_nothing(inputs))

    def _pass_for_nothing(self, inputs: Inputs) -> None:
        hidden = self._objective.hidden_states(inputs)
        if not hidden.requires_grad:
            raise CannotRecord("nothing before the head is trained")
        self._like = hidden.detach()[0, 0].clone()
        hidden.backward(torch.zeros_like(hidden))

    def _exchange(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """Room for hidden states and their gradient; what is made for more tokens serves fewer."""
        assert self._like is not None
        width = len(self._like)
        size = shape.tokens * width
        if self._exchanged is None or len(self._exchanged[0]) < size:
            self._exchanged = (self._like.new_zeros(size), self._like.new_zeros(size))
        hidden, gradient = (flat[:size].view(1, shape.tokens, width) for flat in self._exchanged)
        return hidden, gradient


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))
