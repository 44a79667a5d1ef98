"""A run on a device: its largest pass beside the device's memory, made smaller as training makes it where it must be.

Where a pass does not fit, training makes passes smaller and computes blocks again (train/passes.py); this does the
same, on paper. Only where that does not suffice does a run not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from burnish.model.graphs import TOKENS as TOKENS_OF_A_SHAPE
from burnish.model.graphs import waits_for_launches
from burnish.plan.devices import Device
from burnish.plan.memory import GIB, Memory, most_memory
from burnish.plan.model import Asked, Shape, shape_of_model
from burnish.plan.run import Run
from burnish.plan.speed import Rates, Time, time_of_step
from burnish.plan.steps import Pass, Rows, Step, passes_of, steps_of
from burnish.train.passes import AUTO, EFFICIENT

TIMED_STEPS = 50


@dataclass(frozen=True)
class Remedy:
    """A change that makes a run fit."""

    setting: str
    peak_gib: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Plan:
    """A run on a device. Of the first `recomputed` blocks those with a backward pass keep their input alone.

    Passes have at most `pass_tokens`.
    """

    run: Run
    shape: Shape
    device: Device
    rows: Rows
    memory: Memory
    fits: bool
    pass_tokens: int
    passes: float  # of a step
    recomputed: int
    step_tokens: float  # of all devices
    time: Time | None  # of a mean step
    remedies: tuple[Remedy, ...] = ()

    @property
    def computed_again(self) -> int:
        """Blocks."""
        return max(self.recomputed - self.shape.below, 0)

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.time is None else self.step_tokens / self.time.seconds


def fit(run: Run, rows: Rows, device: Device) -> Plan:
    """Whether it fits or not. Raises UserError for a model that cannot be planned."""
    rows = rows.cut_to(run.cutoff_len)
    steps = steps_of(rows, run.batching)
    shape = _shape(_Key(run.asked))
    most, recomputed = run.most_tokens, shape.layers if run.recompute else 0
    held = replace(run.held, recorded=_records(run, shape, rows))
    fills = TOKENS_OF_A_SHAPE if held.recorded else 1
    while True:
        cut = [passes_of(step, most, padded=run.batching.padded, fills=fills) for step in steps]
        each, of = max(((p, len(passes)) for passes in cut for p in passes), key=lambda pair: pair[0].tokens)
        memory = most_memory(shape, held, each, recomputed=recomputed, passes=of)
        fits = memory.needed <= device.memory_gib * GIB
        if not fits and held.recorded:
            held = replace(held, recorded=False)
            continue
        less = None if fits else _need_less(run, shape, each, recomputed, most)
        if less is None:
            break
        most, recomputed = less
    run = replace(run, held=held)
    time = _mean_time(run, shape, device, rows, steps, cut, recomputed)
    return Plan(
        run, shape, device, rows, memory, fits, each.tokens,
        sum(len(passes) for passes in cut) / len(cut), recomputed,
        sum(p.real for passes in cut for p in passes) / len(cut) * run.held.ranks, time,
    )  # fmt: skip


def _records(run: Run, shape: Shape, rows: Rows) -> bool:
    """As graphs.pays: where the CPU launches a block's kernels for longer than the GPU computes them."""
    held = run.held
    if held.pure_bf16 or held.stage or run.recompute or run.asked.model.quantization_bit:  # a remedy brings them too
        return False
    if run.record is not None:
        return run.record
    batching = run.batching
    of_a_row = batching.pack_to or float(rows.lengths.mean())
    tokens = min(of_a_row * batching.batch_size * batching.accumulation, run.most_tokens or AUTO)
    flops = max(4 * block.held / shape.dtype.itemsize + 2 * block.trained for block in shape.blocks)
    return waits_for_launches(flops * tokens)


def _need_less(run: Run, shape: Shape, each: Pass, recomputed: int, most: int | None) -> tuple[int | None, int] | None:
    """As Passes does where memory does not suffice: halves, and below EFFICIENT a quarter of the blocks again."""
    can_be_cut = most is not None and each.real > each.longest
    smaller = max(each.real // 2, each.longest) if can_be_cut else None
    if smaller is None or smaller < EFFICIENT:
        if run.recompute is None and not run.held.stage and recomputed < shape.layers:
            part = -((shape.below - shape.layers) // 4)  # recompute.py: of those that have a backward pass
            return most, min(shape.layers, max(recomputed, shape.below) + part)
        if smaller is None:
            return None
    return smaller, recomputed


def _mean_time(
    run: Run, shape: Shape, device: Device, rows: Rows, steps: list[Step], cut: list[list[Pass]], recomputed: int
) -> Time | None:
    if device.bf16_tflops is None:
        return None
    rates = Rates.of(device, run.asked.dtype)
    total, seconds, weight = Time(), 0.0, 0.0
    every = max(1, len(steps) // TIMED_STEPS)
    for step, passes in list(zip(steps, cut, strict=True))[::every]:
        time = time_of_step(
            shape, run.held, rates, passes, recomputed=recomputed, trained_share=rows.trained, batches=len(step)
        )
        for name, part in time.parts.items():
            total.add(name, part, kernels=0)
        total.cpu, total.waiting = total.cpu + time.cpu, total.waiting + time.waiting
        seconds, weight = seconds + time.seconds, weight + 1
    mean = Time({name: part / weight for name, part in total.parts.items()}, total.cpu / weight, total.waiting / weight)
    mean.idle = seconds / weight - mean.seconds  # steps differ: some wait for the CPU, some for the GPU
    return mean


@dataclass(frozen=True)
class _Key:
    """Two runs of equal settings have one model."""

    asked: Asked

    def __hash__(self) -> int:
        return hash(repr(self.asked))


@cache
def _shape(key: _Key) -> Shape:
    return shape_of_model(key.asked)
