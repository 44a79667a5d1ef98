"""Two GPUs of one machine, a process each, train over NCCL what one GPU does with a batch of twice the rows.

Skipped, with the reason, where there are not two.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from processes import ROOT, losses, make_run, run, start_without_end, take_back_to_checkpoint_3, weights
from safetensors.torch import load_file

from burnish.kernels.frozen_linear import has_fp8_units

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
    pytest.mark.slow,
]
SEEN = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]
METHODS = {
    "full": ["--finetuning_type", "full"],
    "freeze": ["--finetuning_type", "freeze", "--freeze_trainable_layers", "1"],
    "lora": ["--finetuning_type", "lora", "--lora_rank", "4"],
    "fp8": ["--finetuning_type", "lora", "--lora_rank", "4", "--base_dtype", "fp8"],
}
BF16 = ["--bf16", "--cuda_graphs", "false"]
# Rows laid end to end to one length, and every pass over the blocks recorded as a CUDA graph.
RECORDED = ["--bf16", "--packing", "--cutoff_len", "256", "--cuda_graphs", "true"]
# Plain gradient descent: a step is as long as its gradient, so a rank's that is missing is half of what was learned.
DESCENT = ["--optim", "sgd", "--max_grad_norm", "0", "--learning_rate", "0.2"]


def on_one(words: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", SEEN[0])
    return run(1, [*words, "--per_device_train_batch_size", "4", "--output_dir", str(out)])


def on_two(words: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same command by itself: it starts a process for each GPU that it sees."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(SEEN))
    return run(1, [*words, "--per_device_train_batch_size", "2", "--output_dir", str(out)])


def tokens(folder: Path) -> int:
    return json.loads((folder / "trainer_state.json").read_text())["num_input_tokens_seen"]


def learned(out: Path, base: Path) -> torch.Tensor:
    """By how much every weight has moved, all in one row; of an adapter B, which begins at zero."""
    before = load_file(base / "model.safetensors")
    moved = [
        (weight.float() - before[name].float() if name in before else weight.float()).flatten()
        for name, weight in sorted(weights(out).items())
        if name in before or "lora_B" in name
    ]
    return torch.cat(moved)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("method", "path", "rounding"),
    [
        ("full", [], 1e-3), ("freeze", [], 1e-3), ("lora", [], 1e-3),
        ("full", BF16, 0.15), ("freeze", BF16, 0.15), ("lora", BF16, 0.15), ("fp8", BF16, 0.2),
        ("full", RECORDED, 0.15), ("lora", RECORDED, 0.15),
    ],
)  # fmt: skip
def test_a_command_by_itself_learns_on_two_gpus_what_it_learns_on_one(
    method: str, path: list[str], rounding: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "fp8" and not has_fp8_units(torch.device("cuda", 0)):
        pytest.skip("no fp8 matrix units")
    words, one, two = [*make_run(tmp_path), *METHODS[method], *path, *DESCENT], tmp_path / "one", tmp_path / "two"
    on_one(words, one, monkeypatch)
    said = on_two(words, two, monkeypatch)
    assert said.count("first sample") == 1 and said.count("tuned model:") == 1  # one process speaks
    assert ("are recorded as CUDA graphs" in said) == (path == RECORDED) and "not recorded" not in said
    assert (two / "checkpoint-6" / "rng_state_1.pth").exists()
    assert tokens(two) == tokens(one)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4 if not path else 2e-2)
    base = tmp_path / "model"
    assert apart(learned(two, base), learned(one, base)) < rounding


@pytest.mark.parametrize("path", [[], BF16], ids=["float32", "bf16"])
def test_two_gpus_go_on_from_a_checkpoint_to_the_same_bits(
    path: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, out = [*make_run(tmp_path), *METHODS["lora"], *path, "--full_determinism"], tmp_path / "out"
    on_two(words, out, monkeypatch)
    whole, final = losses(out), weights(out)
    take_back_to_checkpoint_3(out)
    assert "going on from checkpoint-3" in on_two(words, out, monkeypatch)
    assert losses(out) == whole
    assert all(torch.equal(weight, final[name]) for name, weight in weights(out).items())


def test_a_signal_stops_both_after_the_same_step_with_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(SEEN))
    out = tmp_path / "out"
    process = start_without_end(1, [*make_run(tmp_path), *METHODS["full"], *BF16], out)
    try:
        os.kill(process.pid, signal.SIGTERM)  # the command, which hands it on to the processes that it started
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143 and said.count("stopped by SIGTERM after step") == 1, said
    assert "Traceback" not in said, said
    (checkpoint,) = out.glob("checkpoint-*")
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= {path.name for path in checkpoint.iterdir()}


@pytest.mark.parametrize("precision, rounding", [([], 1e-3), (BF16, 0.15)], ids=["float32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_divides_a_model_over_two_gpus(
    stage: int, precision: list[str], rounding: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    words, one, two = [*make_run(tmp_path), *METHODS["full"], *precision, *DESCENT], tmp_path / "one", tmp_path / "two"
    on_one(words, one, monkeypatch)
    config = ROOT / "examples" / "deepspeed" / f"ds_z{stage}_config.json"
    on_two([*words, "--deepspeed", str(config)], two, monkeypatch)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4 if not precision else 2e-2)
    base = tmp_path / "model"
    assert apart(learned(two, base), learned(one, base)) < rounding
