"""The devices that a run can be planned for: figures of their data sheets, dense, without sparsity.

`memory_gib` is what the driver leaves to programs (torch.cuda.mem_get_info's total), which is less than the name says.
`measured` marks the devices on which this project has measured what of these figures is reached. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

from burnish.errors import Problem, UserError


@dataclass(frozen=True)
class Device:
    title: str
    memory_gib: float
    bf16_tflops: float | None  # products of bf16 or float16, added up in float32; None: nothing is known of its speed
    float32_tflops: float  # without tf32
    bandwidth: float  # TB/s
    link: float  # GB/s to another device of the machine, in one direction
    source: str
    measured: bool = False
    fp8: bool = False  # matrix units for it with a scale for every row (kernels/frozen_linear.py)
    # Of its bandwidth, beside the share that an H100 reaches of its own. The H200's faster memory makes SwiGLU with
    # adapters 1.08 times as fast (0.75 of what the data sheets promise), compiled element-wise work 1.20 and 1.29 times
    # (0.84, 0.90), AdamW 1.33 times (0.93): ledger-h200-*.json beside ledger-*.json in benchmarks/gpu/results.
    reach: float = 1.0


_HOPPER = "NVIDIA H100 datasheet (SXM)"
DEVICES = {
    "h100": Device("H100 80GB SXM", 79.2, 989.4, 66.9, 3.35, 450, _HOPPER, measured=True, fp8=True),
    "h100-pcie": Device("H100 80GB PCIe", 79.2, 756.4, 51.2, 2.04, 32, "NVIDIA H100 datasheet (PCIe)", fp8=True),
    "h200": Device(
        "H200 141GB SXM",
        139.8,
        989.4,
        66.9,
        4.8,
        450,
        "NVIDIA H200 datasheet (SXM)",
        measured=True,
        fp8=True,
        reach=0.8,
    ),
    "a100-80g": Device("A100 80GB SXM", 79.2, 312, 19.5, 2.04, 300, "NVIDIA A100 datasheet (SXM, 80GB)"),
    "a100-40g": Device("A100 40GB SXM", 39.4, 312, 19.5, 1.555, 300, "NVIDIA A100 datasheet (SXM, 40GB)"),
    "l40s": Device("L40S 48GB", 44.4, 362, 91.6, 0.864, 32, "NVIDIA L40S datasheet"),
    "rtx6000-ada": Device("RTX 6000 Ada 48GB", 47.4, 364.2, 91.1, 0.96, 32, "NVIDIA RTX 6000 Ada datasheet"),
    "a10": Device("A10 24GB", 22.0, 125, 31.2, 0.6, 32, "NVIDIA A10 datasheet"),
    "l4": Device("L4 24GB", 22.0, 121, 30.3, 0.3, 32, "NVIDIA L4 datasheet"),
    "5090": Device("RTX 5090 32GB", 31.4, 209.5, 104.8, 1.792, 64, "NVIDIA RTX Blackwell whitepaper", fp8=True),
    "4090": Device("RTX 4090 24GB", 23.5, 165.2, 82.6, 1.008, 32, "NVIDIA Ada whitepaper"),
    "3090": Device("RTX 3090 24GB", 23.6, 71, 35.6, 0.936, 32, "NVIDIA GA102 whitepaper"),
}
DEFAULT = "h100"
_NAMES_OF_CUDA = {  # what torch.cuda.get_device_name() holds → the name here; the first that it holds
    "H100 PCIe": "h100-pcie", "H100 NVL": "", "H100": "h100", "H200": "h200", "A100-SXM4-80GB": "a100-80g",
    "A100-SXM4-40GB": "a100-40g", "L40S": "l40s", "RTX 6000 Ada": "rtx6000-ada", "A10G": "", "A100": "", "A10": "a10",
    "L40": "", "L4": "l4", "RTX 5090": "5090", "RTX 4090": "4090", "RTX 3090 Ti": "", "RTX 3090": "3090",
}  # fmt: skip


def find_device(name: str) -> Device:
    """By its name in the table, however its letters are written. Raises UserError."""
    wanted = name.lower().replace("_", "-")
    if wanted in DEVICES:
        return DEVICES[wanted]
    near = get_close_matches(wanted, DEVICES, n=1)
    remedy = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(Problem("--device", "", name, "is no device of the table", f"{remedy}choose {', '.join(DEVICES)}"))


def device_here() -> Device | None:
    """The CUDA device of this machine, with the memory that it has; its speed is the table's, where that has it."""
    import torch

    if not torch.cuda.is_available():
        return None
    called, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30
    name = next((name for words, name in _NAMES_OF_CUDA.items() if words in called), "")
    if name in DEVICES and abs(DEVICES[name].memory_gib - memory) < 0.1 * memory:
        return replace(DEVICES[name], title=called, memory_gib=memory)
    return Device(called, memory, None, 0.0, 0.0, 0.0, "the device of this machine, which the table does not have")
