"""`burnish plan`: peak memory and tokens per second of a run from its configuration alone, and what to change.

    settings → Run ─┬─ the model on the meta device, its blocks measured     plan_model.py, plan_block.py, plan_graph.py
                    ├─ rows → steps → passes                                 plan_steps.py
                    └─ device                                                plan_devices.py
               → the largest moment of the largest pass                      plan_memory.py
               → seconds of a step                                           plan_speed.py

Where a pass does not fit, burnish itself makes passes smaller and computes blocks again (passes.py); the plan does the
same, on paper. Only where that does not suffice does a run not fit, and then other settings are tried until some do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from burnish.errors import UserError
from burnish.model.graphs import LAUNCHING, SPEED
from burnish.model.graphs import TOKENS as TOKENS_OF_A_SHAPE
from burnish.train.passes import AUTO, EFFICIENT
from burnish.train.plan_devices import Device
from burnish.train.plan_memory import GIB, Held, Memory, most_memory
from burnish.train.plan_model import Asked, Shape, shape_of_model
from burnish.train.plan_speed import Rates, Time, time_of_step
from burnish.train.plan_steps import Batching, Pass, Rows, Step, passes_of, steps_of

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings

TIMED_STEPS = 50
SHORTEST_CUTOFF = 512
DEVICES = (2, 4, 8)  # that are tried
ZERO_3 = "examples/deepspeed/ds_z3_config.json"


@dataclass(frozen=True)
class Run:
    """What the settings ask for, as far as memory and time depend on it."""

    asked: Asked
    held: Held
    batching: Batching
    cutoff_len: int
    most_tokens: int | None  # None: a batch is a pass
    recompute: bool | None  # None: as memory needs
    record: bool | None = False  # passes as CUDA graphs; None: where it pays

    @classmethod
    def of(cls, settings: Settings, ranks: int) -> Run:
        """Raises UserError for attention that holds lengths × lengths."""
        if settings.model.flash_attn in ("disabled", "off"):
            message = "is not planned: its memory is the square of lengths"
            raise UserError(settings.problem("flash_attn", message, "leave it out"))
        stage, offloaded = _zero(settings.value("deepspeed"))
        padded = settings.model.flash_attn not in ("auto", "fa2", "fa3") or not settings.data.ignore_pad_token_for_loss
        dtype = _dtype(settings)
        wanted = settings.value("torch_compile") is not False
        bits = settings.model.quantization_bit
        asked_tokens = settings.value("micro_batch_tokens")
        packs = settings.data.packing and settings.finetuning.stage == "sft"
        return cls(
            asked=Asked(
                settings.model,
                settings.finetuning,
                dtype,
                compiled=wanted and not (stage or padded or bits),
            ),
            held=Held(
                settings.value("optim"),
                settings.finetuning.pure_bf16 and dtype == torch.bfloat16,
                stage,
                ranks,
                offloaded,
            ),
            batching=Batching(
                batch_size=settings.value("per_device_train_batch_size"),
                accumulation=settings.value("gradient_accumulation_steps"),
                pack_to=settings.data.cutoff_len if packs else None,
                padded=padded,
                ranks=ranks,
                seed=settings.value("seed") if settings.value("data_seed") is None else settings.value("data_seed"),
                strategy=settings.value("train_sampling_strategy"),
                max_steps=settings.value("max_steps"),
                epochs=settings.value("num_train_epochs"),
            ),
            cutoff_len=settings.data.cutoff_len,
            most_tokens=None if stage or padded else AUTO if asked_tokens == "auto" else int(asked_tokens),
            recompute=settings.value("gradient_checkpointing"),
            record=_may_record(settings, dtype, stage, padded),
        )


@dataclass(frozen=True)
class Remedy:
    """A change that makes a run fit."""

    setting: str
    peak_gib: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Plan:
    """A run on a device. `recomputed` blocks keep their input alone; passes have at most `pass_tokens`."""

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
    def tokens_per_second(self) -> float | None:
        return None if self.time is None else self.step_tokens / self.time.seconds

    @property
    def available_gib(self) -> float:
        return self.device.memory_gib


def make_plan(run: Run, rows: Rows, device: Device) -> Plan:
    """The plan of a run, with what to change where it does not fit. Raises UserError for a model that cannot be."""
    plan = _plan(run, rows, device)
    if plan.fits:
        return plan
    return replace(plan, remedies=tuple(_remedies(run, rows, device)))


def _plan(run: Run, rows: Rows, device: Device) -> Plan:
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
    if run.record is not None:
        return run.record
    batching = run.batching
    of_a_row = batching.pack_to or float(rows.lengths.mean())
    tokens = min(of_a_row * batching.batch_size * batching.accumulation, run.most_tokens or AUTO)
    flops = max(4 * block.held / shape.dtype.itemsize + 2 * block.trained for block in shape.blocks)
    return flops * tokens / SPEED < LAUNCHING


def _need_less(run: Run, shape: Shape, each: Pass, recomputed: int, most: int | None) -> tuple[int | None, int] | None:
    """As Passes does where memory does not suffice: halves, and below EFFICIENT a quarter of the blocks again."""
    can_be_cut = most is not None and each.real > each.longest
    smaller = max(each.real // 2, each.longest) if can_be_cut else None
    if smaller is None or smaller < EFFICIENT:
        if run.recompute is None and not run.held.stage and recomputed < shape.layers:
            return most, min(shape.layers, recomputed - (-shape.layers // 4))
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


# ---- what to change ------------------------------------------------------------------------------------------------


def _remedies(run: Run, rows: Rows, device: Device) -> Iterator[Remedy]:
    """Of each kind of change the least that makes the run fit."""
    for ways in _changes(run):
        for setting, changed in ways:
            plan = _plan(changed, rows, device)
            if plan.fits:
                yield Remedy(setting, plan.memory.needed / GIB, plan.tokens_per_second)
                break


def _changes(run: Run) -> Iterator[list[tuple[str, Run]]]:
    asked, tuning, held = run.asked, run.asked.tuning, run.held
    low = asked.dtype.itemsize == 2
    if run.recompute is False or (run.recompute is None and held.stage):
        yield [("gradient_checkpointing: true", replace(run, recompute=True))]
    if run.most_tokens is None and run.batching.batch_size > 1:
        batching = replace(run.batching, batch_size=1)
        yield [("per_device_train_batch_size: 1", replace(run, batching=batching))]
    if not low:
        yield [("bf16: true", replace(run, asked=replace(asked, dtype=torch.bfloat16)))]
    if tuning.finetuning_type != "lora":
        if low and not held.stage and not held.pure_bf16 and held.optim in ("adamw_torch", "adamw_torch_fused"):
            yield [("pure_bf16: true", replace(run, held=replace(held, pure_bf16=True)))]
        with_lora = replace(asked, tuning=replace(tuning, finetuning_type="lora"))
        yield [("finetuning_type: lora", replace(run, asked=with_lora, held=replace(held, pure_bf16=False)))]
    else:
        if tuning.lora_rank > 8:
            smaller = replace(tuning, lora_rank=8, lora_alpha=16)
            yield [("lora_rank: 8", replace(run, asked=replace(asked, tuning=smaller)))]
        if not held.stage and asked.model.quantization_bit != 4:
            model = replace(asked.model, quantization_bit=4)
            yield [("quantization_bit: 4", replace(run, asked=replace(asked, model=model, compiled=False)))]
    yield list(_shorter(run))
    if held.stage < 3 and not asked.model.quantization_bit and not held.pure_bf16:
        words = f"deepspeed: {ZERO_3} and gradient_checkpointing: true, on {{}} devices"
        yield [(words.format(ranks), _divided(run, ranks)) for ranks in DEVICES if ranks >= held.ranks]


def _shorter(run: Run) -> Iterator[tuple[str, Run]]:
    cutoff = run.cutoff_len // 2
    while cutoff >= SHORTEST_CUTOFF:
        pack_to = cutoff if run.batching.pack_to else None
        yield f"cutoff_len: {cutoff}", replace(run, cutoff_len=cutoff, batching=replace(run.batching, pack_to=pack_to))
        cutoff //= 2


def _divided(run: Run, ranks: int) -> Run:
    return replace(
        run,
        asked=replace(run.asked, compiled=False),
        held=replace(run.held, stage=3, ranks=ranks),
        recompute=True,
        batching=replace(run.batching, ranks=ranks),
        most_tokens=None,
    )


# ---- reading settings ----------------------------------------------------------------------------------------------


def _dtype(settings: Settings) -> torch.dtype:
    if (
        settings.value("bf16")
        or settings.finetuning.pure_bf16
        or (settings.value("fp16") and settings.value("deepspeed"))
    ):
        return torch.bfloat16
    return torch.float16 if settings.value("fp16") else torch.float32


def _may_record(settings: Settings, dtype: torch.dtype, stage: int, padded: bool) -> bool | None:
    """What `cuda_graphs` says, where nothing that training would name stands against it."""
    names = ("quantization_bit", "pure_bf16", "gradient_checkpointing", "neftune_noise_alpha")
    against = [settings.value(name) for name in (*names, "lora_dropout", "full_determinism")]
    return False if dtype.itemsize > 2 or stage or padded or any(against) else settings.value("cuda_graphs")


def _zero(deepspeed: Any) -> tuple[int, bool]:
    """(stage, whether the optimizer is on the CPU) of DeepSpeed's settings: a mapping, or the path of one."""
    if not deepspeed:
        return 0, False
    content = deepspeed
    if isinstance(deepspeed, str):
        text = deepspeed if deepspeed.lstrip().startswith("{") else Path(deepspeed).read_text(encoding="utf-8-sig")
        content = json.loads(text)
    zero = content.get("zero_optimization", {})
    return int(zero.get("stage", 0)), zero.get("offload_optimizer", {}).get("device", "none") != "none"
