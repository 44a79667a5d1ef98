"""`base_dtype: fp8` on a GPU with fp8 matrix units: its kernels, its operators, and a run beside one in bf16.

Skipped, with the reason, where there is no such device.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import losses, make_run, run
from small import samples, small_model

from burnish.data.loader import collate
from burnish.kernels.frozen_linear import (
    FP8,
    LARGEST,
    frozen_linear,
    has_fp8_units,
    hold_in_fp8,
    how_many_twice,
    quantize_rows,
)
from burnish.kernels.lora_linear import lora_linear
from burnish.kernels.lora_mlp import LoraWeights, lora_mlp
from burnish.model.compile import compile_blocks
from burnish.model.fp8 import hold_layers_in_fp8
from burnish.model.head import CausalLoss, unwrap
from burnish.model.probe import choose_path, try_out
from burnish.tuning.blocks import find_blocks, linear_layers
from burnish.tuning.fuse import fuse_lora, fuse_mlp

DEVICE = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_fp8_units(DEVICE)), reason="no CUDA device with fp8 matrix units"
)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def some(columns, device=DEVICE):
    """Channels, not in a row: c of them."""
    return (
        torch.randperm(columns, generator=torch.Generator().manual_seed(9))[: how_many_twice(columns)].int().to(device)
    )


def hold(weight):
    return hold_in_fp8(weight, some(weight.shape[1], weight.device))


def rounded(x, channels=None):
    scales = x.double().abs().amax(1, keepdim=True) / LARGEST
    exact = x.double() / scales
    first = exact.to(FP8).double()
    if channels is not None:
        first[:, channels] += (exact - first)[:, channels].to(FP8).double()
    return first * scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("rows, columns", [(1, 16), (77, 300), (300, 4096), (513, 18_944), (5, 50_000)])
def test_rows_are_rounded_as_plain_torch_rounds_them(rows, columns, dtype):
    torch.manual_seed(0)
    x = draw(rows, columns, dtype=dtype) * torch.logspace(-3, 3, rows, device=DEVICE).to(dtype)[:, None]
    if rows > 1:
        x[rows // 2] = 0
    quantized, scales = quantize_rows(x, some(columns))
    expected, expected_scales = quantize_rows(x.cpu(), some(columns, "cpu"))
    assert torch.allclose(scales.cpu(), expected_scales, rtol=1e-6)
    differ = (quantized.cpu().float() != expected.float()).double().mean().item()
    assert differ < 1e-3  # a division that rounds otherwise moves what lies on a border
    assert quantized.shape == expected.shape == (rows, columns + 2 * how_many_twice(columns))
    assert torch.equal(quantize_rows(x)[0].view(torch.uint8), quantized[:, :columns].view(torch.uint8))
    assert distance(quantized[:, :columns].float().cpu() * scales.cpu()[:, None], x.cpu()) < 0.04


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 300, 2049])
def test_both_products_are_those_of_the_rounded_numbers(rows, dtype):
    torch.manual_seed(0)
    weight, x = draw(512, 352, dtype=dtype), draw(rows, 352, dtype=dtype).requires_grad_()
    y = frozen_linear(x, hold(weight), None)
    grad_y = draw(rows, 512, dtype=dtype)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    # What lies on a border of fp8 may go to either side; a number rounded otherwise differs by a sixteenth.
    channels = some(352)
    assert distance(y, rounded(x.detach(), channels) @ rounded(weight, channels).T) < 1e-2
    assert distance(grad_x, rounded(grad_y) @ rounded(weight.T.contiguous()).T) < 1e-2


@pytest.mark.parametrize("rank", [8, 3, 64])
def test_layer_and_block_are_those_of_a_cpu(rank):
    torch.manual_seed(0)
    shapes = [(1408, 512), (1408, 512), (512, 1408)]
    layers = [(draw(n, k) / k**0.5, draw(rank, k) / k**0.5, draw(n, rank) / rank**0.5) for n, k in shapes]
    x = draw(300, 512)
    found = []
    for place in (DEVICE, "cpu"):
        own = [LoraWeights(hold(w.to(place)), a.to(place).clone(), b.to(place).clone()) for w, a, b in layers]
        leaves = [x.to(place).clone(), *(part for layer in own for part in layer[1:])]
        for leaf in leaves:
            leaf.requires_grad_()
        block = lora_mlp(leaves[0], *own, 0.5)
        single = lora_linear(leaves[0], own[0].weight, None, leaves[0] @ own[0].a.T, own[0].b, 0.5)
        grads = torch.autograd.grad(block.square().sum() + single.square().sum(), leaves)
        found.append([block, single, *grads])
    assert max(distance(a.cpu(), b.cpu()) for a, b in zip(*found, strict=True)) < 0.03


def test_compiled_blocks_give_the_gradients_of_plain_ones():
    found = []
    for fast in (False, True):
        model = small_model("llama", dtype=torch.bfloat16, head_dim=16).to(DEVICE)
        hold_layers_in_fp8(model, linear_layers(model).values())
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn_like(weight, dtype=torch.float32).mul_(0.1).bfloat16()
        model.train()
        assert choose_path(fuse_lora(model)).padding_free
        if fast:
            fuse_mlp(model)
            assert compile_blocks(find_blocks(unwrap(model)).values(), partial(try_out, model)) == ""
        seen = []
        for count in (1, 5, 9):
            loss = CausalLoss(model, fused=True)(collate(samples(count, seed=count)).to(DEVICE)).loss
            loss.backward()
            seen.append(loss.item())
        found.append((seen, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)
    together = [torch.cat([each.flatten() for each in gradients.values()]) for _, gradients in found]
    assert distance(*together) < 0.15
    assert all(value.any() for value in found[1][1].values())


def test_a_run_beside_an_fp8_base_follows_one_in_bf16(tmp_path):
    words = [*make_run(tmp_path), "--per_device_train_batch_size", "4", "--bf16"]
    run(1, [*words, "--output_dir", str(tmp_path / "bf16")])
    said = run(1, [*words, "--output_dir", str(tmp_path / "fp8"), "--base_dtype", "fp8"])
    assert "layers held in fp8" in said and "no fp8 matrix units" not in said
    assert losses(tmp_path / "fp8") == pytest.approx(losses(tmp_path / "bf16"), rel=2e-2)
