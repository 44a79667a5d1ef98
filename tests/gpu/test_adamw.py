"""AdamW in one pass on a CUDA device: the Triton kernel against its formula, and within a run.

    python -m pytest tests/gpu/test_adamw.py

Skipped, with the reason, where there is no CUDA device.
"""

from __future__ import annotations

import pytest
import torch
from one_update import KINDS, SETTINGS, SHAPES, check_that_nothing_moves, compare_with_reference
from small import arguments, samples, small_model, trainer
from transformers import TrainerCallback

from burnish.kernels.adamw import Weight, on_gpu
from burnish.kernels.linear_cross_entropy import linear_cross_entropy
from burnish.train import adamw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda"


@pytest.mark.parametrize("gradient, low", KINDS)
def test_the_kernel_gives_what_the_reference_gives(gradient, low):
    from burnish.kernels.adamw_on_gpu import BLOCK, CHUNK

    ragged = [(CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3, CHUNK // 2 + BLOCK + 7), (5 * CHUNK,), (1000, 333)]
    compare_with_reference(gradient, low, [*SHAPES, *ragged], device=DEVICE, roundings=0.5)


def test_weights_that_do_not_begin_at_16_bytes_and_kinds_side_by_side_move_as_others_do():
    def placed(offset):
        """Two bf16 weights and a float32 one between them, each `offset` elements into a memory of its own."""
        torch.manual_seed(0)
        for low in (torch.bfloat16, None, torch.bfloat16):
            value, slope = (torch.randn(40_000, device=DEVICE) for _ in range(2))
            slope = slope if low is None else slope.to(low)
            whole = [value, slope, torch.zeros_like(value), torch.zeros_like(value)]
            if low is not None:
                whole.append(value.to(low))
            whole = [torch.cat([tensor.new_zeros(offset), tensor])[offset:] for tensor in whole]
            step = torch.zeros((), device=DEVICE)
            yield Weight(*whole[:4], step, None if low is None else whole[4])

    one, none = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    runs = [list(placed(offset)) for offset in (0, 1)]
    for run in runs:
        for _ in range(2):
            on_gpu(run, SETTINGS, one, none)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a.master, b.master, rtol=1e-6, atol=1e-7)
        assert a.low is None or torch.equal(a.low, a.master.bfloat16())
        assert b.low is None or torch.equal(b.low, b.master.bfloat16())


def test_a_weight_beyond_the_reach_of_32_bits_moves_to_its_end():
    """2.15 billion elements: 4 × 8.6 GB and 4.3 more."""
    size = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB of free GPU memory")
    master = torch.ones(size, device=DEVICE)
    low = torch.ones(size, device=DEVICE, dtype=torch.bfloat16)
    weight = Weight(
        master, torch.ones_like(low), *(torch.zeros_like(master) for _ in range(2)), master.new_zeros(()), low
    )
    on_gpu([weight], SETTINGS, master.new_ones(()), master.new_zeros(()))
    expected = 1 - 1e-2 * 0.1 - 1e-2
    for at in (0, 2**31 - 1, 2**31, size - 1):
        assert master[at].item() == pytest.approx(expected, rel=1e-6)
    assert master.min() == master.max() and low.min() == low.max()


def test_nothing_moves_and_nothing_is_counted_where_the_flag_says_so():
    check_that_nothing_moves(on_gpu, DEVICE)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_run_in_one_pass_is_the_run_of_torchs_adamw(dtype, accumulation, tmp_path, monkeypatch):
    runs = []
    for one_pass in (True, False):
        if not one_pass:
            monkeypatch.setattr(adamw, "has_kernels", lambda device: False)
        how = {"gradient_accumulation_steps": accumulation, "weight_decay": 0.1, "max_grad_norm": 0.5}
        args = arguments(tmp_path / str(one_pass), use_cpu=False, learning_rate=1e-3, **how)
        model = small_model(dtype=dtype, head_dim=16).to(DEVICE)
        run = trainer(model, args, samples(32), micro_batch_tokens="40" if accumulation == 2 else "auto")
        run.train()
        assert isinstance(run.optimizer, adamw.AdamW) and run.optimizer.in_one_pass is one_pass
        runs.append(run)
    logs = [[entry for entry in run.state.log_history if "loss" in entry] for run in runs]
    for name in ("loss", "grad_norm"):
        ours, torchs = ([entry[name] for entry in log if name in entry] for log in logs)
        assert ours and ours == pytest.approx(torchs, rel=5e-3)
    ours = runs[0]
    for name, master in ours.update.weights.items():
        assert torch.equal(ours.model.get_parameter(name), master.to(dtype))


def test_a_step_in_one_pass_asks_the_device_nothing_between_two_logs(tmp_path):
    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if 0 < state.global_step < 9 else "default")

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    model = small_model(dtype=torch.bfloat16, head_dim=16).to(DEVICE)
    args = arguments(tmp_path, use_cpu=False, logging_steps=10, max_steps=10, dataloader_pin_memory=True)
    run = trainer(model, args, samples(40), callbacks=[Watch()])
    run.train()
    assert run.optimizer.in_one_pass and run.state.global_step == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_head_is_added_up_in_float32_over_its_tiles(dtype):
    """9,000 positions are 3 tiles. ∂z and ∂W are each rounded once; the sum over tiles is not."""
    torch.manual_seed(0)
    hidden = torch.randn(9000, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = (torch.randn(1003, 64, device=DEVICE) * 0.1).to(dtype).requires_grad_()
    targets = torch.randint(0, 1003, (9000,), device=DEVICE)
    linear_cross_entropy(hidden, weight, targets)[0].mul(1 / 9000).backward()
    exact = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.detach().double() @ exact.T, targets).backward()
    error = (weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert weight.grad.dtype == dtype and error < 4 * torch.finfo(dtype).eps
