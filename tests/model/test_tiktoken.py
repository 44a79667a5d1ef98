"""The first Qwen's tokenizer: its published vocabulary, and small made-up ones."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path

import pytest
from qwen1 import made_up_ranks, make_qwen1
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from burnish.chat.template import load_template
from burnish.errors import UserError
from burnish.model.arguments import ModelArguments
from burnish.model.tiktoken import FILE, SPECIAL_TOKENS, merges, read_ranks
from burnish.model.tokenizer import load_tokenizer

# What tiktoken 0.14 makes of NFC text with the published ranks, pattern and special tokens.
TIKTOKEN = {
    "Hello, world!": [9707, 11, 1879, 0],
    "你好，世界！通知：请各单位于2023年8月1日前上报。": [
        *(108386, 3837, 99489, 6313, 101151, 5122, 14880, 110246, 34204),
        *(17, 15, 17, 18, 7948, 23, 9754, 16, 104507, 109543, 1773),
    ],
    "xinqingbuhao，请将拼音转化汉字": [87, 5885, 287, 65, 12540, 3441, 37945, 44063, 116256, 101548, 114311],
    "def f(x):\n    return x**2  # It's\n\n\n": [
        750,
        282,
        2075,
        982,
        262,
        470,
        856,
        334,
        17,
        220,
        671,
        1084,
        594,
        1406,
    ],
    "<|im_start|>user\nhi<|im_end|>\n": [151644, 872, 198, 6023, 151645, 198],
    "<|extra_0|><|endoftext|>": [151646, 151643],
    "café cafe\u0301 A\u030a": [924, 58858, 51950, 79252],
    "12345 6.78": [16, 17, 18, 19, 20, 220, 21, 13, 22, 23],
    "   leading": [256, 6388],
    "trailing   ": [376, 14277, 262],
    "\r\n\t mixed\n \n": [319, 197, 9519, 26809],
    "😀👩\u200d🚀👋🏽": [141334, 145233, 378, 235, 145836, 145707, 145375],
    "DON'T we'll I'VE": [84641, 17323, 582, 3278, 358, 6, 4491],
    "日本語テキスト한국어": [101059, 102819, 56833, 61803, 70534, 23573, 124785, 31079],
    "": [],
}


def load(folder: Path, **settings):
    return load_tokenizer(ModelArguments(model_name_or_path=str(folder), **settings))


@pytest.fixture(scope="module")
def published(fixture_path, tmp_path_factory):
    """The real vocabulary in a folder as published, whose Python files raise when they are run."""
    ranks = fixture_path("qwen-tiktoken") / FILE
    return load(make_qwen1(tmp_path_factory.mktemp("qwen"), vocabulary="real", tiktoken=ranks), trust_remote_code=True)


@pytest.mark.parametrize("text", TIKTOKEN)
def test_text_becomes_the_ids_that_tiktoken_gives_and_comes_back_in_nfc(published, text):
    assert published(text).input_ids == TIKTOKEN[text]
    assert published.decode(TIKTOKEN[text]) == unicodedata.normalize("NFC", text)


def test_special_tokens_follow_the_published_ranks(published):
    assert published.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [151643, 151644, 151645]
    assert published.convert_tokens_to_ids("<|extra_204|>") == len(published) - 1 == 151850
    assert published.decode([151644, 872, 198, 6023, 151645], skip_special_tokens=True) == "user\nhi"
    assert (published.eos_token, published.pad_token, published.padding_side) == ("<|endoftext|>",) * 2 + ("right",)


def test_saved_it_is_a_tokenizer_json_that_gives_the_same_ids_with_and_without_burnish(published, tmp_path):
    published.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    for again in (load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert all(again(text).input_ids == ids for text, ids in TIKTOKEN.items())
        assert (again.eos_token, again.pad_token, len(again)) == ("<|endoftext|>", "<|endoftext|>", 151851)
        assert again.model_input_names == published.model_input_names


def test_beside_a_model_and_its_own_code_the_saved_one_is_read(tmp_path):
    folder = make_qwen1(tmp_path)
    first = load(folder, add_special_tokens=["<|new|>"])
    first.save_pretrained(folder)
    assert load(folder, trust_remote_code=True).get_vocab() == first.get_vocab()
    assert load(folder)("<|new|>").input_ids == [len(first) - 1]


def test_batches_have_token_type_ids_as_those_of_its_own_class_had(published):
    batch = published(["a", "a b"], padding=True)
    assert batch["token_type_ids"] == [[0, 0], [0, 0]]
    assert batch["attention_mask"] == [[1, 0], [1, 1]]


def test_conversations_have_no_format_until_one_is_named(published):
    """A base model and a chat model have the same files; the chat models' format is ChatML."""
    with pytest.raises(UserError, match="template"):
        load_template(published, None)
    text = load_template(published, "qwen").prompt_text([{"role": "user", "content": "hi"}])
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_what_a_folder_says_of_its_tokenizer_goes_before_what_was_usual(tmp_path):
    folder = make_qwen1(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|im_end|>", "pad_token": "<|extra_0|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = load(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|extra_0|>")
    assert (tokenizer.chat_template, tokenizer.model_max_length) == ("{{ messages }}", 8192)


def test_the_vocabulary_alone_is_enough_beside_the_name_of_its_class_or_model(tmp_path):
    for name, text in (
        ("config.json", '{"model_type": "qwen"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "QWenTokenizer"}'),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / FILE).write_text(made_up_ranks())
        (folder / name).write_text(text)
        assert isinstance(load(folder), PreTrainedTokenizerFast)
        assert load(folder)("the user").input_ids == load(make_qwen1(tmp_path / "whole"))("the user").input_ids


def test_a_token_is_made_of_the_parts_that_lower_ranks_leave():
    """`abcd` from ab, cd, bc: bc has the lowest rank, so a|bc|d; then abc."""
    ranks = {b: n for n, b in enumerate([b"a", b"b", b"c", b"d", b"bc", b"ab", b"cd", b"abc", b"abcd"])}
    assert merges(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"c", b"d"), (b"a", b"bc"), (b"abc", b"d")]


# Files that are not whole


def lines_of(change) -> str:
    lines = made_up_ranks().splitlines()
    change(lines)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (made_up_ranks()[:-7], "line 337: is no token with its rank"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "line 1: is no token with its rank"),
        ("\n".join(made_up_ranks().splitlines()[:200]), "line 201: is the end, and 56 of the 256 bytes are no tokens"),
        (lines_of(lambda lines: lines.pop(300)), "line 301: has rank 301"),
        (lines_of(lambda lines: lines.insert(300, f"{base64.b64encode(b'a').decode()} 300")), "a token that was there"),
    ],
)
def test_a_torn_vocabulary_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError) as told:
        read_ranks(tmp_path / FILE)
    assert message in str(told.value)
    assert "copy the model's files again" in str(told.value)


def test_a_vocabulary_of_another_size_is_said_as_its_special_tokens_have_other_ids(tmp_path, capsys):
    tokenizer = load(make_qwen1(tmp_path))
    assert "holds 337 tokens, not the 151,643 of a published one" in capsys.readouterr().err
    assert len(tokenizer) == 337 + len(SPECIAL_TOKENS)


def test_a_first_qwen_without_its_vocabulary_is_refused(tmp_path):
    folder = make_qwen1(tmp_path)
    (folder / FILE).unlink()
    for trusted in (False, True):
        with pytest.raises(UserError, match=r"neither qwen\.tiktoken nor tokenizer\.json"):
            load(folder, trust_remote_code=trusted)
