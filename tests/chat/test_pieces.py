"""Borders of tokens, on small tokenizers made to be difficult: spaces put before words, trimmed offsets, no offsets."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from burnish.chat.pieces import Rendered, TextEncoder

TEXTS = ["Hello there, how are you?", "Assistant: Hello", "A: Hello\n\nB: Hello", "  two spaces", "ab abc bc"] * 3
END = AddedToken("<end>", special=True, normalized=False)


def sentencepiece_like(*, everywhere: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's: "Hello" at the beginning of a text is "▁Hello"."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    if everywhere:  # behind every special token too
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", END], show_progress=False)
    tokenizer.train_from_iterator([*" ".join(TEXTS).split(), "\n"], trainer)  # no token longer than a word
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


def bytes_level(*, trim_offsets: bool = False, by_words: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's, or as RoBERTa's: there the offsets of " Hello" leave out the space. `by_words`: see words.py."""
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    unknown = pre_tokenizers.Split("\0", "isolated")  # does nothing, but is in no tokenizer that words.py knows
    tokenizer.pre_tokenizer = bytes_ if by_words else pre_tokenizers.Sequence([unknown, bytes_])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


class InPython(PreTrainedTokenizer):
    """Written in Python, so without offsets: one token a letter, and one for two newlines."""

    def __init__(self, **settings):
        self._letters = ["\n\n", *map(chr, range(1, 127))]
        super().__init__(eos_token="<end>", **settings)

    @property
    def vocab_size(self) -> int:
        return len(self._letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(self._letters)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_) -> list[str]:
        parts = text.split("\n\n")
        return [token for i, part in enumerate(parts) for token in ([*part] if i == 0 else ["\n\n", *part])]

    def _convert_token_to_id(self, token: str) -> int:
        return self._letters.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._letters[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


TOKENIZERS = {
    "a space before the first word": lambda: sentencepiece_like(everywhere=False),
    "a space before every first word": lambda: sentencepiece_like(everywhere=True),
    "offsets without spaces": lambda: bytes_level(trim_offsets=True),
    "offsets with spaces": lambda: bytes_level(trim_offsets=False),
    "words, and no offsets": lambda: bytes_level(by_words=True),
    "no offsets": InPython,
}


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [*dict.fromkeys(TEXTS), "Assistant: Hello<end>\n\nB: Hello", "<end>Hello<end> Hello"])
def test_a_border_is_found_just_where_the_text_before_it_has_the_first_ids_of_the_whole(name, text):
    tokenizer = TOKENIZERS[name]()
    tokens = TextEncoder(tokenizer).encode(Rendered(text))
    assert tokens.ids == ids_of(tokenizer, text)
    found = 0
    for border in range(1, len(text) + 1):
        head = ids_of(tokenizer, text[:border])
        index = tokens.index_at(border)
        if index is None:
            # no border of tokens here, or the tokenizer reads the beginning otherwise when it stands alone
            assert head != tokens.ids[: len(head)]
        else:
            found += 1
            assert head == tokens.ids[:index]
    assert found >= 2


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_cut_keeps_every_letter_and_begins_with_the_ids_of_the_text_before_it(name):
    tokenizer = TOKENIZERS[name]()
    encoder = TextEncoder(tokenizer)
    for text in ("Assistant: Hello", "A:Hello\n\nB: Hello", "ab abc bc"):
        for cut in range(1, len(text)):
            tokens = encoder.encode(Rendered(text), [cut])
            head = ids_of(tokenizer, text[:cut])
            assert tokens.ids[: len(head)] == head
            assert tokens.index_at(cut) == len(head)
            decoded = tokenizer.decode(tokens.ids, skip_special_tokens=False)
            assert decoded.replace(" ", "") == text.replace(" ", "")


def test_words_behind_a_cut_get_no_space_of_their_own():
    tokenizer = sentencepiece_like(everywhere=True)
    tokens = TextEncoder(tokenizer).encode(Rendered("A:Hello"), [2])
    behind = tokens.ids[tokens.index_at(2) :]
    assert "".join(tokenizer.convert_ids_to_tokens(behind)) == "Hello"
    assert tokenizer.convert_ids_to_tokens(ids_of(tokenizer, "Hello"))[0].startswith("▁")


def test_the_space_that_offsets_do_not_show_is_seen():
    tokenizer = bytes_level(trim_offsets=True)
    text = "Assistant: Hello"
    tokens = TextEncoder(tokenizer).encode(Rendered(text))
    assert tokenizer.convert_ids_to_tokens(tokens.ids)[-1] == "ĠHello"
    border = len("Assistant: ")
    assert tokens.index_at(border) is None, "the last token begins with the space before the border"
    assert tokens.index_at(border - 1) == len(tokens.ids) - 1


def test_a_marker_that_swallows_white_space_ends_behind_it():
    tokenizer = bytes_level(trim_offsets=False)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False, rstrip=True)])
    tokens = TextEncoder(tokenizer).encode(Rendered("Hello<|end|>\n<|end|>Hello"))
    marker = tokenizer.convert_tokens_to_ids("<|end|>")
    border = len("Hello<|end|>")
    assert tokens.ids.count(marker) == 2
    assert tokens.index_at(border) is None
    assert tokens.index_at(border, after_marker=True) == tokens.ids.index(marker) + 1


def test_settings_that_others_left_on_the_tokenizer_change_nothing():
    tokenizer = bytes_level(trim_offsets=True)
    encoder = TextEncoder(tokenizer)
    expected = encoder.ids(Rendered("Assistant: Hello<end>"))
    tokenizer.pad_token = "<end>"
    tokenizer(["a", "Assistant: Hello"], padding="max_length", max_length=3, truncation=True)
    assert encoder.ids(Rendered("Assistant: Hello<end>")) == expected
    tokenizer("a<end>", split_special_tokens=True)
    assert encoder.ids(Rendered("Assistant: Hello<end>")) == expected
