from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from burnish.chat.template import load_template
from burnish.data.arguments import DataArguments
from burnish.data.encode import (
    AFTER_ANSWER,
    NOTHING_TRAINED,
    TOO_LONG,
    DocumentFrame,
    encode_pt,
    encode_sft,
    join_documents,
)
from burnish.data.shorten import END_OF_ANSWER, HEAD_OF_USER, NO_ROOM, OLDEST_ROUNDS
from burnish.types import IGNORE_INDEX, Example, Sample

WORDS = " ".join(f"word{number}" for number in range(400))


@pytest.fixture(scope="module")
def tokenizer(fixture_path):
    return AutoTokenizer.from_pretrained(fixture_path("smollm2"))


@pytest.fixture(scope="module")
def template(tokenizer):
    return load_template(tokenizer, None)


@pytest.fixture(scope="module")
def qwen3(fixture_path):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path("tokenizer-qwen3"))
    return tokenizer, load_template(tokenizer, None)


def talk(*texts, system="Be brief."):
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return messages


def encode(messages, template, **settings):
    return encode_sft(Example(tuple(messages), place="x.jsonl:7"), template, DataArguments(**settings))


def trained_text(sample, tokenizer):
    return tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX])


def test_the_answer_and_its_end_token_are_trained_and_nothing_else(tokenizer, template):
    [sample] = encode(talk("Who?", "I am Beacon."), template).samples
    assert trained_text(sample, tokenizer) == "I am Beacon.<|im_end|>"
    assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(
        talk("Who?", "I am Beacon."), tokenize=False
    )
    assert (sample.labels == np.where(sample.labels == IGNORE_INDEX, IGNORE_INDEX, sample.input_ids)).all()
    assert (sample.place, sample.input_ids.dtype, sample.labels.dtype) == ("x.jsonl:7", np.int32, np.int32)


def test_with_train_on_prompt_all_but_the_first_token_is_trained(template):
    [sample] = encode(talk("Who?", "I am Beacon."), template, train_on_prompt=True).samples
    assert sample.labels[0] == IGNORE_INDEX
    assert (sample.labels[1:] == sample.input_ids[1:]).all()


def test_turns_after_the_last_answer_are_left_out_and_counted(tokenizer, template):
    outcome = encode(talk("a", "b", "and now?"), template)
    assert outcome.cut == (AFTER_ANSWER,)
    assert "and now?" not in tokenizer.decode(outcome.samples[0].input_ids)


def test_a_conversation_with_nothing_to_train_is_dropped(template):
    messages = talk("a", "b")
    messages[-1]["train"] = False
    assert encode(messages, template).dropped == (NOTHING_TRAINED,)
    both = [*messages, *talk("c", "d", system="")]
    assert not encode(both, template, mask_history=True).dropped
    both[-1]["train"], both[2]["train"] = False, True
    assert encode(both, template, mask_history=True).dropped == (NOTHING_TRAINED,)


def test_the_oldest_turns_go_first_and_the_system_message_stays(tokenizer, template):
    turns = [f"{kind} {number} " + WORDS[:200] for number in range(6) for kind in ("question", "answer")]
    whole = encode(talk(*turns), template).samples[0]
    outcome = encode(talk(*turns), template, cutoff_len=len(whole) // 2 + 20)
    text = tokenizer.decode(outcome.samples[0].input_ids)
    assert (outcome.cut, outcome.dropped) == ((OLDEST_ROUNDS,), ())
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nquestion 3 ")
    assert text == tokenizer.apply_chat_template(talk(*turns[6:]), tokenize=False)
    assert trained_text(outcome.samples[0], tokenizer).startswith("answer 3 ")


@pytest.mark.parametrize("rounds_kept", [1, 2, 3, 4, 5])
def test_as_few_turns_are_left_out_as_do(template, rounds_kept):
    turns = [f"{kind} {number} " + WORDS[: 40 * number] for number in range(6) for kind in ("question", "answer")]
    kept = talk(*turns[-2 * rounds_kept :])
    need = max(np.flatnonzero(encode(kept, template).samples[0].labels != IGNORE_INDEX)) + 1
    [sample] = encode(talk(*turns), template, cutoff_len=need).samples
    assert len(sample) == need
    assert (sample.input_ids == encode(kept, template).samples[0].input_ids[:need]).all()


def test_what_stands_after_the_last_trained_token_goes_before_anything_else(template):
    [sample] = encode(talk("a", "b"), template).samples  # ends with the end token and a line break
    outcome = encode(talk("a", "b"), template, cutoff_len=len(sample) - 1)
    assert outcome.cut == ()
    assert (outcome.samples[0].input_ids == sample.input_ids[:-1]).all()


def test_the_head_of_the_last_user_message_goes_when_that_saves_the_answer(tokenizer, template):
    outcome = encode(talk("old", "older", WORDS, "short answer"), template, cutoff_len=100)
    [sample] = outcome.samples
    text = tokenizer.decode(sample.input_ids)
    assert outcome.cut == (OLDEST_ROUNDS, HEAD_OF_USER)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "word398 word399<|im_end|>" in text and "word0 " not in text
    assert trained_text(sample, tokenizer) == "short answer<|im_end|>"
    assert 94 <= len(sample) <= 100  # hardly more was cut than needed


def test_an_answer_that_does_not_fit_is_cut_and_never_learns_to_stop(tokenizer, template):
    outcome = encode(talk("Tell me.", WORDS), template, cutoff_len=100)
    [sample] = outcome.samples
    assert (outcome.cut, len(sample)) == ((END_OF_ANSWER,), 100)
    text = tokenizer.decode(sample.input_ids)
    prompt = tokenizer.apply_chat_template(talk("Tell me."), tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt + "word0 word1")
    assert WORDS.startswith(trained_text(sample, tokenizer))


def test_an_answer_whose_end_token_alone_does_not_fit_is_kept_without_it(tokenizer, template):
    [whole] = encode(talk("a", "b c d"), template).samples
    end = max(np.flatnonzero(whole.labels != IGNORE_INDEX))
    outcome = encode(talk("a", "b c d"), template, cutoff_len=int(end))
    assert outcome.cut == (END_OF_ANSWER,)
    assert trained_text(outcome.samples[0], tokenizer) == "b c d"


def test_a_short_question_is_never_emptied_to_save_the_end_of_an_answer(tokenizer, template):
    [whole] = encode(talk("Who are you?", WORDS[:200]), template).samples
    outcome = encode(talk("Who are you?", WORDS[:200]), template, cutoff_len=len(whole) - 6)
    assert outcome.cut == (END_OF_ANSWER,)
    assert "Who are you?<|im_end|>" in tokenizer.decode(outcome.samples[0].input_ids)


def test_a_question_and_an_answer_that_are_both_too_long_share_the_room(tokenizer, template):
    outcome = encode(talk(WORDS, WORDS), template, cutoff_len=120)
    [sample] = outcome.samples
    assert (set(outcome.cut), len(sample)) == ({HEAD_OF_USER, END_OF_ANSWER}, 120)
    trained = int((sample.labels != IGNORE_INDEX).sum())
    frame = len(tokenizer.apply_chat_template(talk(""), add_generation_prompt=True)["input_ids"])
    assert abs(trained - (120 - frame) / 2) <= 5


def test_a_prompt_that_leaves_no_room_for_an_answer_is_dropped(template):
    outcome = encode(talk("a", "b", system=WORDS), template, cutoff_len=50)
    assert (outcome.samples, outcome.dropped) == ((), (NO_ROOM,))


def test_overlong_drop_leaves_long_samples_out(template):
    outcome = encode(talk("a", WORDS), template, cutoff_len=100, overlong="drop")
    assert (outcome.samples, outcome.cut, outcome.dropped) == ((), (), (TOO_LONG,))
    assert encode(talk("a", "b"), template, cutoff_len=100, overlong="drop").samples


def test_only_the_question_of_the_last_trained_answer_is_shortened(tokenizer, template):
    messages = talk("first " + WORDS, "one", "second", WORDS)
    messages[-1]["train"] = False
    [sample] = encode(messages, template, cutoff_len=100).samples
    assert trained_text(sample, tokenizer) == "one<|im_end|>"


def test_a_tool_round_is_kept_together(qwen3):
    tokenizer, template = qwen3
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    rounds = [
        *talk("old " + WORDS[:400], "older", system=""),
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    outcome = encode(rounds, template, cutoff_len=90, mask_history=True)
    assert outcome.cut == (OLDEST_ROUNDS,)
    text = tokenizer.decode(outcome.samples[0].input_ids)
    assert text.startswith("<|im_start|>user\n1+1?") and '"name": "add"' in text and "<tool_response>" in text


def test_a_thinking_template_gives_each_answer_a_sample_and_each_is_shortened_by_itself(qwen3):
    tokenizer, template = qwen3
    messages = talk("q0", "a0", "q1 " + WORDS[:500], "a1", "q2", "a2", system="")
    assert len(encode(messages, template).samples) == 3
    outcome = encode(messages, template, cutoff_len=120)
    texts = [tokenizer.decode(sample.input_ids) for sample in outcome.samples]
    assert [text.rsplit("</think>\n\n", 1)[1].removesuffix("\n") for text in texts] == [
        "a0<|im_end|>",
        "a1<|im_end|>",
        "a2<|im_end|>",
    ]
    assert ["q0" in text for text in texts] == [True, False, False]
    assert all(len(sample) <= 120 for sample in outcome.samples)
    assert OLDEST_ROUNDS in outcome.cut
    assert len(encode(messages, template, cutoff_len=120, mask_history=True).samples) == 1


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("cutoff_len", [8, 20, 33, 64, 100, 200, 400])
def test_no_sample_is_longer_than_the_cutoff_and_each_trains_something(template, qwen3, cutoff_len, train_on_prompt):
    messages = talk("q0 " + WORDS[:300], "a0 " + WORDS[:200], "q1", "a1 " + WORDS[:900], "q2 " + WORDS[:600], "a2")
    for one in (template, qwen3[1]):
        outcome = encode(messages, one, cutoff_len=cutoff_len, train_on_prompt=train_on_prompt)
        assert outcome.samples or outcome.dropped
        for sample in outcome.samples:
            assert len(sample) <= cutoff_len
            assert sample.num_trained > 0


def document(*ids):
    return Sample(np.array(ids, dtype=np.int32), np.array(ids, dtype=np.int32), f"x.txt:{ids[0]}")


def test_documents_are_cut_into_rows_of_exactly_cutoff_len_with_borders_kept():
    rows = list(join_documents([document(1, 2, 3, 0), document(4, 5, 0), document(6, 0)], 5))
    assert [row.input_ids.tolist() for row in rows] == [[1, 2, 3, 0, 4], [5, 0, 6, 0]]
    assert [row.documents for row in rows] == [(4, 1), (2, 2)]
    assert [row.place for row in rows] == ["x.txt:1", "x.txt:4"]
    _ = IGNORE_INDEX
    assert [row.labels.tolist() for row in rows] == [[_, 2, 3, 0, _], [_, 0, _, 0]]


@pytest.mark.parametrize("cutoff_len", [2, 3, 7, 10, 64])
def test_no_token_is_lost_when_documents_are_joined(cutoff_len):
    rng = np.random.default_rng(0)
    documents = [document(*rng.integers(1, 99, rng.integers(1, 30))) for _ in range(20)]
    rows = list(join_documents(documents, cutoff_len))
    assert np.array_equal(np.concatenate([r.input_ids for r in rows]), np.concatenate([d.input_ids for d in documents]))
    assert {len(row) for row in rows[:-1]} == {cutoff_len} and 0 < len(rows[-1]) <= cutoff_len
    assert all(sum(row.documents) == len(row) for row in rows)


def test_documents_that_end_with_the_row_leave_no_empty_row():
    assert [row.documents for row in join_documents([document(1, 2), document(3, 4)], 2)] == [(2,), (2,)]


def test_a_document_ends_as_texts_do_not_as_turns_of_chat_do(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    frame = DocumentFrame.of(tokenizer)
    example = Example(({"role": "assistant", "content": "Hello."},), place="x.txt:1")
    [made] = encode_pt(example, tokenizer, frame).samples
    assert tokenizer.decode(made.input_ids) == "Hello.<|endoftext|>"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer-qwen3", "Hello.<|endoftext|>"),
        ("tokenizer-llama3_1", "<|begin_of_text|>Hello.<|end_of_text|>"),
        pytest.param("tokenizer-gemma3", "<bos>Hello.<eos>", marks=pytest.mark.slow),
    ],
)
def test_a_document_has_the_frame_that_its_model_was_pretrained_with(fixture_path, name, text):
    tokenizer = AutoTokenizer.from_pretrained(fixture_path(name))
    example = Example(({"role": "assistant", "content": "Hello."},))
    [made] = encode_pt(example, tokenizer, DocumentFrame.of(tokenizer)).samples
    assert tokenizer.decode(made.input_ids) == text
