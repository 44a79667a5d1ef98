from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from transformers import AutoTokenizer

from burnish.chat.template import load_template
from burnish.data import cache, fingerprint, sources, workers
from burnish.data.arguments import DataArguments
from burnish.data.sources import get_dataset
from burnish.data.store import DTYPES
from burnish.errors import UserError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere rows are encoded in one process")


@pytest.fixture(scope="module")
def tokenizer(fixture_path):
    return AutoTokenizer.from_pretrained(fixture_path("smollm2"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of data and one for the cache, in which the tokens of every set, however small, are kept."""
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "SMALL_DATA", -1)
    monkeypatch.setattr(sources, "FEW_ROWS", 0)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl", range(300))
    write(tmp_path / "data" / "b.jsonl", range(200, 320))
    return tmp_path


@pytest.fixture
def load(place, tokenizer):
    """get_dataset; `seed`, `stage`, `template` and `tokenizer` aside, keywords are DataArguments."""

    def load_dataset(stage="sft", seed=42, template=None, tokenizer=tokenizer, **settings):
        template = template or load_template(tokenizer, None)
        args = DataArguments(**{"dataset": ["a.jsonl"], "dataset_dir": str(place / "data"), **settings})
        return get_dataset(args, stage, tokenizer, template if stage == "sft" else None, seed=seed)

    return load_dataset


def write(path, numbers, **more):
    """Pairs of texts, which are texts of stage pt too; some broken, some empty, some long."""
    lines = []
    for number in numbers:
        row = {"instruction": f"question {number % 250}", "output": "word " * (number * 7 % 50), **more}
        row["text"] = row["output"] or "nothing"
        lines.append("{broken" if number % 41 == 3 else json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


def kept_folders(place):
    return sorted((place / "cache" / "tokens").glob("*/whole"))


def assert_same(one, other):
    assert one.report.lines() == other.report.lines()
    stores = [{"train": made.train, **made.eval} for made in (one, other)]
    assert list(stores[0]) == list(stores[1])
    for name in stores[0]:
        first, second = (store[name] for store in stores)
        assert first.files == second.files
        for array in DTYPES:
            a, b = getattr(first, array), getattr(second, array)
            assert a.dtype == b.dtype and np.array_equal(a, b), (name, array)
        assert first.lengths.tolist() == second.lengths.tolist()


RUNS = [
    {"cutoff_len": 40, "max_bad_rows": 1e9},
    {"dataset": ["a.jsonl", "b.jsonl"], "mix_strategy": "interleave_over", "val_size": 0.2, "max_bad_rows": 1e9},
    {"eval_dataset": ["b.jsonl", "a.jsonl"], "eval_on_each_dataset": True, "max_samples": 150, "max_bad_rows": 1e9},
    {"stage": "pt", "cutoff_len": 31, "val_size": 30, "max_bad_rows": 1e9},
]


@linux_only
@pytest.mark.parametrize("run", RUNS)
def test_tokens_that_are_kept_are_those_that_are_made_in_memory_and_so_is_the_report(load, place, monkeypatch, run):
    with monkeypatch.context() as small:
        small.setattr(sources, "SMALL_DATA", 2**30)
        in_memory = load(**run)
    assert not (place / "cache").exists()
    monkeypatch.setattr(workers, "FEW_ROWS", 100)
    monkeypatch.setattr(workers, "_ROWS_A_CHUNK", 16)
    monkeypatch.setattr(workers, "_num_cores", lambda: 3)
    assert_same(load(**run), in_memory)
    assert in_memory.report.duplicates and in_memory.report.bad

    def read(path):
        raise AssertionError("rows are read again")

    monkeypatch.setattr(sources, "read_rows", read)
    found = load(**run)
    assert_same(found, in_memory)
    assert not found.train.input_ids.flags.writeable  # mapped, not read
    assert len(kept_folders(place)) == 1


def test_a_small_set_is_encoded_by_every_run_and_kept_only_in_a_folder_that_is_named(load, place, monkeypatch):
    monkeypatch.setattr(sources, "SMALL_DATA", 4 * 2**20)
    in_memory = load(max_bad_rows=1e9)
    assert_same(load(max_bad_rows=1e9, tokenized_path=str(place / "mine")), in_memory)
    assert not (place / "cache").exists()
    monkeypatch.setattr(sources, "SMALL_DATA", -1)
    monkeypatch.setattr(sources, "FEW_ROWS", 2000)
    load(max_bad_rows=1e9, max_samples=100)  # few rows of whatever file are few
    assert not (place / "cache").exists()
    index = json.loads((place / "mine" / "whole" / "index.json").read_text())
    assert index["made_of"]["settings"]["cutoff_len"] == 2048
    assert index["parts"]["train"]["samples"] == len(in_memory.train)


def test_too_many_bad_rows_stop_every_run_also_where_tokens_are_found(load):
    for _ in range(2):
        with pytest.raises(UserError, match=r"max_bad_rows 0\.01 is passed: 14 of 300 rows"):
            load()


# ---- what is another set of tokens -----------------------------------------------------------------------------------


def of_template(**how):
    return lambda tokenizer: {"template": load_template(tokenizer, how.pop("name", None), **how)}


def with_another_token(tokenizer):
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["question"])
    return {"tokenizer": other}


@pytest.mark.parametrize(
    "change",
    [
        {"cutoff_len": 60},
        {"overlong": "drop"},
        {"train_on_prompt": True},
        {"mask_history": True},
        {"max_samples": 200},
        {"val_size": 0.5},
        {"eval_dataset": ["a.jsonl"]},
        {"dataset": ["b.jsonl"]},
        {"dataset": ["a.jsonl", "b.jsonl"]},
        {"dataset": ["other_columns"]},
        {"stage": "pt"},
        of_template(default_system="Be brief."),
        of_template(enable_thinking=False),
        of_template(split_special_tokens=True),
        of_template(name="vicuna"),
        with_another_token,
    ],
    ids=lambda change: str(change) if isinstance(change, dict) else change.__name__,
)
def test_other_settings_templates_and_tokenizers_find_no_tokens_of_these(load, place, tokenizer, change):
    columns = {"prompt": "output", "response": "instruction"}
    catalog = {"other_columns": {"file_name": "a.jsonl", "columns": columns}}
    (place / "data" / "dataset_info.json").write_text(json.dumps(catalog))
    load(max_bad_rows=1e9)
    change = change(tokenizer) if callable(change) else change
    load(max_bad_rows=1e9, **change)
    assert len(kept_folders(place)) == 2


def test_a_file_that_is_written_anew_is_seen_though_its_size_and_date_are_the_same(load, place):
    path = place / "data" / "a.jsonl"
    made = load(max_bad_rows=1e9)
    before = path.stat()
    path.write_text(path.read_text().replace("question 1", "question 9", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not np.array_equal(load(max_bad_rows=1e9).train.input_ids, made.train.input_ids)


def test_a_change_of_burnish_or_of_the_libraries_makes_tokens_anew(load, place, monkeypatch):
    load(max_bad_rows=1e9)
    monkeypatch.setattr(fingerprint, "ENCODING", 0)
    load(max_bad_rows=1e9)
    monkeypatch.setattr(fingerprint, "version_of", lambda package: "1.0")
    load(max_bad_rows=1e9)
    assert len(kept_folders(place)) == 3


def test_the_seed_counts_only_where_it_chooses_rows_and_what_changes_no_token_never_does(load, place):
    load(max_bad_rows=1e9)
    load(max_bad_rows=0.5, seed=1, packing=True, ignore_pad_token_for_loss=False)
    assert len(kept_folders(place)) == 1
    for seed in (1, 2):
        load(max_bad_rows=1e9, val_size=0.1, seed=seed)
    assert len(kept_folders(place)) == 3


# ---- what is there is whole, or is made anew -------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["input_ids.int32", "offsets.int64"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_tokens_that_lack_something_are_made_anew(load, place, array, harm):
    made = load(max_bad_rows=1e9)
    whole = [getattr(made.train, name).copy() for name in DTYPES]
    [folder] = kept_folders(place)
    file = folder / "train" / array
    if harm == "gone":
        file.unlink()
    else:
        with open(file, "r+b") as cut:  # as another file: this one is mapped
            rest = cut.read()[:-1]
        file.unlink()
        file.write_bytes(rest)
    again = load(max_bad_rows=1e9)
    for name, array in zip(DTYPES, whole, strict=True):
        assert np.array_equal(getattr(again.train, name), array)


def test_overwrite_cache_makes_tokens_anew_and_leaves_those_alone_that_somebody_has_mapped(load, place):
    first = load(max_bad_rows=1e9)
    ids = first.train.input_ids.copy()
    [folder] = kept_folders(place)
    before = json.loads((folder / "index.json").read_text())["made"]
    again = load(max_bad_rows=1e9, overwrite_cache=True)
    assert json.loads((folder / "index.json").read_text())["made"] > before
    assert np.array_equal(first.train.input_ids, ids) and np.array_equal(again.train.input_ids, ids)


def test_a_data_set_that_cannot_be_read_leaves_nothing_half_made(load, place):
    (place / "data" / "c.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction" "a"}, {"a": 1}]')
    with pytest.raises(UserError, match="no row after it can be told apart"):
        load(dataset=["a.jsonl", "c.json"], max_bad_rows=1e9)
    assert [path.name for path in (place / "cache" / "tokens").glob("*/*")] == ["lock"]


# ---- a folder that the user names ------------------------------------------------------------------------------------


def test_other_tokens_in_the_folder_are_not_lost_without_a_word(load, place):
    mine = str(place / "mine")
    load(max_bad_rows=1e9, tokenized_path=mine)
    with pytest.raises(UserError, match=r"holds other tokens \(cutoff_len 2048, not 64\); set overwrite_cache"):
        load(max_bad_rows=1e9, tokenized_path=mine, cutoff_len=64)
    assert load(max_bad_rows=1e9, tokenized_path=mine, cutoff_len=64, overwrite_cache=True).train.lengths.max() <= 64


def test_other_tokens_that_are_made_while_a_run_waits_for_the_lock_are_not_lost_either(load, place, monkeypatch):
    mine, locked = str(place / "mine"), cache._locked

    @contextmanager
    def after_another_run(folder):
        monkeypatch.setattr(cache, "_locked", locked)
        load(max_bad_rows=1e9, tokenized_path=mine)
        with locked(folder):
            yield

    monkeypatch.setattr(cache, "_locked", after_another_run)
    with pytest.raises(UserError, match=r"holds other tokens \(cutoff_len 2048, not 64\); set overwrite_cache"):
        load(max_bad_rows=1e9, tokenized_path=mine, cutoff_len=64)
    assert load(max_bad_rows=1e9, tokenized_path=mine).train.lengths.max() > 64


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("dataset_dict.json", "holds tokens that LLaMA-Factory kept, which burnish does not read"),
        ("notes.txt", "is a folder with files that are no tokens; name a new or an empty one"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(load, place, file, told):
    (place / "mine").mkdir()
    (place / "mine" / file).write_text("{}")
    with pytest.raises(UserError, match=told):
        load(tokenized_path=str(place / "mine"), overwrite_cache=True)
    assert os.listdir(place / "mine") == [file]


def test_a_place_that_cannot_be_written_is_one_clear_problem(load, place, monkeypatch):
    (place / "file").write_text("")
    with pytest.raises(UserError) as caught:
        load(tokenized_path=str(place / "file" / "mine"))
    assert str(caught.value) == (
        f"data: tokenized_path '{place}/file/mine' cannot be written: Not a directory; "
        "free some space there, or name another folder"
    )
    monkeypatch.setenv("BURNISH_CACHE", str(place / "file"))
    with pytest.raises(UserError, match=r"cannot be written: Not a directory; .* or BURNISH_CACHE in the environment"):
        load()


@linux_only
def test_a_disk_that_fills_up_is_told_and_the_next_run_goes_on_from_there(load, place, monkeypatch, capsys):
    monkeypatch.setattr(workers, "_ROWS_A_CHUNK", 16)
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_ENTRIES", 0.0)
    whole = load(max_bad_rows=1e9, tokenized_path=str(place / "other"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.train.input_ids.nbytes // 2, before[1]))  # of each file
    try:
        with pytest.raises(UserError, match="cannot be written: File too large; free some space there"):
            load(max_bad_rows=1e9, tokenized_path=str(place / "mine"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(load(max_bad_rows=1e9, tokenized_path=str(place / "mine")), whole)
    assert "going on with tokens that an earlier run began" in capsys.readouterr().err


# ---- several processes -----------------------------------------------------------------------------------------------

SLOW = """
import os, sys, time
from types import SimpleNamespace

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from burnish.data import cache, sources, workers
from burnish.data.arguments import DataArguments
from burnish.types import Encoded

folder, stage, log = sys.argv[1], sys.argv[2], os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def slowly(text):  # each text that is encoded leaves a mark, whichever process does it
    os.write(log, b".")
    time.sleep(0.002)
    return [1, *map(ord, text), 2]


class Slow:
    is_fast, special_tokens_map, backend_tokenizer = True, {}, Tokenizer(WordLevel({"[UNK]": 0}, "[UNK]"))
    bos_token_id, eos_token_id = None, 3

    def get_vocab(self):
        return {}

    def __call__(self, text, **how):
        return SimpleNamespace(input_ids=slowly(text) if text else [])

    def encode(self, messages, tools=None, *, train_on_prompt=False, mask_history=False):
        ids = slowly(messages[0]["content"])
        return [Encoded(ids, [place > 5 for place in range(len(ids))])]

    def identity(self):
        return {}


workers.FEW_ROWS, workers._ROWS_A_CHUNK, workers._num_cores = 50, 16, lambda: 2
cache.SECONDS_BETWEEN_ENTRIES = 0.0
args = DataArguments(dataset=[folder + "/rows.jsonl"], cutoff_len=37, val_size=0.25, tokenized_path=folder + "/tokens")
print("begins", flush=True)
made = sources.get_dataset(args, stage, Slow(), None if stage == "pt" else Slow(), seed=7)
print(made.report.lines(), [made.train.input_ids.sum(), made.eval["eval"].labels.sum(), len(made.train)], flush=True)
"""
NUM_ROWS = 1200


@pytest.fixture
def start(tmp_path):
    """Starts a process that encodes NUM_ROWS rows slowly, in two workers; it marks each row in the log."""
    rows = ({"instruction": f"question {n}", "output": "x", "text": f"question {n}"} for n in range(NUM_ROWS))
    (tmp_path / "slow.py").write_text(SLOW)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    lines = [json.dumps(row) for row in rows]
    for name in ("one", "two"):
        (tmp_path / name / "rows.jsonl").write_text("\n".join(lines))
    started = []

    def process(name, stage):
        command = [sys.executable, str(tmp_path / "slow.py"), name, stage, f"{name}.log"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=tmp_path, text=True, start_new_session=True, **pipes))
        assert started[-1].stdout.readline() == "begins\n"
        return started[-1]

    yield process
    for one in started:
        one.kill()
        one.communicate()


def num_encoded(tmp_path, name="one"):
    log = tmp_path / f"{name}.log"
    return log.stat().st_size if log.exists() else 0


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@linux_only
@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_a_run_goes_on_where_the_one_before_was_killed_and_comes_to_the_same(start, tmp_path, stage):
    unhurt, err = start("two", stage).communicate(timeout=60)
    assert (err, num_encoded(tmp_path, "two")) == ("", NUM_ROWS)
    for share in (0.4, 0.9):  # in the rows that are trained on, and in those that are set aside
        killed = start("one", stage)
        until(lambda share=share: num_encoded(tmp_path) > share * NUM_ROWS)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        until(lambda killed=killed: not is_alive(killed.pid))  # its workers too
        assert not (tmp_path / "one/tokens/whole").exists()
    out, err = start("one", stage).communicate(timeout=60)
    assert out.replace("one/", "two/") == unhurt
    assert err.startswith("note: going on with tokens that an earlier run began: ")
    assert num_encoded(tmp_path) < NUM_ROWS + 2 * 150  # what was in work when it was killed, and no more
    assert sorted(os.listdir(tmp_path / "one/tokens")) == ["lock", "whole"]


@linux_only
def test_of_processes_that_want_the_same_tokens_one_makes_them_and_the_next_goes_on_if_it_dies(start, tmp_path):
    first = start("one", "sft")
    until(lambda: num_encoded(tmp_path) > 0.3 * NUM_ROWS)
    first.send_signal(signal.SIGSTOP)  # until the others are there
    others = [start("one", "sft"), start("one", "sft")]
    waiting = f"note: process {first.pid} makes the tokens of this data; waiting for it (one/tokens)\n"
    assert [process.stderr.readline() for process in others] == [waiting, waiting]
    first.send_signal(signal.SIGKILL)
    told = [process.communicate(timeout=60) for process in others]
    assert told[0][0] == told[1][0] and "1,200 rows" in told[0][0]
    assert sorted(err.startswith("note: going on with tokens") for _, err in told) == [False, True]
    assert num_encoded(tmp_path) < NUM_ROWS + 150


def is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
