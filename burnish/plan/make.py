"""`burnish plan`: peak memory and tokens per second of a run from its configuration alone, and what to change.

    settings → Run ─┬─ the model on the meta device, its blocks measured     model.py, block.py, graph.py, kernels.py
       run.py       ├─ rows → steps → passes                                 rows.py, steps.py
                    └─ device                                                devices.py
               → the largest moment of the largest pass                      memory.py
               → seconds of a step                                           speed.py
               → does it fit, in smaller passes if need be?                  fit.py

Where it does not fit, other settings are tried here until some do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from burnish.plan.devices import Device
from burnish.plan.fit import Plan, Remedy, fit
from burnish.plan.memory import GIB
from burnish.plan.run import Run
from burnish.plan.steps import Rows

SHORTEST_CUTOFF = 512
DEVICES = (2, 4, 8)  # that are tried
ZERO_3 = "examples/deepspeed/ds_z3_config.json"


def make_plan(run: Run, rows: Rows, device: Device) -> Plan:
    """The plan of a run, with what to change where it does not fit. Raises UserError for a model that cannot be."""
    plan = fit(run, rows, device)
    if plan.fits:
        return plan
    return replace(plan, remedies=tuple(_remedies(run, rows, device)))


def _remedies(run: Run, rows: Rows, device: Device) -> Iterator[Remedy]:
    """Of each kind of change the least that makes the run fit."""
    for ways in _changes(run):
        for setting, changed in ways:
            plan = fit(changed, rows, device)
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
