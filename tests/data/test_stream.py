from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from transformers import AutoTokenizer

from burnish.chat.template import load_template
from burnish.data.arguments import DataArguments
from burnish.data.encode import ONE_TOKEN
from burnish.data.report import DataReport
from burnish.data.sources import get_dataset
from burnish.data.stream import StreamedSamples
from burnish.data.workers import RowEncoder
from burnish.errors import UserError

# Rewrites what was said before the last question, as templates of thinking models do: a sample for each answer.
REWRITES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last or m.role == 'user' else '-' }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(fixture_path):
    return AutoTokenizer.from_pretrained(fixture_path("smollm2"))


def conversation(number: int) -> dict[str, Any]:
    turns = [
        {"role": role, "content": f"{role} {number} {turn}"} for turn in range(3) for role in ("user", "assistant")
    ]
    return {"messages": turns}


def write(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def make(tmp_path, tokenizer):
    """A stream over files of conversations or texts; a row of each file is broken."""
    one = [conversation(number) for number in range(7)]
    other = [conversation(number) for number in range(10, 15)]
    texts = [{"text": f"text {number}. " * (number % 5 * 8 + 1)} for number in range(14)]
    files = {
        "sft": [write(tmp_path / "a.jsonl", [*one, "{broken"]), write(tmp_path / "b.jsonl", ["{", *other])],
        "pt": [write(tmp_path / "c.jsonl", [*texts[:9], "{broken"]), write(tmp_path / "d.jsonl", ["{", *texts[9:]])],
    }
    (tmp_path / "rewrites.jinja").write_text(REWRITES)
    template = load_template(tokenizer, str(tmp_path / "rewrites.jinja"))

    def stream(stage: str, **settings: Any) -> StreamedSamples:
        usual: dict[str, Any] = {"dataset": files[stage], "cutoff_len": 24 if stage == "pt" else 512, "buffer_size": 4}
        args = DataArguments(streaming=True, max_bad_rows=9, **(usual | settings))
        made = get_dataset(args, stage, tokenizer, template if stage == "sft" else None, seed=3).train
        assert isinstance(made, StreamedSamples)
        return made

    return stream


def seen(sample) -> tuple[Any, ...]:
    return sample.place, sample.input_ids.tolist(), sample.labels.tolist(), sample.documents


MIXED = {"mix_strategy": "interleave_over", "interleave_probs": [0.3, 0.7]}


@pytest.mark.parametrize("settings", [{}, MIXED, {"val_size": 3}, {"max_samples": 5, "buffer_size": 1}])
@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_from_any_place_a_stream_goes_on_as_if_it_had_not_stopped(make, stage, settings):
    whole, resumed = make(stage, **settings), make(stage, **settings)
    for epoch in (0, 3):
        whole.set_epoch(epoch)
        places = [whole.state_dict()]
        samples = []
        for sample in whole:
            samples.append(seen(sample))
            places.append(json.loads(json.dumps(whole.state_dict())))  # plain values, not what goes on changing
        report = whole.known.to_json()
        assert len(samples) > 6 and report["bad"]
        for number, place in enumerate(places):
            resumed.load_state_dict(place)
            assert resumed.state_dict() == place
            assert [seen(sample) for sample in resumed] == samples[number:]
            assert resumed.known.to_json() == report  # bad rows of the whole pass, each counted once
            assert resumed.epoch == epoch


def test_a_row_may_give_several_samples_and_a_stream_stops_among_them(make):
    places = [sample.place for sample in make("sft")]
    assert any(one == other for one, other in pairwise(places))


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_rows_before_the_place_are_not_encoded_again(make, stage, monkeypatch):
    stream = make(stage)
    samples = iter(stream)
    for _ in range(8):
        next(samples)
    place, rows_before = stream.state_dict(), stream.report.rows
    encoded = []
    encode = RowEncoder.encode
    monkeypatch.setattr(RowEncoder, "encode", lambda *args: encoded.append(args[1].place) or encode(*args))
    stream.load_state_dict(place)
    after = list(stream)
    assert len(after) > 3 and rows_before > 2
    assert len(encoded) <= stream.report.rows - rows_before + 1


def test_a_last_row_of_one_token_is_dropped_and_told_once_also_by_a_stream_that_goes_on_before_it(make, tmp_path):
    text = write(tmp_path / "one.jsonl", [{"text": "one two three four five"}])
    (whole,) = make("pt", dataset=[text])
    stream, resumed = (make("pt", dataset=[text], cutoff_len=len(whole) - 1) for _ in range(2))
    samples = iter(stream)
    assert seen(next(samples))[1] == whole.input_ids[:-1].tolist()
    resumed.load_state_dict(stream.state_dict())
    for rest, of in ((samples, stream), (resumed, resumed)):
        assert not list(rest)
        assert {reason: tally.count for reason, tally in of.known.dropped.items()} == {ONE_TOKEN: 1}


def test_a_set_that_has_become_shorter_is_told(make):
    stream = make("sft")
    list(stream)
    short = make("sft", max_samples=2)
    short.load_state_dict(stream.state_dict())
    with pytest.raises(UserError, match="has fewer rows than the 14 that this run had read of it; begin a new run"):
        list(short)


def test_what_is_known_of_a_stream_is_a_whole_pass_where_there_was_one(make):
    stream = make("sft")
    next(iter(stream))
    assert stream.known.rows == stream.report.rows < 14
    assert stream.known.notes == ["train: as far as the stream was read; it is longer"]
    list(stream)
    stream.set_epoch(1)
    next(iter(stream))
    assert stream.known.rows == 14 and not stream.known.notes
    resumed = make("sft")
    resumed.load_state_dict(stream.state_dict())
    assert resumed.known.to_json() == stream.known.to_json()


def test_too_many_bad_rows_stop_a_resumed_pass_too(make):
    stream = make("sft")
    state = {"epoch": 0, "waiting": 0, "report": DataReport(rows=1, hashes=None).to_json(), "whole": None}
    stream._encoder.args.max_bad_rows = 1
    stream.load_state_dict(state)
    with pytest.raises(UserError, match="2 of 14 rows"):
        list(stream)
