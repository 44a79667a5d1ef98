"""Tokens per second and peak memory of `burnish train` on one GPU.

    python benchmarks/gpu/sft.py --tokenizer FOLDER --run lora-7b-packed --run lora-7b-default --out FILE.json

Every run is a command of a user (printed, and in the result file), started as `burnish train` starts it; a callback
notes the device's clock after every step and asks nothing of the device while it works. The first steps are not timed.
Real tokens alone count, and all tokens of the rows are trained.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from transformers import TrainerCallback
from work import flops_per_token, make_model, make_rows

BASE = {
    "stage": "sft", "do_train": True, "template": "empty", "train_on_prompt": True, "cutoff_len": 2048, "bf16": True,
    "learning_rate": 1e-4, "logging_steps": 5, "save_strategy": "no",
}  # fmt: skip
LORA = BASE | {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
PACKED = {
    "packing": True, "cutoff_len": 8192, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
}  # fmt: skip
DEFAULT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
RUNS = {
    "lora-7b-packed": ("7b", LORA | PACKED),
    "lora-7b-default": ("7b", LORA | DEFAULT),
    "full-1.5b-packed": (
        "1.5b", BASE | PACKED | {"finetuning_type": "full", "per_device_train_batch_size": 2, "learning_rate": 1e-5}
    ),
    "lora-0.5b-packed": ("0.5b", LORA | PACKED),
    "lora-0.5b-default": ("0.5b", LORA | DEFAULT),
}  # fmt: skip
NOT_TIMED = 4


class Clock(TrainerCallback):
    """The device's time and the tokens so far, after every step."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []
        self.tokens: list[int] = []
        self.flops = 0.0

    def on_train_begin(self, args, state, control, model=None, **_):
        trains_all = all(p.requires_grad for p in model.parameters())
        torch.cuda.reset_peak_memory_stats()
        self.flops = flops_per_token(model, trains_all=trains_all)

    def on_step_end(self, args, state, control, **_):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)
        self.tokens.append(state.num_input_tokens_seen)

    def result(self) -> dict[str, float]:
        torch.cuda.synchronize()
        events, tokens = self.events[NOT_TIMED - 1 :], self.tokens[NOT_TIMED - 1 :]
        times = [a.elapsed_time(b) for a, b in pairwise(events)]
        counts = [b - a for a, b in pairwise(tokens)]
        speed = sum(counts) / sum(times) * 1000
        return {
            "tokens_per_second": round(speed),
            "median_of_steps": round(statistics.median(c / t * 1000 for c, t in zip(counts, times, strict=True))),
            "useful_tflops": round(speed * self.flops / 1e12, 1),
            "step_ms": round(statistics.median(times), 1),
            "tokens_per_step": round(statistics.mean(counts)),
            "steps": len(times),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        }


def run(name: str, args: argparse.Namespace) -> dict[str, float | str]:
    from burnish.arguments.parse import parse_command
    from burnish.workflow import run_train

    shape, settings = RUNS[name]
    folder = Path(args.folder)
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        settings = settings | {
            "model_name_or_path": make_model(shape, Path(args.tokenizer), folder), "dataset": folder / "rows.json",
            "output_dir": output, "max_steps": args.steps + NOT_TIMED,
        }  # fmt: skip
        words = [f"{key}={value}" for key, value in settings.items()] + args.set
        run_train(parse_command("train", words), [clock])
    command = " ".join(["burnish train", *(w for w in words if not w.startswith(("output_dir", "dataset", "model_")))])
    return {"name": name, **clock.result(), "command": command}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer.json of at most 151,900 tokens")
    parser.add_argument("--run", action="append", choices=RUNS, required=True)
    parser.add_argument("--steps", type=int, default=16, help="timed steps")
    parser.add_argument("--folder", default="/tmp/burnish-work", help="where models and rows are made")
    parser.add_argument("--set", action="append", default=[], help="a setting more, as key=value")
    parser.add_argument("--out", required=True)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one run, in a process of its own
    args = parser.parse_args()
    if args.alone:
        print("RESULT " + json.dumps(run(args.run[0], args)))
        return
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    make_rows(Path(args.tokenizer), folder / "rows.json")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    common = {"device": torch.cuda.get_device_name(), "versions": versions, "date": datetime.date.today().isoformat()}
    results = []
    for name in args.run:
        words = [
            sys.executable,
            __file__,
            "--alone",
            "--run",
            name,
            "--steps",
            str(args.steps),
            "--folder",
            str(folder),
        ]
        words += ["--tokenizer", args.tokenizer, "--out", args.out, *(w for s in args.set for w in ("--set", s))]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(f"{name}: no result\n{done.stdout[-3000:]}", flush=True)
            continue
        results.append(json.loads(lines[0].removeprefix("RESULT ")) | common)
        print(
            json.dumps({key: value for key, value in results[-1].items() if key not in ("versions", "command")}),
            flush=True,
        )
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
