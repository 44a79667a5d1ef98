"""The most memory of a step, and what takes it.

One idea: follow a step through its moments and take the largest. What stays (weights, float32 masters, moments of the
optimizer) is known; what blocks keep and hold is measured (block.py); gradients come as the backward pass goes:

    forward   kept of blocks 0..n-1 ────────► head: a tile of logits, gradients of its input and of its weight
    backward  … block n-1 + what it holds, block n-2 …, each leaving the gradients of its weights ──► optimizer

All of it is what torch's allocator hands out (torch.cuda.max_memory_allocated). What the device needs besides is added
last: the CUDA context, and memory between the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from burnish.kernels.linear_cross_entropy import gpu_tile
from burnish.plan.model import Shape
from burnish.plan.steps import Pass

GIB = 2.0**30
FLOAT32 = 4
CONTEXT = 0.6 * GIB  # CUDA's, its libraries' and the compiled kernels'; outside of torch's allocator. Not measured
BETWEEN = 0.03  # of what is handed out: pieces too small to be used again. Not measured
WORKSPACES = 0.1 * GIB  # of cuBLAS (32 MiB for a handle and a stream on Hopper), inputs, losses

# Moments of an optimizer, bytes a trained weight (train/optimizer.py). Paged ones move to the CPU when they must.
MOMENTS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), 8.0),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 2.03),  # with a scale for each 256
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop"), 4.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), 1.02),
    "sgd": 0.0,
    "adafactor": 0.02,  # a row and a column for each matrix
}


@dataclass(frozen=True)
class Held:
    """How a run holds what it trains."""

    optim: str
    pure_bf16: bool = False
    stage: int = 0  # of ZeRO
    ranks: int = 1
    offloaded: bool = False  # the optimizer's state to the CPU (DeepSpeed)
    recorded: bool = False  # passes as CUDA graphs

    def divided(self, from_stage: int) -> float:
        return 1.0 / self.ranks if self.stage >= from_stage else 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes by what takes them, at the largest moment."""

    parts: dict[str, float] = field(default_factory=dict)
    moment: str = ""
    recorded: float = 0.0  # of recorded passes, whose memory nobody else may use

    @property
    def allocated(self) -> float:
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Of the device, all in all."""
        return self.allocated * (1 + BETWEEN) + CONTEXT + self.recorded


def most_memory(shape: Shape, held: Held, each: Pass, *, recomputed: int, passes: int) -> Memory:
    """`recomputed`: how many blocks, from the first on, keep their input alone. `passes` of the step."""
    stays = _what_stays(shape, held)
    # Gradients that recorded passes add to keep their place from step to step (graphs.Gradients).
    moments = _Moments(shape, held, each, recomputed, after_another=passes > 1 or held.recorded)
    name, rest = max(moments.all(), key=lambda moment: sum(moment[1].values()))
    own = 0.0
    if held.recorded:  # beside them stand hidden states and their gradient, which recordings share (model/graphs.py)
        own = rest.get("activations", 0.0)
        stays["recorded hidden states"] = 2 * shape.measured.hidden.at(each.tokens)
    return Memory({**stays, **{part: size for part, size in rest.items() if size}}, name, own)


def _what_stays(shape: Shape, held: Held) -> dict[str, float]:
    low = shape.dtype.itemsize < FLOAT32
    moments = (MOMENTS[held.optim] if not held.pure_bf16 else 4.0) * shape.trained * held.divided(1)
    masters = FLOAT32 * shape.trained * held.divided(1) if low and not held.pure_bf16 else 0.0
    parts = {"weights": shape.held * held.divided(3)}
    if not held.offloaded:
        parts |= {"float32 masters": masters, "optimizer state": moments}
    return {name: size for name, size in {**parts, "workspaces": WORKSPACES}.items() if size}


def gradient_bytes(shape: Shape, held: Held, *, passes: int) -> float:
    """Of a trained weight, once its gradient has left the model (masters.Masters, rounding.Sums)."""
    if held.pure_bf16 or held.stage:
        return shape.dtype.itemsize * held.divided(2)
    return shape.dtype.itemsize if passes == 1 and held.ranks == 1 and not held.recorded else FLOAT32


class _Moments:
    """The moments of a pass, each as what it holds beyond what stays."""

    def __init__(self, shape: Shape, held: Held, each: Pass, recomputed: int, *, after_another: bool):
        self.shape, self.tokens, self.recomputed = shape, each.tokens, recomputed
        self.blocks, self.size = shape.measured.blocks, shape.dtype.itemsize
        self.gradient, self.after_another = gradient_bytes(shape, held, passes=2 if after_another else 1), after_another
        self.matrix = shape.vocabulary * shape.width  # of the head, and of the embedding
        self.gathered = max((block.held for block in shape.blocks), default=0.0) if held.stage == 3 else 0.0
        self.keeps = [
            cost.keeps(recomputed=number < recomputed).at(each.tokens) for number, cost in enumerate(self.blocks)
        ]
        self.outside = shape.measured.outside.at(each.tokens)
        self.hidden = shape.measured.hidden.at(each.tokens)

    def all(self) -> Iterator[tuple[str, dict[str, float]]]:
        kept = sum(self.keeps)
        yield self._forward(kept)
        yield from self._head(kept)
        yield from self._backward(kept)
        yield self._update()

    def _earlier(self, *, above: int | None = None) -> float:
        """Gradients that are there: of the blocks above, or of everything where a pass has been before."""
        if self.after_another:
            return self.gradient * self.shape.trained
        if above is None:
            return 0.0
        return self.gradient * sum(block.trained for block in self.shape.blocks[above + 1 :])

    def _forward(self, kept: float) -> tuple[str, dict[str, float]]:
        last = self.blocks[-1]
        inside = max(last.extra_forward.at(self.tokens) - last.kept.at(self.tokens), 0.0)
        return "forward", {"activations": kept, "inside a block": inside + self.gathered, "gradients": self._earlier()}

    def _head(self, kept: float) -> Iterator[tuple[str, dict[str, float]]]:
        """The loss, and then its backward pass, where the gradient of the weight is scaled and rounded."""
        tile = min(gpu_tile(self.shape.trains_head), self.tokens) * self.shape.vocabulary * self.size
        activations = kept + self.outside + 3 * self.hidden  # its output, those trained of it, their gradient
        weight = self.matrix if self.shape.trains_head else 0
        common = {"activations": activations, "gradients": self._earlier()}
        yield "head", {**common, "head": tile + weight * FLOAT32}
        yield "head's backward", {**common, "head": weight * (FLOAT32 + self.size) + self.hidden}

    def _backward(self, kept: float) -> Iterator[tuple[str, dict[str, float]]]:
        head = 0.0
        if self.shape.trains_head:  # tied: it waits for the embedding's, to be added to it
            head = self.matrix * (self.size if self.shape.tied else self.gradient)
        for number in reversed(range(len(self.blocks))):
            cost = self.blocks[number]
            again = cost.kept.at(self.tokens) - self.keeps[number] if number < self.recomputed else 0.0
            inside = cost.extra_backward.at(self.tokens) + max(again, 0.0) + self.gathered + self.shape.largest
            gradients = self._earlier(above=number) + head
            yield (
                f"backward of block {number}",
                {
                    "activations": kept,
                    "inside a block": inside,
                    "gradients": gradients,
                },
            )
            kept -= self.keeps[number]
        if self.shape.trains_embedding:
            gradients = self._earlier(above=-1) + head + self.matrix * (self.size + self.gradient)
            yield "embedding's backward", {"gradients": gradients, "activations": self.hidden}

    def _update(self) -> tuple[str, dict[str, float]]:
        return "update", {"gradients": self.gradient * self.shape.trained}
