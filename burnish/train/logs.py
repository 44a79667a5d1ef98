"""What a run says while it goes: a file for machines, lines and a bar for a person, results at the end.

`LogCallback` writes trainer_log.jsonl, `ProgressCallback` speaks to the terminal, `save_metrics` leaves *_results.json.
All three read what transformers' callbacks are given (`TrainerState` and a dict of logs) and never the device.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerState

from burnish import console, ranks

LOG_FILE = "trainer_log.jsonl"
SPEED = ("_runtime", "_per_second")  # ends of names that tell of the machine and not of the model


def hours(seconds: float) -> str:
    """h:mm:ss, with as many hours as it takes.

    >>> hours(59.6), hours(93784)
    ('0:01:00', '26:03:04')
    """
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


class Pace:
    """How fast this process goes, from where it began: a resumed run does not count what an earlier one did."""

    def __init__(self, state: TrainerState):
        self.began = time.monotonic()
        self.first_step = state.global_step
        self.first_token = state.num_input_tokens_seen

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.monotonic() - self.began

    def remaining(self, state: TrainerState) -> float | None:
        """Seconds to the last step at the pace so far; None before the first."""
        steps = state.global_step - self.first_step
        return self.elapsed / steps * max(state.max_steps - state.global_step, 0) if steps else None

    def throughput(self, state: TrainerState) -> float:
        """Tokens a second, padding not counted."""
        return (state.num_input_tokens_seen - self.first_token) / max(self.elapsed, 1e-9)


class LogCallback(TrainerCallback):
    """trainer_log.jsonl: a JSON object a log step and one an evaluation, under the names that LLaMA-Factory gave them.

    {"current_steps": 10, "total_steps": 120, "loss": 1.9, "lr": 0.0005, "epoch": 0.25, "percentage": 8.33,
     "elapsed_time": "0:00:19", "remaining_time": "0:03:29", "throughput": 321.5, "total_tokens": 6104}

    `throughput` is tokens a second since this process began to train, evaluations included; `elapsed_time` goes on
    over a resumed run. What was logged after the checkpoint that a run resumes from is taken out of the file first.
    """

    def __init__(self, output_dir: str | os.PathLike[str]):
        self.path = Path(output_dir) / LOG_FILE
        self._pace: Pace | None = None
        self._seconds_before = 0.0  # what the runs took that this one resumes

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        known = sum(bool(_measured(entry)) for entry in state.log_history)  # none where nothing is resumed
        kept = [line for line in _read_lines(self.path)[:known] if line["current_steps"] <= state.global_step]
        _write_whole(self.path, "".join(_json_line(line) for line in kept))
        self._seconds_before = _seconds(kept[-1].get("elapsed_time", "")) if kept else 0.0
        self._pace = Pace(state)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self._pace is None or not logs:  # only evaluating: eval_results.json says it all
            return
        measured = _measured(logs)
        if not measured:
            return
        remaining = self._pace.remaining(state)
        line = {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            **measured,
            "lr": logs.get("learning_rate"),
            "epoch": logs.get("epoch"),
            "percentage": round(100 * state.global_step / max(state.max_steps, 1), 2),
            "elapsed_time": hours(self._seconds_before + self._pace.elapsed),
            "remaining_time": None if remaining is None else hours(remaining),
        }
        if state.num_input_tokens_seen:
            line |= {"throughput": round(self._pace.throughput(state), 2), "total_tokens": state.num_input_tokens_seen}
        _append(self.path, _json_line({name: value for name, value in line.items() if value is not None}))


class ProgressCallback(TrainerCallback):
    """A line a log step, and below the lines a bar with tokens a second and the time left.

    The bar is there only between the program and a person: not in a file or a pipe, nor with `disable_tqdm`. Tokens a
    second are those of the steps since the last line, evaluations and checkpoints left out.
    """

    def __init__(self) -> None:
        self._pace: Pace | None = None
        self._stretch: Pace | None = None
        self._tokens_per_second: float | None = None
        self._bar: Progress | None = None
        self._training: TaskID | None = None
        self._evaluating: TaskID | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._pace = self._stretch = Pace(state)
        bar = self._open_bar(args, state)
        if bar is not None:
            self._training = bar.add_task("training", total=state.max_steps, completed=state.global_step, pace="")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._bar is not None and self._training is not None:
            self._bar.update(
                self._training, completed=state.global_step, pace=" · ".join([*self._speed(state), *self._left(state)])
            )

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            fields = [f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}", *_numbers(logs)]
            console.say("  ".join([*fields, *self._speed(state), *([] if self._bar else self._left(state))]))
            self._rest(state)
        elif "train_runtime" in logs and "train_loss" in logs:
            console.say(_summary(state, logs))
        elif evaluation := _evaluation(logs):
            at = [f"step {state.global_step}/{state.max_steps}"] if state.max_steps else []
            console.say("  ".join(["evaluation", *at, *evaluation]))

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        bar = self._open_bar(args, state)
        if bar is None:
            return
        if self._evaluating is None:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self._evaluating = bar.add_task("evaluating", total=total, pace="")
        bar.advance(self._evaluating)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._rest(state)
        if self._bar is not None and self._evaluating is not None:
            self._bar.remove_task(self._evaluating)
        self._evaluating = None
        if self._training is None:  # an evaluation of its own: the bar goes with it
            self.close()

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._rest(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal. For a run that ends in an exception; more than once does no harm."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._training = self._evaluating = None

    def _open_bar(self, args: Any, state: TrainerState) -> Progress | None:
        terminal = console.out.is_terminal and not console.out.is_dumb_terminal
        if self._bar is None and terminal and state.is_world_process_zero and not args.disable_tqdm:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
                console=console.out,
                transient=True,  # what stays behind are the lines
                refresh_per_second=2,  # drawing takes time from training
                redirect_stderr=sys.stderr.isatty(),  # above the bar, unless it goes into a file
            )
            self._bar.start()
            weakref.finalize(self, self._bar.stop)  # also when the program ends early, or the cursor stays hidden
        return self._bar

    def _rest(self, state: TrainerState) -> None:
        """What comes between here and the next step is not training: measure anew from there."""
        self._stretch = Pace(state)

    def _speed(self, state: TrainerState) -> list[str]:
        if self._stretch is not None and state.num_input_tokens_seen > self._stretch.first_token:
            self._tokens_per_second = self._stretch.throughput(state)
        return [] if self._tokens_per_second is None else [f"{self._tokens_per_second:,.0f} tokens/s"]

    def _left(self, state: TrainerState) -> list[str]:
        remaining = self._pace.remaining(state) if self._pace else None
        return [] if remaining is None else [f"{hours(remaining)} left"]


def save_metrics(output_dir: str | os.PathLike[str], split: str, metrics: Mapping[str, Any]) -> None:
    """`<split>_results.json`, and the same numbers added to those of the other splits in all_results.json."""
    if not ranks.is_main():
        return
    folder = Path(output_dir)
    _write_whole(folder / f"{split}_results.json", _json_file(metrics))
    together = folder / "all_results.json"
    known = json.loads(together.read_text(encoding="utf-8")) if together.exists() else {}
    _write_whole(together, _json_file({**known, **metrics}))


# How a line for a person is made


def _numbers(logs: Mapping[str, Any]) -> list[str]:
    """The fields of a training log that a person looks at, in a fixed order and width."""
    shown = (("epoch", "epoch", ".2f"), ("loss", "loss", ".4f"), ("grad_norm", "grad", ".3f"))
    fields = [f"{label} {logs[name]:{form}}" for name, label, form in shown if name in logs]
    return fields + ([f"lr {logs['learning_rate']:.2e}"] if "learning_rate" in logs else [])


def _evaluation(logs: Mapping[str, Any]) -> list[str]:
    """eval_loss, eval_perplexity → loss, perplexity; with one set a name, eval_law_loss → law_loss."""
    return [f"{name.removeprefix('eval_')} {measure(logs[name])}" for name in logs if _is_evaluation(name)]


def measure(value: float) -> str:
    """Four places where they tell something: a perplexity may be in the thousands."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _summary(state: TrainerState, logs: Mapping[str, Any]) -> str:
    tokens = logs.get("train_tokens_per_second")
    parts = [
        f"trained {state.global_step} steps in {hours(logs['train_runtime'])}",
        f"mean loss {logs['train_loss']:.4f}",
    ]
    return ", ".join(parts + ([f"{tokens:,.0f} tokens/s"] if tokens else []))


def _measured(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in logs.items() if name == "loss" or _is_evaluation(name)}


def _is_evaluation(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(SPEED)


# How a file is made


def _json_line(fields: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity; such a loss is null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


def _json_file(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=4, sort_keys=True, ensure_ascii=False) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last one of a killed run may have been cut."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "current_steps" in line:
            lines.append(line)
    return lines


def _append(path: Path, line: str) -> None:
    """One write to a file opened for appending: a reader sees the whole line or none of it."""
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def _write_whole(path: Path, text: str) -> None:
    """Beside its place, then renamed: the old file or the new one is there, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _seconds(clock: str) -> float:
    """'1:02:03' → 3723; anything else → 0."""
    found = re.fullmatch(r"(\d+):(\d\d):(\d\d)", clock)
    return sum(int(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
