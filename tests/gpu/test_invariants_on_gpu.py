"""What must never depend on how the work is cut, on the device: tests/test_invariants.py says it for the CPU.

    python -m pytest tests/gpu/test_invariants_on_gpu.py

Every cut of the work (passes, packed rows, padded batches) is compared with plain transformers in float64 on the same
weights. In float32, where documents are attended to one by one: loss 1e-5, gradients 1e-4. In bf16 on the fast path
(variable-length attention, LoRA and MLP fused, blocks compiled) rounding shows: no more of it than plain transformers
in bf16 has of its own, and at most 3e-2. On the CPU, in float32 (1e-6, 1e-5), the tests themselves are tried.

The real model is looked for at $SMOLLM2, then in models/ and among the fixtures; $SMOLLM2_STEPS makes its run shorter,
and lets it be made on a CPU (12 steps take two minutes).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from real import LINEAR, real_rows, smollm2
from small import CONFIGS, arguments, on_the_fast_path, samples, small_model, trainer, tuned
from theirs import collator, padded, run_of_plain
from transformers import AutoModelForCausalLM, AutoTokenizer

from burnish.data.loader import collate, collate_padded, make_loader
from burnish.kernels.frozen_linear import dequantized
from burnish.model.fp8 import Fp8Linear
from burnish.model.head import CausalLoss
from burnish.model.qwen import QWenConfig, register
from burnish.train.optimizer import Masters
from burnish.types import Sample

register()
CONFIGS["the first qwen"] = QWenConfig
KINDS = ["qwen3", "llama", "the first qwen"]
METHODS = ["full", "freeze", "lora", "fp8"]
FP8 = {"loss": 1e-2, "gradient": 0.2}  # allowed beside a base in fp8, whose inputs are rounded too: to 4 % each


class Place(NamedTuple):
    device: str
    dtype: torch.dtype
    loss: float  # relative distance from float64 that is allowed
    gradient: float


FLOAT32, BF16 = Place("cuda", torch.float32, 1e-5, 1e-4), Place("cuda", torch.bfloat16, 5e-4, 3e-2)
ON_CPU = Place("cpu", torch.float32, 1e-6, 1e-5)
on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PLACES = [
    pytest.param(ON_CPU, id="cpu-float32"),
    pytest.param(FLOAT32, id="cuda-float32", marks=on_device),
    pytest.param(BF16, id="cuda-bf16", marks=on_device),
]


@pytest.fixture(autouse=True)
def true_float32():
    """No TF32, and no code compiled for another test's model."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch._dynamo.reset()


def model_of(kind: str, method: str, place: Place, **changes):
    model = small_model(kind, dtype=place.dtype, **({"head_dim": 16} | changes))
    return tuned(model.to(place.device), method, lora_rank=4)


def of_passes(model, batches):
    """Loss and gradient as training has them: added up over the passes in float32, whatever the model computes in."""
    masters, objective = Masters(model), CausalLoss(model, fused=True)
    num_trained, loss = sum(batch.num_trained for batch in batches), 0.0
    for batch in batches:
        part = objective(batch.to(next(model.parameters()).device)).loss / num_trained
        part.backward()
        loss += part.item()
    masters.give_gradients()
    gradient = torch.cat([weight.grad.flatten().double() for weight in masters.by_name.values()])
    masters.release()
    for weight in (*masters.by_name.values(), *model.parameters()):
        weight.grad = None
    return loss, gradient


def of_plain(model, rows):
    """No line of burnish: padding, the model's own forward and loss."""
    loss = model(**padded(rows, next(model.parameters()).device), use_cache=False).loss
    loss.backward()
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return loss.item(), gradient


def in_float64(model):
    """The same weights; those in fp8 as plain layers of what they stand for."""
    model = copy.deepcopy(model).double()
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            layer.weight = torch.nn.Parameter(dequantized(layer.frozen).double(), requires_grad=False)
            layer.__class__ = torch.nn.Linear
    return model


def error(found, exact) -> tuple[float, float]:
    """Relative distance of the loss, and of the gradient as one vector."""
    (loss, gradient), (exact_loss, exact_gradient) = found, exact
    return abs(loss / exact_loss - 1), ((gradient - exact_gradient).norm() / exact_gradient.norm()).item()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_of_the_work_gives_what_plain_transformers_gives_in_float64(kind, method, place):
    rows = samples(8)
    model = model_of(kind, method, place)
    exact = of_plain(in_float64(model), rows)
    plain = error(of_plain(copy.deepcopy(model), rows), exact)
    errors = {"padded": error(of_passes(copy.deepcopy(model), [collate_padded(rows, collator=collator())]), exact)}

    fast = on_the_fast_path(model, compiled=place is BF16)
    packed = list(make_loader(rows, 1, collate, seed=3, pack_to=100))
    assert 1 < len(packed) < 8
    errors |= {
        "end to end": error(of_passes(fast, [collate(rows)]), exact),
        "eight passes": error(of_passes(fast, [collate([row]) for row in rows]), exact),
        "packed": error(of_passes(fast, packed), exact),
    }
    print(f"\n{kind}, {method}: plain {plain}, {errors}")
    allowed = place._replace(**FP8) if method == "fp8" else place
    for cut, (loss, gradient) in errors.items():
        assert loss <= allowed.loss and gradient <= allowed.gradient, (cut, loss, gradient)
        if place.dtype == torch.bfloat16:
            assert gradient <= 1.5 * plain[1], (cut, gradient, plain)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_accumulated_follow_ten_steps_of_one_pass(method, place, tmp_path):
    losses = []
    for name, batch, accumulation in [("whole", 4, 1), ("cut", 1, 4)]:
        args = arguments(
            tmp_path / name, use_cpu=place.device == "cpu", per_device_train_batch_size=batch, max_steps=10,
            gradient_accumulation_steps=accumulation, learning_rate=1e-3,
        )  # fmt: skip
        run = trainer(model_of("qwen3", method, place), args, samples(40))
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(losses[0]) == 10
    exact = place.dtype == torch.float32 and method != "fp8"
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if exact else 5e-3)


# ---- fifty steps of LoRA as transformers and peft do them ----------------------------------------------------------


class Run(NamedTuple):
    base: Callable[[], Any]  # a model of the same weights at each call
    rows: list[Sample]
    steps: int
    learning_rate: float
    one: float  # allowed relative distance of one loss, and of their mean
    mean: float


def losses_of(run: Run, folder: Path, device: str) -> list[np.ndarray]:
    """By burnish's Trainer on the fast path; by peft in a loop on the same batches in order; by that in float32.

    burnish: adapters in the model's dtype with float32 masters. peft: adapters in float32, and no autocast.
    """
    model = tuned(run.base().to(device), "lora", lora_rank=8)
    is_low = next(model.parameters()).dtype == torch.bfloat16
    adapter = {name: value.float().clone() for name, value in model.state_dict().items() if "lora_" in name}
    by_place, order = {row.place: row for row in run.rows}, []

    def noting(batch):
        order.append([by_place[row.place] for row in batch])
        return collate(batch)

    args = arguments(
        folder, use_cpu=device == "cpu", per_device_train_batch_size=8, max_steps=run.steps, num_train_epochs=1,
        learning_rate=run.learning_rate, lr_scheduler_type="constant",
    )  # fmt: skip
    ours = trainer(on_the_fast_path(model, compiled=is_low and device == "cuda"), args, run.rows)
    ours.collate = noting
    ours.train()
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert len(losses) == run.steps and [len(step) for step in order[: run.steps]] == [8] * run.steps
    found = [losses]
    for base in [run.base(), run.base().float()][: 2 if is_low else 1]:
        plain = get_peft_model(base.to(device), LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR))
        assert not plain.load_state_dict(adapter, strict=False).unexpected_keys
        found.append(run_of_plain(plain.train(), order[: run.steps], learning_rate=run.learning_rate))
    return [np.array(each) for each in found]


def follows(run: Run, folder: Path, device: str) -> None:
    ours, theirs, *exact = losses_of(run, folder, device)
    apart, mean = abs(ours / theirs - 1).max(), ours.mean() / theirs.mean() - 1
    print(f"\n{run.steps} losses {theirs[0]:.4f} → {theirs[-1]:.4f}, at most {apart:.1e} apart, mean {mean:.1e}")
    assert theirs[-1] < 0.95 * theirs[0]  # something was learned
    assert apart <= run.one and abs(mean) <= run.mean
    for true in exact:  # bf16 rounds in both: in burnish no more than in plain transformers
        own, other = (np.sqrt(np.mean((losses / true - 1) ** 2)) for losses in (ours, theirs))
        print(f"from the run in float32 {own:.1e}, plain transformers and peft {other:.1e}")
        assert own <= 2 * other


@pytest.mark.parametrize("place", PLACES)
def test_steps_of_a_small_model_follow_transformers_and_peft(place, tmp_path):
    rows = [Sample(row.input_ids % 16 + 3, np.where(row.labels < 0, row.labels, row.input_ids % 16 + 3), row.place)
            for row in samples(160)]  # fmt: skip
    one, mean = (1e-3, 1e-4) if place.dtype == torch.float32 else (2e-2, 5e-3)
    run = Run(
        lambda: small_model("qwen3", dtype=place.dtype, head_dim=16, initializer_range=0.1), rows, 20, 1e-2, one, mean
    )
    follows(run, tmp_path, place.device)


@pytest.mark.skipif(not torch.cuda.is_available() and "SMOLLM2_STEPS" not in os.environ, reason="no CUDA device")
def test_fifty_steps_of_smollm2_follow_transformers_and_peft(tmp_path, fixture_path):
    folder = smollm2(fixture_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    steps = int(os.environ.get("SMOLLM2_STEPS", 50))
    rows = real_rows(tokenizer, 8 * steps)

    def base():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    follows(Run(base, rows, steps, 1e-4, 3e-2, 5e-3), tmp_path, "cuda" if torch.cuda.is_available() else "cpu")
