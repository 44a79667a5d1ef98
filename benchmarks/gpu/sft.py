"""Tokens per second and peak memory of `burnish train` on one GPU or several of one machine.

    python benchmarks/gpu/sft.py --tokenizer FOLDER --run lora-7b-packed --run lora-7b-default --out FILE.json
    python benchmarks/gpu/sft.py --tokenizer FOLDER --run lora-0.5b-packed --peer trl --out FILE.json
    python benchmarks/gpu/sft.py --tokenizer FOLDER --run full-1.5b-packed --gpus 2 --out FILE.json

Every run is a command of a user (in the result file), started as `burnish train` starts it in a process of its own; a
callback notes the device's clock after every step and asks nothing of the device while it works. The first steps are
not timed. Real tokens alone count, and all tokens of the rows are trained. With `--peer trl` each run is followed by
the same work in peers.py. With `--gpus` a run is a process for each, started as `burnish train` starts them; its tokens
and FLOPs are those of all, its memory that of one. The file is written after every run; one that fails prints its end,
and the next is started.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from work import LONG, USUAL, Lengths, flops_per_token, make_model, make_rows

from burnish import ranks

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
    "lora-7b-fp8": ("7b", LORA | PACKED | {"base_dtype": "fp8"}),
    "full-1.5b-packed": (
        "1.5b", BASE | PACKED | {"finetuning_type": "full", "per_device_train_batch_size": 2, "learning_rate": 1e-5}
    ),
    "lora-7b-long": ("7b", LORA | PACKED | {"cutoff_len": 16384}),
    "lora-7b-checkpointed": ("7b", LORA | PACKED | {"gradient_checkpointing": True}),
    "freeze-7b": ("7b", BASE | PACKED | {"finetuning_type": "freeze", "learning_rate": 1e-5}),
    "lora-1.5b-packed": ("1.5b", LORA | PACKED),
    "full-0.5b-packed": ("0.5b", BASE | PACKED | {"finetuning_type": "full", "learning_rate": 1e-5}),
    "lora-0.5b-packed": ("0.5b", LORA | PACKED),
    "lora-0.5b-default": ("0.5b", LORA | DEFAULT),
    "lora-smollm2-packed": ("smollm2", LORA | PACKED),
    "lora-smollm2-default": ("smollm2", LORA | DEFAULT),
}  # fmt: skip
PACKAGES = ("torch", "transformers", "peft", "nvidia-cudnn-frontend")
NOT_TIMED = 4
LIMIT = 240  # seconds for one run, with the loading
# For packed rows the peer's first attention that runs is taken: TRL's own choice, FlashAttention, may not be installed.
ATTENTION = {"packed": ["flex_attention", "sdpa"], "long": ["flex_attention", "sdpa"], "default": ["sdpa"]}


class Clock(TrainerCallback):
    """The device's time and the tokens so far, after every step."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []
        self.tokens: list[int] = []
        self.flops = 0.0

    def on_train_begin(self, args, state, control, model=None, **_):
        torch.cuda.reset_peak_memory_stats()
        self.flops = flops_per_token(model)

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


def add_work(parser: argparse.ArgumentParser) -> None:
    """The options that burnish's runs and a peer's share."""
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer.json of at most 151,900 tokens")
    parser.add_argument("--smollm2", help="folder of the real SmolLM2-135M-Instruct, for the runs of that name")
    parser.add_argument("--steps", type=int, default=16, help="timed steps")
    parser.add_argument("--folder", default="/tmp/burnish-work", help="where models and rows are made")


def rows_of(name: str, folder: Path) -> tuple[Path, Lengths]:
    """The file of a run's rows, and their lengths."""
    if RUNS[name][0] == "smollm2":
        return folder / "rows-smollm2.json", USUAL
    return (folder / "rows-long.json", LONG) if name.endswith("-long") else (folder / "rows.json", USUAL)


def work_of(name: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """The model's folder and the file of rows, made if they are not there; rows are of words of the model's own."""
    shape, folder = RUNS[name][0], Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    real = shape == "smollm2"
    if real and not args.smollm2:
        raise SystemExit(f"{name} needs --smollm2 FOLDER")
    tokenizer = Path(args.smollm2 if real else args.tokenizer)
    rows, lengths = rows_of(name, folder)
    if not rows.exists():
        make_rows(tokenizer, rows, lengths)
    return tokenizer if real else make_model(shape, tokenizer, folder), rows


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    from burnish.arguments.parse import parse_command
    from burnish.workflow import run_train

    model, rows = work_of(name, args)
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        settings = RUNS[name][1] | {
            "model_name_or_path": model, "dataset": rows, "output_dir": output, "max_steps": args.steps + NOT_TIMED,
        }  # fmt: skip
        words = [f"{key}={value}" for key, value in settings.items()] + args.set
        run_train(parse_command("train", words), [clock])
    command = " ".join(["burnish train", *(w for w in words if not w.startswith(("output_dir", "dataset", "model_")))])
    return {"name": name, **clock.result(), "command": command}


def result_of(script: str, words: list[str], gpus: int = 1) -> dict[str, Any] | None:
    """The result of a run in a process (or several) of its own; None, with the end of what it printed, where there is
    none."""
    # Without `--` torchrun takes `--run` for one of its own options, shortened.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus), "--"] if gpus > 1 else []
    command = [sys.executable, *torchrun, str(Path(__file__).with_name(script)), *words]
    environment = (ranks.environment(gpus) if gpus > 1 else {}) | os.environ
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            process.wait(LIMIT)
            why = "no result"
        except subprocess.TimeoutExpired:
            why = f"not done after {LIMIT} s"
            process.terminate()  # torchrun then ends its processes, which would work on beside the next run
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        text = said.read()
    lines = [line for line in text.splitlines() if line.startswith("RESULT ")]
    if lines:
        return json.loads(lines[0].removeprefix("RESULT "))
    print(f"{script} {' '.join(words[:2])}: {why}\n{text[-1500:]}", flush=True)
    return None


def peer_of(name: str, words: list[str], choices: list[str]) -> dict[str, Any] | None:
    for attention in choices:
        found = result_of("peers.py", ["--run", name, *words, "--attention", attention])
        if found:
            return found
    return None


def versions_of(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", choices=RUNS, required=True)
    add_work(parser)
    parser.add_argument("--set", action="append", default=[], help="a setting of burnish's more, as key=value")
    parser.add_argument("--gpus", type=int, default=1, help="processes, each with a GPU of its own (default: 1)")
    parser.add_argument("--peer", choices=["trl"], help="run the same work with it, right after each run")
    parser.add_argument("--peer-steps", type=int, help="timed steps of the peer (default: --steps)")
    parser.add_argument("--peer-attention", action="append", help="only these (default: what runs, flex first)")
    parser.add_argument("--peer-set", action="append", default=[], help="a setting of SFTConfig more, as key=JSON")
    parser.add_argument("--out", required=True)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one run, in this process
    args = parser.parse_args()
    if args.alone:
        result = run(args.run[0], args)
        if ranks.is_main():
            print("RESULT " + json.dumps(result))
        return
    if args.gpus < 1 or (args.gpus > 1 and args.peer):
        parser.error("--gpus takes a number from 1 on, and the peer runs on one GPU")
    shared = ["--tokenizer", args.tokenizer, "--steps", str(args.steps), "--folder", args.folder]
    shared += ["--smollm2", args.smollm2] if args.smollm2 else []
    common = {"device": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat()}
    common |= {"gpus": args.gpus} if args.gpus > 1 else {}
    results = []

    def keep(found: dict[str, Any] | None, *packages: str) -> dict[str, Any] | None:
        if found:
            results.append(found | common | {"versions": versions_of(*PACKAGES, *packages)})
            print(json.dumps({key: value for key, value in found.items() if key != "command"}), flush=True)
            Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        return found

    for name in args.run:
        more = [word for setting in args.set for word in ("--set", setting)]
        if args.gpus > 1:
            work_of(name, args)  # made by one process, which then holds none of it
            torch.cuda.empty_cache()
        alone = ["--run", name, *shared, *more, "--out", args.out, "--alone"]
        ours = keep(result_of("sft.py", alone, args.gpus))
        if args.peer:
            more = [word for setting in args.peer_set for word in ("--set", setting)]
            choices = args.peer_attention or ATTENTION[name.rpartition("-")[2]]
            more += ["--steps", str(args.peer_steps or args.steps)]
            theirs = keep(peer_of(name, [*shared, *more], choices), "trl", "liger-kernel")
            if ours and theirs:
                ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
                print(f"{name}: {ratio:.2f} times the tokens per second of TRL", flush=True)


if __name__ == "__main__":
    main()
