"""`burnish preview`: what is shown is what is trained, and data that training would refuse ends with status 1."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from transformers import AutoTokenizer

from burnish import cli
from burnish.chat.template import load_template
from burnish.data.arguments import DataArguments
from burnish.data.encode import DocumentFrame
from burnish.data.equal_rows import keys_of, repeated, shared
from burnish.data.preview import About, excerpt, make_preview, round_width, with_first_rows, with_rows_worth_a_look
from burnish.data.preview_data import look
from burnish.data.preview_rows import rows_worth_a_look
from burnish.data.preview_text import preview_lines, visible
from burnish.data.sources import get_dataset
from burnish.data.store import SampleStore
from burnish.data.token_texts import TokenTexts
from burnish.types import IGNORE_INDEX, Sample

ABOUT = About("sft", ("rows.jsonl",), "model", "of the tokenizer", 2048, False)


@pytest.fixture(scope="module")
def folder(fixture_path):
    return fixture_path("smollm2")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def see(tmp_path, tokenizer):
    """(what was looked at, its preview) of files in a temporary folder; keywords are DataArguments."""

    def preview(rows, *, stage="sft", shown=3, **settings):
        args = DataArguments(dataset=[write(tmp_path / "rows.jsonl", rows)], dataset_dir=str(tmp_path), **settings)
        template = load_template(tokenizer, None) if stage == "sft" else None
        get = partial(get_dataset, stage=stage, tokenizer=tokenizer, template=template, seed=42)
        looked = look(get, args, rows=shown)
        return looked, make_preview(looked, tokenizer, replace(ABOUT, stage=stage, cutoff_len=args.cutoff_len))

    return preview


def pair(number, answer=""):
    return {"instruction": f"question {number}", "output": answer or f"answer {number}"}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path.name


def text_of(preview, coloured=False):
    return "\n".join(line.plain for line in preview_lines(preview, coloured=coloured))


# ---- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("smollm2", "你好，世界\n\n\tnaïve — 👩‍👩‍👧 x"),
        ("tokenizer-gemma3", " two  spaces 漢字𠮷 😀"),
        ("tokenizer-llama3", "语言模型 🤗"),
    ],
)
def test_the_texts_of_tokens_joined_are_the_text(name, text, fixture_path):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path(name))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    texts = TokenTexts(tokenizer).of(ids)
    assert len(texts) == len(ids) and "".join(part or "" for part in texts) == text


def test_bytes_of_a_character_stand_with_its_first_token(tokenizer):
    ids = tokenizer("𠮷").input_ids
    assert len(ids) > 1
    assert TokenTexts(tokenizer).of(ids) == ("𠮷", *[None] * (len(ids) - 1))


def test_bytes_that_are_no_character_are_shown_one_by_one(tokenizer):
    ids = tokenizer("𠮷").input_ids[:1] * 3
    assert TokenTexts(tokenizer).of(ids) == ("\ufffd",) * 3


def test_what_would_move_a_terminal_is_made_visible():
    assert visible("a\n\x1b[31m\u202eb\tc") == "a⏎\n␛[31m[U+202E]b⇥c"
    assert visible("👩\u200d👧 נ") == "👩\u200d👧 נ"


# ---- rows --------------------------------------------------------------------------------------------------------


def test_shown_tokens_are_those_that_training_gets(see, tokenizer):
    looked, preview = see(map(pair, range(5)))
    shown = with_first_rows(preview, looked, tokenizer, 3).shown
    assert [(row.part, row.index, row.place.rpartition(":")[2]) for row in shown] == [
        ("train", 0, "1"),
        ("train", 1, "2"),
        ("train", 2, "3"),
    ]
    for row, sample in zip(shown, looked.parts["train"], strict=False):
        assert [id for run in row.runs for id in run.ids] == sample.input_ids.tolist()
        trained = [run.trained for run in row.runs for _ in run.ids]
        assert trained == (sample.labels != IGNORE_INDEX).tolist()
        assert (row.num_tokens, row.num_trained) == (len(sample), sample.num_trained)


def test_without_colour_what_is_trained_stands_in_brackets(see, tokenizer):
    looked, preview = see([pair(1, "Bonjour")])
    first = with_first_rows(preview, looked, tokenizer, 1)
    assert "‹Bon│jour│<|im_end|>›" in text_of(first) and "‹ ›: trained" in text_of(first)
    coloured = list(preview_lines(first, coloured=True))
    assert "‹" not in text_of(first, coloured=True) and "│" not in text_of(first, coloured=True)
    green = [line.plain[s.start : s.end] for line in coloured for s in line.spans if "green" in str(s.style)]
    assert green == ["Bon", "jour", "<|im_end|>"]


def test_borders_of_documents_are_shown_in_stage_pt(see, tokenizer):
    looked, preview = see([{"text": "one two"}, {"text": "three"}], stage="pt", cutoff_len=64)
    first = with_first_rows(preview, looked, tokenizer, 1)
    assert [run.begins_document for run in first.shown[0].runs] == [False, False, True, False]
    lines = text_of(first).splitlines()
    assert "2 documents" in lines[0] and "another document" in lines[2]
    assert lines[1].startswith("one‹ two") and lines[3].startswith("three‹")


def test_a_long_row_is_folded_and_says_what_is_not_shown(see, tokenizer):
    looked, preview = see([pair(1, "word" + " word" * 299)])
    text = text_of(with_first_rows(preview, looked, tokenizer, 1)).split("‹ ›: trained")[0]
    assert "211 tokens …" in text and text.count("word") == 90 - 1  # the end token is one of the 90


def test_a_page_shows_what_is_rare(see, tokenizer):
    rows = [*map(pair, range(300)), pair(7), pair(300, "long " * 400), pair(301, "x " * 90)]
    looked, preview = see(rows, cutoff_len=200)
    shown = with_rows_worth_a_look(preview, looked, tokenizer, 40, 42).shown
    tags = {row.place.rpartition(":")[2]: row.tags for row in shown}
    assert 30 <= len(shown) <= 50 and [row.index for row in shown] == sorted(row.index for row in shown)
    assert "cut: end of the answer" in tags["302"] and "longest" in tags["302"] and "longest" in tags["303"]
    assert "duplicate" in tags["8"] and "duplicate" in tags["301"] and "first" in tags["1"]
    assert any("random" in each for each in tags.values()) and any("shortest" in each for each in tags.values())


def test_a_row_that_lost_two_things_is_shown_for_both_by_the_longest_of_its_samples():
    sample = partial(Sample, place="a.jsonl:1")
    parts = {"train": SampleStore.from_samples(sample(np.ones(n, np.int32), np.ones(n, np.int32)) for n in (3, 9, 4))}
    lost = {"cut: oldest turns": "a.jsonl:1", "cut: end of the answer": "a.jsonl:1"}
    tags = rows_worth_a_look(parts, 3, lost, {}, {}, 42)
    assert {index for (_, index), why in tags.items() if set(why) & set(lost)} == {1}
    assert set(lost) <= set(tags["train", 1])


# ---- figures -----------------------------------------------------------------------------------------------------


def store(*rows, documents=()):
    return SampleStore.from_samples(
        Sample(np.array(row, np.int32), np.array(row, np.int32), f"a.jsonl:{n}", each)
        for n, (row, each) in enumerate(zip(rows, documents or [()] * len(rows), strict=True), 1)
    )


def test_equal_samples_are_counted_with_the_place_of_the_first():
    train, other = store([1, 2], [3], [1, 2], [1, 2]), store([3], [4])
    found = repeated(keys_of(train, None), train)
    assert (found.count, found.of, found.places) == (2, 4, (("a.jsonl:3", "a.jsonl:1"), ("a.jsonl:4", "a.jsonl:1")))
    both = shared(keys_of(train, None), train, keys_of(other, None), other)
    assert (both.count, both.of, both.places) == (1, 2, (("a.jsonl:1", "a.jsonl:2"),))


def test_documents_that_were_cut_into_rows_are_compared_whole():
    rows = store([1, 2, 9, 1], [2, 9, 3, 9], documents=[(3, 1), (2, 2)])  # [1 2 9] [1 2 9] [3 9]
    keys = keys_of(rows, document_end=9)
    assert [(length, row) for (_, length), row in keys] == [(3, 0), (3, 0), (2, 1)]
    assert repeated(keys, rows).count == 1


def test_rows_of_train_that_evaluation_holds_too_are_found(see, tmp_path):
    (tmp_path / "more.jsonl").write_text(f"{json.dumps(pair(1))}\n{json.dumps(pair(99))}\n")
    _, preview = see(map(pair, range(3)), eval_dataset=["more.jsonl"])
    train, evaluation = preview.parts
    assert train.shared is None and evaluation.shared.count == 1 and evaluation.shared.of == 2
    assert evaluation.shared.places[0] == (f"{tmp_path}/more.jsonl:1", f"{tmp_path}/rows.jsonl:2")


def test_documents_of_evaluation_that_train_holds_are_found_in_stage_pt(see, tmp_path, tokenizer):
    (tmp_path / "more.jsonl").write_text('{"text": "b c d e f g"}\n{"text": "new"}\n')
    rows = [{"text": "a " * 9}, {"text": "b c d e f g"}]
    _, preview = see(rows, stage="pt", cutoff_len=8, eval_dataset=["more.jsonl"])
    assert preview.parts[1].shared.count == 1 and preview.parts[1].shared.of == 2
    end = DocumentFrame.of(tokenizer).end
    assert preview.units == "documents" and preview.parts[0].lengths.longest > 8 and end is not None


@pytest.mark.parametrize("cutoff_len", [2048, 60])
def test_the_suggested_cutoff_keeps_99_percent_whole(see, cutoff_len):
    rows = [pair(n, "word " * (n // 2)) for n in range(200)]
    _, preview = see(rows, cutoff_len=cutoff_len)
    suggested = preview.parts[0].cutoff
    assert preview.parts[0].lengths.before_cutoff == (cutoff_len == 60)
    cut = [sum(tally.count for tally in see(rows, cutoff_len=n)[0].report.cut.values()) for n in (suggested, 120)]
    assert 0 < cut[0] <= 2 < cut[1]
    assert sum(tally.count for tally in see(rows, cutoff_len=suggested - 1)[0].report.cut.values()) > 2


def test_a_histogram_counts_every_sample_once(see):
    _, preview = see([pair(n, "word " * (n % 50)) for n in range(1, 150)] + [pair(0, "far " * 1500)])
    part = preview.parts[0]
    for histogram in (part.lengths.histogram, part.shares):
        assert sum(histogram.counts) == part.samples and len(histogram.edges) == len(histogram.counts) + 1
    assert part.lengths.histogram.edges[-1] == part.lengths.longest + 1  # the outlier is in a last, wide bin
    assert [round_width(least) for least in (0.2, 1, 3, 7, 21, 501)] == [1, 1, 5, 10, 50, 1000]


def test_packing_is_measured_with_what_training_packs_with(see):
    looked, preview = see(map(pair, range(30)), cutoff_len=128)
    fill, lengths = preview.parts[0].fill, looked.parts["train"].lengths
    assert fill.rows * 128 >= lengths.sum() and fill.share == pytest.approx(lengths.sum() / (fill.rows * 128))
    assert "packing: true would make" in text_of(preview)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_data_that_is_refused_is_still_shown_as_far_as_it_can_be(see, tokenizer, tmp_path):
    looked, preview = see([pair(1), "{broken", {"instruction": "a", "output": ""}])
    assert len(looked.parts["train"]) == 1 and "max_bad_rows" in preview.refused[-1]
    reasons = {reason.text: reason for reason in preview.reasons}
    assert reasons["is not valid JSON: a key stands without double quotes"].first == f"{tmp_path}/rows.jsonl:2"
    assert reasons["is not valid JSON: a key stands without double quotes"].excerpt == "{broken"
    assert "bad row: output is empty: 1 (first: " in text_of(preview)


def test_rows_that_leave_nothing_are_told_with_their_reasons(see):
    looked, preview = see([{"instruction": "a", "output": ""}] * 3)
    assert looked.parts == {} and preview.parts == ()
    assert "rows.jsonl:1: output is empty (and 2 more rows with it); give it a text" in preview.refused[0]
    assert looked.report.rows == 3 and preview.reasons[0].count == 3


def test_train_is_shown_where_nothing_is_left_for_evaluation(see, tmp_path):
    (tmp_path / "more.jsonl").write_text('{"instruction": "a", "output": ""}\n')
    looked, preview = see(map(pair, range(3)), eval_dataset=["more.jsonl"], max_bad_rows=5)
    assert list(looked.parts) == ["train"] and "has no sample left" in preview.refused[-1]


def test_a_stream_is_looked_at_from_its_beginning(see, tokenizer, monkeypatch):
    monkeypatch.setattr("burnish.data.preview_data.STREAMED", 10)
    looked, preview = see(map(pair, range(50)), streaming=True, val_size=2)
    assert preview.streamed == len(looked.parts["train"]) == 10 and len(looked.parts["eval"]) == 2
    assert "only the first 10 samples of train were looked at" in text_of(preview)
    assert see(map(pair, range(50)), streaming=True, shown=20)[1].streamed == 20


def test_a_stream_with_bad_rows_is_refused_with_the_good_ones_shown(see):
    looked, preview = see([*map(pair, range(9)), "{broken"], streaming=True)
    assert len(looked.parts["train"]) == 9 and "max_bad_rows" in preview.refused[-1]
    assert [reason.text for reason in preview.reasons] == ["is not valid JSON: a key stands without double quotes"]


def test_an_excerpt_is_how_the_row_stands_in_its_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("one\ntwo " + "x" * 900 + "\n")
    (tmp_path / "a.json").write_text('[\n{"a":\n  1}\n]')
    assert excerpt(f"{tmp_path}/a.jsonl:1") == "one"
    assert excerpt(f"{tmp_path}/a.jsonl:2").startswith("two xx") and len(excerpt(f"{tmp_path}/a.jsonl:2")) == 241
    assert excerpt(f"{tmp_path}/a.json:2").startswith('{"a": 1}')
    (tmp_path / "b.jsonl").write_bytes("一\n二二".encode("gbk"))
    (tmp_path / "c.jsonl").write_bytes("一\r二\n三".encode() * 900)
    assert excerpt(f"{tmp_path}/b.jsonl:2") == "二二" and excerpt(f"{tmp_path}/c.jsonl:2") == "三一\r二"
    assert excerpt(f"{tmp_path}/gone.jsonl:1") == excerpt("name/on-a-hub:3") == ""


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path, folder):
    """A training file, of a run that was never done: its adapter and its output_dir are not there."""

    def config(*rows, **more):
        write(tmp_path / "rows.jsonl", rows)
        (tmp_path / "model").mkdir(exist_ok=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (folder / name).is_file():
                (tmp_path / "model" / name).write_bytes((folder / name).read_bytes())
        settings = {
            "model_name_or_path": str(tmp_path / "model"),
            "dataset": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "out"),
            "finetuning_type": "full",
            "do_train": True,
            "learning_rate": 1e-5,
            "bf16": True,
            "deepspeed": "gone.json",
        } | more
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(settings))
        return str(path)

    return config


def test_a_training_file_is_previewed_without_weights(run_file, tmp_path, capsys):
    assert cli.main(["preview", run_file(pair(1), pair(2)), "--html", str(tmp_path / "p.html"), "--rows=1"]) == 0
    out, err = capsys.readouterr()
    assert out.count("── train ") == 1 and "train: 2 samples" in out and f"page: {tmp_path}/p.html" in out
    assert err == "" and (tmp_path / "p.html").read_text().startswith("<!doctype html>")
    assert not (tmp_path / "out").exists()


def test_refused_data_ends_with_status_1_and_says_what_training_would_say(run_file, tmp_path, capsys):
    words = ["preview", run_file(pair(1), "{broken"), "--html", str(tmp_path / "p.html")]
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert "train 1 of 1" in out and "bad row: is not valid JSON" in out and (tmp_path / "p.html").is_file()
    assert err.splitlines()[0] == "training would refuse this data:" and "1 of 2 rows (50.0%)" in err
    assert cli.main([*words, "max_bad_rows=1"]) == 0


def test_a_text_file_of_stage_pt_needs_no_template(run_file, capsys):
    assert cli.main(["preview", run_file({"text": "one"}), "stage=pt", "template=qwen", "mask_history=true"]) == 0
    out, err = capsys.readouterr()
    assert "stage pt" in out and "mask_history" in out
    assert err == "note: template is not used in stage pt: a text is learned as it stands\n"


def test_a_cutoff_beyond_the_positions_is_said(run_file, capsys):
    assert cli.main(["preview", run_file(pair(1)), "cutoff_len=100000"]) == 0
    assert "cutoff_len 100000 is beyond the model's 8192 positions" in capsys.readouterr().err


def test_mistakes_of_a_configuration_are_told_together_and_end_with_status_2(run_file, tmp_path, capsys):
    words = ["--rows", "0", "--html", str(tmp_path / "no" / "p.html"), "cutof_len=3", "learning_rate=1", "template=q"]
    assert cli.main(["preview", run_file(pair(1)), *words]) == 2
    err = capsys.readouterr().err
    for told in (
        "--rows: '0' is not",
        "--html: ",
        "did you mean 'cutoff_len'",
        "learning_rate '1' does nothing",
        "'q'",
    ):
        assert told in err
    assert len(err.splitlines()) == 5
    assert cli.main(["preview", f"model_name_or_path={tmp_path / 'model'}", "--html"]) == 2
    err = capsys.readouterr().err
    assert "dataset is missing" in err and "--html: has no value" in err


def test_the_help_names_the_options_of_the_command_itself(capsys):
    assert cli.main(["preview", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--html FILE" in text and "--rows N" in text and "--cutoff_len" in text and "--learning_rate" not in text
