"""The loss of the same run beside a base in bf16 and beside one in fp8.

    python benchmarks/gpu/fp8_curve.py --model models/SmolLM2-135M-Instruct --out results/fp8-curve.json
    python benchmarks/gpu/fp8_curve.py --model … --dataset FILE --seed 1 --seed 2 --set lora_rank=16 --out FILE.json
    python benchmarks/gpu/fp8_curve.py --draw results/fp8-curve.json

A real model learns real tasks (data/pinyin_hanzi.jsonl, Chinese from its spelling, unless told otherwise), LoRA of rank
8 on all layers, through `burnish train`, once for each seed; all runs share the device, as nothing is timed. `--draw`
puts a picture beside the file.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
LAST = 20  # steps whose mean is the loss at the end: one step's depends on its rows more than on its numbers
BASES = {"bf16": None, "fp8": "fp8"}


def command(args: argparse.Namespace, dataset: Path, seed: int, base_dtype: str | None) -> list[str]:
    settings = {
        "stage": "sft", "do_train": True, "model_name_or_path": args.model, "dataset": dataset,
        "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "bf16": True, "cutoff_len": 512,
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "learning_rate": 5e-4,
        "max_steps": args.steps,
        "lr_scheduler_type": "cosine", "warmup_steps": 10, "logging_steps": 1, "save_strategy": "no", "val_size": 0.05,
        "eval_strategy": "steps", "eval_steps": args.steps, "seed": seed,
    } | dict(setting.split("=", 1) for setting in args.set)  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items()] + ([f"base_dtype={base_dtype}"] if base_dtype else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dataset", type=Path, action="append", help="a file of rows; several are tasks of their own")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, action="append", help="of rows, order and adapters; several are runs each")
    parser.add_argument("--set", action="append", default=[], help="another setting, as key=value")
    parser.add_argument("--out")
    parser.add_argument("--draw", type=Path)
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.draw.read_text()), args.draw.with_suffix(".png"))
        return
    if not (args.model and args.out):
        parser.error("give --model and --out, or --draw")
    datasets = [file.resolve() for file in args.dataset or [ROOT / "data/pinyin_hanzi.jsonl"]]
    if len({file.stem for file in datasets}) < len(datasets):
        parser.error("two files of one name")
    args.model = Path(args.model).resolve()
    pairs = [(dataset, seed) for dataset in datasets for seed in args.seed or [42]]
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for dataset, seed in pairs:
            for name, base_dtype in BASES.items():
                output = output_of(Path(folder), dataset, seed, name)
                words = [*command(args, dataset, seed, base_dtype), f"output_dir={output}"]
                runs[output.name] = subprocess.Popen([sys.executable, "-m", "burnish", "train", *words], cwd=ROOT)
        for name, run in runs.items():
            if run.wait():
                raise SystemExit(f"{name}: exit {run.returncode}")
        results = [result(args, dataset, seed, Path(folder)) for dataset, seed in pairs]
    Path(args.out).write_text(json.dumps(results) + "\n")


def output_of(folder: Path, dataset: Path, seed: int, name: str) -> Path:
    return folder / f"{dataset.stem}-{seed}-{name}"


def result(args: argparse.Namespace, dataset: Path, seed: int, folder: Path) -> dict[str, Any]:
    curves: dict[str, list[float]] = {}
    evaluated: dict[str, float] = {}
    for name in BASES:
        log = json.loads((output_of(folder, dataset, seed, name) / "trainer_state.json").read_text())["log_history"]
        curves[name] = [entry["loss"] for entry in log if "loss" in entry]
        evaluated[name] = next(entry["eval_loss"] for entry in reversed(log) if "eval_loss" in entry)
    end = {name: sum(curve[-LAST:]) / LAST for name, curve in curves.items()}
    words = [w for w in command(args, dataset, seed, "fp8") if not w.startswith(("model_name", "dataset"))]
    found = {
        "name": "fp8-curve", "model": Path(args.model).name, "dataset": dataset.name, "seed": seed, "steps": args.steps,
        "loss_at_the_end": end, "apart": end["fp8"] / end["bf16"] - 1, "eval_loss": evaluated,
        "eval_apart": evaluated["fp8"] / evaluated["bf16"] - 1,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["burnish train", *words]),
    }  # fmt: skip
    shown = ("dataset", "seed", "loss_at_the_end", "apart", "eval_loss", "eval_apart")
    print({key: found[key] for key in shown}, flush=True)
    return found | {"curves": curves}


def draw(results: list[dict[str, Any]], place: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(results), figsize=(6 * len(results), 4), squeeze=False)
    for axes, each in zip(all_axes[0], results, strict=True):
        for name, curve in each["curves"].items():
            axes.plot(range(1, len(curve) + 1), curve, label=f"base in {name}", linewidth=1, alpha=0.8)
        axes.set_title(f"{each['dataset']}, seed {each['seed']}")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        axes.legend()
    figure.tight_layout()
    figure.savefig(place, dpi=120)


if __name__ == "__main__":
    main()
