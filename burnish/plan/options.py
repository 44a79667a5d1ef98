"""The options of `burnish plan` itself, which are no settings of a run. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from burnish.errors import Problem, UserError
from burnish.plan.devices import DEFAULT, DEVICES, find_device

HELP = f"""\
burnish plan says what `burnish train` would need, before anything is loaded: the
peak memory of a device, tokens per second, and what takes them. It takes the words
that burnish train takes, reads config.json of the model (no weights) and the rows
for their lengths, and needs no GPU.

Its exit status is 0 where the run fits, 1 where it does not; then it says what to
change. 2 where something that was given is wrong.

options of plan itself:
  --device NAME   {", ".join(list(DEVICES)[:6])},
                  {", ".join(list(DEVICES)[6:])};
                  not given: the CUDA device that is here, else {DEFAULT}
  --devices N     how many of them; not given: those that are here, else 1
  --json          for programs

"""


@dataclass(frozen=True)
class PlanOptions:
    device: str | None = None  # a name of the table
    devices: int | None = None
    as_json: bool = False


def plan_options(words: Sequence[str]) -> tuple[PlanOptions, list[str], list[Problem]]:
    """What the words say of the plan; the other words; what is wrong.

    >>> plan_options(["run.yaml", "--device", "4090", "bf16=true", "--json"])[:2]
    (PlanOptions(device='4090', devices=None, as_json=True), ['run.yaml', 'bf16=true'])
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if name not in ("--device", "--devices", "--json"):
            rest.append(word)
        elif equals or name == "--json" or not waiting or waiting[0].startswith("--"):
            given[name] = value
        else:
            given[name] = waiting.pop(0)
    mistakes = []
    device, devices, as_json = given.get("--device"), given.get("--devices"), given.get("--json")
    if device is not None:
        try:
            find_device(device)
        except UserError as error:
            mistakes += error.problems
    if devices is not None and not (devices.isdecimal() and int(devices) > 0):
        mistakes.append(Problem("--devices", "", devices, "is not a number of devices", "write --devices 8"))
    if as_json:
        mistakes.append(Problem("--json", "", as_json, "is not wanted", "write --json alone"))
    count = int(devices) if devices and not mistakes else None
    return PlanOptions(device, count, as_json is not None), rest, mistakes
