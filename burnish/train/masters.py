"""The float32 masters of a low-precision model, and what becomes of its gradients until the optimizer takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Masters:
    """float32 copies of the trained weights of a low-precision model; the weights themselves where they are float32.

    A low-precision gradient leaves the model as soon as it exists: a hook takes it. That of the first pass is kept as
    it is, which loses nothing and takes half of float32's memory (3 GiB less for 1.5 billion weights); the second
    makes a float32 sum of it. So accumulation over passes is in float32.
    """

    def __init__(self, model: nn.Module):
        self.by_name: dict[str, nn.Parameter] = {}  # name in the model → what the optimizer moves
        self.copied: dict[nn.Parameter, nn.Parameter] = {}  # master → the model's weight, where they are two
        self._alone: dict[nn.Parameter, Tensor] = {}  # master → the low-precision gradient of its only pass so far
        self._keeps_places = False
        self._hooks: list[RemovableHandle] = []
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            self.by_name[name] = weight
            if weight.dtype in (torch.bfloat16, torch.float16):
                master = nn.Parameter(weight.detach().float())
                self.by_name[name] = master
                self.copied[master] = weight
                self._hooks.append(weight.register_post_accumulate_grad_hook(self._take_for(master)))

    def _take_for(self, master: nn.Parameter) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            if master in self._alone:
                master.grad = self._alone.pop(master).float()
            if master.grad is None and not self._keeps_places:
                self._alone[master] = gradient
            elif master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad += gradient

        return take

    def gradient_of(self, master: nn.Parameter) -> Tensor | None:
        """In float32, or in the model's dtype where one pass alone gave it."""
        return self._alone.get(master, master.grad)

    def give_gradients(self) -> None:
        """Every master has its gradient, in float32: for whoever knows of nothing else."""
        while self._alone:
            master, gradient = self._alone.popitem()
            master.grad = gradient.float()

    def keep_places(self, keep: bool) -> None:
        """Whether every gradient is a float32 sum from its first pass on, for recorded passes that add to it."""
        self._keeps_places = keep
        if keep:
            self.give_gradients()

    def forget(self) -> None:
        """The low-precision gradients; those of the masters are the optimizer's to forget."""
        self._alone.clear()

    def release(self) -> None:
        """The model's gradients are its own again."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model: after every optimizer step, and after loading them from a checkpoint."""
        if self.copied:
            torch._foreach_copy_(list(self.copied.values()), list(self.copied))

    def state_dict(self) -> dict[str, Tensor]:
        """Only what the model's own file does not hold: the masters that are copies."""
        return {name: master.detach() for name, master in self.by_name.items() if master in self.copied}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.by_name[name].copy_(value)
        self.publish()
