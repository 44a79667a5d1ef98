"""A run over a stream, stopped and taken up again, ends in the same weights, bit for bit, from the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import losses, make_run, run, weights

from burnish.arguments.parse import parse_command
from burnish.errors import RunStopped
from burnish.train.trainer import Trainer
from burnish.workflow import run_train

MIXED = ["--mix_strategy", "interleave_under", "--interleave_probs", "0.4,0.6"]


def words_of(folder: Path, stage: str) -> list[str]:
    """Six steps of 2×2 over two sets of 12 rows in all, which are several passes of them; 3 rows are set aside."""
    words = make_run(folder, rows=12)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = [{"text": row["output"]} for row in rows] if stage == "pt" else rows
    for name, part in (("one", rows[:5]), ("other", rows[5:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    changed = {"--stage": stage, "--dataset": f"{folder}/one.jsonl,{folder}/other.jsonl", "--val_size": "3"}
    for name, value in changed.items():
        words[words.index(name) + 1] = value
    if stage == "pt":
        at = words.index("--template")
        del words[at : at + 2]
    sizes = [
        "--cutoff_len",
        "16" if stage == "pt" else "128",
        "--buffer_size",
        "4",
        "--per_device_train_batch_size",
        "2",
    ]
    return [*words, *sizes, "--streaming", *MIXED, "--lora_dropout", "0.1"]


@pytest.fixture
def places(monkeypatch) -> list[tuple[str, ...]]:
    """The rows of every batch that is trained, in order."""
    seen: list[tuple[str, ...]] = []
    step = Trainer._optimizer_step

    def noting(self: Trainer, batches: Any, *rest: Any) -> None:
        seen.extend(batch.places for batch in batches)
        step(self, batches, *rest)

    monkeypatch.setattr(Trainer, "_optimizer_step", noting)
    return seen


def train(words: list[str], folder: Path, *more: str) -> None:
    run_train(parse_command("train", [*words, "--output_dir", str(folder), "--use_cpu", *more]))


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_resumed_a_stream_trains_the_same_rows_to_the_same_weights(stage, tmp_path, places):
    words = words_of(tmp_path, stage)
    train(words, tmp_path / "whole")
    whole = list(places)
    assert len(whole) == 12 and len(set(whole)) > 6
    at = [torch.load(tmp_path / "whole" / f"checkpoint-{step}" / "rng_state.pth")["loop"]["stream"] for step in (3, 6)]
    assert 0 < at[0]["epoch"] <= at[1]["epoch"], "it stopped before the second pass"
    places.clear()
    train(words, tmp_path / "resumed", "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3"))
    assert places == whole[6:]
    assert same(tmp_path / "whole", tmp_path / "resumed")
    assert losses(tmp_path / "whole")[-4:] == losses(tmp_path / "resumed")[-4:]


def test_after_a_step_that_is_not_finite_a_stream_goes_on_at_the_rows_of_that_step(tmp_path, places, monkeypatch):
    words = words_of(tmp_path, "sft")
    train(words, tmp_path / "whole")
    whole = list(places)
    places.clear()
    step = Trainer.training_step

    def spoil(self: Trainer, batch: Any, *args: Any, **how: Any) -> Any:
        if self.state.global_step == 4:
            self.model.get_input_embeddings().weight.data[3:] = float("nan")
        return step(self, batch, *args, **how)

    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="step 5: the loss"):
        patch.setattr(Trainer, "training_step", spoil)
        train(words, tmp_path / "out")
    assert places == whole[:10]
    places.clear()
    train(words, tmp_path / "out", "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-4"))
    assert places == whole[8:]


@pytest.mark.slow
def test_two_processes_resume_a_stream_together(tmp_path):
    words = words_of(tmp_path, "sft")
    run(2, [*words, "--output_dir", str(tmp_path / "whole")])
    start_at = str(tmp_path / "whole" / "checkpoint-3")
    run(2, [*words, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", start_at])
    assert same(tmp_path / "whole", tmp_path / "resumed")
    assert losses(tmp_path / "whole")[-4:] == losses(tmp_path / "resumed")[-4:]
