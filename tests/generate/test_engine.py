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
from burnish.generate.arguments import GeneratingArguments, RequestOptions
from burnish.generate.config import DEFAULT_NEW_TOKENS
from burnish.generate.engine import Engine
from burnish.generate.stream import Piece, TextPieces, decode
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


@pytest.mark.parametrize("asked", [{"top_p": 0.9}, {"do_sample": True}, {"top_k": 5}, {}])
def test_the_models_own_temperature_0_does_not_draw_either(engine: Engine, asked: dict[str, Any]):
    own = engine.model.generation_config
    own.do_sample, own.temperature = True, 0.0
    assert engine.generation_config(GeneratingArguments(**asked), 10).do_sample is False
    assert len(streamed(engine, **asked)) > 0
    assert engine.generation_config(GeneratingArguments(temperature=0.5), 10).do_sample is True


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


def test_a_token_without_a_row_is_named(engine: Engine):
    """A vocabulary may have tokens that the model was never given rows for."""
    engine.model.resize_token_embeddings(len(engine.tokenizer) - 1)
    last = len(engine.tokenizer) - 1
    with pytest.raises(UserError) as error:
        engine.generate([[5], [5, last] * 40])
    token = engine.tokenizer.convert_ids_to_tokens(last)
    message = f"prompt 2 of 2: holds the token {token!r} (id {last}), for which the model has no row; leave it out"
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_theta": 10000.0}, 64),
        ({"rope_type": "dynamic", "factor": 3.0}, 192),
        ({"rope_type": "linear", "factor": 3.0}, 64),
        ({"full": {"rope_type": "dynamic", "factor": 3.0}, "sliding": {"rope_type": "default"}, "none": None}, 192),
    ],
)
def test_dynamic_scaling_stretches_the_positions_of_the_config(engine: Engine, rope: dict[str, Any], positions: int):
    engine.model.config.rope_parameters = rope
    assert engine.max_positions == positions


def test_a_conversation_that_does_not_fit_is_refused_before_the_first_piece(engine: Engine):
    with pytest.raises(UserError, match="64 positions"):
        engine.chat([{"role": "user", "content": "word " * 100}])


def test_beams_give_the_answer_in_one_piece(engine: Engine):
    pieces, answer = read(engine.chat(FRANCE, num_beams=2, length_penalty=0.5, do_sample=False))
    [ids] = engine.generate([engine.template.prompt(FRANCE)], num_beams=2, length_penalty=0.5, do_sample=False)
    assert "".join(pieces) == decode(engine.tokenizer, ids)
    assert answer == engine.template.parse(ids)


# ---- what one request may ask for ------------------------------------------------------------------------------------


def streamed(engine: Engine, options: RequestOptions | None = None, **overrides: Any) -> list[Piece]:
    return list(engine.stream(engine.template.prompt(FRANCE), options, **overrides))


def ids_of(pieces: list[Piece]) -> list[int]:
    return [token.id for piece in pieces for token in piece.tokens]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_pieces_hold_the_tokens_of_their_text_and_the_last_says_why_it_ended(engine: Engine):
    [ids] = engine.generate([engine.template.prompt(FRANCE)], do_sample=False)
    pieces = streamed(engine, do_sample=False)
    assert (ids_of(pieces), text_of(pieces)) == (ids, decode(engine.tokenizer, ids))
    assert all(piece.text == decode(engine.tokenizer, ids_of([piece])) for piece in pieces)
    assert [piece.finish_reason for piece in pieces[:-1]] == [""] * (len(pieces) - 1)
    assert (pieces[-1].finish_reason, pieces[-1].num_generated) == ("length", 12)
    engine.template.stop_ids = [ids[5]]
    ended = streamed(engine, do_sample=False)
    first = ids.index(ids[5])
    assert (ids_of(ended), ended[-1].finish_reason, ended[-1].num_generated) == (ids[:first], "end", first + 1)


def test_an_answer_ends_before_the_first_stop_string(smollm2: Engine):
    def stopped(*words: str) -> tuple[str, str, int, str]:
        pieces = streamed(smollm2, RequestOptions(stop_strings=words), do_sample=False)
        last = pieces[-1]
        return text_of(pieces), last.finish_reason, last.num_generated, decode(smollm2.tokenizer, ids_of(pieces))

    assert stopped("of Fra") == ("The capital ", "stop_string", 4, "The capital of")  # inside a token, and over two
    assert stopped("zebra", " is", "Paris") == ("The capital of France", "stop_string", 5, "The capital of France")
    assert stopped("The") == ("", "stop_string", 1, "")
    assert stopped("is Paris!") == ("The capital of France is Paris.", "end", 8, "The capital of France is Paris.")


def test_a_stop_string_ends_the_generation_too(engine: Engine, forwards: list[float]):
    full = text_of(streamed(engine, do_sample=False))
    forwards.clear()
    streamed(engine, RequestOptions(stop_strings=(full[:3],)), do_sample=False)
    assert len(forwards) <= 4


def test_a_seed_draws_the_same_and_moves_no_other_dice(engine: Engine):
    def drawn(seed: int | None) -> list[int]:
        return ids_of(streamed(engine, RequestOptions(seed=seed), do_sample=True, temperature=2.0, top_k=0))

    before = torch.get_rng_state()
    first = drawn(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn(5) == first != drawn(6)
    assert drawn(None) != drawn(None)
    assert drawn(-1) == drawn(-1)


def test_penalties_count_what_the_answer_has_said_and_not_its_prompt(engine: Engine):
    prompt = engine.template.prompt(FRANCE)

    def penalized(**how: float) -> list[int]:
        return ids_of(streamed(engine, RequestOptions(**how), do_sample=False))

    def by_hand(presence: float, frequency: float) -> list[int]:
        answer: list[int] = []
        while len(answer) < 12:
            with torch.no_grad():
                logits = engine.model(torch.tensor([prompt + answer])).logits[0, -1]
            for token_id in set(answer):
                logits[token_id] -= presence + frequency * answer.count(token_id)
            answer.append(int(logits.argmax()))
        return answer

    engine.template.stop_ids = []
    engine.model.generation_config.eos_token_id = None
    with torch.no_grad():
        engine.model.lm_head.weight *= 0.02  # so that a penalty can move a choice
        engine.model.lm_head.weight[prompt[3]] *= 100  # and a token of the prompt is liked
    assert penalized(presence_penalty=0.3) == by_hand(0.3, 0)
    assert penalized(frequency_penalty=0.2) == by_hand(0, 0.2)
    assert penalized(presence_penalty=-0.5, frequency_penalty=0.7) == by_hand(-0.5, 0.7)
    assert len({tuple(penalized(presence_penalty=p, frequency_penalty=f)) for p in (0, 1) for f in (0, 1)}) > 1


def test_logprobs_are_the_models_own_whatever_changes_what_is_drawn(engine: Engine):
    prompt = engine.template.prompt(FRANCE)
    options = RequestOptions(top_logprobs=3, frequency_penalty=1.0, seed=1)
    pieces = streamed(engine, options, do_sample=True, temperature=1.7, top_p=0.9, repetition_penalty=1.5)
    tokens = [token for piece in pieces for token in piece.tokens]
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt + ids_of(pieces)])).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    assert len(tokens) == 12
    for token, row in zip(tokens, logprobs, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [logprob for _, logprob in token.likeliest] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    plain = streamed(engine, RequestOptions(frequency_penalty=1.0, seed=1), do_sample=True, temperature=1.7, top_p=0.9,
                     repetition_penalty=1.5)  # fmt: skip
    assert ids_of(plain) == ids_of(pieces)
    with pytest.raises(UserError, match="num_beams 2 gives no logprobs"):
        streamed(engine, options, num_beams=2)


def test_an_event_ends_a_stream_from_outside(engine: Engine, forwards: list[float]):
    stop = threading.Event()
    pieces = engine.stream(engine.template.prompt(FRANCE), stop=stop, do_sample=False, max_new_tokens=30)
    next(pieces)
    stop.set()
    assert list(pieces)[-1].finish_reason == "length"
    assert len(forwards) < 10


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
