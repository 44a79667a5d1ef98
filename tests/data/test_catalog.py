from __future__ import annotations

import json
import subprocess
import sys

import pytest

from burnish.data.arguments import DataArguments
from burnish.data.catalog import get_dataset_list, problems
from burnish.data.entry import Columns, Tags
from burnish.errors import UserError


@pytest.fixture
def catalog(tmp_path):
    """Writes a dataset_info.json and gives arguments that use it. pairs.jsonl is there."""
    (tmp_path / "pairs.jsonl").write_text('{"instruction": "a", "output": "b"}\n')

    def arguments(entries, **settings):
        text = entries if isinstance(entries, str) else json.dumps(entries)
        (tmp_path / "dataset_info.json").write_text(text)
        return DataArguments(dataset_dir=str(tmp_path), **{"dataset": ["it"], **settings})

    return arguments


def told(args):
    return [str(problem).removeprefix(f"{args.dataset_dir}/dataset_info.json") for problem in problems(args)]


def test_an_entry_becomes_an_attr_with_the_usual_columns(catalog, tmp_path):
    [attr] = get_dataset_list(catalog({"it": {"file_name": "pairs.jsonl"}}))
    assert (attr.name, attr.load_from, attr.path) == ("it", "file", str(tmp_path / "pairs.jsonl"))
    assert (attr.formatting, attr.columns, attr.tags) == ("alpaca", Columns(), Tags())


def test_columns_that_are_named_replace_the_usual_ones_as_a_whole(catalog):
    columns = {"prompt": "question", "response": "answer"}
    [attr] = get_dataset_list(catalog({"it": {"file_name": "pairs.jsonl", "columns": columns}}))
    assert attr.columns == Columns("question", None, "answer", None, None, None, None)


def test_an_openai_entry_needs_no_columns_and_no_tags(catalog):
    for entry in ({}, {"columns": {"messages": "messages"}}):
        [attr] = get_dataset_list(catalog({"it": {"file_name": "pairs.jsonl", "formatting": "openai", **entry}}))
        assert (attr.columns.messages, attr.columns.tools) == ("messages", "tools")
        assert (attr.tags.role_tag, attr.tags.content_tag, attr.tags.observation_tag) == ("role", "content", "tool")


def test_the_columns_role_and_content_of_2023_are_tags(catalog):
    columns = {"messages": "conversations", "role": "who", "content": "what"}
    [attr] = get_dataset_list(
        catalog({"it": {"file_name": "pairs.jsonl", "formatting": "sharegpt", "columns": columns}})
    )
    assert (attr.tags.role_tag, attr.tags.content_tag, attr.tags.user_tag) == ("who", "what", "human")


def test_a_hub_entry_keeps_what_load_dataset_takes(catalog):
    entry = {"hf_hub_url": "some/set", "subset": "en", "folder": "f", "num_samples": 5, "ms_hub_url": "some/set"}
    [attr] = get_dataset_list(catalog({"it": entry}, split="validation"))
    assert (attr.load_from, attr.path, attr.subset, attr.folder) == ("hf_hub", "some/set", "en", "f")
    assert (attr.num_samples, attr.split) == (5, "validation")
    [attr] = get_dataset_list(catalog({"it": {**entry, "split": "test"}}, split="validation"))
    assert attr.split == "test"


def test_a_name_may_be_a_file_or_a_folder_with_no_catalog_at_all(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}")
    names = [str(tmp_path / "pairs.jsonl"), str(tmp_path)]
    attrs = get_dataset_list(DataArguments(dataset=names, dataset_dir=str(tmp_path / "nowhere")))
    assert [(attr.path, attr.formatting) for attr in attrs] == [(name, "auto") for name in names]
    [attr] = get_dataset_list(DataArguments(dataset=["pairs.jsonl"], dataset_dir=str(tmp_path)))
    assert attr.path == str(tmp_path / "pairs.jsonl")


def test_online_means_that_every_name_is_a_repository(tmp_path):
    [attr] = get_dataset_list(DataArguments(dataset=["some/set"], dataset_dir="ONLINE"))
    assert (attr.load_from, attr.path, attr.formatting) == ("hf_hub", "some/set", "auto")


def test_an_unknown_name_is_told_with_the_nearest_one(catalog):
    args = catalog({"identity": {}, "pinyin": {}}, dataset=["identty"], eval_dataset=["what", "pairz.jsonl"])
    assert told(args) == [
        ": dataset 'identty' is not in it; did you mean 'identity'?",
        ": eval_dataset 'what' is not in it; it has identity, pinyin",
        ": eval_dataset 'pairz.jsonl' is not a file that is there; did you mean 'pairs.jsonl'?",
    ]


def test_every_mistake_of_an_entry_is_told_at_once(catalog):
    entry = {
        "file_name": "pair.jsonl",
        "formating": "alpaca",
        "formatting": "sharegtp",
        "num_samples": "many",
        "columns": {"promt": "q", "response": 3, "images": "images"},
        "tags": {"user_tag": "u", "bot_word": "b"},
    }
    known_tags = ", ".join(Tags.__dataclass_fields__)
    assert told(catalog({"it": entry})) == [
        ": it.formating is not known; did you mean 'formatting'?",
        ": it.columns.promt is not known; did you mean 'prompt'?",
        ": it.columns.response 3 is not a name",
        ": it.columns.images 'images' cannot be used; burnish trains on text alone",
        f": it.tags.bot_word is not known; known are {known_tags}",
        ": it.formatting 'sharegtp' is not one of alpaca, sharegpt, openai; did you mean 'sharegpt'?",
        ": it.num_samples 'many' is not a number of rows; give 1 or more",
        f": it.file_name 'pair.jsonl' is not there: {catalog({}).dataset_dir}/pair.jsonl; did you mean 'pairs.jsonl'?",
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"script_url": "x"}, "it.script_url 'x' names a loading script, which datasets no longer runs; save its rows"),
        ({"ms_hub_url": "x"}, "it.ms_hub_url 'x' is read by the package modelscope, which is not installed"),
        ({"om_hub_url": "x"}, "it.om_hub_url 'x' is not read from openMind; download it"),
        ({"cloud_file_name": "s3://x"}, "it.cloud_file_name 's3://x' is not read from cloud storage; download it"),
        ({"file_name": "pairs.jsonl", "ranking": True}, "it.ranking True pairs of answers are for stages rm and dpo"),
        ({"file_name": "pairs.jsonl", "columns": {"kto_tag": "t"}}, "it.columns.kto_tag 't' cannot be used; stages rm"),
        ({"file_name": "pairs.jsonl", "subset": "en"}, "it.subset 'en' is for repositories of a hub; name the subset"),
        ({"file_name": "pairs.jsonl", "split": "test"}, "it.split 'test' is for repositories of a hub; name the split"),
        ({"file_name": ""}, "it.file_name '' is not a name"),
        ({"file_name": "dataset_info.txt"}, "it.file_name 'dataset_info.txt' is not there"),
        ({}, "it does not say where its rows lie; give file_name or hf_hub_url"),
        ([], "it [] is not an object"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(catalog, entry, message):
    [problem] = told(catalog({"it": entry}))
    assert problem.startswith(f": {message}")


def test_a_type_that_is_not_read_and_a_folder_without_data_are_refused(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty").mkdir()
    args = DataArguments(dataset=["notes.md", "empty"], dataset_dir=str(tmp_path))
    assert [problem.message.split(":")[0] for problem in problems(args)] == [
        "is of a type that burnish does not read",
        "is a folder without a file of data",
    ]


def test_a_catalog_that_is_not_json_is_told_with_its_line_and_hides_no_other_file(catalog, tmp_path):
    args = catalog('{\n  "it": {"file_name": "pairs.jsonl"},\n}', dataset=["it", "pairs.jsonl"])
    [problem] = told(args)
    assert problem.startswith(":3: is not valid JSON")
    with pytest.raises(UserError, match="is not valid JSON"):
        get_dataset_list(args)


def test_a_split_for_a_file_is_refused(catalog):
    [problem] = problems(catalog({}, dataset=["pairs.jsonl"], split="test"))
    assert "a file has one split" in str(problem)


def test_names_are_checked_without_torch_or_numpy():
    code = "import sys, burnish.data.catalog; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_text_set_of_llamafactorys_own_catalog_is_read(fixture_path):
    folder = fixture_path("llamafactory-data") / "data"
    entries = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    not_text = {"ranking", "images", "videos", "audios", "chosen", "kto_tag"}
    names = [n for n, entry in entries.items() if not not_text & {*entry, *entry.get("columns", {})}]
    args = DataArguments(dataset=names, dataset_dir=str(folder))
    assert [problem.name for problem in problems(args)] == ["deepctrl.ms_hub_url"]  # on no other hub
    assert len(names) > 70
