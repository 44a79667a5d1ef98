from __future__ import annotations

import json
import sys

import pytest
from families import save_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from burnish.errors import UserError
from burnish.model.arguments import ModelArguments
from burnish.model.tokenizer import load_tokenizer


def load(folder, **settings) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelArguments(model_name_or_path=str(folder), **settings))


def refusal(folder, **settings) -> str:
    with pytest.raises(UserError) as raised:
        load(folder, **settings)
    return str(raised.value)


def test_it_pads_on_the_right_with_the_end_token_where_there_is_no_other(tmp_path):
    tokenizer = load(save_tokenizer(tmp_path))
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert tokenizer(["a", "a b c"], padding=True).input_ids == [[3, 2, 2], [3, 4, 5]]


def test_a_token_made_for_padding_is_preferred_to_the_end_token_and_none_is_added(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = load(tmp_path, add_special_tokens=["<|finetune_right_pad_id|>"])
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert len(load(tmp_path)) == 96


def test_a_pad_token_that_the_model_names_stays(tmp_path):
    assert load(save_tokenizer(tmp_path, pad_token="<unk>")).pad_token == "<unk>"


def test_a_tokenizer_without_an_end_token_gets_one_that_is_there_and_says_so(tmp_path, capsys):
    save_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    assert load(tmp_path).eos_token == "</s>"
    assert "names no end token: </s> is taken" in capsys.readouterr().err


def test_added_tokens_are_one_token_each_and_special_ones_are_special(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = load(tmp_path, add_tokens=["foo_bar"], add_special_tokens=["<|tool|>"])
    assert tokenizer("a foo_bar<|tool|> b").input_ids == [3, 96, 97, 4]
    assert tokenizer.decode([96, 97], skip_special_tokens=True) == "foo_bar"


def test_adding_a_special_token_keeps_those_that_were_there(tmp_path):
    save_tokenizer(tmp_path)
    first = load(tmp_path, add_special_tokens=["<|one|>"])
    first.save_pretrained(tmp_path)
    assert {"<|one|>", "<|two|>"} <= set(load(tmp_path, add_special_tokens=["<|two|>"]).all_special_tokens)


def test_the_same_settings_on_the_saved_tokenizer_add_nothing(tmp_path):
    save_tokenizer(tmp_path)
    added = {"add_tokens": ["foo_bar", "a"], "add_special_tokens": ["<|tool|>"]}
    first = load(tmp_path, **added)
    first.save_pretrained(tmp_path)
    again = load(tmp_path, **added)
    assert len(again) == len(first) == 98
    assert again.get_vocab() == first.get_vocab()


def test_adding_a_word_that_is_there_does_not_take_other_words_apart(tmp_path):
    save_tokenizer(tmp_path)
    assert load(tmp_path, add_tokens=["word1"])("word12").input_ids == load(tmp_path)("word12").input_ids


def test_special_tokens_stay_whole_in_the_saved_tokenizer_whatever_split_special_tokens_says(tmp_path):
    save_tokenizer(tmp_path)
    load(tmp_path, split_special_tokens=True, add_special_tokens=["<|im_start|>"]).save_pretrained(tmp_path)
    assert load(tmp_path)("<|im_start|>").input_ids == [96]


def test_a_folder_without_the_vocabulary_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert "vocabulary of 1" in refusal(tmp_path)


def test_an_empty_folder_is_refused_with_what_it_needs(tmp_path):
    assert "tokenizer.json" in refusal(tmp_path)


def test_a_torn_tokenizer_file_is_refused(tmp_path):
    save_tokenizer(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    assert "the tokenizer cannot be loaded" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["./missing", "saves/run/checkpoint-12", "/missing"])
def test_a_path_that_is_not_there_is_said_to_be_a_path(name):
    assert "is not there; looked for the folder" in refusal(name)


def test_a_hub_name_without_a_hub_is_one_sentence():
    message = refusal("some-team/some-model")
    assert "neither a folder here nor in the hub's cache, and the hub cannot be reached" in message
    assert len(message.splitlines()) == 1


def test_modelscope_is_asked_for_by_name_and_missed_by_name(monkeypatch):
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "pip install modelscope" in refusal("some-team/some-model")


OWN_CODE = """
from transformers import PreTrainedTokenizerFast

class OddTokenizer(PreTrainedTokenizerFast):
    def _pad(self, encoded_inputs, max_length=None, padding_strategy=None):  # as written in 2023
        raise AssertionError("the old signature cannot be called")
"""


def save_with_own_code(folder) -> None:
    save_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "odd.OddTokenizer"]}, "tokenizer_class": "OddTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "odd.py").write_text(OWN_CODE)


def test_code_that_comes_with_a_tokenizer_is_not_run_unasked_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    save_with_own_code(tmp_path)
    message = refusal(tmp_path)
    assert "Python code of its own" in message
    assert "trust_remote_code: true" in message


def test_an_overridden_pad_gives_way_to_that_of_transformers(tmp_path):
    save_with_own_code(tmp_path)
    tokenizer = load(tmp_path, trust_remote_code=True)
    assert type(tokenizer).__name__ == "OddTokenizer"
    assert tokenizer.pad([{"input_ids": [3]}, {"input_ids": [3, 4]}]).input_ids == [[3, 2], [3, 4]]


def test_smollm2_keeps_its_own_tokens(fixture_path):
    tokenizer = load(fixture_path("smollm2"))
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<|im_end|>", "<|im_end|>", 49152)
    assert tokenizer("\n\n1.").input_ids == [1116, 33, 30]  # two newlines are one token and digits stand alone


def test_text_is_split_as_the_file_says_where_transformers_would_do_otherwise(tmp_path, fixture_path, capsys):
    """SmolLM2's hub repository names GPT2Tokenizer, of which transformers 5 makes one that does not part digits."""
    published = load(fixture_path("smollm2"))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((fixture_path("smollm2") / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load(tmp_path)
    assert tokenizer("\n\n1. and    12").input_ids == published("\n\n1. and    12").input_ids
    assert (tokenizer.eos_token, tokenizer.chat_template) == (published.eos_token, published.chat_template)
    assert "the file's own way is used" in capsys.readouterr().err
    tokenizer.save_pretrained(tmp_path / "saved")  # what a run leaves is right by itself
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("\n\n1.").input_ids == published("\n\n1.").input_ids
