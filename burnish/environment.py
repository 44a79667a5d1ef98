"""`burnish env`: what a report of a fault should say about the machine."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("burnish", "torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "safetensors")
EXTRAS = ("deepspeed", "bitsandbytes", "vllm")  # named when they are there
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16")  # x86, then arm


def describe() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    for package in (*PACKAGES, *EXTRAS):
        if found := version_of(package):
            yield package, found
        elif package in PACKAGES:
            yield package, "not installed"
    yield from _cpu()
    yield from _devices()


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> Iterator[tuple[str, str]]:
    lines = _lines("/proc/cpuinfo")
    model = next((value for name, value in lines if name == "model name"), platform.processor() or "unknown")
    flags = {flag for name, value in lines if name in ("flags", "Features") for flag in value.split()}
    yield "cpu", f"{model}, {os.cpu_count()} cores"
    has = [flag for flag in BF16_FLAGS if flag in flags]
    yield "cpu bf16", ", ".join(has) if has else "no instructions of its own"
    memory = next((value for name, value in _lines("/proc/meminfo") if name == "MemTotal"), None)
    if memory:
        yield "memory", f"{int(memory.split()[0]) / 2**20:.1f} GiB"


def cpu_multiplies_bf16() -> bool:
    """Without AVX512_BF16 or AMX a CPU emulates bf16: 8 to 100 times slower than float32, and no more exact."""
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def quiet_deepspeed() -> None:
    """Where DeepSpeed is installed, transformers imports it to save a model, and it prints that it found no GPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def quiet_bitsandbytes() -> None:
    """Where it is installed, peft imports it, and on some CPUs it warns of kernels that it lacks and nobody wants."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _lines(path: str) -> list[tuple[str, str]]:
    """`name : value` lines of a file of Linux; nothing elsewhere."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    pairs = (line.partition(":") for line in text.splitlines())
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "threads", str(torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, {bf16}"
    if not torch.cuda.is_available():
        yield "cuda", "none; training runs on the cpu"
