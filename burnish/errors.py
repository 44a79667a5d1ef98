"""What a person reads when their input is wrong: the place, the value, the remedy. No traceback, exit status 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One mistake. `place` is where it stands: "run.yaml line 7", "--stage", "data/pairs.jsonl:17".

    >>> print(Problem("run.yaml line 7", "stage", "sfft", "is not one of pt, sft", "did you mean 'sft'?"))
    run.yaml line 7: stage 'sfft' is not one of pt, sft; did you mean 'sft'?
    """

    place: str
    name: str  # the setting or thing that is wrong; "" when the place says it
    value: Any  # what was given; None when nothing was
    message: str  # what is wrong with it, a verb first
    remedy: str = ""  # what to do

    def __str__(self) -> str:
        subject = " ".join(part for part in (self.name, "" if self.value is None else repr(self.value)) if part)
        sentence = f"{subject} {self.message}" if subject else self.message
        return f"{self.place}: {sentence}" + (f"; {self.remedy}" if self.remedy else "")


class UserError(Exception):
    """A mistake of the user's, with every problem that was found. `main()` prints it and exits with status 2."""

    def __init__(self, problems: Problem | Sequence[Problem]):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """So that one process of a run can send it to the others."""
        return UserError, (self.problems,)


class RunStopped(Exception):
    """A run that ended early for a reason that is told in one message. `main()` prints it and exits with `status`."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return RunStopped, (str(self), self.status)
