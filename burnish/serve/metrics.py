"""What /metrics tells, in Prometheus's text format. https://prometheus.io/docs/instrumenting/exposition_formats/"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    def __init__(self) -> None:
        self.in_flight = 0
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._prompt_tokens = self._generated_tokens = 0

    def count(self, path: str, status: int, seconds: float, prompt_tokens: int, generated_tokens: int) -> None:
        """One request that is over. `path` is one of few: each is a series of its own."""
        self._requests[path, status] += 1
        self._seconds[path] += seconds  # type: ignore[assignment] # a Counter sums what it is given
        self._prompt_tokens += prompt_tokens
        self._generated_tokens += generated_tokens

    def text(self, waiting: int) -> str:
        return "".join(f"{line}\n" for line in self._lines(waiting))

    def _lines(self, waiting: int) -> Iterator[str]:
        yield from _head("burnish_requests_total", "counter", "Requests that are over, by path and HTTP status.")
        for (path, status), number in sorted(self._requests.items()):
            yield f'burnish_requests_total{{path="{path}",status="{status}"}} {number}'
        yield from _head("burnish_request_seconds", "summary", "Seconds from a request's head to its answer's end.")
        for path, seconds in sorted(self._seconds.items()):
            times = sum(number for (of_path, _), number in self._requests.items() if of_path == path)
            yield f'burnish_request_seconds_sum{{path="{path}"}} {seconds:.6f}'
            yield f'burnish_request_seconds_count{{path="{path}"}} {times}'
        for name, kind, help_text, value in (
            ("burnish_prompt_tokens_total", "counter", "Tokens of prompts.", self._prompt_tokens),
            ("burnish_generated_tokens_total", "counter", "Tokens of answers.", self._generated_tokens),
            ("burnish_requests_in_flight", "gauge", "Requests that are being answered or wait.", self.in_flight),
            ("burnish_answers_waiting", "gauge", "Answers that wait for their turn on the model.", waiting),
        ):
            yield from _head(name, kind, help_text)
            yield f"{name} {value}"


def _head(name: str, kind: str, help_text: str) -> Iterator[str]:
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"
