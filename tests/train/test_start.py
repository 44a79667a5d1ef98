"""What a start does with an output_dir that is not empty: go on, begin anew, or refuse and say why."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small import arguments, samples, small_model, trainer

from burnish import workflow
from burnish.arguments.parse import parse_command
from burnish.arguments.settings import Settings
from burnish.errors import UserError
from burnish.train.checkpoint import STATE_FILE
from burnish.train.start import SETTINGS_FILE, decide_start


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """What every run here is given. No weight is read: a folder that looks like a model will do."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "hello", "output": "hi"}\n')
    return {
        "model_name_or_path": tmp_path / "model",
        "dataset": tmp_path / "rows.jsonl",
        "dataset_dir": tmp_path,
        "output_dir": tmp_path / "out",
        "learning_rate": "1e-3",
    }


def settings(given: dict[str, Any], **changes: Any) -> Settings:
    return parse_command("train", [f"{name}={value}" for name, value in (given | changes).items()])


def leave_checkpoint(run: Settings | None, folder: Path, step: int) -> Path:
    """What a run of these settings leaves that was stopped after `step`; of None, another program's."""
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / STATE_FILE).write_text("{}")
    if run is not None:
        run.dump(place / SETTINGS_FILE)
    return place


def refusal(run: Settings) -> list[str]:
    with pytest.raises(UserError) as caught:
        decide_start(run)
    return [str(problem) for problem in caught.value.problems]


def test_an_empty_or_missing_folder_is_begun_in(given, capsys):
    assert decide_start(settings(given)) is None
    (given["output_dir"] / "notes.txt").write_text("mine")
    assert decide_start(settings(given)) is None
    assert capsys.readouterr().out == ""


def test_what_a_killed_run_was_writing_is_removed(given):
    half = given["output_dir"] / ".checkpoint-2.partial"
    half.mkdir(parents=True)
    assert decide_start(settings(given)) is None
    assert not half.exists()


def test_an_unfinished_run_with_the_same_arguments_is_gone_on_with_and_that_is_said(given, capsys):
    run = settings(given)
    for step in (2, 10):
        leave_checkpoint(run, given["output_dir"], step)
    assert decide_start(settings(given)) == given["output_dir"] / "checkpoint-10"
    said = capsys.readouterr().out
    assert str(given["output_dir"]) in said and "going on from checkpoint-10" in said


def test_arguments_that_change_training_are_refused_by_name_all_at_once(given, tmp_path):
    place = leave_checkpoint(settings(given), given["output_dir"], 4)
    (tmp_path / "other.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    changes = {
        "learning_rate": "2e-3",
        "cutoff_len": 64,
        "lora_rank": 4,
        "seed": 1,
        "dataset": tmp_path / "other.jsonl",
    }
    problems = refusal(settings(given, **changes))
    assert len(problems) == len(changes)
    for name in changes:
        (problem,) = [text for text in problems if f" {name} " in text]
        assert problem.startswith(f"{place / SETTINGS_FILE}: ") and "overwrite_output_dir" in problem
    (rate,) = [text for text in problems if "learning_rate" in text]
    assert "learning_rate 0.002 is not what the run in output_dir was trained with (0.001)" in rate


def test_arguments_that_only_tell_and_keep_may_change(given):
    place = leave_checkpoint(settings(given), given["output_dir"], 4)
    changes = {"logging_steps": 3, "save_steps": 7, "plot_loss": True, "disable_tqdm": True, "save_total_limit": 2}
    assert decide_start(settings(given, **changes)) == place


def test_the_same_folder_spelt_otherwise_is_the_same_run(given, tmp_path, monkeypatch):
    place = leave_checkpoint(settings(given), given["output_dir"], 4)
    monkeypatch.chdir(tmp_path)
    spelt = {"model_name_or_path": "model", "dataset": "./rows.jsonl", "dataset_dir": ".", "output_dir": "./out"}
    assert decide_start(settings(given, **spelt)).resolve() == place


def test_a_finished_run_is_refused_with_the_remedy(given):
    run = settings(given)
    leave_checkpoint(run, given["output_dir"], 4)
    (given["output_dir"] / "train_results.json").write_text("{}")
    (problem,) = refusal(settings(given))
    assert "holds a finished run" in problem and "overwrite_output_dir: true" in problem
    assert str(given["output_dir"]) in problem
    (given["output_dir"] / "checkpoint-4" / STATE_FILE).unlink()
    assert refusal(settings(given)) == [problem]  # finished without checkpoints, too


def test_overwriting_begins_anew_whatever_is_there(given):
    leave_checkpoint(settings(given), given["output_dir"], 4)
    assert decide_start(settings(given, overwrite_output_dir=True)) is None
    (given["output_dir"] / "train_results.json").write_text("{}")
    assert decide_start(settings(given, overwrite_output_dir=True, learning_rate="5e-3")) is None


def test_a_checkpoint_of_another_program_is_refused(given):
    leave_checkpoint(None, given["output_dir"], 500)
    (problem,) = refusal(settings(given))
    assert "holds checkpoint-500 of a run that is not burnish's" in problem and "another output_dir" in problem


@pytest.mark.parametrize("word", ["true", "True", "yes", "1"])
def test_resume_from_checkpoint_true_takes_the_newest_whatever_the_arguments(word, given):
    leave_checkpoint(settings(given), given["output_dir"], 9)
    newest = leave_checkpoint(None, given["output_dir"], 10)
    (given["output_dir"] / "train_results.json").write_text("{}")  # to train on for more epochs
    run = settings(given, resume_from_checkpoint=word, learning_rate="5e-3")
    assert decide_start(run) == newest


def test_resume_from_checkpoint_true_with_none_is_refused(given):
    (problem,) = refusal(settings(given, resume_from_checkpoint=True))
    assert f"finds no checkpoint in {given['output_dir']}" in problem and "leave resume_from_checkpoint out" in problem


def test_resume_from_checkpoint_may_name_one_of_any_folder(given, tmp_path):
    leave_checkpoint(settings(given), given["output_dir"], 9)
    elsewhere = leave_checkpoint(None, tmp_path / "elsewhere", 3)
    assert decide_start(settings(given, resume_from_checkpoint=elsewhere)) == elsewhere
    run = settings(given, resume_from_checkpoint=elsewhere, overwrite_output_dir=True)
    assert decide_start(run) == elsewhere  # it decides over all


def test_a_folder_that_is_no_checkpoint_is_refused(given, tmp_path):
    (problem,) = refusal(settings(given, resume_from_checkpoint=tmp_path / "model"))
    assert "is no checkpoint" in problem and STATE_FILE in problem and str(tmp_path / "model") in problem


def test_a_checkpoint_that_was_renamed_is_refused(given):
    """Its name would tell which checkpoints are later."""
    leave_checkpoint(settings(given), given["output_dir"], 4)
    renamed = leave_checkpoint(None, given["output_dir"], 2).rename(given["output_dir"] / "best")
    (problem,) = refusal(settings(given, resume_from_checkpoint=renamed))
    assert "is no checkpoint" in problem and "give a folder named checkpoint-N" in problem


def test_a_home_that_nobody_has_is_a_name_like_any_other(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given["output_dir"] = "~nobody_here/out"
    place = leave_checkpoint(None, tmp_path / "~nobody_here", 2)
    assert decide_start(settings(given)) is None
    assert decide_start(settings(given, resume_from_checkpoint="~nobody_here/checkpoint-2")).resolve() == place


def test_a_run_that_ends_before_all_is_written_does_not_count_as_finished(tmp_path, monkeypatch):
    def run():
        args = arguments(tmp_path, do_train=True, do_eval=True)
        return trainer(small_model(), args, samples(4), eval_dataset=samples(2, seed=5))

    def interrupted(*given):
        raise KeyboardInterrupt

    alike = SimpleNamespace(finetuning=SimpleNamespace(plot_loss=False))
    monkeypatch.setattr(workflow, "write_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workflow._run(alike, run(), None)
    assert not (tmp_path / "train_results.json").exists() and (tmp_path / "eval_results.json").exists()
    monkeypatch.setattr(workflow, "write_card", lambda *given: None)
    workflow._run(alike, run(), None)
    assert (tmp_path / "train_results.json").is_file()
    assert {"train_loss", "eval_loss"} <= set(json.loads((tmp_path / "all_results.json").read_text()))


def test_a_folder_that_cannot_be_made_is_a_mistake_of_the_settings(given, tmp_path):
    (tmp_path / "file").write_text("")
    given["output_dir"] = tmp_path / "file" / "out"
    with pytest.raises(UserError, match="cannot be written to"):
        decide_start(settings(given))
