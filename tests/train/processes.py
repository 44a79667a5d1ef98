"""What tests of several processes share: rows and a model as files, and real launchers that start real commands."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import families
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_run(folder: Path, family: str = "qwen3", rows: int = 54, **model: Any) -> list[str]:
    """A small model and rows of letters in `folder`; the words of a command that trains on them for six steps."""
    families.save(family, folder / "model", **model)
    families.save_tokenizer(folder / "model")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(rows):
            question, answer = (" ".join(draw.choices(LETTERS, k=draw.randint(3, 20))) for _ in range(2))
            file.write(json.dumps({"instruction": question, "output": answer}) + "\n")
    return [
        *("--stage", "sft", "--do_train", "--do_eval", "--val_size", "0.2", "--eval_strategy", "steps"),
        *("--eval_steps", "3", "--dataset", str(folder / "rows.jsonl"), "--template", "default"),
        *("--model_name_or_path", str(folder / "model"), "--max_steps", "6", "--logging_steps", "1"),
        *("--learning_rate", "1e-2", "--save_strategy", "steps", "--save_steps", "3"),
        *("--gradient_accumulation_steps", "2"),
    ]


def environment(**more: str) -> dict[str, str]:
    """One thread a process: two processes of two threads each on two cores would wait for each other."""
    found = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found["PATH"]])
    return found


def start(processes: int, words: list[str]) -> subprocess.Popen[str]:
    """`burnish train WORDS` in so many processes under torchrun; in this one's place where it is one."""
    command = [sys.executable, "-m", "burnish", "train", *words]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*torchrun, *command[1:]]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def start_without_end(processes: int, words: list[str], out: Path) -> subprocess.Popen[str]:
    """The command of make_run, but it goes on until it is stopped; some steps of it are done."""
    words = list(words)
    for name, steps in (("--max_steps", "100000"), ("--save_steps", "1000000"), ("--eval_steps", "1000000")):
        words[words.index(name) + 1] = steps
    process = start(processes, [*words, "--output_dir", str(out)])
    log, deadline = out / "trainer_log.jsonl", time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.2)
    return process


def take_back_to_checkpoint_3(out: Path) -> None:
    """What a run of make_run's command that was killed behind that checkpoint would have left."""
    for file in [out / "train_results.json", out / "all_results.json", *out.glob("*model.safetensors")]:
        file.unlink()
    shutil.rmtree(out / "checkpoint-6")


def run(processes: int, words: list[str], status: int = 0) -> str:
    process = start(processes, words)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == status, output
    return output


def run_script(processes: int, script: Path, *words: str) -> None:
    """A program of Python in so many processes under torchrun, for what no command does."""
    command = [sys.executable, str(script), *words]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*torchrun, *command[1:]]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(folder: Path) -> list[float]:
    """Of training and evaluation, in the order in which they were logged."""
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] if "loss" in line else line["eval_loss"] for line in lines]


def weights(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*model*.safetensors")
    return load_file(file)
