"""The optimizer, its float32 masters, and the learning rate.

One rule of precision: the model computes in its own dtype (bf16, float16 or float32), what is trained is kept in
float32. For a bf16 model that means a float32 master of each trained weight (masters.py): gradients are added up in
it, the optimizer moves it, and after the step the model gets its rounding. A float32 model is its own master. So the
weights that a checkpoint saves are exactly those that the forward pass used, and small updates are not lost
(Micikevicius et al., arXiv 1710.03740). The loss of a float16 model is scaled besides (scale.py). `pure_bf16` alone
does without masters (rounding.py). On a GPU AdamW clips, moves and rounds in one pass (adamw.py).
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish import console
from burnish.errors import Problem, UserError
from burnish.model.head import CausalLoss
from burnish.model.patch import shape_of
from burnish.train.adamw import AdamW
from burnish.train.masters import Masters
from burnish.train.peers import Peers, add_gradients, share_weights
from burnish.train.rounding import Sums
from burnish.train.scale import LossScale, computes_in_float16
from burnish.types import Batch

MASTERS_FILE = "masters.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
SCALE_FILE = "scaler.pt"

# name → (where it comes from, class, fixed keywords). transformers' names; each takes the adam_* settings that it has.
OPTIMIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw_torch": ("torch.optim", "AdamW", {}),
    "adamw_torch_fused": ("torch.optim", "AdamW", {"fused": True}),
    "sgd": ("torch.optim", "SGD", {}),
    "adagrad": ("torch.optim", "Adagrad", {}),
    "rmsprop": ("torch.optim", "RMSprop", {}),
    "adafactor": ("transformers.optimization", "Adafactor", {"scale_parameter": False, "relative_step": False}),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW", {"optim_bits": 8}),
    "adamw_bnb_8bit": ("bitsandbytes.optim", "AdamW", {"optim_bits": 8}),
    "paged_adamw_32bit": ("bitsandbytes.optim", "AdamW", {"is_paged": True}),
    "paged_adamw_8bit": ("bitsandbytes.optim", "AdamW", {"optim_bits": 8, "is_paged": True}),
    "lion_32bit": ("bitsandbytes.optim", "Lion", {}),
    "lion_8bit": ("bitsandbytes.optim", "Lion", {"optim_bits": 8}),
    "paged_lion_32bit": ("bitsandbytes.optim", "Lion", {"is_paged": True}),
    "paged_lion_8bit": ("bitsandbytes.optim", "Lion", {"optim_bits": 8, "is_paged": True}),
}

# The same over bf16 weights and moments, which are rounded at random.
PURE_BF16 = dict.fromkeys(("adamw_torch", "adamw_torch_fused"), ("burnish.train.rounding", "AdamW", {}))


class Outcome(NamedTuple):
    """What became of an update."""

    updated: bool  # False where it is known that nothing was moved, and that the run stops there
    must_not: Tensor  # bool on the device: something was not finite, nothing was moved, and the run stops there
    norm: Tensor  # of the gradients before clipping


class LocalUpdate:
    """How the weights of an optimizer step move where each process holds all of them.

    A step: `forward` and `backward` of each pass, `gather_gradients`, `step`, `zero_grad`.

    `pure_bf16`: a bf16 model is its own master, in bf16, and is rounded at random. `recorded`: passes may be recorded
    (model/graphs.py).
    """

    def __init__(
        self,
        objective: CausalLoss,
        args: Any,
        peers: Peers,
        *,
        loraplus_lr_ratio: float | None = None,
        pure_bf16: bool = False,
        recorded: bool = False,
    ):
        self.objective, self.peers = objective, peers
        self.bucket_mib = args.ddp_bucket_cap_mb
        share_weights([weight for weight in objective.model.parameters() if weight.requires_grad], peers)
        self.masters = None if pure_bf16 else Masters(objective.model, at_once=recorded)
        self.weights = self.masters.by_name if self.masters else trained_weights(objective.model)
        self.sums = Sums(self.weights) if pure_bf16 else None
        how: dict[str, Any] = {"loraplus_lr_ratio": loraplus_lr_ratio, "pure_bf16": pure_bf16}
        self.optimizer = create_optimizer(args, self.weights, masters=self.masters, **how)
        self.scale = LossScale(args.device) if computes_in_float16(objective.model) else None
        self._keeps_places = False

    def forward(self, batch: Batch) -> Tensor:
        return self.objective(batch).loss

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss if self.scale is None else loss * self.scale.value).backward()

    @property
    def _one_pass(self) -> AdamW | None:
        """The optimizer, where it does by itself what else is done before and after it."""
        return self.optimizer if isinstance(self.optimizer, AdamW) and self.optimizer.in_one_pass else None

    def gather_gradients(self, max_norm: float) -> None:
        """The gradients of all processes added up, and their norm limited to `max_norm` (0: not limited)."""
        if self.sums is not None:
            self.sums.give_back()
        one_pass = self._one_pass
        if self.masters is not None and (one_pass is None or self.peers.count > 1):
            self.masters.give_gradients()
        add_gradients(list(self.weights.values()), self.peers, self.bucket_mib)
        if one_pass is not None:
            self._measure_gradients(one_pass, max_norm)
            return
        moving = [weight for weight in self.weights.values() if weight.grad is not None]
        gradients = [weight.grad for weight in moving if weight.grad is not None]
        if self.scale is not None:
            self.scale.unscale(gradients)
        self._norm = _norm(gradients)
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(moving, max_norm, self._norm)

    def _measure_gradients(self, optimizer: AdamW, max_norm: float) -> None:
        """The same without a pass over them: the optimizer is told what to multiply them by."""
        gradients = [optimizer.masters.gradient_of(weight) for weight in self.weights.values()]
        self._norm = _norm([gradient for gradient in gradients if gradient is not None])
        factor = torch.ones_like(self._norm)
        if self.scale is not None:
            factor = self.scale.value.reciprocal()
            self._norm = self._norm * factor
        if max_norm > 0:
            factor = factor * (max_norm / (self._norm + 1e-6)).clamp(max=1.0)  # torch's 1e-6
        optimizer.factor = factor

    def step(self, check: Callable[..., Tensor], loss: Tensor) -> Outcome:
        if self.scale is not None:
            return self._step_unless_it_overflows(check, loss, self.scale)
        must_not = check(loss, self._norm)
        return Outcome(self._update_unless(must_not), must_not, self._norm)

    def _step_unless_it_overflows(self, check: Callable[..., Tensor], loss: Tensor, scale: LossScale) -> Outcome:
        """A step that overflows is left out and the run goes on, its schedule too, so that nobody need wait to know.

        Loss and gradients are sums over the processes: all of them come to the same.
        """
        overflow = ~(torch.isfinite(loss) & torch.isfinite(self._norm))
        scale.update(overflow)
        must_not = check(scale.or_nan())
        self._update_unless(overflow | must_not)
        return Outcome(True, must_not, self._norm)

    def _update_unless(self, must_not: Tensor) -> bool:
        """An optimizer on CUDA that takes the flag itself (`found_inf`) lets nobody wait; otherwise it is read."""
        one_pass = self._one_pass
        if one_pass is not None or (must_not.is_cuda and self.optimizer.defaults.get("fused")):
            self.optimizer.found_inf = must_not.float()  # type: ignore[attr-defined]
        elif must_not.item():
            return False
        self.optimizer.step()
        if self.masters is not None and one_pass is None:
            self.masters.publish()
        return True

    def zero_grad(self) -> None:
        for part in (self.masters, self.sums):
            if part is not None:
                part.forget()
        if self._keeps_places:
            gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
            if gradients:
                torch._foreach_zero_(gradients)
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def keep_places(self, keep: bool) -> None:
        """Whether gradients become zero where they are after a step, for recorded passes that add to them there."""
        self._keeps_places = keep

    def places(self) -> tuple[int, ...]:
        """The address of each gradient, 0 where there is none."""
        gradients = (weight.grad for weight in self.weights.values())
        return tuple(0 if gradient is None else gradient.data_ptr() for gradient in gradients)

    def settle(self) -> None:
        """After an evaluation there is nothing under way."""

    def release(self) -> None:
        for part in (self.masters, self.sums):
            if part is not None:
                part.release()

    def save(self, folder: Path) -> None:
        """optimizer.pt, the float32 masters where the model's own file does not hold them, and the loss's scale."""
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_FILE)
        if self.masters is not None and (masters := self.masters.state_dict()):
            save_file(masters, folder / MASTERS_FILE)
        if self.scale is not None:
            torch.save(self.scale.state_dict(), folder / SCALE_FILE)

    def load(self, folder: Path) -> None:
        if not (folder / OPTIMIZER_FILE).is_file():
            remedy = "go on with the same --deepspeed, or begin anew from it as a model"
            raise UserError(Problem(str(folder), "", None, "was written under ZeRO and cannot be resumed", remedy))
        device = next(iter(self.weights.values())).device
        if self.masters is not None and (folder / MASTERS_FILE).is_file():
            self.masters.load_state_dict(load_file(folder / MASTERS_FILE, device=str(device)))
        self.optimizer.load_state_dict(torch.load(folder / OPTIMIZER_FILE, map_location=device))
        if self.scale is not None and (folder / SCALE_FILE).is_file():
            self.scale.load_state_dict(torch.load(folder / SCALE_FILE))


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of all of them together, in float32 whatever they are in."""
    dtypes = {gradient.dtype for gradient in gradients}
    if dtypes <= {torch.float32}:
        return torch.nn.utils.get_total_norm(gradients)
    norms: list[Tensor] = []
    for dtype in dtypes:  # one launch takes many gradients of one dtype
        norms += torch._foreach_norm([g for g in gradients if g.dtype == dtype], 2.0, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def create_optimizer(
    args: Any,
    weights: dict[str, nn.Parameter],
    *,
    loraplus_lr_ratio: float | None = None,
    pure_bf16: bool = False,
    masters: Masters | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `args.optim` names, over groups with and without weight decay.

    Weights with fewer than two dimensions (norms, biases) are not decayed. `loraplus_lr_ratio`: the B of every LoRA
    learns so many times faster than the rest (Hayou et al., LoRA+, arXiv 2402.12354). With `masters`, whose weights
    these are, torch's AdamW is the one of adamw.py.
    """
    name = getattr(args.optim, "value", args.optim)
    if name not in OPTIMIZERS:
        raise UserError(Problem("--optim", "optim", name, "is not one of " + ", ".join(OPTIMIZERS)))
    if pure_bf16 and name not in PURE_BF16:
        remedy = f"choose one of {', '.join(PURE_BF16)}, or bf16 in the place of pure_bf16"
        raise UserError(Problem("--optim", "optim", name, "is not built for pure_bf16", remedy))
    module_name, class_name, fixed = (PURE_BF16 if pure_bf16 else OPTIMIZERS)[name]
    if pure_bf16:
        fixed = {"seed": args.seed}
    try:
        optimizer_class = getattr(importlib.import_module(module_name), class_name)
    except ImportError:
        extra = "pip install 'burnish[quant]'"
        raise UserError(Problem("--optim", "optim", name, "needs bitsandbytes, which is not here", extra)) from None
    settings: dict[str, Any] = {"lr": args.learning_rate, **fixed}
    if class_name in ("AdamW", "Lion"):
        settings["betas"] = (args.adam_beta1, args.adam_beta2)
    if class_name == "AdamW":
        settings["eps"] = args.adam_epsilon
    settings |= _optim_args(args.optim_args)
    if masters is not None and optimizer_class is torch.optim.AdamW:
        optimizer_class = partial(AdamW, masters=masters)
    groups = _groups(weights, args.weight_decay, args.learning_rate, loraplus_lr_ratio)
    try:
        return optimizer_class(groups, **settings)
    except (TypeError, ValueError) as error:
        reason = f"does not suit {name}: {error}"
        raise UserError(Problem("--optim_args", "optim_args", args.optim_args, reason)) from None


def _groups(
    weights: dict[str, nn.Parameter], weight_decay: float, learning_rate: float, loraplus_lr_ratio: float | None
) -> list[dict[str, Any]]:
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, weight in weights.items():
        decayed = len(shape_of(weight)) >= 2
        faster = loraplus_lr_ratio is not None and ("lora_B" in name or "lora_embedding_B" in name)
        groups.setdefault((decayed, faster), []).append(weight)
    return [
        {
            "params": params,
            "weight_decay": weight_decay if decayed else 0.0,
            "lr": learning_rate * (loraplus_lr_ratio or 1.0) if faster else learning_rate,
        }
        for (decayed, faster), params in groups.items()
    ]


def _optim_args(text: str | None) -> dict[str, Any]:
    """ "rank=8, eps=1e-6, name=x" → {"rank": 8, "eps": 1e-6, "name": "x"}"""
    settings = {}
    for pair in filter(None, (part.strip() for part in (text or "").split(","))):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UserError(Problem("--optim_args", "optim_args", pair, "is no key=value pair"))
        if key in ("lr", "weight_decay"):  # every group has its own
            own = "learning_rate" if key == "lr" else key
            raise UserError(Problem("--optim_args", "optim_args", pair, "would be overruled", f"set {own} instead"))
        try:
            settings[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


def create_scheduler(args: Any, optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
    """transformers' schedule of that name over `max_steps` optimizer steps."""
    from transformers import SchedulerType, get_scheduler

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # schedules that go by a metric do not note it
    schedule = SchedulerType(args.lr_scheduler_type).value
    warmup_steps, kwargs = args.get_warmup_steps(max_steps), args.lr_scheduler_kwargs
    if warmup_steps and schedule in WITHOUT_WARMUP:  # transformers passes it over without a word
        console.warn(f"lr_scheduler_type: {schedule} has no warmup; constant_with_warmup has")
    try:
        return get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=max_steps,
            scheduler_specific_kwargs=kwargs,
        )
    except (TypeError, ValueError) as error:
        reason = f"does not suit {schedule}: {error}"
        raise UserError(Problem("--lr_scheduler_kwargs", "lr_scheduler_kwargs", kwargs, reason)) from None


def steps_on_metric(scheduler: Any) -> bool:
    """Whether this schedule moves after an evaluation instead of after every step."""
    return "metrics" in inspect.signature(scheduler.step).parameters


def current_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
