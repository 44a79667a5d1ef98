"""Where the Triton kernels run: on a CUDA device, with Triton, which torch's CUDA builds for Linux bring."""

from __future__ import annotations

from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None


def has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and HAS_TRITON
