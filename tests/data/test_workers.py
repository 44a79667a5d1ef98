from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from burnish.chat.template import load_template
from burnish.data import workers
from burnish.data.arguments import DataArguments
from burnish.data.entry import DatasetAttr
from burnish.data.report import DataReport
from burnish.data.rows import Row
from burnish.data.store import SampleStore
from burnish.data.workers import RowEncoder, encode_items
from burnish.errors import RunStopped

ATTR = DatasetAttr("it", "file", "it.jsonl")


@pytest.fixture(scope="module")
def encoder(fixture_path):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("smollm2"))
    return RowEncoder("sft", tokenizer, load_template(tokenizer, None), DataArguments(cutoff_len=48))


def items(count):
    for number in range(count):
        row = {"instruction": f"question {number % 400}", "output": "word " * (number % 40)}
        yield Row(row if number % 9 else None, f"it.jsonl:{number + 1}", "" if number % 9 else "is not UTF-8"), ATTR


def encoded(rows, encoder):
    report = DataReport()
    store = SampleStore.concatenate(list(encode_items(rows, encoder, report)))
    report.count_duplicates()
    return store, report


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere rows are encoded in one process")
def test_many_processes_give_the_samples_and_the_report_of_one(encoder, monkeypatch):
    rows = list(items(700))
    alone, told_alone = encoded(rows, encoder)
    monkeypatch.setattr(workers, "FEW_ROWS", 100)
    monkeypatch.setattr(workers, "_ROWS_A_CHUNK", 32)
    monkeypatch.setattr(workers, "_num_cores", lambda: 3)
    parent = os.getpid()
    monkeypatch.setattr(encoder.template, "encode", in_another_process_than(parent, encoder.template.encode))
    together, told_together = encoded(rows, encoder)
    for name in ("input_ids", "labels", "offsets", "place_line"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
    assert told_alone == told_together
    assert told_alone.bad["is not UTF-8"].count == 78
    assert told_alone.duplicates > 0 and told_alone.cut


def in_another_process_than(parent, encode):
    def checked(*args, **kwargs):
        assert os.getpid() != parent
        return encode(*args, **kwargs)

    return checked


class Killed:
    def encode(self, messages, tools=None, *, train_on_prompt=False, mask_history=False):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere rows are encoded in one process")
def test_a_worker_that_is_killed_ends_the_run_with_a_message_and_does_not_hang_it(encoder, monkeypatch):
    monkeypatch.setattr(workers, "FEW_ROWS", 100)
    monkeypatch.setattr(workers, "_num_cores", lambda: 2)
    with pytest.raises(RunStopped, match="was killed"):
        encoded(list(items(600))[1:], RowEncoder("sft", encoder.tokenizer, Killed(), encoder.args))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere rows are encoded in one process")
def test_ctrl_c_ends_all_processes(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from burnish.data import workers
        from burnish.data.arguments import DataArguments
        from burnish.data.entry import DatasetAttr
        from burnish.data.report import DataReport
        from burnish.data.rows import Row
        from burnish.types import Encoded

        class Slow:
            def encode(self, messages, tools=None, *, train_on_prompt=False, mask_history=False):
                time.sleep(0.001)
                return [Encoded([1, 2, 3], [False, True, True])]

        workers._num_cores = lambda: 2
        attr = DatasetAttr("it", "file", "it.jsonl")
        row = Row({"instruction": "a", "output": "b"}, "it.jsonl:1")
        encoder = workers.RowEncoder("sft", None, Slow(), DataArguments())
        try:
            for store in workers.encode_items([(row, attr)] * 200_000, encoder, DataReport()):
                os.write(1, b"encoding\\n")  # print writes the end of a line by itself: Ctrl-C may come between
        except KeyboardInterrupt:
            print("ended")
        """)
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout and process.stdout.readline() == "encoding\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = process.communicate(timeout=60)
    assert (out.splitlines()[-1], err, process.returncode) == ("ended", "", 0)
    deadline = time.monotonic() + 20
    while group_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_is_alive(process.pid)


def group_is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_bad_row_is_counted_and_its_neighbours_are_not(encoder):
    rows = [
        (Row(value, f"it.jsonl:{n}"), ATTR)
        for n, value in enumerate([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}], 1)
    ]
    store, report = encoded(rows, encoder)
    assert (len(store), report.rows, report.kept) == (1, 2, 1)
    assert {reason: tally.first for reason, tally in report.bad.items()} == {"output is empty": "it.jsonl:2"}
