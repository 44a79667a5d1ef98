"""How full packed rows are, and how long packing takes, at 2,048 and 8,192 tokens.

    python benchmarks/packing.py

Real lengths: LLaMA-Factory's demo rows (`make fixtures`) and data/pinyin_hanzi.jsonl, as `burnish train` encodes them
with Qwen3's tokenizer and template; and the texts of data/gongwen.jsonl, as if each were an answer. A set of few tokens
cannot be 99 % full: its last row is what is left, as the fewest rows that would hold its tokens (`bound`) show, so
`fill_but_last` leaves the emptiest row out. `unpacked` is how full rows of one sample each would be. For time, a
million log-normal lengths, median 200 tokens, cut at the row, and the real sets repeated to a million. CPU seconds of
one core, median of five packings.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import fixtures  # noqa: E402
import numpy as np  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from burnish.chat.template import load_template  # noqa: E402
from burnish.data.arguments import DataArguments  # noqa: E402
from burnish.data.packing import pack  # noqa: E402
from burnish.data.sources import get_dataset  # noqa: E402

CAPACITIES = (2048, 8192)
MILLION = 1_000_000
SETS = {
    "alpaca_en_demo": "llamafactory-data",
    "alpaca_zh_demo": "llamafactory-data",
    "glaive_toolcall_en_demo": "llamafactory-data",
    "pinyin_hanzi": "",
}  # set → the fixture that holds it; "": data/


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "packing.json"))
    args = parser.parse_args()
    results = [measure(name, lengths, capacity) for capacity in CAPACITIES for name, lengths in sets(capacity).items()]
    about = {"device": f"{platform.machine()} CPU, one core", "date": datetime.date.today().isoformat()}
    about |= {"python": platform.python_version(), "numpy": np.__version__, "command": "python benchmarks/packing.py"}
    Path(args.out).write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    print(
        f"{'set':34}{'row':>6}{'samples':>11}{'rows':>9}{'bound':>9}{'full':>9}{'but last':>10}{'unpacked':>10}{'s':>7}"
    )
    for r in results:
        print(
            f"{r['set']:34}{r['capacity']:6}{r['samples']:11,}{r['rows']:9,}{r['bound']:9,}{r['fill']:9.2%}"
            f"{r['fill_but_last']:10.2%}{r['unpacked']:10.2%}{r['seconds']:7.2f}"
        )


def measure(name: str, lengths: np.ndarray, capacity: int) -> dict[str, Any]:
    seconds = []
    for epoch in range(5):
        begun = time.process_time()
        packing = pack(lengths, capacity, np.random.default_rng([42, epoch]))
        seconds.append(time.process_time() - begun)
    filled = np.add.reduceat(lengths[packing.samples], packing.borders[:-1])
    tokens = int(lengths.sum())
    return {
        "set": name,
        "capacity": capacity,
        "samples": len(lengths),
        "mean_length": round(tokens / len(lengths), 1),
        "rows": len(packing),
        "bound": -(-tokens // capacity),
        "fill": round(packing.fill, 5),
        "fill_but_last": round(float(np.sort(filled)[1:].mean() / capacity), 5) if len(packing) > 1 else packing.fill,
        "unpacked": round(tokens / len(lengths) / capacity, 5),
        "seconds": round(statistics.median(seconds), 3),
    }


def sets(capacity: int) -> dict[str, np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(fixtures.fetch("tokenizer-qwen3"))
    real = {name: encoded(name, fixture, capacity, tokenizer) for name, fixture in SETS.items()}
    texts = [json.loads(line)["text"] for line in (ROOT / "data" / "gongwen.jsonl").read_text("utf-8").splitlines()]
    real["gongwen"] = np.array([min(len(tokenizer(text).input_ids) + 1, capacity) for text in texts])
    together = np.concatenate(list(real.values()))
    drawn = np.random.default_rng(0).lognormal(np.log(200), 1.0, MILLION)
    return {
        **real,
        "all of them": together,
        "all of them, to a million": np.tile(together, MILLION // len(together) + 1)[:MILLION],
        "log-normal": np.minimum(drawn.astype(np.int64) + 1, capacity),
    }


def encoded(name: str, fixture: str, cutoff_len: int, tokenizer: Any) -> np.ndarray:
    folder = fixtures.fetch(fixture) / "data" if fixture else ROOT / "data"
    args = DataArguments(dataset=[name], dataset_dir=str(folder), cutoff_len=cutoff_len)
    datasets = get_dataset(args, "sft", tokenizer, load_template(tokenizer, None), seed=42)
    assert datasets.train is not None
    return datasets.train.lengths  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
