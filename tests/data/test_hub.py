"""Data sets of a hub, read as a user reads them: a command in a process of its own, a small hub on this machine.

The hub speaks HTTP (tests/hub_server.py) and holds real jsonl and parquet files; `datasets` is as it is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from hub_server import TOKEN, Hub, serve
from processes import environment, make_run

from burnish.data.arguments import DataArguments
from burnish.data.catalog import get_dataset_list, problems
from burnish.data.sources import load_single_dataset

SUBSETS = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/train-*}, {split: test, path: en/test-*}]
  default: true
- config_name: de
  data_files: [{split: train, path: de/train-*}, {split: test, path: de/test-*}]
---
"""
ENTRIES = {
    "plain": {"hf_hub_url": "owner/plain"},
    "validation": {"hf_hub_url": "owner/plain", "split": "validation"},
    "unsplit": {"hf_hub_url": "owner/plain", "split": "dev"},
    "german": {"hf_hub_url": "owner/subsets", "subset": "de", "num_samples": 2},
    "tested": {"hf_hub_url": "owner/subsets", "subset": "de", "split": "test"},
    "french": {"hf_hub_url": "owner/subsets", "subset": "fr"},
    "folder": {"hf_hub_url": "owner/folders", "folder": "b"},
    "secret": {"hf_hub_url": "owner/secret"},
    "nowhere": {"hf_hub_url": "owner/nowhere"},
    "script": {"hf_hub_url": "owner/script"},
    "either": {"hf_hub_url": "owner/plain", "ms_hub_url": "team/plain"},
    "scope": {"ms_hub_url": "team/plain", "subset": "small", "split": "test"},
}
READ = r"""
import sys
from datasets import disable_progress_bars
from burnish.data.arguments import DataArguments
from burnish.data.catalog import get_dataset_list
from burnish.data.hub import Hub
from burnish.data.sources import load_single_dataset
from burnish.errors import UserError
disable_progress_bars()
for name in sys.argv[2:]:
    name, _, how = name.partition("+")
    args = DataArguments(dataset=[name], dataset_dir=sys.argv[1], streaming=how == "stream")
    token = how if how.startswith("hf_") else None
    [attr] = get_dataset_list(args)
    try:
        rows = load_single_dataset(attr, args, seed=1, hub=Hub(None, token))
        print(name, *(row.value["output"] for row in rows))
    except UserError as error:
        print(error)
"""


def pair(number: int) -> dict[str, str]:
    return {"instruction": f"question {number}", "output": f"a{number}"}


def write(path: Path, numbers: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [pair(number) for number in numbers]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`hub/owner/…`: repositories; `data/dataset_info.json`: the entries that name them."""
    root = tmp_path_factory.mktemp("hub")
    owner = root / "hub" / "owner"
    write(owner / "plain" / "train.jsonl", range(4))
    write(owner / "plain" / "validation.jsonl", range(10, 12))
    for first, language in ((0, "en"), (100, "de")):
        write(owner / "subsets" / language / "train-00000-of-00001.parquet", range(first, first + 5))
        write(owner / "subsets" / language / "test-00000-of-00001.parquet", range(first + 50, first + 52))
    (owner / "subsets" / "README.md").write_text(SUBSETS)
    write(owner / "folders" / "a" / "train.jsonl", range(3))
    write(owner / "folders" / "b" / "train.jsonl", range(20, 23))
    write(owner / "secret" / "train.jsonl", range(7))
    (owner / "script").mkdir()
    (owner / "script" / "script.py").write_text("import datasets\n")
    (root / "data").mkdir()
    (root / "data" / "dataset_info.json").write_text(json.dumps(ENTRIES))
    return root


@pytest.fixture(scope="module")
def hub(folder) -> Any:
    with serve(folder / "hub", private=("owner/secret",)) as hub:
        yield hub


def asking(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    return environment(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_OFFLINE="0", NO_COLOR="1", **more)


def read(folder: Path, env: dict[str, str], *names: str) -> list[str]:
    """What each of the sets holds, or what is said of it, in one process."""
    command = [sys.executable, "-c", READ, str(folder / "data"), *names]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


def test_subset_split_folder_token_and_streaming_reach_the_hub(folder, hub, home):
    names = ["plain", "validation", "tested", "folder", f"secret+{TOKEN}", "plain+stream", "tested+stream"]
    assert read(folder, asking(hub, home), *names) == [
        "plain a0 a1 a2 a3",
        "validation a10 a11",
        "tested a150 a151",
        "folder a20 a21 a22",
        "secret a0 a1 a2 a3 a4 a5 a6",
        "plain a0 a1 a2 a3",
        "tested a150 a151",
    ]
    # Once more without the hub: what was read is in the cache, what was not is told.
    told = read(folder, asking(hub, home) | {"HF_HUB_OFFLINE": "1"}, "validation", "nowhere")
    assert told[0] == "validation a10 a11"
    assert told[1] == (
        "data: nowhere 'owner/nowhere' cannot be loaded: Couldn't reach 'owner/nowhere' on the Hub "
        "(OfflineModeIsEnabled); it is not in the cache: connect (HF_ENDPOINT names a mirror), or name a folder with it"
    )


def test_what_a_hub_does_not_have_is_one_line_with_the_remedy(folder, hub, tmp_path):
    told = read(folder, asking(hub, tmp_path), "nowhere", "secret", "french", "unsplit", "script", "nowhere+stream")
    missing = (
        "doesn't exist on the Hub or cannot be accessed; check its name; a private or gated one needs hf_hub_token"
    )
    assert missing in told[0] and missing in told[1] and missing in told[5]
    assert "BuilderConfig 'fr' not found. Available: ['en', 'de']; check its name, subset and split" in told[2]
    assert (
        """Unknown split "dev". Should be one of ['train', 'validation']; check its name, subset and split""" in told[3]
    )
    assert "found script.py; datasets no longer runs scripts: save its rows as parquet or jsonl" in told[4]


def test_a_command_trains_on_a_set_of_the_hub_and_on_a_stream_of_it(folder, hub, home, tmp_path):
    words = make_run(tmp_path)
    for name, value in (("--dataset", "german,plain"), ("--max_steps", "2"), ("--val_size", "1")):
        words[words.index(name) + 1] = value
    words += ["--dataset_dir", str(folder / "data"), "--output_dir", str(tmp_path / "out"), "--save_strategy", "no"]
    command = [sys.executable, "-m", "burnish", "train", *words, "--streaming", "--buffer_size", "4"]
    hub.asked.clear()
    run = subprocess.run(command, env=asking(hub, tmp_path), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "owner/subsets" in run.stdout
    assert any("/datasets/owner/plain/resolve/" in asked for asked in hub.asked)
    assert (tmp_path / "out" / "train_results.json").is_file()


# ---- ModelScope ------------------------------------------------------------------------------------------------------


def test_without_the_package_modelscope_its_sets_are_refused_by_name(folder, monkeypatch):
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    args = DataArguments(dataset=["scope", "either"], dataset_dir=str(folder / "data"))
    catalog, remedy = (
        folder / "data" / "dataset_info.json",
        "pip install modelscope, or download it and name the folder",
    )
    told = "ms_hub_url 'team/plain' is read by the package modelscope, which is not installed"
    assert [str(problem) for problem in problems(args)] == [
        f"{catalog}: scope.{told}; {remedy}",
        f"{catalog}: either.{told}; {remedy}",
    ]
    [problem] = problems(DataArguments(dataset=["team/plain"], dataset_dir="ONLINE"))
    assert str(problem).startswith("USE_MODELSCOPE_HUB: dataset 'team/plain' is read by the package modelscope")


@pytest.fixture
def modelscope(tmp_path, monkeypatch) -> list[dict[str, Any]]:
    """A stand-in for the package, which is not among what burnish is tested with; → what it was asked for."""
    asked: list[dict[str, Any]] = []

    class MsDataset:
        @classmethod
        def load(cls, name: str, **how: Any) -> MsDataset:
            asked.append({"name": name, **how})
            return cls()

        def to_hf_dataset(self) -> Dataset:
            return Dataset.from_list([pair(7)])

    (tmp_path / "modelscope.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(MsDataset=MsDataset, __spec__=object()))
    return asked


@pytest.mark.parametrize(("asks", "from_modelscope"), [("1", ["either", "scope"]), ("", ["scope"])])
def test_modelscope_is_asked_where_the_environment_says_so_or_no_other_hub_is_named(
    asks, from_modelscope, folder, modelscope, monkeypatch
):
    monkeypatch.setenv("USE_MODELSCOPE_HUB", asks)
    args = DataArguments(dataset=["either", "scope"], dataset_dir=str(folder / "data"))
    attrs = get_dataset_list(args)
    assert [attr.name for attr in attrs if attr.load_from == "ms_hub"] == from_modelscope
    rows = list(load_single_dataset(attrs[1], args, seed=1))
    assert [(row.value, row.place) for row in rows] == [(pair(7), "team/plain:1")]
    assert modelscope[-1] == {
        "name": "team/plain",
        "subset_name": "small",
        "split": "test",
        "data_dir": None,
        "cache_dir": None,
        "use_streaming": False,
    }
