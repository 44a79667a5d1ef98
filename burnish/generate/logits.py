"""What is done to the logits of an answer: OpenAI's penalties, and keeping log-probabilities for those who ask.

Both stand before temperature, top_p and top_k; the recorder stands before the penalties, so that what it keeps is what
the model itself thinks. https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from collections import deque
from typing import cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from burnish.generate.arguments import RequestOptions
from burnish.generate.stream import Token


def make_processors(
    options: RequestOptions, repetition_penalty: float, prompt_length: int
) -> tuple[LogitsProcessorList, LogprobRecorder | None]:
    """What stands beside transformers' own processors, and the recorder among them, if logprobs are asked for.

    Then the repetition penalty is among them too: transformers would put its own before the recorder.
    """
    processors, recorder = LogitsProcessorList(), None
    if options.top_logprobs is not None:
        recorder = LogprobRecorder(options.top_logprobs)
        processors.append(recorder)
        if repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if options.presence_penalty or options.frequency_penalty:
        processors.append(Penalties(options.presence_penalty, options.frequency_penalty, prompt_length))
    return processors, recorder


class Penalties(LogitsProcessor):
    """logit −= frequency · (times said) + presence · (said at all), counted in the answer, not in its prompt."""

    def __init__(self, presence: float, frequency: float, prompt_length: int):
        self.presence, self.frequency, self.prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.FloatTensor:
        said = input_ids[:, self.prompt_length :]  # [B, S]
        times = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))  # [B, V]
        return cast(torch.FloatTensor, scores - self.frequency * times - self.presence * (times > 0))


class LogprobRecorder(LogitsProcessor):
    """Keeps the log-probabilities of each step until the token that was drawn there is known."""

    def __init__(self, num_likeliest: int):
        self.num_likeliest = num_likeliest
        self._steps: deque[torch.Tensor] = deque()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.FloatTensor:
        self._steps.append(torch.log_softmax(scores[0].float(), dim=-1))  # [V]
        return cast(torch.FloatTensor, scores)

    def token(self, token_id: int) -> Token:
        """The token that the oldest step led to."""
        logprobs = self._steps.popleft()
        values, ids = logprobs.topk(min(self.num_likeliest, len(logprobs)))
        return Token(token_id, float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
