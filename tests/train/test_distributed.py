"""Several processes train what one would: torchrun and DeepSpeed as a user starts them, compared with a single run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import ROOT, environment, losses, make_run, run, start, weights
from torch import nn

from burnish import ranks
from burnish.errors import UserError
from burnish.train import distributed, peers
from burnish.train.peers import Peers, add_gradients

ZERO_3 = str(ROOT / "examples" / "deepspeed" / "ds_z3_config.json")
ZERO_2 = str(ROOT / "examples" / "deepspeed" / "ds_z2_config.json")
FULL = ["--finetuning_type", "full"]
LORA = ["--finetuning_type", "lora", "--lora_rank", "4", "--gradient_checkpointing"]


def assert_same_training(one: Path, several: Path, rounding: float = 1e-4) -> None:
    assert losses(several) == pytest.approx(losses(one), rel=rounding)
    expected, found = weights(one), weights(several)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=2e-4), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """(words of the command, folder) of a full run in one process, whose batch is 4 rows."""
    folder = tmp_path_factory.mktemp("alone")
    words = make_run(folder)
    run(1, [*words, *FULL, "--per_device_train_batch_size", "4", "--output_dir", str(folder / "out")])
    return words, folder / "out"


@pytest.mark.slow
def test_two_processes_of_two_rows_train_what_one_of_four_does_and_go_on_after_a_kill(
    alone: tuple[list[str], Path], tmp_path: Path
) -> None:
    words, one = alone
    out = tmp_path / "two"
    words = [*words, *FULL, "--per_device_train_batch_size", "2", "--output_dir", str(out)]
    output = run(2, words)
    assert_same_training(one, out)
    assert output.count("first sample") == 1 and output.count("tuned model:") == 1  # one process speaks
    found = json.loads((out / "trainer_state.json").read_text())
    assert (
        found["num_input_tokens_seen"] == json.loads((one / "trainer_state.json").read_text())["num_input_tokens_seen"]
    )

    whole = losses(out)
    for name in ("train_results.json", "all_results.json", "model.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-6")
    assert "going on from checkpoint-3" in run(2, words)
    assert losses(out) == whole
    assert_same_training(one, out)


@pytest.mark.slow
def test_zero_3_trains_what_one_process_does_and_saves_the_whole_model(
    alone: tuple[list[str], Path], tmp_path: Path
) -> None:
    words, one = alone
    out = tmp_path / "zero"
    words = [*words, *FULL, "--per_device_train_batch_size", "2", "--output_dir", str(out), "--deepspeed", ZERO_3]
    run(2, words)
    assert_same_training(one, out)

    whole, final = losses(out), weights(out)
    for name in ("train_results.json", "all_results.json", "model.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-6")
    assert "going on from checkpoint-3" in run(2, words)
    assert losses(out) == whole
    assert all(torch.equal(weight, final[name]) for name, weight in weights(out).items())


@pytest.mark.slow
def test_an_adapter_trains_under_zero_2_and_without_a_launcher_too(tmp_path: Path) -> None:
    words = [*make_run(tmp_path), *LORA]
    run(1, [*words, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "one")])
    divided = ["--deepspeed", ZERO_2]
    run(2, [*words, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two"), *divided])
    assert_same_training(tmp_path / "one", tmp_path / "two")
    run(1, [*words, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "by itself"), *divided])
    assert_same_training(tmp_path / "one", tmp_path / "by itself")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step_with_a_whole_checkpoint(tmp_path: Path) -> None:
    words = make_run(tmp_path)
    out = tmp_path / "out"
    words[words.index("--max_steps") + 1] = "100000"
    words[words.index("--save_steps") + 1] = "1000000"
    words[words.index("--eval_steps") + 1] = "1000000"
    process = start(2, [*words, *FULL, "--per_device_train_batch_size", "2", "--output_dir", str(out)])
    log = out / "trainer_log.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)  # not the main process
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and output.count("stopped by SIGTERM after step") == 1, output
    (checkpoint,) = out.glob("checkpoint-*")
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "trainer_state.json"} <= {
        path.name for path in checkpoint.iterdir()
    }


def test_a_checkpoint_of_two_processes_is_not_gone_on_with_by_one(
    alone: tuple[list[str], Path], tmp_path: Path
) -> None:
    words, one = alone
    start_at = tmp_path / "checkpoint-3"
    shutil.copytree(one / "checkpoint-3", start_at)
    (start_at / "rng_state.pth").rename(start_at / "rng_state_0.pth")
    shutil.copy(start_at / "rng_state_0.pth", start_at / "rng_state_1.pth")
    words = [*words, *FULL, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "out")]
    output = run(1, [*words, "--resume_from_checkpoint", str(start_at)], status=2)
    assert "was written by 2 processes and cannot be resumed by 1; start as many" in output


def test_gradients_travel_in_buckets_of_one_dtype() -> None:
    gradients = [torch.zeros(size) for size in (100, 200, 1000, 10)] + [torch.zeros(5, dtype=torch.bfloat16)]
    sizes = [[gradient.numel() for gradient in bucket] for bucket in peers._buckets(gradients, size=4 * 300)]
    assert sizes == [[100, 200], [1000], [10], [5]]


def test_one_process_asks_nobody() -> None:
    peers, weight = Peers(), nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 3.0)
    add_gradients([weight], peers)
    assert weight.grad.tolist() == [3.0, 3.0] and peers.sums([1, 2]) == [1, 2] and peers.gather("x") == ["x"]


# Two processes in one launch look at each thing that peers tell each other.
PEERS = """
import sys
import torch, torch.distributed as dist
from torch import nn
from burnish.errors import Problem, UserError
from burnish.train.peers import Peers, add_gradients, part
dist.init_process_group("gloo")
peers = Peers()
rank = peers.rank
assert peers.sums([rank, 10]) == [1, 20]
assert peers.add(torch.tensor(2.0 + rank)).item() == 5.0
assert peers.gather("ab"[rank]) == ["a", "b"]
weights = [nn.Parameter(torch.zeros(3)) for _ in range(3)]  # with a gradient in both, in one, in none
weights[0].grad = torch.full((3,), 1.0 + rank)
if rank:
    weights[1].grad = torch.full((3,), 7.0)
add_gradients(weights, peers, bucket_mib=1e-6)
assert weights[0].grad.tolist() == [3.0] * 3 and weights[1].grad.tolist() == [7.0] * 3 and weights[2].grad is None
assert peers.from_main(lambda: f"said by {rank}") == "said by 0"
def fail():
    raise UserError(Problem("here", "", None, "is wrong"))
try:
    peers.from_main(fail)
    raise SystemExit(1)
except UserError as error:
    assert str(error) == "here: is wrong"
part()
"""


def test_peers_agree_on_sums_gradients_decisions_and_errors(tmp_path: Path) -> None:
    script = tmp_path / "peers.py"
    script.write_text(PEERS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(torchrun, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_place_among_more_processes_than_gpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="LOCAL_RANK: 3 is the place of this process, and there are 2 GPUs here"):
        distributed._choose_gpu()


def test_a_command_by_itself_becomes_torchrun_with_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(ranks.os, "execv", lambda program, command: became.append(command))
    for name in ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", "")
    ranks.launch(["train", "run.yaml"], devices=4)
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "8", "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    ranks.launch(["train", "run.yaml"], devices=4)
    assert [" ".join(command[3:]) for command in became] == [
        "--nproc_per_node 4 --standalone -m burnish train run.yaml",
        "--nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 "
        "-m burnish train run.yaml",
    ]
