"""Tokens in, tokens out: a model, its tokenizer and its chat template, put to work through `model.generate`.

`Engine.chat` streams the text of one answer, `Engine.stream` its tokens too, `Engine.generate` answers many prompts.
What is not asked for comes from the model's own generation config. Who talks (a terminal, an evaluation, a server) and
where the settings come from is not known here; messages become ids only through the template.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from burnish.chat.template import CannotRender
from burnish.errors import Problem, UserError
from burnish.generate.arguments import RequestOptions
from burnish.generate.config import as_list, make_config, new_tokens, num_positions
from burnish.generate.logits import make_processors
from burnish.generate.stream import AnswerPieces, Piece, StopWhen, TextPieces, Token, TokenStream
from burnish.types import Message

if TYPE_CHECKING:
    from burnish.chat.template import ChatTemplate
    from burnish.generate.arguments import GeneratingArguments


class Engine:
    """One model that answers one call at a time; a call from another thread waits for its turn."""

    def __init__(self, model: Any, tokenizer: Any, template: ChatTemplate, generating: GeneratingArguments):
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.generating = generating
        self._turn = threading.Lock()

    def chat(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, **overrides: Any
    ) -> Generator[str, None, Message]:
        """The answer to a conversation, piece by piece; the generator returns it whole, as the template parses it.

        Closing the generator ends the generation at the next token. `overrides` are fields of GeneratingArguments.
        A conversation that does not fit, or that the template refuses, raises UserError here and now, not at the first
        piece. With several beams nothing is known before the end, and the answer comes in one piece.

        >>> for piece in engine.chat([{"role": "user", "content": "What is the capital of France?"}]):
        ...     print(piece, end="")
        The capital of France is Paris.
        """
        try:
            prompt = self.template.prompt(messages, tools)
        except CannotRender as error:
            raise UserError(Problem("conversation", "", None, f"cannot be asked: {error}")) from error
        return self._said(self.stream(prompt, **overrides))

    def _said(self, pieces: Generator[Piece, None, None]) -> Generator[str, None, Message]:
        answer: list[int] = []
        with closing(pieces):
            for piece in pieces:
                answer += [token.id for token in piece.tokens]
                if piece.text:
                    yield piece.text
        return self.template.parse(answer)

    def stream(
        self,
        prompt: Sequence[int],
        options: RequestOptions | None = None,
        *,
        stop: threading.Event | None = None,
        **overrides: Any,
    ) -> Generator[Piece, None, None]:
        """The answer to a prompt as it is made; the last piece says why it ended. Raises UserError here and now.

        Closing the generator ends the generation at the next token, and so does `stop`, from any thread.
        """
        options, asked = options or RequestOptions(), replace(self.generating, **overrides)
        self._check_lengths([prompt])
        config = self.generation_config(asked, len(prompt))
        if options.top_logprobs is not None and config.num_beams > 1:
            raise UserError(Problem("generation", "num_beams", config.num_beams, "gives no logprobs", "set it to 1"))
        answer = AnswerPieces(TextPieces(self.tokenizer, asked.skip_special_tokens), options.stop_strings)
        return self._pieces(list(prompt), config, options, answer, stop or threading.Event())

    def _pieces(
        self,
        prompt: list[int],
        config: GenerationConfig,
        options: RequestOptions,
        answer: AnswerPieces,
        stop: threading.Event,
    ) -> Generator[Piece, None, None]:
        stop_ids, num_generated, reason = set(as_list(config.eos_token_id)), 0, "length"
        penalty = config.repetition_penalty or self.model.generation_config.repetition_penalty or 1.0
        processors, recorder = make_processors(options, penalty, len(prompt))
        if recorder is not None:
            config.repetition_penalty = 1.0  # it is among the processors
        stream = TokenStream(recorder.token if recorder else Token)
        generate = partial(self._run, [prompt], config, stop, processors=processors, seed=options.seed)
        thread = threading.Thread(target=_fill, args=(stream, generate, config.num_beams > 1), daemon=True)
        thread.start()
        try:
            for token in stream:
                num_generated += 1
                if token.id in stop_ids:
                    reason = "end"
                    break
                text, tokens = answer.push(token)
                if text:
                    yield Piece(text, tokens, num_generated)
                if answer.stopped:
                    break
            text, tokens = answer.flush()
            yield Piece(text, tokens, num_generated, "stop_string" if answer.stopped else reason)
        finally:
            stop.set()
            thread.join()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int = 1,
        stop: threading.Event | None = None,
        **overrides: Any,
    ) -> list[list[int]]:
        """Prompts → the new ids of each, in order, its end token included where it came to one.

        Prompts of a batch are padded on the left. In bf16 that moves the logits (by more than 0.5 with 50 pads on a
        small model), so one at a time is the default, and an answer then does not depend on its neighbours.
        """
        asked = replace(self.generating, **overrides)
        self._check_lengths(prompts)
        stop = stop or threading.Event()
        answers: list[list[int]] = []
        for first in range(0, len(prompts), batch_size):
            batch = [list(prompt) for prompt in prompts[first : first + batch_size]]
            config = self.generation_config(asked, max(map(len, batch)))
            answers += self._run(batch, config, stop)
        return answers

    def generation_config(self, asked: GeneratingArguments, prompt_length: int) -> GenerationConfig:
        own = self.model.generation_config
        config = make_config(asked, own, new_tokens(asked, own, prompt_length, self.max_positions), prompt_length)
        config.eos_token_id = sorted({*self.template.stop_ids, *as_list(own.eos_token_id)}) or None
        config.pad_token_id = self._pad_id()
        return config

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest prompt and answer together; None where the model has no such bound."""
        return num_positions(self.model.config)

    @property
    def vocabulary_size(self) -> int:
        """How many ids the model knows."""
        return self.model.get_input_embeddings().weight.shape[0]

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises UserError with every prompt that the model cannot answer at all."""
        limit = self.max_positions
        problems = []
        for number, prompt in enumerate(prompts, start=1):
            place = "prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
            if not prompt:
                problems.append(Problem(place, "", None, "is empty", "give it at least one token"))
            elif (highest := max(prompt)) >= self.vocabulary_size:  # a message may hold the text of such a token
                token = self.tokenizer.convert_ids_to_tokens(highest)
                message = f"holds the token {token!r} (id {highest}), for which the model has no row"
                problems.append(Problem(place, "", None, message, "leave it out"))
            elif limit is not None and len(prompt) >= limit:
                message = (
                    f"has {len(prompt):,} tokens; the model has {limit:,} positions for prompt and answer together"
                )
                problems.append(Problem(place, "", None, message, "shorten it or begin a new conversation"))
        if problems:
            raise UserError(problems)

    def _pad_id(self) -> int:
        """Padded positions are masked, so any id will do: the tokenizer's, or an end token."""
        pad_id = self.tokenizer.pad_token_id
        return pad_id if pad_id is not None else next(iter(self.template.stop_ids), 0)

    def _run(
        self,
        prompts: list[list[int]],
        config: GenerationConfig,
        stop: threading.Event,
        *,
        stream: TokenStream | None = None,
        processors: LogitsProcessorList | None = None,
        seed: int | None = None,
    ) -> list[list[int]]:
        pad_id, longest = config.pad_token_id, max(map(len, prompts))
        device = self.model.device
        input_ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)  # [B, S]
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, S]
        with self._turn, _evaluating(self.model), _seeded(seed, device):
            if stop.is_set():
                return [[] for _ in prompts]
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([StopWhen(stop)]),
                streamer=stream,
            )
        stop_ids = set(as_list(config.eos_token_id))
        return [_until_end(row, stop_ids) for row in output[:, longest:].tolist()]


def _fill(stream: TokenStream, generate: Callable[..., list[list[int]]], at_once: bool) -> None:
    """The generating thread: whatever happens in it, the reader hears of it."""
    try:
        if at_once:  # transformers streams no beams
            stream.give(generate()[0])
        else:
            generate(stream=stream)
        stream.close()
    except BaseException as error:
        stream.close(error)


def _until_end(ids: list[int], stop_ids: set[int]) -> list[int]:
    """One row of a batch up to its own end token, which stays; what follows is padding."""
    for i, token_id in enumerate(ids):
        if token_id in stop_ids:
            return ids[: i + 1]
    return ids


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout while it generates; a model that is being trained goes back to it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws by this seed; the generator that everybody shares is afterwards what it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
