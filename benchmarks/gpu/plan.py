"""What `burnish plan` predicts beside what is measured: peak memory and tokens per second, run by run.

    python benchmarks/gpu/plan.py --tokenizer FOLDER --out results/plan.json
    python benchmarks/gpu/plan.py --tokenizer FOLDER --run lora-7b-r64 --run freeze-7b --out FILE.json
    python benchmarks/gpu/plan.py --tokenizer FOLDER --smollm2 FOLDER --measured results/sft.json --out FILE.json

Every plan is made before anything is trained; then each run is trained as sft.py does it. Results are written after
each run: a JSON list, and beside it a Markdown table (FILE.md). All of them take about eight minutes on an H100.

With --measured nothing is trained: the plans stand beside the runs of burnish in a result file of sft.py (the median of
its steps), each planned from the command in that file. That needs no GPU, no weights and about three minutes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sft
import torch
from transformers import Qwen2Config
from work import SHAPES, make_model, make_rows

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    # what the plan's shares were measured on
    "lora-7b-packed": sft.RUNS["lora-7b-packed"],
    "lora-7b-default": sft.RUNS["lora-7b-default"],
    "full-1.5b-packed": sft.RUNS["full-1.5b-packed"],
    "lora-0.5b-default": sft.RUNS["lora-0.5b-default"],
    # what they were not
    "lora-7b-r64": ("7b", sft.LORA | sft.PACKED | {"lora_rank": 64}),
    "lora-7b-packed-4096": ("7b", sft.LORA | sft.PACKED | {"cutoff_len": 4096}),
    "lora-7b-packed-16384": ("7b", sft.LORA | sft.PACKED | {"cutoff_len": 16384}),
    "lora-7b-checkpointing": ("7b", sft.LORA | sft.PACKED | {"gradient_checkpointing": True}),
    "freeze-7b": sft.RUNS["freeze-7b"],
    "lora-1.5b-packed": sft.RUNS["lora-1.5b-packed"],
    "full-0.5b-packed": sft.RUNS["full-0.5b-packed"],
    "full-0.5b-default": ("0.5b", sft.BASE | sft.DEFAULT | {"finetuning_type": "full", "learning_rate": 1e-5}),
}
STEPS = 10  # timed, after sft.NOT_TIMED
SECONDS = 120  # after which a run is given up


def words_of(name: str, args: argparse.Namespace, output: str) -> list[str]:
    """The command that sft.py makes of a run."""
    shape, settings = RUNS[name]
    folder = Path(args.folder)
    own = {
        "model_name_or_path": folder / shape, "dataset": folder / "rows.json", "output_dir": output,
        "max_steps": args.steps + sft.NOT_TIMED,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (settings | own).items()] + args.set


def predict(name: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        return plan_of(name, words_of(name, args, output))


def plan_of(name: str, words: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "burnish", "plan", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{name}: no plan\n{done.stderr}")
    return json.loads(done.stdout)


def train_alone(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """In this process, which ends afterwards."""
    sft.RUNS.update(RUNS)
    measured = sft.run(name, args)
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return measured | {
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "beside_gib": round((total - free - reserved) / 2**30, 2),  # the context, and whoever else is there
    }


def train(name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    command = [sys.executable, __file__, "--alone", "--run", name, "--steps", str(args.steps), "--folder", args.folder]
    command += ["--tokenizer", args.tokenizer, "--out", args.out, *(w for s in args.set for w in ("--set", s))]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}: given up after {SECONDS} s", flush=True)
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"{name}: no result\n{done.stdout[-3000:]}", flush=True)
        return None
    return json.loads(lines[0].removeprefix("RESULT "))


def compare(name: str, plan: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Errors are (predicted - measured) / measured."""
    speed, real_speed = plan["tokens_per_second"], measured["tokens_per_second"]
    return {
        "name": name,
        "peak_gib": {"predicted": round(plan["peak_gib"], 2), "measured": measured["peak_gib"]},
        "memory_error": round(plan["peak_gib"] / measured["peak_gib"] - 1, 4),
        "tokens_per_second": {"predicted": speed, "measured": real_speed},
        "speed_error": None if speed is None else round(speed / real_speed - 1, 4),
        "plan": plan,
        "measured": measured,
    }


# ---- beside what was measured before ---------------------------------------------------------------------------------

DEVICES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}  # torch's names of devices: plan's
CALIBRATED_ON = {  # on an H100: what the figures of burnish/plan/speed.py and memory.py were read off or chosen after
    "lora-7b-packed": ["speed", "memory"],
    "lora-7b-default": ["speed", "memory"],
    "full-1.5b-packed": ["speed", "memory"],
    "lora-0.5b-packed": ["speed", "memory"],
    "lora-0.5b-default": ["memory"],
    "full-0.5b-packed": ["memory"],
}

REACH_CHOSEN_AFTER = ("sft-h200.json", "sft-h200-cudnn.json")  # all runs in them; of an H200: devices.py


def compare_with(file: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    runs = [each for each in json.loads(file.read_text()) if each["name"] in sft.RUNS]  # and no peer's
    runs = [each for each in runs if not args.run or each["name"] in args.run]
    with ThreadPoolExecutor(2) as pool:
        plans = list(pool.map(lambda each: plan_of(each["name"], words_of_measured(each, args)), runs))
    results = []
    for run, plan in zip(runs, plans, strict=True):
        known = compare(run["name"], plan, run | {"tokens_per_second": run["median_of_steps"]})
        del known["measured"]
        results.append(
            known
            | {"calibrated_on_it": calibrated_on(run, file.name), "command": "burnish plan " + plan_words(run)}
            | {"measured_in": file.name, **{key: run[key] for key in ("device", "date", "versions")}}
            | {"planned": datetime.date.today().isoformat(), "planned_with": sft.versions_of("torch", "transformers")}
        )
    return results


def calibrated_on(run: dict[str, Any], file: str) -> list[str]:
    """What the plan's figures were read off or chosen after, of this run in that file."""
    if DEVICES[run["device"]] == "h200":
        return ["speed"] if file in REACH_CHOSEN_AFTER else []
    return CALIBRATED_ON.get(run["name"], [])


def plan_words(run: dict[str, Any]) -> str:
    several = f" --devices {run['gpus']}" if "gpus" in run else ""
    return f"{run['command'].removeprefix('burnish train ')} --device {DEVICES[run['device']]}{several}"


def words_of_measured(run: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Its command, with what sft.py left out of it: the model and the rows, and a folder for the output."""
    folder, shape = Path(args.folder), sft.RUNS[run["name"]][0]
    real = shape == "smollm2"
    model = Path(args.smollm2) if real else folder / f"{shape}-without-weights"
    rows, _ = sft.rows_of(run["name"], folder)
    own = {"model_name_or_path": model, "dataset": rows, "output_dir": folder / "none"}
    return [*plan_words(run).split(), *(f"{key}={value}" for key, value in own.items()), *args.set]


def make_without_weights(file: Path, args: argparse.Namespace) -> None:
    """config.json and the tokenizer of each shape, and the rows."""
    folder, tokenizer = Path(args.folder), Path(args.tokenizer)
    names = [each["name"] for each in json.loads(file.read_text()) if each["name"] in sft.RUNS]
    shapes = {sft.RUNS[name][0] for name in names}
    if "smollm2" in shapes and not args.smollm2:
        raise SystemExit("one of the runs needs --smollm2 FOLDER")
    for (rows, lengths), is_real in {(sft.rows_of(name, folder), sft.RUNS[name][0] == "smollm2") for name in names}:
        make_rows(Path(args.smollm2) if is_real else tokenizer, rows, lengths)
    for shape in shapes - {"smollm2"}:
        place = folder / f"{shape}-without-weights"
        Qwen2Config(**SHAPES[shape], max_position_embeddings=32768).save_pretrained(place)
        for each in tokenizer.glob("tokenizer*.json"):
            shutil.copyfile(each, place / each.name)


def table(results: list[dict[str, Any]]) -> str:
    rows = ["| run | peak, predicted | measured | error | tokens/s, predicted | measured | error |", "|---" * 7 + "|"]
    for each in results:
        memory, speed = each["peak_gib"], each["tokens_per_second"]
        known = speed["predicted"] is not None
        rows.append(
            f"| {each['name']} | {memory['predicted']:.1f} GiB | {memory['measured']:.1f} GiB "
            f"| {each['memory_error']:+.1%} | {speed['predicted'] if known else 0:,} | {speed['measured']:,} "
            f"| {each['speed_error'] if known else 0:+.1%} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer.json of at most 151,900 tokens")
    parser.add_argument("--run", action="append", choices=RUNS | sft.RUNS, help="not given: all of them")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps")
    parser.add_argument("--folder", default="/tmp/burnish-work", help="where models and rows are made")
    parser.add_argument("--set", action="append", default=[], help="a setting more, as key=value")
    parser.add_argument("--measured", type=Path, help="a result file of sft.py, in the place of training")
    parser.add_argument(
        "--smollm2", help="folder of the real SmolLM2-135M-Instruct, for the measured runs of that name"
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one run, in a process of its own
    args = parser.parse_args()
    names = args.run or list(RUNS)
    if args.alone:
        print("RESULT " + json.dumps(train_alone(names[0], args)))
        return
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if args.measured:
        make_without_weights(args.measured, args)
        results = compare_with(args.measured, args)
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
        print(table(results))
        return
    make_rows(Path(args.tokenizer), folder / "rows.json")
    for shape in dict.fromkeys(RUNS[name][0] for name in names):
        make_model(shape, Path(args.tokenizer), folder)
    torch.cuda.empty_cache()
    with ThreadPoolExecutor(4) as pool:
        plans = dict(zip(names, pool.map(lambda name: predict(name, args), names), strict=True))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    common = {"device": torch.cuda.get_device_name(), "versions": versions, "date": datetime.date.today().isoformat()}
    results = []
    for name in names:
        if (measured := train(name, args)) is None:
            continue
        results.append(compare(name, plans[name], measured) | common)
        print(table(results[-1:]).splitlines()[-1], flush=True)
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
        Path(args.out).with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
