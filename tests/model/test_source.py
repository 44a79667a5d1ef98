from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from families import logits, make, save, save_tokenizer
from huggingface_hub import errors
from peft import LoraConfig, get_peft_model

from burnish.errors import UserError
from burnish.model.arguments import ModelArguments
from burnish.model.loader import load_model
from burnish.model.source import find_folder, find_model
from burnish.model.tokenizer import load_tokenizer
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache_dir, name: str, revision: str = "main"):
    """The folder in which huggingface_hub keeps the files of a repository that it has fetched."""
    home = cache_dir / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / revision).write_text(COMMIT)
    folder = home / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def test_a_name_on_the_hub_is_the_folder_of_its_cached_files_and_keeps_its_name(tmp_path):
    folder = cached(tmp_path, "team/model")
    save("llama", folder)
    save_tokenizer(folder)
    args = ModelArguments(model_name_or_path="team/model", cache_dir=str(tmp_path))
    assert find_model(args, weights=True) == folder
    assert len(load_tokenizer(args)) == 96
    model = load_model(args, dtype=torch.float32, trainable=False)
    assert torch.equal(logits(model), logits(make("llama")))
    assert model.name_or_path == model.config.name_or_path == "team/model"


def test_a_revision_is_a_revision_of_the_model(tmp_path):
    folder = cached(tmp_path, "team/model", revision="v2")
    args = ModelArguments(model_name_or_path="team/model", cache_dir=str(tmp_path), model_revision="v2")
    assert find_model(args, weights=False) == folder
    with pytest.raises(UserError, match="nor in the hub's cache"):
        find_model(ModelArguments(model_name_or_path="team/model", cache_dir=str(tmp_path)), weights=False)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_may_be_a_name_on_the_hub_too(tmp_path):
    base = make("llama")
    base.name_or_path = "team/model"
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(cached(tmp_path, "team/adapter"), save_embedding_layers=False)
    model_args = ModelArguments(adapter_name_or_path=["team/adapter"], cache_dir=str(tmp_path))
    merged = init_adapter(make("llama"), FinetuningArguments(), model_args, trainable=False)
    assert torch.allclose(logits(merged), logits(tuned), atol=1e-5)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (errors.GatedRepoError, "is gated on the hub"),
        (errors.RepositoryNotFoundError, "is neither a folder here nor a model on the hub"),
        (errors.RevisionNotFoundError, "model_revision 'v9' is no branch, tag or commit of it"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (OSError, "did not come from the hub"),
    ],
)
def test_what_a_hub_answers_is_one_sentence_with_a_remedy(monkeypatch, raised, message):
    def refuse(*_, **__):
        error = raised.__new__(raised)
        Exception.__init__(error, "the hub's own words\nin many lines")
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError) as told:
        find_model(ModelArguments(model_name_or_path="team/model", model_revision="v9"), weights=False)
    assert message in str(told.value)
    assert len(str(told.value).splitlines()) == 1
    assert told.value.problems[0].remedy


def test_weights_are_fetched_in_one_format_and_only_when_they_are_wanted(tmp_path, monkeypatch):
    asked = []

    def fetch(name, *, allow_patterns, **_):
        asked.append(tuple(allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    args = ModelArguments(model_name_or_path="team/model")
    find_model(args, weights=False)
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)
    find_model(args, weights=True)
    assert asked[-2:] == [("*.safetensors",), ("*_model*.bin",)]
    (tmp_path / "model.safetensors").touch()
    find_model(args, weights=True)
    assert asked[-1] == ("*.safetensors",)


def test_modelscope_is_asked_when_the_environment_says_so(tmp_path, monkeypatch):
    save("llama", tmp_path / "there")
    asked = {}

    def fetch(name, *, revision, cache_dir, **_):
        asked.update(name=name, revision=revision)
        return shutil.copytree(tmp_path / "there", cache_dir)

    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=fetch))
    args = ModelArguments(model_name_or_path="team/model", cache_dir=str(tmp_path / "cache"))
    model = load_model(args, dtype=torch.float32, trainable=False)
    assert asked == {"name": "team/model", "revision": None}
    assert torch.equal(logits(model), logits(make("llama")))


def test_a_folder_is_found_from_home_and_from_here(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/model", "model", "./model", str(tmp_path / "model")):
        assert find_folder(name, ModelArguments(), revision=None, weights=True) == tmp_path / "model"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a file; give the folder that holds it"):
        find_folder(str(tmp_path / "model.safetensors"), ModelArguments(), revision=None, weights=True)
