"""Broken data as people have it: `burnish preview` says what is wrong and where, loses no row unsaid, and never dies.

The cases are the table of tests/bad_files.py. The exit status is 1 where training would refuse the data, and 2 for a
mistake of the configuration, which is told before a file of data is opened; `burnish train` ends with 2 in both cases.
"""

from __future__ import annotations

import os
import re
import time
import tracemalloc

import bad_files
import pytest
from bad_files import CASES, ROW, Case, make

from burnish import cli, workflow
from burnish.data.rows import read_rows
from burnish.model.arguments import ModelArguments
from burnish.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(fixture_path):
    return fixture_path("smollm2")


@pytest.fixture(scope="module")
def tokenizer(model):
    """Loaded once: that is most of a preview's time."""
    return load_tokenizer(ModelArguments(model_name_or_path=str(model)))


@pytest.fixture
def preview(tmp_path, model, tokenizer, monkeypatch, capsys):
    """(exit status, output, errors) of the command, with the folder of the files left out of what it says."""
    monkeypatch.setattr(workflow, "load_tokenizer", lambda args: tokenizer)

    def run(*words):
        settings = [f"model_name_or_path={model}", f"dataset_dir={tmp_path}", "max_bad_rows=0"]
        status = cli.main(["preview", *settings, *words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        (captured.out + captured.err).encode()  # whatever is said can be said on a terminal
        return status, *(text.replace(f"{tmp_path}/", "") for text in captured)

    return run


def accounts(out):
    """(rows read, used, bad, dropped) as the command says them."""
    (read, used) = re.findall(r"^rows: ([\d,]+) read, ([\d,]+) of them used$", out, re.MULTILINE)[0]
    kinds = [re.findall(rf"^  {kind}: .*: ([\d,]+) \(first: ", out, re.MULTILINE) for kind in ("bad row", "dropped")]
    return int(read), int(used), *(sum(map(int, counts)) for counts in kinds)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_wrong_is_told_with_its_place_and_no_row_is_lost_unsaid(case: Case, preview, tmp_path):
    make(tmp_path / case.file, case.content)
    named = [] if any(word.startswith("dataset=") for word in case.words) else [f"dataset={case.file}"]
    status, out, err = preview(*named, *case.words)
    assert status == case.status, err
    if case.told:
        lines = (err if status else out).replace(case.file, "@").splitlines()
        assert any(line.startswith(case.told.replace("x.csv", "@")) for line in lines), "\n".join(lines)
    if case.rows is None:
        assert not re.search(r"^rows: ", out, re.MULTILINE)
    else:
        read, used, bad, dropped = accounts(out)
        assert (read, used) == (case.rows, case.used) and used + bad + dropped == read, out
    if status == 1:
        assert err.splitlines()[0] == "training would refuse this data:"


def test_no_case_takes_the_name_of_another():
    assert len(CASES) == sum(map(len, (
        bad_files.ENCODINGS, bad_files.JSON, bad_files.TABLES, bad_files.COLUMNAR, bad_files.COLUMNS,
        bad_files.CONVERSATIONS, bad_files.LENGTHS, bad_files.FOLDERS, bad_files.CATALOGS,
    )))  # fmt: skip


@pytest.mark.parametrize("name", ["comments between rows", "gb18030 in json", "a misspelt column", "numbers"])
def test_a_row_that_is_refused_is_refused_at_its_place_with_a_remedy(name, preview, tmp_path):
    case = CASES[name]
    make(tmp_path / case.file, case.content)
    _, _, err = preview(f"dataset={case.file}")
    _, *reasons, last = err.splitlines()
    assert all(re.match(rf"{case.file}:\d+: .*; \w+", reason) for reason in reasons), err
    assert last.endswith("cannot be used; mend or drop these rows, or allow more")


def test_training_refuses_what_preview_refuses_with_status_2_and_the_same_words(preview, model, tmp_path, capsys):
    make(tmp_path / "x.jsonl", ROW + "{'a': 1}\n")
    status, _, err = preview("dataset=x.jsonl")
    words = [
        f"model_name_or_path={model}",
        f"dataset={tmp_path}/x.jsonl",
        f"output_dir={tmp_path}/out",
        "max_bad_rows=0",
    ]
    assert cli.main(["train", "do_train=true", "finetuning_type=full", "use_cpu=true", *words]) == 2
    told = capsys.readouterr().err.replace(f"{tmp_path}/", "").splitlines()
    assert status == 1 and told[-2:] == err.splitlines()[1:] and "texts stand in single quotes" in told[-2]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_row_of_100_megabytes_is_read_or_refused_in_seconds(name, preview, tmp_path):
    """The row is cut off: what a download that broke leaves. Its memory is that of the row, a few times over."""
    with (tmp_path / name).open("w") as file:
        file.write(ROW + '{"instruction": "q", "output": "')
        for _ in range(100):
            file.write("word " * 200_000)
    begun = time.process_time()
    status, out, err = preview(f"dataset={name}")
    assert status == 1 and f"{name}:2: JSON is cut off" in err and accounts(out) == (2, 1, 1, 0)
    assert time.process_time() - begun < 10
    assert max(map(len, out.splitlines())) < 500


def test_a_whole_row_of_100_megabytes_needs_a_few_times_its_memory(tmp_path):
    with (tmp_path / "x.jsonl").open("w") as file:
        file.write('{"text": "' + "word " * 20_000_000 + '"}\n' + ROW)
    tracemalloc.start()
    first, second = read_rows(str(tmp_path / "x.jsonl"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first.value and len(first.value["text"]) == 100_000_000 and second.place.endswith(":2")
    assert peak < 4 * 100_000_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_told(preview, tmp_path):
    make(tmp_path / "x.jsonl", ROW)
    (tmp_path / "x.jsonl").chmod(0)
    status, _, err = preview("dataset=x.jsonl")
    assert status == 1 and "x.jsonl: cannot be read: Permission denied; see that this user may read it" in err


def test_a_file_whose_name_is_not_utf8_is_read_and_its_place_written_with_escapes(preview, tmp_path):
    (tmp_path / "set").mkdir()
    with open(os.fsencode(tmp_path / "set") + "/中.jsonl".encode("gbk"), "w") as file:
        file.write(ROW + "{")
    status, out, _ = preview("dataset=set", "max_bad_rows=1")
    assert status == 0 and accounts(out) == (2, 1, 1, 0)
    assert r"(first: set/\udcd6\udcd0.jsonl:2)" in out and r"set/\udcd6\udcd0.jsonl:1 ──" in out
