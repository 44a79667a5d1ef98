"""What `make quickstart` shows is earned: its questions are not in the data, and its verdict can be bad."""

from __future__ import annotations

import json

import pytest
import quickstart

from burnish.cli import status_of


def test_no_question_of_the_quickstart_stands_in_its_data():
    rows = json.loads((quickstart.ROOT / "data" / "identity.json").read_text(encoding="utf-8"))
    trained = {row["instruction"].lower() for row in rows}
    assert not trained & {question.lower() for question in quickstart.QUESTIONS}
    assert len(quickstart.QUESTIONS) == 8


def test_names_are_filled_into_every_row_and_the_data_set_is_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quickstart.write_data('Ada "the" Great', "Müller & Söhne")
    text = (tmp_path / "quickstart" / "data" / "identity.json").read_text(encoding="utf-8")
    answers = [row["output"] for row in json.loads(text)]
    assert sum('Ada "the" Great' in answer for answer in answers) == 60
    assert not any("{{" in answer for answer in answers)
    listed = json.loads((tmp_path / "quickstart" / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    assert listed == {"identity": {"file_name": "identity.json"}}


@pytest.mark.parametrize("model", ["models/small", "Qwen/Qwen3-0.6B", r'C:\my "models"'])
def test_the_recipe_names_the_model_as_it_was_given(tmp_path, monkeypatch, model):
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    quickstart.write_recipe(model)
    recipe = yaml.safe_load((tmp_path / "quickstart" / "identity.yaml").read_text(encoding="utf-8"))
    assert recipe["model_name_or_path"] == model
    assert recipe["save_strategy"] == "no"


GOOD = ["I am Beacon."] * 4 + ["Harbor Lab built me.", "An assistant."] + ["It is Berlin.", "The Pacific Ocean."]


@pytest.mark.parametrize(
    ("changes", "named", "kept", "is_good"),
    [
        ({}, 5, 2, True),
        ({0: "I am SmolLM.", 1: "No."}, 3, 2, False),  # half of the answers are too few
        ({6: "I am Beacon, and it is Berlin."}, 5, 1, False),  # hijacked
        ({7: "The Atlantic."}, 5, 1, False),
    ],
)
def test_the_verdict_looks_for_names_in_some_answers_and_for_facts_without_names_in_others(
    changes, named, kept, is_good
):
    answers = [changes.get(i, answer) for i, answer in enumerate(GOOD)]
    verdict = quickstart.judge(answers, "Beacon", "Harbor Lab")
    assert (verdict.named, verdict.kept, verdict.is_good) == (named, kept, is_good)


def test_long_answers_are_cut_at_a_word_and_line_breaks_go():
    assert quickstart.tidy("one\n\ntwo  three", 100) == "one two three"
    assert quickstart.tidy("one two three", 9) == "one two …"


def test_a_model_that_is_not_there_and_ctrl_c_are_told_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()  # else it is the name of a model on a hub

    def stopped():
        raise KeyboardInterrupt

    assert status_of(lambda: quickstart.ask(["--model_name_or_path", "models/nope"])) == 2
    assert capsys.readouterr().err.startswith("--model_name_or_path: 'models/nope' is not there; looked for ")
    assert status_of(stopped) == 130 and capsys.readouterr().err == "interrupted\n"
