"""Several processes train what one would: torchrun and DeepSpeed as a user starts them, compared with a single run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from processes import (
    ROOT,
    environment,
    losses,
    make_run,
    run,
    run_script,
    start_without_end,
    take_back_to_checkpoint_3,
    weights,
)
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

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
    take_back_to_checkpoint_3(out)
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
    take_back_to_checkpoint_3(out)
    assert "going on from checkpoint-3" in run(2, words)
    assert losses(out) == whole
    assert all(torch.equal(weight, final[name]) for name, weight in weights(out).items())


@pytest.mark.slow
@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
def test_zero_3_evaluates_before_it_saves_and_loads_the_best_checkpoint_again(
    method: list[str], tmp_path: Path
) -> None:
    """The best is the worst here, so that it is not the last. The evaluation at the start is there as it shows ZeRO
    another course through the layers than training takes."""
    out = tmp_path / "out"
    best = ["--load_best_model_at_end", "--metric_for_best_model", "loss", "--greater_is_better", "true"]
    words = [*make_run(tmp_path), *method, "--deepspeed", ZERO_3, "--per_device_train_batch_size", "2"]
    run(2, [*words, "--eval_on_start", *best, "--output_dir", str(out)])
    early, late, final = weights(out / "checkpoint-3"), weights(out / "checkpoint-6"), weights(out)
    assert all(torch.equal(weight, early[name]) for name, weight in final.items())
    assert not all(torch.equal(weight, late[name]) for name, weight in final.items())
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]  # at 0, 3, 6, and of the best one
    assert len(evaluated) == 4 and evaluated[3] == pytest.approx(evaluated[1], rel=1e-6)


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
    out = tmp_path / "out"
    process = start_without_end(2, [*make_run(tmp_path), *FULL, "--per_device_train_batch_size", "2"], out)
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
    assert sizes == [[1000], [100, 200], [10], [5]]


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
from burnish.train.peers import Peers, add_gradients, part, share_weights
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
for size in (None, 1e-6):  # both in one piece, and each alone; the first does not lie in one piece itself
    pair = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2))]
    pair[0].grad, pair[1].grad = torch.arange(6.0).view(2, 3).T * (1 + rank), torch.ones(2)
    add_gradients(pair, peers, bucket_mib=size)
    assert pair[0].grad.tolist() == [[0.0, 9.0], [3.0, 12.0], [6.0, 15.0]] and pair[1].grad.tolist() == [2.0, 2.0]
own = nn.Parameter(torch.full((2,), float(rank)))
share_weights([own], peers)
assert own.tolist() == [0.0, 0.0]
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


def launched(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a script, as torchrun starts them."""
    (folder / "script.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*torchrun, str(folder / "script.py"), *words], env=environment(), capture_output=True, text=True, timeout=120
    )


def test_peers_agree_on_sums_gradients_weights_decisions_and_errors(tmp_path: Path) -> None:
    done = launched(tmp_path, PEERS)
    assert done.returncode == 0, done.stderr


# What one process alone asks its callbacks for: a checkpoint after step 2, an evaluation after 3, the end after 4.
ASKING = r"""
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:2]
from small import arguments, samples, small_model, trainer
from transformers import TrainerCallback
from burnish import ranks
from burnish.train.distributed import together

class Settings:
    def value(self, name):
        return {"ddp_timeout": 60, "use_cpu": True}.get(name)

class Asks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 2
        control.should_evaluate = state.global_step == 3
    def on_log(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4
    def on_substep_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 0

with together(Settings()):
    asks = [Asks] if ranks.rank() == 1 else []
    args = arguments(Path(sys.argv[2]), gradient_accumulation_steps=2, num_train_epochs=3)
    run = trainer(small_model(), args, samples(30), eval_dataset=samples(5), callbacks=asks)
    run.train()
    evaluated = [entry["step"] for entry in run.state.log_history if "eval_loss" in entry]
    sys.stdout.write(f"rank {ranks.rank()} {run.state.global_step} {evaluated} {run.steps.per_epoch}\n")
"""


@pytest.mark.slow
def test_what_a_callback_of_one_process_asks_for_happens_in_all(tmp_path: Path) -> None:
    done = launched(tmp_path, ASKING, str(ROOT / "tests"), str(tmp_path / "out"))
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert said == ["rank 0 4 [3] 4", "rank 1 4 [3] 4"], done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


# One process ends the run while the other waits for it; argv: which one, and how.
ENDING = """
import os, sys
from burnish import cli, ranks
from burnish.errors import Problem, RunStopped, UserError
from burnish.train.distributed import together
from burnish.train.peers import Peers

class Settings:
    def value(self, name):
        return {"ddp_timeout": 600, "use_cpu": True}.get(name)

ERRORS = {
    "mistake": UserError(Problem("rows.jsonl:3", "", None, "is torn")),
    "stop": RunStopped("stopped after step 7", 143),
    "fault": OSError("no space left on device"),
}

def run(words):
    with together(Settings()):
        peers = Peers()
        peers.wait()
        if words[0] in ("both", str(ranks.rank())):
            raise ERRORS[words[1]]
        peers.wait()

cli.COMMANDS["train"] = run
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("who", "how", "status", "told"),
    [
        ("1", "mistake", 2, "rows.jsonl:3: is torn\n"),
        ("0", "stop", 143, "stopped after step 7\n"),
        ("both", "mistake", 2, "rows.jsonl:3: is torn\n"),
        ("1", "fault", 1, "[rank1]: OSError: no space left on device\n"),
    ],
)
def test_what_ends_a_run_is_told_once_by_the_process_that_met_it(
    who: str, how: str, status: int, told: str, tmp_path: Path
) -> None:
    done = launched(tmp_path, ENDING, who, how)
    assert f"exitcode  : {status} " in done.stderr  # in torchrun's report, below
    assert done.stderr.count(told) == 1
    tracebacks = set(re.findall(r"\[rank\d\]: Traceback", done.stderr))
    assert tracebacks == ({"[rank1]: Traceback"} if how == "fault" else set())


def test_a_place_among_more_processes_than_gpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="LOCAL_RANK: 3 is the place of this process, and there are 2 GPUs here"):
        distributed._choose_gpu()


def test_a_port_that_another_run_has_is_told_with_how_to_give_another(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"MASTER_PORT: '{other.port}' is no port at which processes can meet"):
        peers.meet("gloo", timedelta(seconds=5))


def test_a_command_by_itself_is_torchrun_with_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[str] = []
    monkeypatch.setattr(torch.distributed.run, "main", lambda words: became.append(" ".join(words)))
    for name in ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)

    def launch() -> None:
        with pytest.raises(SystemExit) as ended:
            ranks.launch(["train", "run.yaml"], devices=4)
        assert ended.value.code == 0

    launch()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == ("4", "5")
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "8", "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    launch()
    assert became == [
        "--nproc_per_node 4 --standalone -m burnish train run.yaml",
        "--nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 "
        "-m burnish train run.yaml",
    ]


@pytest.mark.slow
def test_a_command_by_itself_ends_as_its_processes_do_and_torchruns_pages_are_not_shown(
    alone: tuple[list[str], Path],
) -> None:
    words, one = alone
    command = [sys.executable, "-m", "burnish", "train", *words, *FULL, "--output_dir", str(one)]
    two = environment(FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    done = subprocess.run(command, env=two, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"--output_dir: {str(one)!r} holds a finished run; give another output_dir, or overwrite_output_dir: true to "
        "train anew"
    ]


@pytest.mark.parametrize(("by", "status"), [("SIGKILL", 137), ("SIGTERM", 143)])
def test_a_process_that_was_killed_is_named(
    by: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(words: list[str]) -> None:
        failure = ProcessFailure(1, 4711, -getattr(signal, by), "")
        raise ChildFailedError("burnish", {3: failure})

    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.distributed.run, "main", killed)
    with pytest.raises(SystemExit) as ended:
        ranks.launch(["train"], devices=4)
    assert ended.value.code == status
    assert capsys.readouterr().err == f"process 3 was ended by {by}\n"


def test_zero_3_holds_no_more_weights_the_deeper_the_backward_pass_is(tmp_path: Path) -> None:
    """Weights that an attention read for its layers would stay until the step is over."""
    pytest.importorskip("deepspeed")
    run_script(1, Path(__file__).with_name("zero3_weights.py"), str(tmp_path / "held.json"))
    steps = json.loads((tmp_path / "held.json").read_text())
    assert len(steps) == 2 and all(len(held) == 3 and max(held) == min(held) for held in steps), steps
