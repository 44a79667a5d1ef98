"""One update of AdamW in several forms, for the tests of its kernel here (tests/kernels) and on a GPU (tests/gpu)."""

from __future__ import annotations

import torch

from burnish.kernels.adamw import Settings, Weight, on_gpu, reference

SETTINGS = Settings(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
SHAPES = [(3, 5), (1,), (7, 1, 2)]
KINDS = [
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def weights(shapes, dtype, *, gradient=None, low=None, seed=0):
    """New ones, of which nothing has moved yet."""
    generator = torch.Generator().manual_seed(seed)
    for shape in shapes:
        value, slope = (torch.randn(shape, generator=generator) for _ in range(2))
        copy = None if low is None else value.to(low)
        master = (value if copy is None else copy).to(dtype).clone()
        moments = torch.zeros_like(master), torch.zeros_like(master)
        yield Weight(master, slope.to(gradient or dtype), *moments, torch.zeros(()), copy)


def tensors(weight):
    return [tensor for tensor in weight if tensor is not None]


def check_that_nothing_moves(step_of, device="cpu"):
    for bad in (1.0, float("nan")):
        ours = [Weight(*(t.to(device) for t in w)) for w in weights(SHAPES, torch.float32, low=torch.bfloat16)]
        for w in ours:
            w.gradient.fill_(bad)
        before = [[tensor.clone() for tensor in tensors(w)] for w in ours]
        step_of(ours, SETTINGS, torch.tensor(bad, device=device), torch.tensor(1.0, device=device))
        for w, old in zip(ours, before, strict=True):
            for now, then in zip(tensors(w), old, strict=True):
                torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def compare_with_reference(gradient, low, shapes, *, device="cpu", roundings=1.0):
    """Three steps, and one that is left out, of the kernel in float32 and of the formula in float64.

    `roundings`: how many of the model's dtype the kernel may differ from the rounding of its own master.
    """
    ours = list(weights(shapes, torch.float32, gradient=gradient, low=low))
    ours = [Weight(*(None if t is None else t.to(device) for t in w)) for w in ours]
    theirs = list(weights(shapes, torch.float64, gradient=gradient, low=low))
    for flag in (0.0, 0.0, 1.0, 0.0):
        on_gpu(ours, SETTINGS, torch.tensor(0.5, device=device), torch.tensor(flag, device=device))
        reference(theirs, SETTINGS, torch.tensor(0.5), torch.tensor(flag))
    for a, b in zip(ours, theirs, strict=True):
        for ours_now, theirs_now in ((a.master, b.master), (a.first, b.first), (a.second, b.second)):
            torch.testing.assert_close(ours_now.double().cpu(), theirs_now, rtol=1e-5, atol=1e-6)
        assert a.step.item() == 3
        if low is not None:
            rounding = torch.finfo(low).eps * a.master.abs() * roundings + torch.finfo(low).smallest_normal
            assert ((a.low.float() - a.master).abs() <= rounding).all()
