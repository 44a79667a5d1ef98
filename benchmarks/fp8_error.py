"""How far a base in fp8 is from its own weights, before anything is trained, by how many channels have two numbers.

    python benchmarks/fp8_error.py --model models/SmolLM2-135M-Instruct --data alpaca_en_demo.json --data …

SmolLM2 (or a model with its markers and names) reads rows of real tasks in float32 on the CPU, as it was published and
held in fp8 (burnish/kernels/frozen_linear.py). Told are the KL divergence of its predictions of the answers' tokens, in
nats a token, their loss, and by how much of itself that lies above the published model's (`apart`). What a run ends at,
benchmarks/gpu/fp8_curve.py measures.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from burnish.model.fp8 import hold_layers_in_fp8
from burnish.tuning.blocks import linear_layers

HERE = Path(__file__).resolve().parent
BATCH = 32
Row = tuple[list[int], int]  # ids, and how many of them are the question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, action="append", help="alpaca rows; several are tasks of their own")
    parser.add_argument("--tokens", type=int, default=3000, help="of answers, of each task")
    parser.add_argument("--channels", type=int, nargs="+", default=[0, 8, 16, 32])
    parser.add_argument("--out", default=str(HERE / "results" / "fp8_error.json"))
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tasks = {Path(file).name: rows_of(Path(file), tokenizer, args.tokens) for file in args.data}
    exact = {name: list(predictions(load(args.model), rows)) for name, rows in tasks.items()}
    results = []
    for channels in args.channels:
        with mock.patch("burnish.model.fp8.how_many_twice", lambda _columns, c=channels: c):
            model = load(args.model)
            hold_layers_in_fp8(model, linear_layers(model).values())
        for name, rows in tasks.items():
            found = compare(exact[name], predictions(model, rows))
            results.append({"name": "fp8-error", "dataset": name, "channels": channels, **found, **about(args)})
            print({key: results[-1][key] for key in ("dataset", "channels", "kl", "loss", "apart")}, flush=True)
            Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


def rows_of(file: Path, tokenizer: Any, tokens: int) -> list[Row]:
    """Rows from the beginning of the file until their answers have so many tokens."""
    found: list[Row] = []
    lines = file.read_text(encoding="utf-8")
    for row in map(json.loads, lines.splitlines()) if file.suffix == ".jsonl" else json.loads(lines):
        asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        message = [{"role": "user", "content": asked}]
        question = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        start, answer = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (question, row["output"] + "<|im_end|>")
        )
        found.append((start + answer, len(start)))
        if sum(len(ids) - asked for ids, asked in found) >= tokens:
            break
    return found


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def predictions(model: Any, rows: list[Row]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row log p [answer, V], and the answer's ids. Padding comes after a row, which does not look ahead."""
    for start in range(0, len(rows), BATCH):
        batch = [(torch.tensor(ids), asked) for ids, asked in rows[start : start + BATCH]]
        padded = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in batch], batch_first=True)
        hidden = model.model(input_ids=padded).last_hidden_state
        for states, (ids, asked) in zip(hidden, batch, strict=True):
            yield F.log_softmax(model.lm_head(states[asked - 1 : len(ids) - 1]), dim=-1), ids[asked:]


def compare(exact: list[tuple[Tensor, Tensor]], found: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    kl = exact_loss = loss = tokens = 0.0
    for (p, ids), (q, _) in zip(exact, found, strict=True):
        kl += (p.exp() * (p - q)).sum().item()
        exact_loss -= p.gather(1, ids[:, None]).sum().item()
        loss -= q.gather(1, ids[:, None]).sum().item()
        tokens += len(ids)
    return {"tokens": int(tokens), "kl": kl / tokens, "loss": loss / tokens, "apart": loss / exact_loss - 1}


def about(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": Path(args.model).name,
        "device": "CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
