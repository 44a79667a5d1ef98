"""The log file and the lines, driven by transformers' own CallbackHandler; the bar, by a terminal that is a string."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from burnish import console
from burnish.train import logs as logs_module
from burnish.train.logs import LogCallback, ProgressCallback, hours, save_metrics

EVALUATION = {"eval_loss": 1.5, "eval_perplexity": 4.4817, "eval_runtime": 2.0, "eval_samples_per_second": 9.0}


class Run:
    """A training of 8 steps of 2 seconds and 1,000 tokens, on a clock of its own."""

    def __init__(self, callback: TrainerCallback, clock: SimpleNamespace, first_step: int = 0, quiet: bool = False):
        self.args = SimpleNamespace(disable_tqdm=quiet)
        self.state = TrainerState(max_steps=8, global_step=first_step, num_input_tokens_seen=1000 * first_step)
        self.state.log_history = [{"loss": 4.0, "step": step + 1} for step in range(first_step)]
        self.control = TrainerControl()
        self.clock = clock
        self.handler = CallbackHandler([callback], None, None, None, None)  # type: ignore[arg-type]
        self.tell("on_train_begin")

    def tell(self, event: str, **details: Any) -> None:
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, **details)

    def step(self, seconds: float = 2.0) -> None:
        self.clock.now += seconds
        self.state.global_step += 1
        self.state.num_input_tokens_seen += 1000
        self.state.epoch = self.state.global_step / 4
        self.tell("on_step_end")

    def log(self, **logs: float) -> None:
        self.tell("on_log", logs={**logs, "epoch": self.state.epoch})

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()
            self.log(loss=4.0 / self.state.global_step, learning_rate=5e-4, grad_norm=1.25)

    def evaluate(self, seconds: float, batches: int = 2) -> None:
        self.handler.eval_dataloader = range(batches)
        for _ in range(batches):
            self.clock.now += seconds / batches
            self.tell("on_prediction_step")
        self.log(**EVALUATION)
        self.tell("on_evaluate", metrics=EVALUATION)

    def finish(self) -> None:
        self.log(train_loss=1.25, train_runtime=16.4, train_tokens_per_second=487.8, total_flos=1e9)
        self.tell("on_train_end")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(now=100.0)
    monkeypatch.setattr(logs_module.time, "monotonic", lambda: now.now)
    return now


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is said where standard output is no terminal."""
    written = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=written, soft_wrap=True, highlight=False))
    yield written


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is sent to a terminal of 100 columns."""
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=100, soft_wrap=True, highlight=False, color_system=None)
    monkeypatch.setattr(console, "out", terminal)
    monkeypatch.setenv("TERM", "xterm")
    yield written


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- trainer_log.jsonl -----------------------------------------------------------------------------------------------


def test_a_log_step_is_one_line_under_llamafactorys_names(tmp_path: Path, clock: SimpleNamespace):
    run = Run(LogCallback(tmp_path / "new" / "folder"), clock)
    run.steps(2)
    assert read(tmp_path / "new" / "folder")[1] == {
        "current_steps": 2,
        "total_steps": 8,
        "loss": 2.0,
        "lr": 5e-4,
        "epoch": 0.5,
        "percentage": 25.0,
        "elapsed_time": "0:00:04",
        "remaining_time": "0:00:12",
        "throughput": 500.0,
        "total_tokens": 2000,
    }


def test_an_evaluation_is_a_line_and_the_summary_is_none(tmp_path: Path, clock: SimpleNamespace):
    run = Run(LogCallback(tmp_path), clock)
    run.steps(1)
    run.evaluate(2.0)
    run.finish()
    _, evaluation = read(tmp_path)
    assert evaluation["eval_loss"] == 1.5 and evaluation["eval_perplexity"] == 4.4817
    assert evaluation["throughput"] == 250.0  # since training began, evaluations included
    assert not {"loss", "lr", "eval_runtime", "eval_samples_per_second"} & evaluation.keys()


def test_a_resumed_run_takes_out_what_came_after_its_checkpoint(tmp_path: Path, clock: SimpleNamespace):
    run = Run(LogCallback(tmp_path), clock)
    run.steps(3)
    run.evaluate(0.0)  # after the checkpoint, though at its step: it comes again
    run.steps(2)
    with (tmp_path / "trainer_log.jsonl").open("a") as file:
        file.write('{"current_steps": 6, "lo')  # killed in the middle of a line
    clock.now = 7.0  # another process, another clock
    resumed = Run(LogCallback(tmp_path), clock, first_step=3)
    assert [line["current_steps"] for line in read(tmp_path)] == [1, 2, 3]
    resumed.steps(1)
    last = read(tmp_path)[-1]
    assert last["current_steps"] == 4
    assert last["elapsed_time"] == "0:00:08"  # 6 seconds before, 2 now
    assert last["remaining_time"] == "0:00:08"  # 4 steps at the pace of this process
    assert last["throughput"] == 500.0
    assert last["total_tokens"] == 4000


def test_a_new_run_in_the_same_folder_begins_a_new_file(tmp_path: Path, clock: SimpleNamespace):
    Run(LogCallback(tmp_path), clock).steps(3)
    Run(LogCallback(tmp_path), clock).steps(1)
    assert [line["current_steps"] for line in read(tmp_path)] == [1]


def test_a_loss_that_is_no_number_is_still_json(tmp_path: Path, clock: SimpleNamespace):
    run = Run(LogCallback(tmp_path), clock)
    run.step()
    run.log(loss=math.nan, grad_norm=math.inf)
    text = (tmp_path / "trainer_log.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert line["loss"] is None


def test_only_the_main_process_writes(tmp_path: Path, clock: SimpleNamespace):
    callback = LogCallback(tmp_path)
    state = TrainerState(max_steps=8, is_world_process_zero=False)
    callback.on_train_begin(None, state, TrainerControl())
    callback.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "clock_time"), [(0, "0:00:00"), (59.6, "0:01:00"), (93784, "26:03:04")])
def test_hours_go_beyond_a_day(seconds: float, clock_time: str):
    assert hours(seconds) == clock_time


# ---- lines and bar ---------------------------------------------------------------------------------------------------


def test_without_a_terminal_there_are_only_lines(lines: io.StringIO, clock: SimpleNamespace):
    run = Run(ProgressCallback(), clock)
    run.steps(2)
    run.evaluate(60.0)
    run.finish()
    assert lines.getvalue().splitlines() == [
        "step 1/8  epoch 0.25  loss 4.0000  grad 1.250  lr 5.00e-04  500 tokens/s  0:00:14 left",
        "step 2/8  epoch 0.50  loss 2.0000  grad 1.250  lr 5.00e-04  500 tokens/s  0:00:12 left",
        "evaluation  step 2/8  loss 1.5000  perplexity 4.4817",
        "trained 2 steps in 0:00:16, mean loss 1.2500, 488 tokens/s",
    ]


def test_the_speed_of_training_leaves_out_evaluations_and_checkpoints(lines: io.StringIO, clock: SimpleNamespace):
    run = Run(ProgressCallback(), clock)
    run.steps(1)
    run.evaluate(60.0)
    clock.now += 30.0
    run.tell("on_save")
    run.step(seconds=4.0)
    run.log(loss=1.0)
    assert re.findall(r"\d+ tokens/s", lines.getvalue()) == ["500 tokens/s", "250 tokens/s"]
    assert lines.getvalue().splitlines()[-1].endswith("0:04:48 left")  # but the time left does not: 96 / 2 * 6


def test_on_a_terminal_a_bar_stands_below_the_lines(screen: io.StringIO, clock: SimpleNamespace):
    callback = ProgressCallback()
    run = Run(callback, clock)
    run.steps(3)
    bar = callback._bar
    assert bar is not None
    bar.refresh()
    assert re.search(r"training ━+.* 3/8 500 tokens/s · 0:00:10 left", screen.getvalue())
    assert "step 3/8  epoch 0.75  loss 1.3333  grad 1.250  lr 5.00e-04  500 tokens/s\n" in screen.getvalue()
    run.tell("on_train_end")
    assert bar.finished is False and not bar.live.is_started


def test_an_evaluation_has_a_bar_of_its_own_while_it_lasts(screen: io.StringIO, clock: SimpleNamespace):
    callback = ProgressCallback()
    run = Run(callback, clock)
    run.steps(1)
    run.handler.eval_dataloader = range(4)
    run.tell("on_prediction_step")
    bar = callback._bar
    assert bar is not None
    assert [(task.description, task.completed, task.total) for task in bar.tasks] == [
        ("training", 1, 8),
        ("evaluating", 1, 4),
    ]
    run.tell("on_evaluate", metrics={})
    assert [task.description for task in bar.tasks] == ["training"]
    run.tell("on_train_end")


def test_an_evaluation_without_training_takes_its_bar_away(screen: io.StringIO):
    callback = ProgressCallback()
    handler = CallbackHandler([callback], None, None, None, None)  # type: ignore[arg-type]
    args, state, control = SimpleNamespace(disable_tqdm=False), TrainerState(), TrainerControl()
    handler.eval_dataloader = range(2)
    handler.on_prediction_step(args, state, control)  # type: ignore[arg-type]
    bar = callback._bar
    assert bar is not None and bar.live.is_started
    handler.on_log(args, state, control, logs=dict(EVALUATION))  # type: ignore[arg-type]
    handler.on_evaluate(args, state, control, metrics=EVALUATION)  # type: ignore[arg-type]
    assert not bar.live.is_started
    assert "evaluation  loss 1.5000  perplexity 4.4817\n" in screen.getvalue()


def test_disable_tqdm_leaves_the_lines(screen: io.StringIO, clock: SimpleNamespace):
    run = Run(ProgressCallback(), clock, quiet=True)
    run.steps(1)
    run.evaluate(1.0)
    assert "━" not in screen.getvalue()
    assert [line.split()[0] for line in screen.getvalue().splitlines()] == ["step", "evaluation"]


def test_a_run_that_ends_early_gives_the_terminal_back(screen: io.StringIO, clock: SimpleNamespace):
    callback = ProgressCallback()
    Run(callback, clock).steps(1)
    bar = callback._bar
    assert bar is not None
    callback.close()
    callback.close()
    assert not bar.live.is_started
    assert screen.getvalue().count("\x1b[?25h") == 1  # the cursor is shown again


DIES_EARLY = """
from types import SimpleNamespace
from transformers import TrainerControl, TrainerState
from burnish import console
from burnish.train.logs import ProgressCallback
state = TrainerState(max_steps=8)
callback = ProgressCallback()
callback.on_train_begin(SimpleNamespace(disable_tqdm=False), state, TrainerControl())
console.warn("a note")
console.fail("the last words")
"""


def test_notes_stand_above_the_bar_and_a_program_that_dies_shows_the_cursor_again():
    terminal, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", DIES_EARLY], stdout=child, stderr=child, env=environment)
    os.close(child)
    screen = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while more := os.read(terminal, 4096):
            screen += more
    os.close(terminal)
    assert process.wait() == 0
    shown = screen.decode()
    assert re.search(r"\x1b\[2Knote: a note\r\n", shown), shown  # the bar's line was emptied first
    assert re.search(r"\x1b\[2K(\x1b\[[0-9;]*m)*the last words", shown), shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


# ---- *_results.json --------------------------------------------------------------------------------------------------


def test_results_of_all_splits_come_together_as_transformers_writes_them(tmp_path: Path):
    save_metrics(tmp_path, "train", {"train_loss": 1.5, "epoch": 3.0})
    save_metrics(tmp_path, "eval", {"eval_loss": 1.25, "epoch": 4.0})
    assert json.loads((tmp_path / "train_results.json").read_text()) == {"train_loss": 1.5, "epoch": 3.0}
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_loss": 1.25, "epoch": 4.0}
    together = {"train_loss": 1.5, "eval_loss": 1.25, "epoch": 4.0}
    assert json.loads((tmp_path / "all_results.json").read_text()) == together
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "all_results.json",
        "eval_results.json",
        "train_results.json",
    ]
