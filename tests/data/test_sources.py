from __future__ import annotations

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from burnish.chat.template import load_template
from burnish.data.arguments import DataArguments
from burnish.data.catalog import get_dataset_list
from burnish.data.loader import collate
from burnish.data.sources import get_dataset, load_single_dataset
from burnish.data.store import SampleStore
from burnish.errors import UserError
from burnish.types import IGNORE_INDEX


@pytest.fixture(scope="module")
def tokenizer(fixture_path):
    return AutoTokenizer.from_pretrained(fixture_path("smollm2"))


@pytest.fixture(scope="module")
def template(tokenizer):
    return load_template(tokenizer, None)


@pytest.fixture
def load(tmp_path, tokenizer, template):
    """get_dataset on files of a temporary folder; `seed` and `stage` aside, keywords are DataArguments."""

    def load_dataset(stage="sft", seed=42, order_seed=None, **settings):
        args = DataArguments(dataset_dir=str(tmp_path), **settings)
        template_of_stage = template if stage == "sft" else None
        return get_dataset(args, stage, tokenizer, template_of_stage, seed=seed, order_seed=order_seed)

    return load_dataset


def pair(number):
    return {"instruction": f"question {number}", "output": f"answer {number}"}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path.name


def answers(store, tokenizer):
    return [tokenizer.decode(s.labels[s.labels != IGNORE_INDEX]).removesuffix("<|im_end|>") for s in store]


def answers_to(numbers):
    return [f"answer {number}" for number in numbers]


def test_a_file_becomes_samples_in_its_order(load, tmp_path, tokenizer):
    made = load(dataset=[write(tmp_path / "a.jsonl", map(pair, range(5)))])
    assert answers(made.train, tokenizer) == answers_to(range(5))
    assert [sample.place for sample in made.train] == [f"{tmp_path}/a.jsonl:{n}" for n in range(1, 6)]
    assert (made.eval, made.report.rows, made.report.kept) == ({}, 5, 5)


def test_54_rows_with_a_fifth_set_aside_are_43_and_11_samples_that_share_no_row(load, tmp_path, tokenizer):
    name = write(tmp_path / "a.jsonl", map(pair, range(54)))
    made = load(dataset=[name], val_size=0.2)
    assert (len(made.train), len(made.eval["eval"])) == (43, 11)
    both = answers(made.train, tokenizer) + answers(made.eval["eval"], tokenizer)
    assert sorted(both) == sorted(answers_to(range(54)))
    assert answers(load(dataset=[name], val_size=0.2).train, tokenizer) == answers(made.train, tokenizer)
    assert answers(load(dataset=[name], val_size=0.2, seed=1).train, tokenizer) != answers(made.train, tokenizer)
    assert len(load(dataset=[name], val_size=7.0).eval["eval"]) == 7


def test_too_few_rows_to_split_are_told_with_what_is_wrong_with_them(load, tmp_path):
    name = write(tmp_path / "a.jsonl", [pair(0), {"instruction": "a", "output": ""}, {"instruction": "a"}])
    for streaming in (False, True):
        with pytest.raises(UserError) as caught:
            load(dataset=[name], val_size=5, streaming=streaming)
        told = [str(problem).removeprefix(f"{tmp_path}/a.jsonl:") for problem in caught.value.problems]
        assert told[0].startswith("2: output is empty") and told[1].startswith("3: has no column 'output'")
        assert told[2:] == ["data: val_size 5 would set aside all of 3 rows; give a smaller number, or an eval_dataset"]
    with pytest.raises(UserError, match=r"val_size 0\.1 would set aside the only row"):
        load(dataset=[write(tmp_path / "b.jsonl", [pair(0)])], val_size=0.1)


def test_the_seed_of_order_moves_no_row_between_training_and_evaluation(load, tmp_path, tokenizer):
    name = write(tmp_path / "a.jsonl", map(pair, range(30)))
    made = [load(dataset=[name], val_size=0.2, seed=1, order_seed=order_seed) for order_seed in (None, 2, 3)]
    assert len({tuple(answers(one.eval["eval"], tokenizer)) for one in made}) == 1
    how = {"dataset": [name], "streaming": True, "buffer_size": 8}
    orders = [answers(load(**how, seed=1, order_seed=order_seed).train, tokenizer) for order_seed in (None, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_sizes_count_rows_before_any_of_them_is_found_to_be_bad(load, tmp_path, tokenizer):
    name = write(tmp_path / "a.jsonl", [pair(0), "{broken", *map(pair, range(1, 9))])
    made = load(dataset=[name], max_samples=4, max_bad_rows=1)
    assert answers(made.train, tokenizer) == answers_to(range(3))
    made = load(dataset=[name], val_size=0.2, max_bad_rows=1)
    assert len(made.train) + len(made.eval["eval"]) == 9
    assert made.report.rows == 10


def test_each_bad_row_is_counted_by_reason_with_its_place_and_the_run_goes_on(load, tmp_path):
    bad = ['{"instruction": "a', {"instruction": "a"}, {"instruction": "a", "output": ""}, '{"instruction": "b']
    made = load(dataset=[write(tmp_path / "a.jsonl", [*map(pair, range(3)), *bad])], max_bad_rows=4)
    assert {reason: (tally.count, tally.first) for reason, tally in made.report.bad.items()} == {
        "JSON is cut off": (2, f"{tmp_path}/a.jsonl:4"),
        "has no column 'output' (it has 'instruction')": (1, f"{tmp_path}/a.jsonl:5"),
        "output is empty": (1, f"{tmp_path}/a.jsonl:6"),
    }
    assert len(made.train) == 3


def test_more_bad_rows_than_allowed_stop_the_run(load, tmp_path):
    name = write(tmp_path / "a.jsonl", [*map(pair, range(98)), "{", "[]"])
    with pytest.raises(UserError, match=r"2 of 100 rows \(2\.0%\) cannot be used"):
        load(dataset=[name])
    assert len(load(dataset=[name], max_bad_rows=0.02).train) == 98


def test_a_conversation_that_the_template_cannot_render_is_a_bad_row(load, tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    rows = [{"messages": [{"role": "user", "content": "1+1"}, call]}]  # SmolLM2's template knows no tool calls
    with pytest.raises(UserError, match="the chat template leaves out a tool call"):
        load(dataset=[write(tmp_path / "a.jsonl", rows)])


def test_several_sets_follow_each_other_or_are_interleaved(load, tmp_path, tokenizer):
    names = [write(tmp_path / "a.jsonl", map(pair, range(3))), write(tmp_path / "b.jsonl", map(pair, range(10, 15)))]
    assert answers(load(dataset=names).train, tokenizer) == answers_to([0, 1, 2, 10, 11, 12, 13, 14])
    mixed = load(dataset=names, mix_strategy="interleave_under").train
    assert answers(mixed, tokenizer) == answers_to([0, 10, 1, 11, 2, 12])
    mixed = load(dataset=names, mix_strategy="interleave_over").train
    assert answers(mixed, tokenizer) == answers_to([0, 10, 1, 11, 2, 12, 0, 13, 1, 14])


def test_max_samples_holds_for_each_set_and_num_samples_for_its_own(load, tmp_path):
    write(tmp_path / "a.jsonl", map(pair, range(30)))
    entries = {"few": {"file_name": "a.jsonl", "num_samples": 10}, "all": {"file_name": "a.jsonl"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    assert len(load(dataset=["few", "all"]).train) == 40
    assert len(load(dataset=["few", "all"], max_samples=20).train) == 30


def test_an_empty_file_is_told_where_num_samples_are_drawn(load, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "dataset_info.json").write_text('{"it": {"file_name": "a.jsonl", "num_samples": 3}}')
    with pytest.raises(UserError, match="holds no rows"):
        load(dataset=["it"])


@pytest.mark.parametrize("tokens", [None, "tokens"])
def test_rows_that_num_samples_takes_twice_are_told_of_where_rows_are_set_aside(load, tmp_path, tokens):
    write(tmp_path / "a.jsonl", map(pair, range(4)))
    entries = {name: {"file_name": "a.jsonl", "num_samples": number} for name, number in (("more", 9), ("all", 4))}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    place = tokens and str(tmp_path / tokens)

    def notes(name, **settings):
        told = load(dataset=[name], tokenized_path=place, overwrite_cache=True, **settings).report.notes
        return [note for note in told if note.startswith("val_size")]

    note = "val_size: a row of more that num_samples takes twice may be both trained and evaluated on"
    assert notes("more", val_size=0.5) == [note]
    assert notes("more") == notes("all", val_size=0.5) == notes("more", val_size=0.5, max_samples=4) == []


def test_num_samples_are_drawn_from_all_rows_by_the_seed(tmp_path):
    write(tmp_path / "a.jsonl", map(pair, range(30)))
    (tmp_path / "dataset_info.json").write_text('{"it": {"file_name": "a.jsonl", "num_samples": 10}}')
    args = DataArguments(dataset=["it"], dataset_dir=str(tmp_path))
    [attr] = get_dataset_list(args)
    places = [[row.place for row in load_single_dataset(attr, args, seed=seed)] for seed in (0, 0, 1)]
    assert places[0] == places[1] != places[2]
    assert len(set(places[0])) == 10


def test_eval_sets_are_joined_or_kept_apart_by_name(load, tmp_path, tokenizer):
    names = [write(tmp_path / "a.jsonl", map(pair, range(3))), write(tmp_path / "b.jsonl", map(pair, range(10, 12)))]
    assert answers(load(eval_dataset=names).eval["eval"], tokenizer) == answers_to([0, 1, 2, 10, 11])
    made = load(dataset=names[:1], eval_dataset=names, eval_on_each_dataset=True)
    assert {name: len(store) for name, store in made.eval.items()} == {"a": 3, "b": 2}
    assert load(eval_dataset=names).train is None


def test_eval_sets_that_are_called_alike_or_train_are_kept_apart_from_each_other_and_from_training(
    load, tmp_path, tokenizer
):
    (tmp_path / "old").mkdir()
    names = ["a.jsonl", "old/a.jsonl", "train.jsonl"]
    for number, name in enumerate(names):
        write(tmp_path / name, [pair(number)])
    made = load(dataset=names[:1], eval_dataset=names, eval_on_each_dataset=True)
    assert {name: answers(store, tokenizer) for name, store in made.eval.items()} == {
        "a": answers_to([0]),
        "a_2": answers_to([1]),
        "train_2": answers_to([2]),
    }
    assert answers(made.train, tokenizer) == answers_to([0])


def test_csv_parquet_and_json_give_the_same_samples(load, tmp_path, tokenizer):
    rows = [
        {"instruction": "say", "input": "NA", "output": "007"},
        {"instruction": "a, b", "input": "", "output": "é\n"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "a.csv").write_text('instruction,input,output\nsay,NA,007\n"a, b",,"é\n"\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    stores = [load(dataset=[f"a.{kind}"]).train for kind in ("json", "csv", "parquet")]
    assert answers(stores[0], tokenizer) == ["007", "é\n"]
    assert all((store.input_ids == stores[0].input_ids).all() for store in stores)


def test_a_folder_is_read_file_by_file_and_what_is_no_data_is_told(load, tmp_path, tokenizer):
    folder = tmp_path / "many"
    folder.mkdir()
    write(folder / "b.jsonl", [pair(2)])
    (folder / "a.json").write_text(json.dumps([pair(0), pair(1)]))
    (folder / "README.md").write_text("x")
    (folder / ".hidden.jsonl").write_text("x")
    made = load(dataset=["many"])
    assert answers(made.train, tokenizer) == answers_to(range(3))
    assert made.report.notes == [f"left out: {folder}/README.md is not a file of data"]


def test_columns_that_no_one_reads_are_told(load, tmp_path):
    made = load(dataset=[write(tmp_path / "a.jsonl", [{**pair(0), "source": "x", "quality": 1}])])
    assert made.report.notes == ["columns that are not read: quality, source (a.jsonl)"]


def test_equal_rows_are_counted_wherever_they_stand(load, tmp_path):
    rows = [pair(0), pair(1), {"output": "answer 0", "instruction": "question 0"}]
    names = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [pair(1)])]
    assert load(dataset=names).report.duplicates == 2


def test_texts_are_joined_into_rows_of_cutoff_len_with_an_end_after_each(load, tmp_path, tokenizer):
    texts = [f"This is text number {number}." for number in range(30)]
    name = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    made = load("pt", dataset=[name], cutoff_len=32, val_size=0.2)
    assert set(made.train.lengths[:-1].tolist()) == {32}
    text = tokenizer.decode(made.train.input_ids) + tokenizer.decode(made.eval["eval"].input_ids)
    assert sorted(text.split("<|endoftext|>")[:-1]) == sorted(texts)
    assert made.report.rows == made.report.kept == 30


def test_documents_of_a_row_are_one_text_where_they_may_see_each_other(load, tmp_path, tokenizer):
    name = write(tmp_path / "a.jsonl", [{"text": f"This is text number {number}."} for number in range(9)])
    apart, together = (load("pt", dataset=[name], cutoff_len=32, cross_document_attention=on) for on in (False, True))
    assert (apart.train.input_ids == together.train.input_ids).all()
    assert len(apart.train[0].documents) > 1
    for row, same in zip(apart.train, together.train, strict=True):
        assert same.documents == (len(same),)
        first = np.cumsum([0, *row.documents[:-1]])
        assert (row.labels[first] == IGNORE_INDEX).all()
        assert same.labels.tolist() == [IGNORE_INDEX, *same.input_ids[1:].tolist()]
    streamed = load("pt", dataset=[name], cutoff_len=32, cross_document_attention=True, streaming=True, buffer_size=1)
    assert [row.labels.tolist() for row in streamed.train] == [row.labels.tolist() for row in together.train]
    batch = collate([together.train[0]])
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 32]
    assert batch.inputs["position_ids"].tolist() == [list(range(32))]


def test_a_last_row_of_one_token_is_dropped_and_told(load, tmp_path, tokenizer):
    name = write(tmp_path / "a.jsonl", [{"text": "one two three"}])
    length = len(tokenizer("one two three").input_ids)
    made = load("pt", dataset=[name], cutoff_len=length)
    assert (len(made.train), list(made.report.dropped)) == (1, ["the last row, of a single token"])


@pytest.mark.parametrize(
    ("stage", "rows", "message"),
    [
        ("sft", [], "holds no rows"),
        ("pt", [{"messages": [{"role": "user", "content": "a"}]}], "holds conversations, and stage pt trains on texts"),
        ("sft", [{"text": "a"}], "is a text without an answer; stage pt trains on texts"),
        ("sft", [{"messages": "hi"}], r"a.jsonl:1: messages is not JSON"),
    ],
)
def test_a_set_that_does_not_fit_the_stage_is_refused(load, tmp_path, stage, rows, message):
    with pytest.raises(UserError, match=message):
        load(stage, dataset=[write(tmp_path / "a.jsonl", rows)])


def test_an_entry_without_answers_is_refused_for_sft(load, tmp_path):
    write(tmp_path / "a.jsonl", [pair(0)])
    (tmp_path / "dataset_info.json").write_text(
        '{"it": {"file_name": "a.jsonl", "columns": {"prompt": "instruction"}}}'
    )
    with pytest.raises(UserError, match="names columns, but none with answers"):
        load(dataset=["it"])


def test_a_run_with_no_sample_left_says_why(load, tmp_path):
    name = write(tmp_path / "a.jsonl", map(pair, range(3)))
    with pytest.raises(UserError) as caught:
        load(dataset=[name], cutoff_len=10)
    assert "its prompt leaves no room for an answer (and 2 more samples with it)" in str(caught.value)
    assert "has no sample left" in str(caught.value)


def hub(tmp_path, **entry):
    """A repository of the hub, as a folder that `datasets` reads by itself."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", range(4)), ("validation", range(10, 12))):
        table = pyarrow.Table.from_pylist([pair(number) for number in rows])
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    entries = {"it": {"hf_hub_url": str(folder), **entry}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    return str(folder)


def test_a_repository_is_read_through_the_datasets_library(load, tmp_path, tokenizer):
    name = hub(tmp_path)
    made = load(dataset=["it"])
    assert answers(made.train, tokenizer) == answers_to(range(4))
    assert made.train[1].place == f"{name}:2"
    assert answers(load(dataset=["it"], split="validation").train, tokenizer) == answers_to([10, 11])


def test_a_repository_can_be_streamed(load, tmp_path, tokenizer):
    hub(tmp_path)
    assert sorted(answers(load(dataset=["it"], streaming=True).train, tokenizer)) == answers_to(range(4))


@pytest.mark.parametrize("entry", [{"split": "test"}, {"hf_hub_url": "nobody/nothing"}, {"subset": "de"}])
def test_a_repository_that_cannot_be_read_is_no_traceback(load, tmp_path, entry):
    hub(tmp_path, **entry)
    with pytest.raises(UserError, match=r"data: it '.*' cannot be loaded: .*; (check its name|.* name a folder)"):
        load(dataset=["it"])


def test_a_streamed_set_has_an_order_for_each_epoch_and_gives_all_rows_in_each(load, tmp_path, tokenizer):
    name = write(tmp_path / "a.jsonl", map(pair, range(20)))
    stream = load(dataset=[name], streaming=True, buffer_size=8).train
    epochs = []
    for epoch in (0, 0, 1):
        stream.set_epoch(epoch)
        epochs.append(answers(stream, tokenizer))
    assert epochs[0] == epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[2]) == sorted(answers_to(range(20)))


def test_streaming_sets_the_first_rows_aside(load, tmp_path, tokenizer):
    name = write(tmp_path / "a.jsonl", map(pair, range(20)))
    made = load(dataset=[name], streaming=True, val_size=5)
    assert answers(made.eval["eval"], tokenizer) == answers_to(range(5))
    assert sorted(answers(made.train, tokenizer)) == sorted(answers_to(range(5, 20)))


def test_streamed_texts_become_rows_of_cutoff_len(load, tmp_path):
    name = write(tmp_path / "a.jsonl", [{"text": f"text {number}"} for number in range(50)])
    rows = list(load("pt", dataset=[name], streaming=True, cutoff_len=16).train)
    assert {len(row) for row in rows[:-1]} == {16}
    assert len(SampleStore.from_samples(rows)) == len(rows)


def test_a_stream_stops_at_too_many_bad_rows_and_tells_of_fewer(load, tmp_path):
    name = write(tmp_path / "a.jsonl", [*map(pair, range(8)), "{", "{"])
    with pytest.raises(UserError, match="2 of 10 rows"):
        list(load(dataset=[name], streaming=True).train)
    stream = load(dataset=[name], streaming=True, max_bad_rows=2).train
    assert len(list(stream)) == 8
    assert stream.report.num_bad == 2
