"""SIGTERM and Ctrl-C: the step is finished, a checkpoint saved, and the run says how it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from small import arguments, samples, small_model, trainer
from transformers import TrainerCallback

from burnish.errors import RunStopped
from burnish.train.checkpoint import last_checkpoint
from burnish.train.interrupt import Interrupt

# Three runs in one process, through the command's own main(): the parent sends signals while a step is under way.
PROCESS = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from small import arguments, samples, small_model, trainer
from transformers import TrainerCallback
from burnish import cli

class Told(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        print("inside step", state.global_step + 1, flush=True)
        sys.stdin.readline()  # the parent has sent what it wants to send
    def on_step_end(self, args, state, control, **kwargs):
        print("after step", state.global_step, flush=True)

def train(words):
    args = arguments(Path(words[0]), gradient_accumulation_steps=2, num_train_epochs=2)
    trainer(small_model(), args, samples(16), callbacks=[Told]).train()

cli.COMMANDS["train"] = train
for name in ("terminated", "interrupted", "killed"):
    print("status", cli.main(["train", str(Path(sys.argv[3]) / name)]), flush=True)
"""


class Process:
    """The script above; `lines` is what it has said so far."""

    def __init__(self, folder):
        root = Path(__file__).parents[2]
        self.errors = open(folder / "stderr", "w+")  # noqa: SIM115
        self.child = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(root), str(root / "tests"), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.lines: list[str] = []

    def go_on(self):
        """Let it leave the place where it waits."""
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def until(self, line):
        """Read on to that line, letting it pass every place where it waits before."""
        for said in self.child.stdout:
            self.lines.append(said.strip())
            if said.strip() == line:
                return
            if said.startswith("inside"):
                self.go_on()
        raise AssertionError(f"ended without {line!r}: {self.lines} {self.said_to_people()}")

    def said_to_people(self):
        self.errors.seek(0)
        return self.errors.read()


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """What happened, in order: SIGTERM inside step 2, Ctrl-C inside step 3, SIGTERM twice inside step 1."""
    folder = tmp_path_factory.mktemp("runs")
    process = Process(folder)
    try:
        for line, signals, end in [
            ("inside step 2", [signal.SIGTERM], "status 143"),
            ("inside step 3", [signal.SIGINT], "status 130"),
        ]:
            process.until(line)
            for number in signals:
                process.child.send_signal(number)
            process.go_on()
            process.until(end)
        process.until("inside step 1")
        process.child.send_signal(signal.SIGTERM)
        process.child.send_signal(signal.SIGTERM)  # may come as one: signals of a kind do not queue
        while process.child.poll() is None:
            process.child.send_signal(signal.SIGTERM)
            try:
                process.child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
        process.folder = folder
        yield process
    finally:
        process.child.kill()
        process.child.wait()
        for stream in (process.child.stdin, process.child.stdout, process.errors):
            stream.close()


@pytest.mark.parametrize(
    "name, step, status, told", [("terminated", 2, 143, "SIGTERM"), ("interrupted", 3, 130, "SIGINT")]
)
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(name, step, status, told, process):
    begin = process.lines.index("after step 1") if name == "terminated" else process.lines.index("status 143")
    end = process.lines.index(f"status {status}")
    assert process.lines[begin + 1 : end][-1] == f"after step {step}"  # that step was finished and no other begun
    place = process.folder / name / f"checkpoint-{step}"
    assert last_checkpoint(process.folder / name) == place
    assert (place / "optimizer.pt").is_file() and (place / "model.safetensors").is_file()
    text = process.said_to_people()
    assert f"note: {told}: finishing this step and saving a checkpoint; once more stops at once" in text
    assert f"stopped by {told} after step {step} of 8. {place} is whole: the same command goes on from there" in text
    assert f"needs resume_from_checkpoint={place})." in text
    assert "Traceback" not in text


def test_a_second_signal_stops_at_once(process):
    assert process.child.returncode == -signal.SIGTERM
    assert "after step" not in " ".join(process.lines[process.lines.index("status 130") :])
    assert not (process.folder / "killed").exists() or last_checkpoint(process.folder / "killed") is None


class SignalAt(TrainerCallback):
    """Sends this very process a signal inside a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            signal.raise_signal(self.number)


def test_an_interrupted_run_that_goes_on_equals_an_uninterrupted_one(tmp_path):
    changes = dict(gradient_accumulation_steps=2, num_train_epochs=2, lr_scheduler_type="cosine", logging_steps=3)

    def prepared(name, *callbacks):
        return trainer(small_model(), arguments(tmp_path / name, **changes), samples(16), callbacks=callbacks)

    whole = prepared("whole")
    whole.train()
    with pytest.raises(RunStopped) as stopped:
        prepared("cut", SignalAt(5)).train()
    assert stopped.value.status == 143
    cut = prepared("cut")
    cut.train(last_checkpoint(tmp_path / "cut"))
    for ours, theirs in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    losses = [[(e["step"], e["loss"]) for e in run.state.log_history if "loss" in e] for run in (cut, whole)]
    assert losses[0] == losses[1] != []


def test_a_signal_in_the_last_step_saves_too_and_what_is_left_is_nothing(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(RunStopped, match="after step 3 of 3"):
        trainer(small_model(), args, samples(6), callbacks=[SignalAt(3)]).train()
    again = trainer(small_model(), args, samples(6))
    assert again.train(last_checkpoint(tmp_path)).global_step == 3


def test_what_signals_did_before_they_do_again_after_a_run(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer(small_model(), arguments(tmp_path / "a"), samples(4)).train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    with pytest.raises(RunStopped):
        trainer(small_model(), arguments(tmp_path / "b"), samples(4), callbacks=[SignalAt(1)]).train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_only_the_first_signal_is_taken_and_each_kind_by_itself():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append("mine"))
    try:
        with Interrupt() as interrupt:
            assert interrupt.signal is None
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.signal is signal.SIGTERM and calls == []
            signal.raise_signal(signal.SIGTERM)
            assert calls == ["mine"]
        signal.raise_signal(signal.SIGTERM)
        assert calls == ["mine", "mine"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_under_a_launcher_what_follows_at_once_is_the_same_signal_again(monkeypatch):
    calls, clock = [], [100.0]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append("mine"))
    try:
        with Interrupt() as interrupt:
            for seconds in (0.0, 0.2, 1.0):  # Ctrl-C, and how DeepSpeed's launcher passes it on
                clock[0] += seconds
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
            assert interrupt.signal is signal.SIGINT and calls == []
            clock[0] += 3.0
            signal.raise_signal(signal.SIGTERM)
            assert calls == ["mine"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_ctrl_c_is_pythons_own():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    done = []

    def train():
        done.append(trainer(small_model(), arguments(tmp_path), samples(4)).train().global_step)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert done == [2]
