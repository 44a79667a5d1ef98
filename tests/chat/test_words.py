"""Ids made word by word are those of the tokenizer, whatever the text: tried on published tokenizers."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from burnish.chat import words
from burnish.chat.pieces import Rendered, TextEncoder
from burnish.chat.words import WordTokenizer

KNOWN = ("smollm2", "tokenizer-qwen3", "tokenizer-llama3")
DIFFICULT = [
    *("<|im_start|>", "<|im_end|>", "<|im_end", "<think>", "</think>", "<|eot_id|>", "<|begin_of_text|>", "\n", "\n\n"),
    *(" ", "  ", "\t", "\r\n", "\u00a0", "\u3000", "a", "Hello", "don't", "I'LL", "'s", "'S", "ſ", "é", "e\u0301", "½"),
    *(
        "٣",
        "7",
        "1234567",
        "3.14",
        "中文",
        "。",
        "한국",
        "🙂",
        "👩\u200d👧",
        "\ufe0f",
        "—",
        "…",
        "_",
        "x_1",
        "\x00",
        "\x1c",
        "\x7f",
    ),
    *("\u2028", "ß", "ﬁ", "Ω", "Ж", "\U0001d4d0", "\u0e01", "\ud7a3", "!?", "  \n ", " 's", "(1)"),
]


@pytest.fixture(scope="module", params=KNOWN)
def tokenizer(request, fixture_path):
    return AutoTokenizer.from_pretrained(fixture_path(request.param))


@pytest.fixture(scope="module")
def known(tokenizer):
    by_words = WordTokenizer.of(tokenizer.backend_tokenizer)
    assert by_words
    return by_words


def ids_of(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def differing(tokenizer, known, texts):
    """Texts whose ids are others, and how many texts were left to the tokenizer."""
    made = {text: known.encode(text) for text in texts}
    wrong = [text for text, found in made.items() if found and found[0] != ids_of(tokenizer, text)]
    return wrong, sum(found is None for found in made.values())


def test_words_of_any_kind_side_by_side_give_the_ids_of_the_tokenizer(tokenizer, known):
    draw = random.Random(0)
    texts = ["".join(draw.choices(DIFFICULT, k=draw.randint(1, 9))) for _ in range(4000)]
    wrong, left = differing(tokenizer, known, texts)
    assert not wrong
    assert left < 2500


def test_any_two_characters_of_ascii_give_the_ids_of_the_tokenizer(tokenizer, known):
    characters = [chr(code) for code in range(128)]
    texts = ["".join(f"{one}{two}x{two}{one} 1" for two in characters) for one in characters]
    texts += ["".join(pair) for pair in itertools.product(characters, repeat=2)]
    wrong, left = differing(tokenizer, known, texts)
    assert not wrong
    assert left < 0.2 * len(texts)  # SmolLM2's vocabulary has no control characters


def test_every_character_that_is_not_strange_is_classed_as_the_tokenizer_classes_it(tokenizer, known):
    usual = [c for c in map(chr, range(0x110000)) if not words._STRANGE.match(c) and not "\ud800" <= c <= "\udfff"]
    assert len(usual) > 30_000
    groups = [usual[at : at + 16] for at in range(0, len(usual), 16)]
    wrong, left = differing(tokenizer, known, ["".join(f"a{c}1{c} {c}.{c}\n" for c in group) for group in groups])
    assert not wrong
    assert left < 0.05 * len(groups)


def test_a_real_conversation_is_not_left_to_the_tokenizer(fixture_path, tokenizer, known):
    rows = json.loads((fixture_path("llamafactory-data") / "data/alpaca_zh_demo.json").read_text(encoding="utf-8"))
    texts = [f"<|im_start|>user\n{row['instruction']}<|im_end|>\n{row['output']}" for row in rows[:100]]
    assert differing(tokenizer, known, texts) == ([], 0)


def test_markers_are_told_with_their_places_in_text_and_tokens(fixture_path):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("smollm2"))
    by_words = WordTokenizer.of(tokenizer.backend_tokenizer)
    assert by_words
    found = by_words.encode("ab <|im_start|>user\nHi<|im_end|>")
    assert found
    ids, markers = found
    assert [marker[:2] for marker in markers] == [(3, 15), (22, 32)]
    assert [ids[marker.token] for marker in markers] == tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])


def test_borders_are_those_that_the_tokenizers_own_offsets_give(tokenizer):
    by_words, by_offsets = TextEncoder(tokenizer), TextEncoder(tokenizer)
    by_offsets._words = None
    draw = random.Random(1)
    for _ in range(60):
        text = "<|im_start|>" + "".join(draw.choices([d for d in DIFFICULT if d.isprintable()], k=7))
        one, other = by_words.encode(Rendered(text)), by_offsets.encode(Rendered(text))
        for at, after_marker in itertools.product(range(len(text) + 1), (False, True)):
            border = f"{text!r} at {at}, {after_marker}"
            assert one.index_at(at, after_marker=after_marker) == other.index_at(at, after_marker=after_marker), border
            assert one.index_of(at) == other.index_of(at), border


@pytest.mark.parametrize("name", ["tokenizer-gemma3", "tokenizer-deepseek_v3"])
def test_tokenizers_that_do_not_work_word_by_word_are_left_alone(name, fixture_path):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path(name))
    assert WordTokenizer.of(tokenizer.backend_tokenizer) is None


def test_a_tokenizer_whose_added_tokens_swallow_spaces_is_left_alone(fixture_path):
    backend = AutoTokenizer.from_pretrained(fixture_path("smollm2")).backend_tokenizer
    assert WordTokenizer.of(backend)
    backend.add_tokens([AddedToken("<swallows>", rstrip=True, normalized=False)])
    assert WordTokenizer.of(backend) is None


def test_a_tokenizer_that_draws_its_merges_is_left_alone(fixture_path):
    backend = AutoTokenizer.from_pretrained(fixture_path("smollm2")).backend_tokenizer
    backend.model.dropout = 0.1
    assert WordTokenizer.of(backend) is None


def test_a_text_with_a_byte_that_the_vocabulary_lacks_is_left_to_the_tokenizer(fixture_path):
    by_words = WordTokenizer.of(AutoTokenizer.from_pretrained(fixture_path("smollm2")).backend_tokenizer)
    assert by_words
    assert by_words.encode("a\x04b") is None
    assert by_words.encode("ab")


def test_only_so_many_words_are_remembered_and_they_are_the_latest(fixture_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("smollm2"))
    monkeypatch.setattr(words, "_REMEMBERED_WORDS", 10)
    by_words = WordTokenizer.of(tokenizer.backend_tokenizer)
    assert by_words
    text = "one two three four five six seven eight nine ten eleven twelve thirteen " + "e" * 40
    found = by_words.encode(text)
    assert found and found[0] == ids_of(tokenizer, text)
    assert len(by_words._ids_of) <= 10 and max(map(len, by_words._ids_of)) <= words._LONGEST_WORD
    assert " thirteen" in by_words._ids_of
