"""Where a training step goes on the GPU, and what the CPU does meanwhile.

    python benchmarks/gpu/ledger.py --tokenizer FOLDER --run lora-7b-packed --out results/ledger.json

The same commands as sft.py's. Three steps are recorded by torch.profiler; kernels are grouped by what they are for.
"waiting" is the part of the step's wall time in which the GPU had nothing to do.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path

import torch
from sft import RUNS, work_of
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

FROM, STEPS = 6, 3
GROUPS = {  # the first that matches
    "attention": r"^(?!triton_).*(flash|fmha|attention|cudnn)",  # compiled kernels are named for their neighbours
    "head softmax": r"_softmax_loss",
    "SwiGLU": r"_swiglu",
    "optimizer": r"multi_tensor|FusedAdam|adam",
    "matrix products": r"nvjet|gemm|cutlass|splitKreduce|cublas",
    "compiled element-wise": r"^triton_",
    "copies": r"Memcpy|Memset",
    "other": r"",
}


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self.wall_ms = 0.0

    def on_step_end(self, args, state, control, **_):
        if state.global_step == FROM:
            torch.cuda.synchronize()
            self.profiler.__enter__()
            self.start = torch.cuda.Event(enable_timing=True)
            self.start.record()
        if state.global_step == FROM + STEPS:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            torch.cuda.synchronize()
            self.wall_ms = self.start.elapsed_time(end) / STEPS
            self.profiler.__exit__(None, None, None)

    def ledger(self) -> dict:
        events = self.profiler.key_averages()
        on_gpu = [
            e
            for e in events
            if e.device_type == DeviceType.CUDA and e.self_device_time_total > 0 and not e.is_user_annotation
        ]  # an annotation spans kernels that are counted themselves
        kernels = [(e.key, e.self_device_time_total / 1e3 / STEPS, e.count // STEPS) for e in on_gpu]
        groups: dict[str, list[float]] = {}
        for name, ms, count in kernels:
            group = next(group for group, pattern in GROUPS.items() if re.search(pattern, name, re.I))
            row = groups.setdefault(group, [0.0, 0])
            row[0], row[1] = row[0] + ms, row[1] + count
        busy = sum(ms for ms, _ in groups.values())
        groups["waiting"] = [max(self.wall_ms - busy, 0.0), 0]
        cpu = sorted(((e.self_cpu_time_total / 1e3 / STEPS, e.count // STEPS, e.key) for e in events), reverse=True)
        return {
            "step_ms": round(self.wall_ms, 1),
            "groups": {name: {"ms": round(ms, 1), "launches": n} for name, (ms, n) in sorted(groups.items())},
            "kernels": [[round(ms, 2), n, name[:100]] for name, ms, n in sorted(kernels, key=lambda k: -k[1])[:30]],
            "cpu": [[round(ms, 2), n, name[:80]] for ms, n, name in cpu[:30]],
        }


def main() -> None:
    from burnish.arguments.parse import parse_command
    from burnish.workflow import run_train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--smollm2", help="folder of the real SmolLM2-135M-Instruct, for the runs of that name")
    parser.add_argument("--run", choices=RUNS, required=True)
    parser.add_argument("--folder", default="/tmp/burnish-work")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    model, rows = work_of(args.run, args)
    with tempfile.TemporaryDirectory() as output:
        settings = RUNS[args.run][1] | {
            "model_name_or_path": model, "dataset": rows,
            "output_dir": output, "max_steps": FROM + STEPS + 1, "logging_steps": 100,
        }  # fmt: skip
        recorder = Recorder()
        words = [f"{key}={value}" for key, value in settings.items()] + args.set
        run_train(parse_command("train", words), [recorder])
    ledger = {"name": args.run, "device": torch.cuda.get_device_name(), **recorder.ledger()}
    Path(args.out).write_text(json.dumps(ledger, indent=1) + "\n")
    print(f"{args.run}: {ledger['step_ms']} ms a step")
    for name, row in ledger["groups"].items():
        print(f"  {name:24} {row['ms']:8.1f} ms  {row['launches']:6} launches")
    for kind in ("kernels", "cpu"):
        print(kind)
        for ms, count, name in ledger[kind][:22]:
            print(f"  {ms:9.2f} ms {count:6}  {name}")


if __name__ == "__main__":
    main()
