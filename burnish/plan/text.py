"""A plan as a person reads it, and as a program does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from burnish.plan.fit import Plan
from burnish.plan.memory import BETWEEN, CONTEXT, GIB

WIDTH = 24


def plan_lines(plan: Plan) -> Iterator[str]:
    yield _title(plan)
    yield f"rows: {plan.rows.source}"
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _speed(plan)
    yield ""
    yield from _verdict(plan)


def _title(plan: Plan) -> str:
    shape, run, ranks = plan.shape, plan.run, plan.run.held.ranks
    bits = run.asked.model.quantization_bit
    dtype = str(run.asked.dtype).removeprefix("torch.") + (f" on weights of {bits} bits" if bits else "")
    dtype += f" on weights in {run.asked.model.base_dtype}" if run.asked.model.base_dtype else ""
    trained = f"{shape.trained:,} weights trained"
    where = f"{plan.device.title}" if ranks == 1 else f"{ranks} devices of {plan.device.title}"
    divided = f", ZeRO-{run.held.stage}" if run.held.stage else ""
    return f"{shape.name}, {run.asked.tuning.finetuning_type}, {trained}, {dtype}{divided}, on {where}"


def _memory(plan: Plan) -> Iterator[str]:
    yield f"{'memory of a device':<{WIDTH}}      GiB"
    for name, size in sorted(plan.memory.parts.items(), key=lambda part: -part[1]):
        if size >= GIB / 200:  # less is 0.00
            yield _row(name, size / GIB, 2)
    yield _row("peak", plan.memory.allocated / GIB, 2, f"as torch counts it, in: {plan.memory.moment}")
    beside = CONTEXT + BETWEEN * plan.memory.allocated
    yield _row("beside it", beside / GIB, 2, "CUDA context and fragmentation: an allowance, not measured")
    if plan.memory.recorded:
        yield _row("recorded passes", plan.memory.recorded / GIB, 2, "CUDA graphs, whose memory is theirs alone")
    yield _row("needed", plan.memory.needed / GIB, 2, f"of {plan.device.memory_gib:.1f} GiB")


def _speed(plan: Plan) -> Iterator[str]:
    time = plan.time
    if time is None:
        yield f"speed: not known ({plan.device.source})"
        return
    yield f"{'time of a step':<{WIDTH}}       ms"
    for name, seconds in sorted(time.parts.items(), key=lambda part: -part[1]):
        if seconds >= 5e-5:
            yield _row(name, seconds * 1e3, 1)
    rest = time.seconds - sum(time.parts.values())
    yield _row("GPU waits", max(rest, 0.0) * 1e3, 1, f"starting all of it takes the CPU {time.cpu * 1e3:.0f} ms")
    passes = "one pass" if plan.passes == 1 else f"{plan.passes:.1f} passes"
    yield _row("step", time.seconds * 1e3, 1, f"{plan.step_tokens:,.0f} tokens in {passes}, the largest {_pass(plan)}")
    yield _row("tokens per second", plan.tokens_per_second or 0.0, 0)
    if not plan.device.measured:
        yield f"Speeds are {plan.device.source}'s times what an H100 was measured to reach of its own."


def _pass(plan: Plan) -> str:
    again = f", {plan.computed_again} of {plan.shape.layers} blocks computed again" if plan.computed_again else ""
    return f"{plan.pass_tokens:,}{again}"


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.fits:
        asked = plan.run.most_tokens
        made_smaller = plan.computed_again and plan.run.recompute is None
        yield "It fits." + (
            f" At first it does not: burnish then goes on in passes of {_pass(plan)}."
            if made_smaller or (asked is not None and plan.passes > 1 and plan.pass_tokens < asked // 2)
            else ""
        )
        return
    yield f"It does not fit: {plan.memory.needed / GIB - plan.device.memory_gib:.1f} GiB too much."
    if not plan.remedies:
        yield "Nothing tried makes it fit: take a device with more memory or a smaller model."
    for remedy in plan.remedies:
        speed = "" if remedy.tokens_per_second is None else f", {remedy.tokens_per_second:,.0f} tokens per second"
        yield f"  {remedy.setting}: {remedy.peak_gib:.1f} GiB{speed}"


def _row(name: str, value: float, digits: int, note: str = "") -> str:
    return f"  {name:<{WIDTH}}{value:>9,.{digits}f}{'  ' + note if note else ''}"


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Bytes in GiB, seconds in ms."""
    time = plan.time
    return {
        "fits": plan.fits,
        "device": {"name": plan.device.title, "memory_gib": plan.device.memory_gib, "source": plan.device.source,
                   "speed_measured": plan.device.measured},
        "devices": plan.run.held.ranks,
        "model": plan.shape.name,
        "trained_weights": plan.shape.trained,
        "peak_gib": round(plan.memory.allocated / GIB, 3),
        "needed_gib": round(plan.memory.needed / GIB, 3),
        "memory_gib": {name: round(size / GIB, 3) for name, size in plan.memory.parts.items()},
        "moment": plan.memory.moment,
        "pass_tokens": plan.pass_tokens,
        "passes_per_step": round(plan.passes, 2),
        "recorded_as_cuda_graphs": plan.run.held.recorded,
        "recomputed_blocks": plan.computed_again,
        "blocks": plan.shape.layers,
        "tokens_per_step": round(plan.step_tokens),
        "tokens_per_second": None if plan.tokens_per_second is None else round(plan.tokens_per_second),
        "step_ms": None if time is None else round(time.seconds * 1e3, 2),
        "time_ms": None if time is None else {name: round(part * 1e3, 2) for name, part in time.parts.items()},
        "cpu_ms": None if time is None else round(time.cpu * 1e3, 2),
        "rows": plan.rows.source,
        "remedies": [
            {"setting": each.setting, "needed_gib": round(each.peak_gib, 3),
             "tokens_per_second": None if each.tokens_per_second is None else round(each.tokens_per_second)}
            for each in plan.remedies
        ],
    }  # fmt: skip
