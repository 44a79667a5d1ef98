"""The engine on a real tokenizer: a small random model where any words will do, SmolLM2 where they must be right."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from burnish.chat.template import load_template
from burnish.errors import UserError
from burnish.generate.arguments import GeneratingArguments
from burnish.generate.engine import DEFAULT_NEW_TOKENS, Engine
from burnish.generate.stream import TextPieces, decode
from burnish.types import Message

FRANCE: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def tokenizer(fixture_path: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(fixture_path("smollm2"))


@pytest.fixture
def engine(tokenizer: Any) -> Engine:
    """A Llama with random weights and 64 positions."""
    model = small_model("llama", vocab_size=len(tokenizer), max_position_embeddings=64)
    return Engine(model, tokenizer, load_template(tokenizer, None), GeneratingArguments(max_new_tokens=12))


@pytest.fixture(scope="module")
def smollm2(tokenizer: Any, fixture_path: Callable[[str], Path]) -> Engine:
    model = AutoModelForCausalLM.from_pretrained(fixture_path("smollm2"), dtype=torch.float32)
    return Engine(model, tokenizer, load_template(tokenizer, None), GeneratingArguments(do_sample=False))


def read(pieces: Any) -> tuple[list[str], Message]:
    """What a stream gave piece by piece, and what it returned."""
    given: list[str] = []
    while True:
        try:
            given.append(next(pieces))
        except StopIteration as end:
            return given, end.value


# ---- a real model ----------------------------------------------------------------------------------------------------


def test_the_real_model_knows_the_capital_of_france(smollm2: Engine):
    pieces, answer = read(smollm2.chat(FRANCE))
    assert len(pieces) > 3
    assert "".join(pieces) == "The capital of France is Paris."
    assert answer == {"role": "assistant", "content": "The capital of France is Paris."}


def test_a_padded_batch_answers_as_each_prompt_by_itself(smollm2: Engine):
    questions = ["What is the capital of France?", "Hi", "What is the capital of Germany? Use one short sentence."]
    prompts = [smollm2.template.prompt([{"role": "user", "content": text}]) for text in questions]
    assert len({len(prompt) for prompt in prompts}) == 3
    alone = smollm2.generate(prompts, max_new_tokens=8)
    assert smollm2.generate(prompts, batch_size=3, max_new_tokens=8) == alone
    assert smollm2.tokenizer.decode(alone[0]) == "The capital of France is Paris.<|im_end|>"


# ---- text out of tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["你好，世界", "🦊 and 👩‍👩‍👧", "naïve café", "a .  b\n\n\tc"])
def test_no_piece_holds_half_a_character(tokenizer: Any, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = TextPieces(tokenizer)
    given = [pieces.push(token_id) for token_id in ids]
    assert "".join(given) == text
    assert not any("\ufffd" in piece for piece in given)
    assert pieces.flush() == ""


def test_what_never_became_a_character_comes_out_at_the_end(tokenizer: Any):
    cut = tokenizer.encode("ok 🦊", add_special_tokens=False)[:-1]
    pieces = TextPieces(tokenizer)
    given = "".join(pieces.push(token_id) for token_id in cut)
    assert given == "ok"
    assert pieces.flush() == " \ufffd"
    assert decode(tokenizer, cut) == "ok \ufffd"


def test_the_pieces_of_any_tokens_are_their_text(tokenizer: Any):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(len(tokenizer), (30,), generator=generator).tolist()
        for skip in (True, False):
            pieces = TextPieces(tokenizer, skip)
            assert "".join([*map(pieces.push, ids), pieces.flush()]) == decode(tokenizer, ids, skip)


def test_a_stream_is_the_text_of_what_is_generated_at_once(engine: Engine):
    """Sampled from random weights, so that tokens that are half a character are among them."""
    for seed in range(3):
        torch.manual_seed(seed)
        pieces, answer = read(engine.chat(FRANCE, do_sample=True, max_new_tokens=25))
        torch.manual_seed(seed)
        [ids] = engine.generate([engine.template.prompt(FRANCE)], do_sample=True, max_new_tokens=25)
        assert "".join(pieces) == decode(engine.tokenizer, ids)
        assert answer == engine.template.parse(ids)


# ---- how long, how drawn ---------------------------------------------------------------------------------------------


def test_an_answer_ends_at_the_templates_stop_token_and_keeps_it(engine: Engine):
    prompt = engine.template.prompt(FRANCE)
    [free] = engine.generate([prompt], do_sample=False)
    engine.template.stop_ids = [free[4]]
    first = free.index(free[4])
    assert engine.generate([prompt], do_sample=False) == [free[: first + 1]]
    assert "".join(read(engine.chat(FRANCE, do_sample=False))[0]) == decode(engine.tokenizer, free[:first])


def test_the_models_own_habit_holds_where_nothing_is_asked(engine: Engine):
    own = engine.model.generation_config
    own.do_sample, own.temperature, own.top_p, own.max_new_tokens = True, 0.6, 0.8, 7
    merged, _ = engine.model._prepare_generation_config(engine.generation_config(GeneratingArguments(), 10))
    assert (merged.do_sample, merged.temperature, merged.top_p, merged.max_new_tokens) == (True, 0.6, 0.8, 7)
    asked = GeneratingArguments(temperature=0.2, max_new_tokens=3)
    merged, _ = engine.model._prepare_generation_config(engine.generation_config(asked, 10))
    assert (merged.do_sample, merged.temperature, merged.top_p, merged.max_new_tokens) == (True, 0.2, 0.8, 3)


@pytest.mark.parametrize(
    ("asked", "own", "samples"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"temperature": 0.7}, False, True),
        ({"top_p": 0.9}, False, True),
        ({"temperature": 0.0}, True, False),
        ({"temperature": 0.7, "do_sample": False}, True, False),
        ({"temperature": 0.0, "do_sample": True}, True, False),
    ],
)
def test_who_sets_how_to_draw_draws_and_temperature_0_does_not(
    engine: Engine, asked: dict[str, Any], own: bool, samples: bool
):
    engine.model.generation_config.do_sample = own
    assert engine.generation_config(GeneratingArguments(**asked), 10).do_sample is samples


@pytest.mark.parametrize("own_length", [{}, {"max_length": 40}, {"max_new_tokens": 40}])
def test_greedy_decoding_warns_of_nothing(engine: Engine, own_length: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    """Neither of sampling settings that the model brings along nor of two words for the length."""
    heard: list[str] = []
    for method in ("warning", "warning_once"):
        monkeypatch.setattr(transformers_logging.get_logger("transformers").__class__, method, heard_by(heard))
    own = engine.model.generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k = True, 0.6, 0.8, 20
    for name, value in own_length.items():
        setattr(own, name, value)
    assert len(engine.generate([engine.template.prompt(FRANCE)], do_sample=False, max_new_tokens=4)[0]) <= 4
    assert heard == []


def heard_by(heard: list[str]) -> Callable[..., None]:
    return lambda logger, message, *args, **kwargs: heard.append(message)


def test_the_answer_ends_where_the_models_positions_do(engine: Engine):
    prompt = list(range(100, 160))  # 60 of 64
    [answer] = engine.generate([prompt], do_sample=False, max_new_tokens=50)
    assert len(answer) == 4


def test_an_unbounded_answer_has_the_default_length(engine: Engine):
    engine.model.config.max_position_embeddings = 10_000
    assert engine.generation_config(GeneratingArguments(), 10).max_new_tokens == DEFAULT_NEW_TOKENS
    assert engine.generation_config(GeneratingArguments(max_length=50), 10).max_new_tokens == 40


def test_prompts_that_do_not_fit_are_told_all_at_once(engine: Engine):
    with pytest.raises(UserError) as error:
        engine.generate([[5] * 64, [5], [], [5] * 70])
    assert [str(problem).partition(";")[0] for problem in error.value.problems] == [
        "prompt 1 of 4: has 64 tokens",
        "prompt 3 of 4: is empty",
        "prompt 4 of 4: has 70 tokens",
    ]
    with pytest.raises(UserError, match="max_length 8 leaves no room for an answer to a prompt of 9 tokens"):
        engine.generate([[5] * 9], max_new_tokens=None, max_length=8)


def test_a_conversation_that_does_not_fit_is_refused_before_the_first_piece(engine: Engine):
    with pytest.raises(UserError, match="64 positions"):
        engine.chat([{"role": "user", "content": "word " * 100}])


def test_beams_give_the_answer_in_one_piece(engine: Engine):
    pieces, answer = read(engine.chat(FRANCE, num_beams=2, length_penalty=0.5, do_sample=False))
    [ids] = engine.generate([engine.template.prompt(FRANCE)], num_beams=2, length_penalty=0.5, do_sample=False)
    assert "".join(pieces) == decode(engine.tokenizer, ids)
    assert answer == engine.template.parse(ids)


# ---- the thread --------------------------------------------------------------------------------------------------


@pytest.fixture
def forwards(engine: Engine) -> Iterator[list[float]]:
    """One entry a forward pass, each slow enough that a reader can be quicker."""
    made: list[float] = []

    def count(*_: Any) -> None:
        made.append(time.monotonic())
        time.sleep(0.02)

    hook = engine.model.register_forward_pre_hook(count)
    yield made
    hook.remove()


def test_closing_a_stream_ends_the_generation_at_the_next_token(engine: Engine, forwards: list[float]):
    engine.template.stop_ids = []
    engine.model.generation_config.eos_token_id = None
    threads = threading.active_count()
    pieces = engine.chat([{"role": "user", "content": "a"}], do_sample=True, max_new_tokens=30)
    next(pieces)
    read_so_far = len(forwards)
    pieces.close()
    assert len(forwards) <= read_so_far + 2
    assert threading.active_count() == threads
    assert [len(ids) for ids in engine.generate([[5, 6]], max_new_tokens=3)] == [3]  # and the next one goes on


def test_a_set_event_ends_a_batch(engine: Engine, forwards: list[float]):
    stop = threading.Event()
    stop.set()
    assert engine.generate([[5, 6], [7]], batch_size=2, stop=stop) == [[], []]
    assert forwards == []


def test_what_goes_wrong_in_the_thread_is_raised_to_the_reader(engine: Engine):
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    hook = engine.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(engine.chat(FRANCE))
    hook.remove()
    assert list(engine.chat(FRANCE, do_sample=True))


def test_two_streams_at_once_do_not_mix(engine: Engine):
    alone = ["".join(engine.chat(FRANCE, do_sample=False))] * 2
    streams = [engine.chat(FRANCE, do_sample=False) for _ in range(2)]
    texts = ["", ""]
    threads = [threading.Thread(target=lambda i=i: texts.__setitem__(i, "".join(streams[i]))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == alone


def test_a_model_that_is_being_trained_goes_back_to_training(engine: Engine):
    engine.model.train()
    seen: list[bool] = []
    hook = engine.model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    engine.generate([[5, 6, 7]], max_new_tokens=2)
    hook.remove()
    assert seen and not any(seen)
    assert engine.model.training
