"""Checkpoints: whole or not there, found again, loaded, thrown away; and read by transformers' own Trainer."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import arguments, samples, small_model, trainer
from theirs import Rows, collator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerState,
    default_data_collator,
)
from transformers import Trainer as TransformersTrainer

from burnish.errors import UserError
from burnish.train import checkpoint, optimizer
from burnish.train.generators import restore_rng, rng_state
from burnish.train.logs import LogCallback

WHOLE = {
    *("config.json", "generation_config.json", "model.safetensors", "training_args.bin", "trainer_state.json"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth"),
}


def make_checkpoint(folder, step, text="whole"):
    def write(place):
        (place / checkpoint.STATE_FILE).write_text("{}")
        (place / "weights").write_text(text)

    return checkpoint.write_whole(folder, step, write)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def saving(folder, *, rows=8, **changes):
    """A run over 8 rows: 4 steps, a checkpoint every other step."""
    args = arguments(folder, **({"save_strategy": "steps", "save_steps": 2} | changes))
    return trainer(small_model("llama"), args, samples(rows))


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_in_the_middle_leaves_no_checkpoint(tmp_path):
    def write(place):
        (place / "first").write_text("written")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.write_whole(tmp_path, 7, write)
    assert checkpoint.last_checkpoint(tmp_path) is None
    assert names(tmp_path) == [".checkpoint-7.partial"]
    place = make_checkpoint(tmp_path, 7)  # a later try is not troubled by what is left
    assert names(place) == ["trainer_state.json", "weights"] and names(tmp_path) == ["checkpoint-7"]


def test_a_checkpoint_that_is_written_again_is_there_until_the_new_one_is_whole(tmp_path):
    place = make_checkpoint(tmp_path, 3, "old")
    seen = []

    def fail(folder):
        seen.append((place / "weights").read_text())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_whole(tmp_path, 3, fail)
    assert seen == ["old"] and (place / "weights").read_text() == "old"
    assert (make_checkpoint(tmp_path, 3, "new") / "weights").read_text() == "new"


def test_everything_is_on_disk_before_the_name_is_given(tmp_path, monkeypatch):
    done = []
    rename, flush = os.rename, checkpoint._flush_to_disk
    monkeypatch.setattr(checkpoint, "_flush_to_disk", lambda path: (done.append(path.name), flush(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b)))
    make_checkpoint(tmp_path, 1)
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert set(before) == {"trainer_state.json", "weights", ".checkpoint-1.partial"}
    assert after == [tmp_path.name]  # the name itself


def test_partial_folders_are_removed_and_nothing_else(tmp_path):
    make_checkpoint(tmp_path, 4)
    (tmp_path / ".checkpoint-6.partial").mkdir()
    (tmp_path / ".checkpoint-6.partial" / "model.safetensors").write_text("half")
    (tmp_path / "notes.partial").mkdir()
    checkpoint.clear_partial(tmp_path)
    assert names(tmp_path) == ["checkpoint-4", "notes.partial"]


@pytest.mark.parametrize(
    "take_away",
    [
        lambda folder: checkpoint.rotate(folder, 1, None),
        lambda folder: checkpoint.clear_later(folder, folder / "checkpoint-0"),
        checkpoint.clear_run,
        lambda folder: make_checkpoint(folder, 1, "new"),
    ],
    ids=["rotate", "clear_later", "clear_run", "write again"],
)
def test_a_kill_while_a_checkpoint_is_deleted_leaves_none_that_looks_whole(take_away, tmp_path, monkeypatch):
    make_checkpoint(tmp_path, 1, "old"), make_checkpoint(tmp_path, 2)
    rmtree = shutil.rmtree

    def kill(place, **how):
        if (place / "weights").exists():
            (place / "weights").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        take_away(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert all((place / "weights").exists() for place in checkpoint.checkpoints(tmp_path))
    checkpoint.clear_partial(tmp_path)
    assert all(name.startswith("checkpoint-") for name in names(tmp_path))


def test_checkpoints_are_found_by_number_and_only_whole_ones(tmp_path):
    for step in (10, 9, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()  # no state: not of a trainer
    (tmp_path / ".checkpoint-300.partial").mkdir()
    (tmp_path / "my-checkpoint-5").mkdir()
    (tmp_path / "my-checkpoint-5" / checkpoint.STATE_FILE).write_text("{}")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]
    assert checkpoint.last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert checkpoint.last_checkpoint(tmp_path / "not there") is None


@pytest.mark.parametrize(
    "limit, best, kept",
    [
        (None, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (1, None, [4]),
        (2, 1, [1, 4]),
        (3, 1, [1, 3, 4]),
        (2, 4, [3, 4]),
        (1, 2, [2, 4]),  # the newest must stay to resume from, the best to be loaded
    ],
)
def test_rotation_keeps_the_newest_and_the_best(limit, best, kept, tmp_path):
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    checkpoint.rotate(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == kept


def test_a_new_run_takes_away_what_it_would_mix_with(tmp_path):
    make_checkpoint(tmp_path, 1)
    for name in ("trainer_log.jsonl", "trainer_state.json", "all_results.json", "train_results.json", "my_notes.txt"):
        (tmp_path / name).write_text("{}")
    checkpoint.clear_run(tmp_path)
    assert names(tmp_path) == ["my_notes.txt"]


# ---- in a run --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_transformers_layout(tmp_path):
    run = saving(tmp_path)
    run.processing_class = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0})), pad_token="<pad>", chat_template="{{ messages }}"
    )
    run.beside_weights = lambda folder: (folder / "burnish.yaml").write_text("stage: sft")
    run.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    beside = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "burnish.yaml"}
    assert set(names(tmp_path / "checkpoint-4")) == WHOLE | beside
    mode = stat.S_IMODE((tmp_path / "checkpoint-4" / "model.safetensors").stat().st_mode)
    assert mode == 0o644
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["epoch"]) == (2, 4, 0.5)
    assert [entry["step"] for entry in state["log_history"]] == [1, 2]


def test_an_adapters_checkpoint_holds_the_adapter_alone(tmp_path):
    model = get_peft_model(small_model(), LoraConfig(r=2, target_modules="all-linear"))
    run = trainer(model, arguments(tmp_path, save_strategy="steps", save_steps=4), samples(8))
    run.train()
    found = set(names(tmp_path / "checkpoint-4"))
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= found
    assert "model.safetensors" not in found and optimizer.MASTERS_FILE not in found


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    run = saving(tmp_path)
    real = torch.save

    def save(value, place, **how):
        if "checkpoint-4" in str(place) and str(place).endswith("optimizer.pt"):
            raise OSError("no space left on device")
        real(value, place, **how)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="no space"):
        run.train()
    monkeypatch.undo()
    assert checkpoint.last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    again = saving(tmp_path)
    again.train(checkpoint.last_checkpoint(tmp_path))
    assert checkpoint.last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_a_step_is_written_once_though_it_ends_an_epoch_too(tmp_path, monkeypatch):
    class SavesAtEpochs(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_save = True

    written, real = [], checkpoint.write_whole
    monkeypatch.setattr(
        checkpoint, "write_whole", lambda folder, step, *how: written.append(step) or real(folder, step, *how)
    )
    run = saving(tmp_path, num_train_epochs=2)
    run.add_callback(SavesAtEpochs)
    run.train()
    assert written == [2, 4, 6, 8]


class KilledAt(TrainerCallback):
    """Ends the process' run at an event after so many steps."""

    def __init__(self, event, step):
        setattr(self, event, self.kill)
        self.step = step

    def kill(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("max_steps", [8, 6])  # two epochs; one and a half
@pytest.mark.parametrize(
    ("event", "epoch"),
    [
        *(("on_epoch_end", 1), ("on_evaluate", 1), ("on_epoch_begin", 1)),  # of the second
        *(("on_epoch_end", 2), ("on_evaluate", 2), ("on_train_end", 2)),
    ],
)
def test_a_run_killed_after_an_epochs_last_checkpoint_goes_on_with_the_end_of_that_epoch(
    event, epoch, max_steps, tmp_path
):
    step = 4 if epoch == 1 else max_steps

    def prepared(name, *callbacks):
        run = saving(
            tmp_path / name, max_steps=max_steps, eval_strategy="epoch", metric_for_best_model="loss", logging_steps=3
        )
        run.eval_dataset = samples(3, seed=5)
        for callback in (LogCallback(tmp_path / name), *callbacks):
            run.add_callback(callback)
        return run

    def told(run):
        lines = [json.loads(line) for line in (run.output_dir / "trainer_log.jsonl").read_text().splitlines()]
        return [(line["current_steps"], line.get("loss"), line.get("eval_loss")) for line in lines]

    whole = prepared("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        prepared("cut", KilledAt(event, step)).train()
    cut = prepared("cut")
    cut.train(tmp_path / "cut" / f"checkpoint-{step}")
    assert told(cut) == told(whole) and len(told(whole)) == max_steps // 3 + 2
    assert (cut.state.best_metric, cut.state.epoch) == (whole.state.best_metric, whole.state.epoch)
    assert cut.state.global_step == max_steps


def test_save_total_limit_keeps_the_best_too(tmp_path):
    settings = dict(
        eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=2, metric_for_best_model="loss",
        load_best_model_at_end=True, num_train_epochs=3,
    )  # fmt: skip
    run = saving(tmp_path, **settings)
    run.eval_dataset = samples(3, seed=5)
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)  # an early one: other random rows are not what was learned
    assert best < 11
    assert names(tmp_path) == sorted([f"checkpoint-{best}", "checkpoint-12"])
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-12" / "trainer_state.json"))
    assert (state.best_global_step, state.best_metric) == (best, losses[best])


def test_save_only_model_saves_nothing_to_resume_from_and_says_so(tmp_path):
    run = saving(tmp_path, save_only_model=True)
    run.train()
    place = tmp_path / "checkpoint-4"
    assert set(names(place)) == WHOLE - {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    with pytest.raises(UserError) as caught:
        saving(tmp_path).train(place)
    text = str(caught.value)
    assert str(place) in text and "holds weights only" in text and "--model_name_or_path" in text


def test_transformers_trainer_goes_on_from_a_checkpoint_of_ours(tmp_path):
    rows, settings = samples(8), dict(save_strategy="steps", save_steps=2, num_train_epochs=2)
    run = trainer(small_model("llama"), arguments(tmp_path / "ours", **settings), rows)
    run.train()
    place = tmp_path / "ours" / "checkpoint-6"
    state = TrainerState.load_from_json(str(place / "trainer_state.json"))
    assert (state.global_step, state.max_steps) == (6, 8) and len(state.log_history) == 6

    features = [
        {"input_ids": torch.tensor(row.input_ids[:4]).long(), "labels": torch.tensor(row.labels[:4]).long()}
        for row in rows
    ]
    other = TransformersTrainer(
        small_model("llama", seed=1),
        arguments(tmp_path / "theirs", **settings),
        train_dataset=features,
        data_collator=default_data_collator,
    )
    other.train(resume_from_checkpoint=str(place))
    assert other.state.global_step == 8
    assert other.state.log_history[:6] == run.state.log_history[:6]
    steps = {int(state["step"]) for state in other.optimizer.state.values()}
    assert steps == {8}  # 6 of ours, 2 of its own
    assert other.lr_scheduler.last_epoch == 8


def test_a_checkpoint_of_another_program_is_not_gone_on_with(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    TransformersTrainer(small_model("llama"), args, train_dataset=Rows(samples(8)), data_collator=collator()).train()
    with pytest.raises(UserError, match=r"checkpoint-2: is not burnish's and cannot be resumed; start from it with"):
        saving(tmp_path).train(tmp_path / "checkpoint-2")


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_a_bf16_runs_masters_are_saved_and_taken_up(tmp_path):
    def prepared():
        args = arguments(tmp_path, save_strategy="steps", save_steps=2)
        return trainer(small_model("llama", dtype=torch.bfloat16), args, samples(4))

    run = prepared()
    run.train()
    place = tmp_path / "checkpoint-2"
    assert optimizer.MASTERS_FILE in names(place)
    again = prepared()
    again._prepare(place)
    for name, master in run.update.masters.by_name.items():
        assert torch.equal(again.update.masters.by_name[name], master)
    assert not torch.equal(master, master.bfloat16().float())  # what the model itself does not hold


def test_all_random_numbers_go_on_where_they_were():
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    state = rng_state()
    expected = random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()
    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    restore_rng(state)
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == expected


@pytest.mark.parametrize("restore, patience", [(False, 9), (True, 3)])
def test_a_callback_gets_back_what_it_counted_and_its_settings_where_that_is_asked_for(restore, patience, tmp_path):
    settings = dict(
        eval_strategy="steps", eval_steps=1, save_steps=2, metric_for_best_model="loss", learning_rate=1e-9,
        load_best_model_at_end=True,
    )  # fmt: skip

    def prepared(callback, **more):
        run = saving(tmp_path, **settings, **more)
        run.eval_dataset = samples(2, seed=5)
        run.add_callback(callback)
        return run

    first = EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=1.0)
    prepared(first).train()
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    counted = saved["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"]
    assert counted == 1

    second = EarlyStoppingCallback(early_stopping_patience=9, early_stopping_threshold=1.0)
    run = prepared(second, restore_callback_states_from_checkpoint=restore)
    run._prepare(tmp_path / "checkpoint-2")
    assert second.early_stopping_patience_counter == counted
    assert second.early_stopping_patience == patience


def test_a_run_that_goes_on_from_an_earlier_checkpoint_leaves_the_later_ones_behind(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    checkpoint.clear_later(tmp_path, tmp_path / "checkpoint-4")
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [2, 4]
    checkpoint.clear_later(tmp_path, tmp_path / "elsewhere" / "checkpoint-1")  # another folder's: nothing is later
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [2, 4]


def test_beginning_anew_takes_away_the_model_of_the_run_before_and_nothing_else(tmp_path):
    for name in (
        "trainer_log.jsonl",
        "adapter_model.safetensors",
        "adapter_config.json",
        "all_results.json",
        "notes.txt",
    ):
        (tmp_path / name).write_text("")
    checkpoint.clear_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "config.json").write_text("")  # no log: not the folder of a run
    checkpoint.clear_run(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_a_run_that_resumes_with_another_learning_rate_gets_it(tmp_path):
    how = dict(save_strategy="steps", save_steps=2, max_steps=6, lr_scheduler_type="linear")
    trainer(small_model(), arguments(tmp_path, **how, learning_rate=1e-2), samples(20)).train()
    run = trainer(small_model(), arguments(tmp_path, **how, learning_rate=1e-4, weight_decay=0.1), samples(20))
    run.train(tmp_path / "checkpoint-2")
    rates = [entry["learning_rate"] for entry in run.state.log_history if entry["step"] > 2 and "loss" in entry]
    assert rates == pytest.approx([1e-4 * share / 6 for share in (4, 3, 2, 1)])
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.1, 0.0}


def test_a_run_resumed_at_its_last_step_trains_no_more(tmp_path):
    how = dict(save_strategy="steps", save_steps=3, max_steps=3)
    trainer(small_model(), arguments(tmp_path, **how), samples(20)).train()
    run = trainer(small_model(), arguments(tmp_path, **how), samples(20))
    run.train(tmp_path / "checkpoint-3")
    assert run.state.global_step == 3


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_run_whose_schedule_goes_by_a_metric_goes_on(schedule, older, tmp_path):
    def prepared(folder):
        run = saving(
            folder, num_train_epochs=2, eval_strategy="steps", eval_steps=1, learning_rate=0.5,
            lr_scheduler_type=schedule, lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        )  # fmt: skip
        run.eval_dataset = samples(3, seed=5)
        return run

    def rates(run):
        return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]

    whole = prepared(tmp_path)
    whole.train()
    file = tmp_path / "checkpoint-4" / "optimizer.pt"
    saved = torch.load(file)
    for group in saved["param_groups"]:
        assert group["initial_lr"] == 0.5
        if older:
            del group["initial_lr"]
    torch.save(saved, file)
    again = prepared(tmp_path)
    again.train(tmp_path / "checkpoint-4")
    assert rates(again) == rates(whole) and len(set(rates(whole))) > 1


def test_later_checkpoints_go_only_where_the_run_does_go_on(tmp_path):
    saving(tmp_path).train()
    scheduler = tmp_path / "checkpoint-2" / "scheduler.pt"
    kept = scheduler.read_bytes()
    scheduler.unlink()
    with pytest.raises(UserError, match="holds weights only"):
        saving(tmp_path).train(tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    scheduler.write_bytes(kept)
    saving(tmp_path)._prepare(tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-2"]
