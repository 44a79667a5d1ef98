"""AdamW over bf16 weights and bf16 moments, without float32 copies of them: `pure_bf16`.

One idea: the update is computed in float32 and what it gives is rounded at random, up or down, with the chance that
makes it right on average. bf16 keeps 8 bits: rounded to the nearest, an update below 0.2 % of its weight is lost every
time, and a second moment, of which a step forgets 0.1 %, never falls. Rounded at random, many small changes add up to
what they are (Gupta et al., arXiv 1502.02551). 4 bytes of state a weight, where float32 masters and moments are 12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CHUNK = 2**23  # weights that are computed in float32 at a time: 32 MiB for each number that is kept of a weight
DROPPED_BITS = 16  # of float32's 32, the upper half is a bf16


def round_at_random(value: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The bf16 below or above each float32, whose mean is the float32. Infinity stays; so does what bf16 holds."""
    noise = torch.randint(0, 2**DROPPED_BITS, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = value.view(torch.int32).add(noise).bitwise_and_(-(2**DROPPED_BITS))
    return bits.view(torch.float32).to(torch.bfloat16)


class Sums:
    """Adds up the gradients of bf16 weights over passes, rounded at random where autograd would round to the nearest:
    there the small gradients of later passes would be lost.

    It draws from the device's own generator, as dropout does: each process rounds its own passes.
    """

    def __init__(self, weights: dict[str, nn.Parameter]):
        self._weights = [weight for weight in weights.values() if weight.dtype == torch.bfloat16]
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._hooks: list[RemovableHandle] = [w.register_post_accumulate_grad_hook(self._take) for w in self._weights]

    def _take(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None and isinstance(weight, nn.Parameter)
        if weight in self._sums:
            gradient = round_at_random(self._sums[weight].float() + gradient.float())
        self._sums[weight] = gradient

    def give_back(self) -> None:
        """After the last pass: each weight has its gradient."""
        for weight, gradient in self._sums.items():
            weight.grad = gradient
        self._sums.clear()

    def forget(self) -> None:
        self._sums.clear()

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Piece(NamedTuple):
    """A part of a weight, flat, with what belongs to it. All are views: what is written into them is kept."""

    weight: Tensor
    gradient: Tensor
    first: Tensor  # moment
    second: Tensor
    step: Tensor  # a scalar: updates of this weight


class AdamW(torch.optim.Optimizer):
    """torch's AdamW; weights and moments of bf16 are rounded at random after each step, others are kept as they are.

    All three are rounded so. The second moment must be: to the nearest it would stay at the largest gradient it has
    met. The random bits come from a generator of its own, the same in every process, so that weights stay the same in
    all of them; its state is part of `state_dict`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        seed: int = 0,
    ):
        # fused: torch's word for an optimizer that heeds `found_inf` without waiting for the device.
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True))
        self.found_inf: Tensor | None = None
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for weight in weights:
            weight.data = weight.data.contiguous()
        self.generator = torch.Generator(weights[0].device).manual_seed(seed)
        self._sizes: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the update knows no closure"
        for group in self.param_groups:
            for pieces in _chunks(list(self._pieces(group["params"]))):
                self._update(pieces, **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})

    def _pieces(self, weights: list[nn.Parameter]) -> Iterator[Piece]:
        for weight in weights:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros((), device=weight.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            taken = 1.0 if self.found_inf is None else 1.0 - self.found_inf
            state["step"] += taken
            all_of_it = (weight.data, weight.grad, state["exp_avg"], state["exp_avg_sq"])
            for parts in zip(*(each.flatten().split(CHUNK) for each in all_of_it), strict=True):
                yield Piece(parts[0], parts[1], parts[2], parts[3], state["step"])

    def _update(
        self, pieces: list[Piece], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        sizes = [piece.weight.numel() for piece in pieces]
        steps = torch.stack([piece.step for piece in pieces]).clamp_(min=1)
        repeats = self._on_device(sizes)

        def by_weight(values: Tensor) -> Tensor:
            """A number for each piece → one for each of its weights."""
            return values if len(sizes) == 1 else values.repeat_interleave(repeats, output_size=sum(sizes))

        weight, gradient, first, second = (torch.cat(parts).float() for parts in list(zip(*pieces, strict=True))[:4])
        first.lerp_(gradient, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        root = second.sqrt().div_(by_weight((1 - betas[1] ** steps).sqrt_())).add_(eps)
        weight.mul_(1 - lr * weight_decay).sub_((first / root).mul_(by_weight(lr / (1 - betas[0] ** steps))))
        for name, value in (("weight", weight), ("first", first), ("second", second)):
            self._keep([getattr(piece, name) for piece in pieces], value, sizes)

    def _on_device(self, sizes: list[int]) -> Tensor:
        """Sent there once: sending waits for the device."""
        if tuple(sizes) not in self._sizes:
            self._sizes[tuple(sizes)] = torch.tensor(sizes, device=self.generator.device)
        return self._sizes[tuple(sizes)]

    def _keep(self, places: list[Tensor], value: Tensor, sizes: list[int]) -> None:
        """Where something was not finite, what was there stays."""
        rounded = round_at_random(value, self.generator) if places[0].dtype == torch.bfloat16 else value
        if self.found_inf is not None:
            rounded = torch.where(self.found_inf > 0, torch.cat(places), rounded)
        torch._foreach_copy_(places, list(rounded.split(sizes)))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rounding": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "rounding"})
        if "rounding" in state_dict:
            self.generator.set_state(state_dict["rounding"].cpu())


def _chunks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces of one dtype, together of at most `CHUNK` weights."""
    chunk: list[Piece] = []
    filled = 0
    for piece in pieces:
        size = piece.weight.numel()
        if chunk and (filled + size > CHUNK or piece.weight.dtype != chunk[0].weight.dtype):
            yield chunk
            chunk, filled = [], 0
        chunk.append(piece)
        filled += size
    if chunk:
        yield chunk
