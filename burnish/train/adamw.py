"""torch's AdamW, which on a GPU clips, moves and rounds in one pass over memory (kernels/adamw.py).

Its state is torch's own, so that a checkpoint goes from one to the other; what torch's AdamW can do besides (amsgrad,
maximize …) torch does, here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from burnish.kernels.adamw import Settings, Weight, adamw_
from burnish.kernels.fast_path import has_kernels
from burnish.train.masters import Masters


class AdamW(torch.optim.AdamW):
    """Before a step in one pass `factor` and `found_inf` are set, float32 scalars on the device.

    The gradients are then those of `masters`, as the passes left them: `factor` is still to be multiplied into them
    (clipping, the loss's scale). Where `found_inf` is not zero nothing moves.
    """

    def __init__(self, params: Any, *, masters: Masters, **settings: Any):
        super().__init__(params, **settings)
        self.masters = masters
        self.factor: Tensor | None = None
        self.found_inf: Tensor | None = None
        moved = list(masters.by_name.values())
        flat = all(weight.is_contiguous() for weight in (*moved, *masters.copied.values()))
        one_place = {(weight.device, weight.dtype) for weight in moved} == {(moved[0].device, torch.float32)}
        self._suits = flat and one_place and has_kernels(moved[0].device)

    @property
    def in_one_pass(self) -> bool:
        """Asked anew at each step: a checkpoint's settings replace those that the run began with."""
        return self._suits and all(map(_is_plain, self.param_groups))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        if not self.in_one_pass:
            return super().step(closure)
        assert closure is None and self.factor is not None and self.found_inf is not None
        for group in self.param_groups:
            settings = Settings(group["lr"], group["betas"], group["eps"], group["weight_decay"])
            adamw_(list(self._moving(group["params"])), settings, self.factor, self.found_inf)
        return None

    def _moving(self, weights: list[nn.Parameter]) -> Iterator[Weight]:
        for master in weights:
            gradient = self.masters.gradient_of(master)
            if gradient is None:
                continue
            state = self.state[master]
            if not state:
                state["step"] = torch.zeros((), device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            moments = state["exp_avg"], state["exp_avg_sq"]
            yield Weight(master, gradient.contiguous(), *moments, state["step"], self.masters.copied.get(master))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """`step` may come from a CPU, where torch's AdamW counts unless it is fused."""
        super().load_state_dict(state_dict)
        if self.in_one_pass:
            for weight, state in self.state.items():
                state["step"] = state["step"].to(weight.device, torch.float32)
                state["exp_avg"] = state["exp_avg"].contiguous()
                state["exp_avg_sq"] = state["exp_avg_sq"].contiguous()


def _is_plain(group: dict[str, Any]) -> bool:
    """Nothing is asked for by name that the pass does not do; unless it is, `fused` and `foreach` are None."""
    special = ("amsgrad", "maximize", "capturable", "differentiable", "foreach")
    return not any(group[name] for name in special) and group["fused"] is not False
