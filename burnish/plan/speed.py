"""How long a step takes: its kernels, one by one, on the figures of a device.

    product       the larger of FLOPs ÷ (share reached × data sheet) and bytes ÷ bandwidth
    all others    bytes ÷ bandwidth; attention its FLOPs besides, which are the squares of documents' lengths
    a step        what the GPU works, or what the CPU takes to start it all, whichever is more; and its batches

The shares are those of one table, measured once on an H100 and taken for all others (devices.py says how much of its
bandwidth an H200 reaches beside that): nothing is fitted to a configuration. Attention is torch's, where cuDNN's is
installed too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from burnish.kernels.linear_cross_entropy import gpu_tile
from burnish.plan.devices import Device
from burnish.plan.kernels import Kernel
from burnish.plan.memory import FLOAT32, Held, gradient_bytes
from burnish.plan.model import Shape
from burnish.plan.steps import Pass

# What is reached on an H100 (torch 2.11), as shares of the data sheet's figures. Where a ledger is named it is
# benchmarks/gpu/results/ledger-RUN.json: its milliseconds are divided by what this plan counts of its three steps.
# Of frozen matrices in lora-7b-packed, the first four kernels: 200 TFLOP in 277.7 ms, 0.729. All products of
# full-1.5b-packed: 151 TFLOP in 211.3 ms, 0.724.
PRODUCTS = 0.73
# Of bf16's figure: 8,190 × 3,584 × 18,944 at 1,459 TFLOP/s, alone. No run was looked at for it; the ledger of
# lora-7b-fp8 has the same (389 kernels nvjet…qqtst: 213.5 TFLOP in 146.0 ms).
FP8 = 1.475
# FlashAttention-2, of the FLOPs and of the bandwidth, one after the other: 2.28 TFLOP and 21.2 GB in 21.4 ms
# (lora-7b-packed), 1.51 TFLOP and 18.4 GB in 17.4 ms (full-1.5b-packed); two ledgers, two figures.
ATTENTION, ATTENTION_BYTES = 0.41, 0.40
# Of the bandwidth. Compiled element-wise work: 101 GB in 37.9 ms (full-1.5b-packed, 0.79), 47 GB in 18.3 ms
# (lora-7b-packed, 0.77). AdamW alone is better: 28 bytes of 1.54 billion weights in 15.2 ms, 0.85.
STREAMING = 0.78
SWIGLU = 0.58  # of the bandwidth, with adapters inside: 8 × 18,944 × 28 numbers a token in 35.7 ms (lora-7b-packed)
# Of a step, its time over the sum of its kernels: 442.8 over 433.8 ms (lora-7b-packed), 301.3 over 295.8
# (full-1.5b-packed), under the profiler.
BETWEEN_KERNELS = 0.02
KERNEL = 2e-6  # seconds that the shortest kernel takes. Not measured
# Seconds of the CPU for each kernel, Python included: 129 ms a step of lora-0.5b-packed before passes were recorded
# (docs/performance.md, "What was tried") over the 2,463 launches that are counted here.
LAUNCH = 52e-6
OF_A_GRADIENT = 3  # launches more for each trained tensor and pass: cast, added, noted
# Seconds for each batch of a step, in which the GPU waits. In sft.json a step of lora-7b-packed takes 443.9 ms (8,191
# tokens, 1 batch), one of lora-7b-default 258.8 (4,523 tokens, 4 batches): as much for a token in both, and this.
# Recorded steps have none: their batches go through pinned memory, and the CPU is ahead of the GPU.
BATCH = 4e-3
REPLAY = 30  # launches of a recorded pass: its inputs copied, the two lists started. Not measured
# Seconds more for each launch of a replayed pass: kernels begin and end, and some are launched that are not counted
# (ledger-lora-7b-packed: 3,491, here 2,859). What is left of the 63.1 ms of lora-0.5b-packed (sft.json) over its 2,371
# launches when all else is taken off; no ledger of a replay tells them apart.
IN_A_GRAPH = 6.1e-6
NOT_FUSED = 4  # kernels that a block as it is written takes for one of the compiler's. Not measured
# Of a link between devices. Not measured alone: a step of 1.5B on two H200s took 39 ms longer than on one, copies and
# float32 gradients among them (sft-h200-two.json), where this makes 20.
LINK = 0.7
AROUND = 60  # launches of an optimizer step, its norm and its log
TILE = 128  # tokens: attention computes whole tiles

# Bytes that move for a trained weight in a step, its gradient apart, which is read twice: for the norm and to move it.
ONE_PASS = 3 * 8 + 2  # kernels/adamw.py: master and two moments read and written, the model's weight written
ONE_BY_ONE = ONE_PASS + 8 + 4  # other optimizers: gradients are clipped first, weights rounded last
# pure_bf16 (train/rounding.py), operation by operation in plain torch: 272 are counted of a step (tests/test_plan.py),
# the gradient's 2 among them; gradients are clipped first.
ROUNDED = 272 - 2 + 4


@dataclass(frozen=True)
class Rates:
    """Of one device, in FLOP and bytes a second."""

    products: float
    fp8: float
    attention: float
    bandwidth: float
    link: float

    @classmethod
    def of(cls, device: Device, dtype: torch.dtype) -> Rates:
        assert device.bf16_tflops is not None
        sheet = (device.bf16_tflops if dtype.itemsize == 2 else device.float32_tflops) * 1e12
        fp8 = FP8 * sheet if device.fp8 and dtype.itemsize == 2 else PRODUCTS * sheet
        return cls(
            PRODUCTS * sheet, fp8, ATTENTION * sheet, device.reach * device.bandwidth * 1e12, LINK * device.link * 1e9
        )

    def moving(self, bytes_: float, share: float = STREAMING) -> float:
        return bytes_ / (share * self.bandwidth)


@dataclass
class Time:
    """Seconds by what takes them. `cpu` runs beside the parts, `waiting` beside nothing."""

    parts: dict[str, float] = field(default_factory=dict)
    cpu: float = 0.0
    waiting: float = 0.0  # for batches, and for other devices
    idle: float = 0.0  # of a mean step beyond these means

    def add(self, name: str, seconds: float, kernels: int = 1) -> None:
        self.parts[name] = self.parts.get(name, 0.0) + seconds
        self.cpu += kernels * LAUNCH

    @property
    def gpu(self) -> float:
        return sum(self.parts.values()) * (1 + BETWEEN_KERNELS)

    @property
    def seconds(self) -> float:
        return max(self.gpu, self.cpu) + self.waiting + self.idle


def time_of_step(
    shape: Shape,
    held: Held,
    rates: Rates,
    passes: Sequence[Pass],
    *,
    recomputed: int,
    trained_share: float,
    batches: int,
) -> Time:
    """One optimizer step of one process."""
    time = Time(waiting=0.0 if held.recorded else batches * BATCH)
    for each in passes:
        before = time.cpu
        for number, block in enumerate(shape.measured.blocks):
            for kernel in block.forward.kernels * (2 if number < recomputed and block.goes_back else 1):
                _add_kernel(time, kernel, each, rates, backward=False, fused=block.fused)
            for kernel in block.backward.kernels:
                _add_kernel(time, kernel, each, rates, backward=True, fused=block.fused)
        _add_gradients(time, shape, held, rates, len(passes))
        if held.recorded:
            launches, time.cpu = (time.cpu - before) / LAUNCH, before + REPLAY * LAUNCH
            time.add("between recorded kernels", launches * IN_A_GRAPH, kernels=0)
        _add_head(time, shape, each, rates, trained_share)
        back = sum(b.goes_back for b in shape.measured.blocks)
        again = sum(b.goes_back for b in shape.measured.blocks[:recomputed])
        time.add("dequantizing", rates.moving((1 + (back + again) / shape.layers) * shape.dequantized), kernels=0)
    gradient = gradient_bytes(shape, held, passes=len(passes))
    moved = _moved_by_optimizer(held) + 2 * gradient
    time.add("optimizer", rates.moving(moved * shape.trained * held.divided(1)), kernels=AROUND)
    _add_exchange(time, shape, held, rates, len(passes))
    return time


def _moved_by_optimizer(held: Held) -> int:
    if held.pure_bf16:
        return ROUNDED
    return ONE_PASS if held.optim in ("adamw_torch", "adamw_torch_fused") and not held.stage else ONE_BY_ONE


def _add_kernel(time: Time, kernel: Kernel, each: Pass, rates: Rates, *, backward: bool, fused: bool) -> None:
    moved = kernel.moved.at(each.tokens)
    if kernel.kind in ("product", "product in fp8"):
        rate = rates.products if kernel.kind == "product" else rates.fp8
        seconds = max(kernel.flops * each.tokens / rate, rates.moving(moved))
        time.add("matrix products", max(seconds, KERNEL))
    elif kernel.kind == "attention":
        pairs = (each.squares + TILE * each.tokens) / 2
        flops = 4 * kernel.width * pairs * (2.5 if backward else 1.0)
        sums = 12.0 * kernel.width * each.tokens if backward else 0.0  # ∂q in float32: added to, and read once more
        seconds = flops / rates.attention + rates.moving(moved + sums, ATTENTION_BYTES)
        time.add("attention", seconds, kernels=3 if backward else 1)
    else:
        share, times = SWIGLU if kernel.kind == "swiglu" else STREAMING, 1 if fused else NOT_FUSED
        time.add("element-wise", times * max(rates.moving(moved, share), KERNEL), kernels=times)


def _add_head(time: Time, shape: Shape, each: Pass, rates: Rates, trained_share: float) -> None:
    """Products forward, to the input, and to the weight where it is trained; a tile's softmax reads twice."""
    tokens, matrix = each.real * trained_share, shape.vocabulary * shape.width
    tiles = max(1, -(-int(tokens) // gpu_tile(shape.trains_head)))
    products = 3 if shape.trains_head else 2
    time.add("head", products * 2 * tokens * matrix / rates.products, kernels=products * tiles)
    time.add("head", rates.moving(3 * tokens * shape.vocabulary * shape.dtype.itemsize), kernels=tiles)
    if shape.trains_head:  # each tile's gradient is added in float32; then scaled and rounded
        time.add("head", rates.moving(matrix * (8 * tiles + 6)), kernels=tiles)
    if shape.trains_embedding:
        time.add("element-wise", rates.moving(matrix * 3 * shape.dtype.itemsize), kernels=4)
    norm = 4 * (shape.measured.outside.at(each.tokens) + shape.measured.hidden.at(each.tokens))
    time.add("element-wise", rates.moving(norm), kernels=20)


def _add_gradients(time: Time, shape: Shape, held: Held, rates: Rates, passes: int) -> None:
    """Where a step has several passes each is added to a float32 sum; of one alone nothing moves."""
    launches = OF_A_GRADIENT * (shape.outside.tensors + sum(block.tensors for block in shape.blocks))
    sums = gradient_bytes(shape, held, passes=passes) > shape.dtype.itemsize
    time.add("gradients", rates.moving((2 + 8) * shape.trained if sums else 0.0), kernels=launches)


def _add_exchange(time: Time, shape: Shape, held: Held, rates: Rates, passes: int) -> None:
    """Gradients added up over the devices; under ZeRO-3 weights are gathered for each pass forward and backward too."""
    if held.ranks == 1:
        return
    others = (held.ranks - 1) / held.ranks
    bytes_ = 2 * others * FLOAT32 * shape.trained
    if held.stage == 3:
        bytes_ += 2 * passes * others * shape.held
    time.waiting += bytes_ / rates.link
