from __future__ import annotations

import json
from array import array

import numpy as np
import pytest
from transformers import AutoTokenizer

from burnish.data import report as report_module
from burnish.data.report import DataReport, first_sample_text
from burnish.data.store import SampleStore
from burnish.errors import UserError
from burnish.types import IGNORE_INDEX, Sample


def report(rows, *bad):
    made = DataReport(rows=rows, kept=rows - len(bad))
    for reason, place in bad:
        made.add("bad", reason, place)
    return made


EMPTY = ("output is empty", "x.jsonl:3"), ("output is empty", "x.jsonl:8"), ("is not UTF-8", "x.jsonl:5")


def test_reasons_are_counted_with_the_place_of_the_first():
    lines = report(1000, *EMPTY).lines()
    assert lines == [
        "data: 1,000 rows, 997 of them used",
        "  bad row: output is empty: 2 (first: x.jsonl:3)",
        "  bad row: is not UTF-8: 1 (first: x.jsonl:5)",
    ]


@pytest.mark.parametrize(("rows", "allowed"), [(300, 0.01), (299, 3), (4, 0.75)])
def test_bad_rows_up_to_the_limit_are_let_pass(rows, allowed):
    report(rows, *EMPTY).check(allowed)


@pytest.mark.parametrize(("rows", "allowed"), [(299, 0.01), (10_000, 2), (1_000_000, 0)])
def test_more_bad_rows_stop_the_run_with_every_reason(rows, allowed):
    with pytest.raises(UserError) as caught:
        report(rows, *EMPTY).check(allowed)
    first, second, last = map(str, caught.value.problems)
    assert first == "x.jsonl:3: output is empty (and 1 more row with it); give it a text, or drop the row"
    assert second == "x.jsonl:5: is not UTF-8; save the file as UTF-8"
    assert f"max_bad_rows {allowed} is passed: 3 of {rows:,} rows" in last


def test_a_missing_column_has_a_remedy_of_its_own():
    with pytest.raises(UserError, match=r"name the columns in dataset_info\.json"):
        report(2, ("has no column 'output'", "x.jsonl:1")).check(0.01)


def test_reasons_that_quote_their_rows_are_told_up_to_a_number_and_counted_all():
    made = report(100, *((f"has a turn of unknown role {n}", f"x.jsonl:{n}") for n in range(90)))
    assert len(made.bad) == report_module.MOST_REASONS + 1 and made.num_bad == 90
    assert made.bad[report_module.OTHER].first == f"x.jsonl:{report_module.MOST_REASONS}"
    other = report(10, ("one more", "y.jsonl:1"))
    made.merge(other)
    assert made.bad[report_module.OTHER].count == 90 - report_module.MOST_REASONS + 1


def test_a_name_that_no_terminal_takes_is_written_with_escapes():
    made = report(3, ("is not UTF-8", "\udcd6.jsonl:1"))
    made.note("columns that are not read: \ud800")
    assert made.lines()[1:] == [
        "  bad row: is not UTF-8: 1 (first: \\udcd6.jsonl:1)",
        "  columns that are not read: \\ud800",
    ]


def test_what_several_processes_counted_adds_up_in_the_order_of_the_rows():
    one, two = report(10, EMPTY[0]), report(20, EMPTY[1], EMPTY[2])
    one.hashes, two.hashes = array("Q", [1, 2, 3, 1]), array("Q", [3, 2**64 - 1])
    one.straddled = 1
    two.note("a line")
    one.merge(two)
    one.count_duplicates()
    assert (one.rows, one.kept, one.num_bad, one.straddled, one.duplicates) == (30, 27, 3, 1, 2)
    assert (str(one.bad["output is empty"]), one.notes) == ("2 (first: x.jsonl:3)", ["a line"])


def test_a_report_that_was_kept_says_the_same(tmp_path):
    made = report(1000, *EMPTY)
    made.add("cut", "turns after the last answer", "x.jsonl:7")
    made.add("dropped", "longer than cutoff_len", "x.jsonl:9")
    made.duplicates, made.straddled = 3, 4
    made.note("a line")
    ids = np.arange(4, dtype=np.int32)
    made.add_part("train", SampleStore.from_samples([Sample(ids, ids)]))
    kept = DataReport.from_json(json.loads(json.dumps(made.to_json())))
    assert kept.lines() == made.lines()
    assert (kept.bad, kept.dropped, kept.cut, kept.parts) == (made.bad, made.dropped, made.cut, made.parts)


def test_a_part_is_told_in_samples_tokens_and_trained_tokens():
    ids = np.arange(4, dtype=np.int32)
    labels = np.array([IGNORE_INDEX, IGNORE_INDEX, 2, 3], dtype=np.int32)
    made = DataReport()
    made.add_part("train", SampleStore.from_samples([Sample(ids, labels), Sample(ids, labels)]))
    assert made.lines() == ["  train: 2 samples, 8 tokens, 4 of them trained (50%)"]


def test_the_first_sample_is_shown_as_ids_and_text_whole_and_trained(fixture_path):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("smollm2"))
    ids = tokenizer("Who are you? I am Beacon.<|im_end|>").input_ids
    labels = [*[IGNORE_INDEX] * 4, *ids[4:-1], IGNORE_INDEX]
    sample = Sample(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), "x.jsonl:1")
    head, input_ids, inputs, label_ids, text = first_sample_text(sample, tokenizer).split("\n")
    assert head == f"first sample (x.jsonl:1), {len(ids)} tokens, {len(ids) - 5} trained"
    assert (input_ids, inputs) == (f"input_ids: {ids}", "inputs: Who are you? I am Beacon.<|im_end|>")
    assert label_ids == f"label_ids: [-100 ×4, {', '.join(map(str, ids[4:-1]))}, -100]"
    assert text == "labels:  I am Beacon."
