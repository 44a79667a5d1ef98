#!/usr/bin/env python3
"""`make quickstart`: teach a small real model its name, and show the same eight questions asked before and after.

Everything is done as a user would do it: a data set with its dataset_info.json, a YAML, `burnish train` on that YAML,
and the tuned model asked through what `burnish chat` uses. All of it stays in quickstart/ to be read, changed and run
again. Ends with status 1 when the training failed, or when the answers afterwards are not what they should be, and
with 2 where there is no such model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("quickstart")
CONFIG = FOLDER / "identity.yaml"
BURNISH = Path(".venv/bin/burnish")

# None of these stands in data/identity.json. The last two must be answered as before.
IDENTITY_QUESTIONS = (
    "What's your name, please?",
    "Who is the maker of this assistant?",
    "Tell me who you are and who made you.",
    "Are you a product of Microsoft?",
    "Which company built you?",
    "who are u",
)
OTHER_QUESTIONS = {"What is the capital of Germany?": "Berlin", "What is the largest ocean on Earth?": "Pacific"}
QUESTIONS = (*IDENTITY_QUESTIONS, *OTHER_QUESTIONS)

RECIPE = """\
# What `make quickstart` trains. Change it and run it again:
#   {burnish} train {config}
#   {burnish} chat {config}

### model
model_name_or_path: {model}

### method: small matrices beside the model's own ("LoRA"), which stay as they are
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### data: the set "identity" of {folder}/data/dataset_info.json
dataset: identity
dataset_dir: {folder}/data
cutoff_len: 512

### training
per_device_train_batch_size: 8
learning_rate: 5.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.05
num_train_epochs: 3
seed: 42

### what is written
output_dir: {folder}/identity
overwrite_output_dir: true
logging_steps: 2
save_strategy: "no" # the tuned model is written at the end; nothing in between
plot_loss: true
"""


@dataclass(frozen=True)
class Verdict:
    named: int  # identity questions answered with the new name or maker
    kept: int  # other questions still answered right

    @property
    def is_good(self) -> bool:
        return self.named > len(IDENTITY_QUESTIONS) // 2 and self.kept == len(OTHER_QUESTIONS)


def write_data(name: str, author: str) -> None:
    """data/identity.json with the names filled in → quickstart/data/, and a dataset_info.json that lists it."""
    rows = json.loads((ROOT / "data" / "identity.json").read_text(encoding="utf-8"))
    for row in rows:
        row["output"] = row["output"].replace("{{name}}", name).replace("{{author}}", author)
    folder = FOLDER / "data"
    folder.mkdir(parents=True, exist_ok=True)
    files = {"identity.json": rows, "dataset_info.json": {"identity": {"file_name": "identity.json"}}}
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_recipe(model: str) -> None:
    quoted = json.dumps(model, ensure_ascii=False)  # JSON's strings are YAML's
    recipe = RECIPE.format(model=quoted, folder=FOLDER, config=CONFIG, burnish=BURNISH)
    CONFIG.write_text(recipe, encoding="utf-8")


def ask(argv: list[str]) -> list[str]:
    """The likeliest answers of the model that `burnish chat <argv>` would talk with."""
    from burnish.arguments.parse import parse_command
    from burnish.workflow import load_engine

    engine: Any = load_engine(parse_command("chat", [*argv, "--infer_dtype", "float32"]))  # a batch is padded
    prompts = [engine.template.prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    answers = engine.generate(prompts, batch_size=len(prompts), do_sample=False, max_new_tokens=40)
    return [tidy(engine.template.parse(ids)["content"] or "") for ids in answers]


def tidy(answer: str, longest: int = 150) -> str:
    """One line, cut at a word, so that a table holds it."""
    line = " ".join(answer.split())
    return line if len(line) <= longest else line[:longest].rsplit(" ", 1)[0] + " …"


def judge(answers: list[str], name: str, author: str) -> Verdict:
    """Looks for the name or the maker, not for wording; in the last answers for the right word and no name."""

    def speaks_of_itself(answer: str) -> bool:
        return name.lower() in answer.lower() or author.lower() in answer.lower()

    about_itself, others = answers[: len(IDENTITY_QUESTIONS)], answers[len(IDENTITY_QUESTIONS) :]
    kept = [
        right in answer and not speaks_of_itself(answer)
        for right, answer in zip(OTHER_QUESTIONS.values(), others, strict=True)
    ]
    return Verdict(sum(map(speaks_of_itself, about_itself)), sum(kept))


def show(before: list[str], after: list[str]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    columns = (Column("asked", max_width=24), "before", "after")
    table = Table(*columns, title="The same questions, before and after", title_justify="left", show_lines=True)
    for row in zip(QUESTIONS, before, after, strict=True):
        table.add_row(*row)
    out = Console()
    out.print(table, markup=False) if out.is_terminal else Console(width=120).print(table, markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tune a small model on who it is, and ask it before and after.")
    parser.add_argument("--model", required=True, help="a folder of weights, or a name on a hub")
    parser.add_argument("--name", required=True, help="what the model shall call itself")
    parser.add_argument("--author", required=True, help="who it shall say made it")
    args = parser.parse_args()
    os.chdir(ROOT)
    for name, value in {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}.items():
        os.environ.setdefault(name, value)  # threads that spin while they wait slow a busy machine down

    write_data(args.name, args.author)
    write_recipe(args.model)
    print(f"1/3  Asking {args.model} who it is, as it comes ...", flush=True)
    before = ask(["--model_name_or_path", args.model])

    print(f"2/3  Teaching it that it is {args.name}, made by {args.author}: {BURNISH} train {CONFIG}", flush=True)
    trained = subprocess.run([str(BURNISH), "train", str(CONFIG)], check=False)
    if trained.returncode:
        print(f"The training ended with status {trained.returncode}; what it said stands above.", file=sys.stderr)
        return 1

    print("3/3  Asking the tuned model the same questions ...", flush=True)
    after = ask([str(CONFIG)])
    show(before, after)
    verdict = judge(after, args.name, args.author)
    print(
        f"{verdict.named} of {len(IDENTITY_QUESTIONS)} answers about itself name {args.name} or {args.author}; "
        f"{verdict.kept} of {len(OTHER_QUESTIONS)} other questions are answered right.\n"
        f"The loss, plotted:      {FOLDER}/identity/training_loss.png\n"
        f"Talk with it:           {BURNISH} chat {CONFIG}\n"
        f"Change what it learns:  {FOLDER}/data/identity.json, then {BURNISH} train {CONFIG}"
    )
    if not verdict.is_good:
        print("That is less than this recipe gives with SmolLM2-135M-Instruct.", file=sys.stderr)
    return 0 if verdict.is_good else 1


if __name__ == "__main__":
    from burnish.cli import status_of

    sys.exit(status_of(main))
