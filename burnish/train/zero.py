"""DeepSpeed's own settings (`deepspeed`: a file or an object) as far as burnish reads them: how the model is divided.

What is wrong there is told before a run: DeepSpeed and accelerate end in errors of their own on it. Nothing here needs
torch, so that `burnish plan` and the check of the settings can share it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.errors import Problem

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings


def read_deepspeed(given: Any) -> Any:
    """The settings themselves: given as such, or what the file of that path holds. ValueError: it is no JSON."""
    return json.loads(Path(given).read_text(encoding="utf-8-sig")) if isinstance(given, str) else given


def wrong_in_deepspeed(settings: Settings, config: Any) -> list[Problem]:
    """What is wrong with what was read: an object of settings, and in it how the model is divided."""
    if not isinstance(config, dict):
        return [settings.problem("deepspeed", "is not an object of settings", 'write {"zero_optimization": …}')]

    def problem(name: str, value: Any, remedy: str) -> list[Problem]:
        return [settings.problem("deepspeed", f"has {name} {json.dumps(value)} in it, which is none", remedy)]

    remedy = 'write "zero_optimization": {"stage": 2}'
    if "zero_optimization" not in config:
        return [settings.problem("deepspeed", "has no zero_optimization in it", remedy)]
    zero = config["zero_optimization"]
    if zero is None:  # stage 0
        return []
    if not isinstance(zero, dict):
        return problem("zero_optimization", zero, remedy)
    if zero.get("stage", 0) not in (0, 1, 2, 3, "auto"):
        return problem("stage", zero["stage"], "write 0, 1, 2 or 3")
    for name in ("offload_optimizer", "offload_param"):
        part = zero.get(name)
        is_one = isinstance(part, dict) and part.get("device", "none") in ("none", "cpu", "nvme", "auto")
        if part is not None and not is_one:
            return problem(name, part, f'write "{name}": {{"device": "cpu"}}, or leave it out')
    return []
