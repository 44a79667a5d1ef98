"""The operator around cuDNN's attention against attention document by document; tests/gpu has cuDNN itself.

On a CPU the operator computes its formula, written out; shapes, layouts and reasons are plain Python.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from processes import make_run
from transformers import Gemma4TextConfig, MambaConfig, MusicgenConfig, Qwen3Config

from burnish.cli import main
from burnish.kernels import cudnn_attention as kernel
from burnish.kernels import cudnn_plan as plan
from burnish.model import attention
from burnish.model.attention import _by_document, choose_kernel, packed_attention

LENGTHS = [5, 1, 0, 9, 2, 0]
BORDERS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
CPU = torch.device("cpu")
DETERMINISTIC = (  # what full_determinism sets and leaves
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "ASCEND_LAUNCH_BLOCKING",
    "HCCL_DETERMINISTIC",
    "FLASH_ATTENTION_DETERMINISTIC",
)


def rows(heads, kv_heads, head_dim, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    return [
        torch.randn(1, n, sum(LENGTHS), head_dim, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for n in sizes
    ]


def results(attend, parts):
    """What it gives, [1, T, heads, head_dim], and the gradients of Q, K and V."""
    out = attend(*parts)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), parts)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 8), (6, 2, 8), (3, 1, 16)])
def test_the_operator_gives_output_and_gradients_of_attention_by_document(heads, kv_heads, head_dim, compiled):
    def ours(q, k, v, borders=BORDERS, longest=9):
        return attention._cudnn(q, k, v, borders, longest, 0.3)

    parts = rows(heads, kv_heads, head_dim)
    expected = results(lambda *qkv: _by_document(*(x.float() for x in qkv), BORDERS, 0.3, None, 0.0).double(), parts)
    found = results(torch.compile(ours, dynamic=True, fullgraph=True) if compiled else ours, parts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # by document it is in float32


def test_what_the_forward_pass_keeps_is_the_logarithm_of_the_sum():
    q, k, v = (x.detach()[0].transpose(0, 1) for x in rows(2, 1, 8))
    _, stats = kernel.reference(q, k, v, BORDERS, 9, 0.5)
    first = (q[:5, 1] @ k[:5, 0].T * 0.5).tril().masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(stats[:5, 1], first.exp().sum(1).log())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_finds_nothing_wrong_with_the_operator(dtype):
    q, k, v = (x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in rows(2, 1, 8, dtype))
    torch.library.opcheck(torch.ops.burnish.cudnn_attention, (q, k, v, BORDERS, 9, 0.5))


# ---- shapes --------------------------------------------------------------------------------------------------------


def shape_of(tokens=4000, borders=17, longest=700, *, backward=True, dtype=torch.bfloat16):
    q, k = torch.empty(tokens, 8, 64, dtype=dtype, device="meta"), torch.empty(tokens, 2, 64, device="meta")
    return plan.Shape.of(q, k, borders, longest, 0.125, backward=backward)


def test_shapes_that_differ_a_little_are_one_plan():
    assert shape_of() == shape_of(2100, 20, 10) == shape_of(4096, 32, 2048)
    assert shape_of().documents == 31 and shape_of(borders=2).documents == 15 and shape_of(borders=33).documents == 63
    assert shape_of().longest == 2048 and shape_of(longest=2049).longest == 4096
    assert shape_of(1).tokens == 2048 and shape_of(8190).tokens == shape_of(8192).tokens == 8192
    forward = shape_of(backward=False)
    assert forward.tokens == 0 and forward == shape_of(100_000, backward=False)
    assert shape_of(dtype=torch.float16) != shape_of()


def test_a_layout_says_where_documents_begin_and_how_long_they_are():
    borders = torch.tensor([0, 3, 10], dtype=torch.int32)
    lengths, places = plan.layout_of(borders, 4, 10, torch.tensor([[8], [4], [2]], dtype=torch.int32))
    assert lengths.tolist() == [3, 7, 0, 0]
    assert places.tolist() == [[0, 24, 80, 80, 80], [0, 12, 40, 40, 40], [0, 6, 20, 20, 20]]
    assert lengths.dtype == places.dtype == torch.int32
    exact, _ = plan.layout_of(borders, 2, 10, torch.ones(3, 1, dtype=torch.int32))
    assert exact.tolist() == [3, 7]


@pytest.mark.parametrize(
    "dtype, head_dim, value_dim, tokens, fits",
    [
        (torch.bfloat16, 128, 128, 8192, True),
        (torch.float16, 64, 64, 1, True),
        (torch.float32, 64, 64, 10, False),
        (torch.bfloat16, 256, 256, 10, False),
        (torch.bfloat16, 12, 12, 10, False),
        (torch.bfloat16, 128, 64, 10, False),
        (torch.bfloat16, 128, 128, 2**20, False),
    ],
)
def test_what_cudnn_is_given(dtype, head_dim, value_dim, tokens, fits):
    query = torch.empty(tokens, 16, head_dim, dtype=dtype, device="meta")
    assert kernel.fits(query, query, query[..., :value_dim]) is fits
    assert not kernel.fits(query, query.double(), query[..., :value_dim])


# ---- where it is used ----------------------------------------------------------------------------------------------


CONFIG = Qwen3Config(num_attention_heads=4, num_key_value_heads=2, hidden_size=256, head_dim=64)
HOPPER = torch.device("cuda")


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A GPU as far as anyone asks."""
    monkeypatch.setattr(attention, "OF_CUDNN", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def test_a_missing_library_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setattr(kernel, "find_spec", lambda _: None)
    why = choose_kernel(CONFIG, HOPPER, torch.bfloat16)
    assert why == "nvidia-cudnn-frontend is not installed (pip install 'burnish[cudnn]')"
    assert attention.OF_CUDNN is None


def test_other_devices_and_dtypes_are_not_spoken_of(monkeypatch):
    assert choose_kernel(CONFIG, HOPPER, torch.float32) == ""
    assert choose_kernel(CONFIG, CPU, torch.bfloat16, keep="full_determinism") == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert choose_kernel(CONFIG, HOPPER, torch.bfloat16) == ""
    assert attention.OF_CUDNN is None


def test_it_is_used_where_it_was_tried_and_nothing_speaks_against_it(monkeypatch):
    tried = []
    monkeypatch.setattr(kernel, "try_out", lambda *what: tried.append(what) or "")
    assert choose_kernel(CONFIG, HOPPER, torch.bfloat16) == "" and attention.OF_CUDNN == (4, 2, 64)
    assert tried == [(HOPPER, torch.bfloat16, 4, 2, 64)]
    assert choose_kernel(CONFIG, HOPPER, torch.bfloat16, keep="full_determinism") == "full_determinism"
    assert attention.OF_CUDNN is None and len(tried) == 1


@pytest.mark.parametrize("config", [Gemma4TextConfig(), MusicgenConfig(), MambaConfig()], ids=lambda c: c.model_type)
def test_a_model_whose_layers_differ_or_have_no_heads_keeps_torchs(config, monkeypatch):
    if config.model_type == "gemma4_text" and attention._heads_of(config):
        pytest.skip("this transformers still names one number of heads for layers that differ")
    monkeypatch.setattr(kernel, "try_out", lambda *what: pytest.fail(f"tried with {what}"))
    assert "does not say how many heads" in choose_kernel(config, HOPPER, torch.bfloat16)
    assert choose_kernel(config, CPU, torch.float32) == "" and attention.OF_CUDNN is None


@pytest.mark.parametrize(
    "words, why",
    [
        ("flash_attn=auto", None),
        ("flash_attn=fa3", None),
        ("flash_attn=fa2", "flash_attn: fa2 is FlashAttention 2"),
        ("full_determinism=true", "full_determinism adds up in one order"),
        ("flash_attn=sdpa", None),  # padded: nothing to choose
    ],
)
def test_a_run_says_which_setting_leaves_attention_to_torch(words, why, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernel, "is_for", lambda *_: True)
    monkeypatch.setattr(kernel, "try_out", lambda *_: "")
    for name in DETERMINISTIC:
        monkeypatch.setenv(name, "as it was")
    given = [*make_run(tmp_path, rows=4), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", words]
    try:
        assert main(["train", *given]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    said = [line for line in capsys.readouterr().out.splitlines() if "attention is torch's" in line]
    assert said == ([f"attention is torch's, not cuDNN's: {why}"] if why else [])
    assert (attention.OF_CUDNN is None) is (why is not None or words == "flash_attn=sdpa")


@pytest.mark.parametrize(
    "tried, window, dtype, is_cudnn",
    [
        ((2, 1, 8), None, torch.bfloat16, True),
        ((2, 1, 8), 4, torch.bfloat16, False),
        ((2, 2, 8), None, torch.bfloat16, False),
        (None, None, torch.bfloat16, False),
        ((2, 1, 8), None, torch.float32, False),
    ],
)
def test_windows_and_heads_that_were_not_tried_stay_with_torch(tried, window, dtype, is_cudnn, monkeypatch):
    called = []
    monkeypatch.setattr(attention, "OF_CUDNN", tried)
    monkeypatch.setattr(attention, "_varlen_fits", lambda *_: True)
    for name in ("_cudnn", "_varlen"):
        monkeypatch.setattr(attention, name, lambda *_, name=name: called.append(name))
    module = SimpleNamespace(is_causal=True)
    parts = rows(2, 1, 8, dtype)
    packed_attention(module, *parts, None, sliding_window=window, cu_seq_lens_q=BORDERS, max_length_q=9)
    assert called == ["_cudnn" if is_cudnn else "_varlen"]


@pytest.mark.parametrize(
    "factor, why",
    [
        (1, ""),
        (1.1, "its numbers are wrong by 0.1"),
        (math.nan, "its numbers are wrong by nan"),
        (None, "RuntimeError: no engine"),
    ],
)
def test_its_numbers_are_looked_at_before_it_is_used(factor, why, monkeypatch):
    """The formula stands in for cuDNN, on the CPU."""

    def backward(*given):
        if factor is None:
            raise RuntimeError("no engine\nmore")
        dq, dk, dv = kernel.reference_backward(*given)
        return dq, dk * factor, dv

    monkeypatch.setattr(kernel, "forward_of", kernel.reference)
    monkeypatch.setattr(kernel, "backward_of", backward)
    monkeypatch.setattr(kernel, "is_for", lambda *_: True)
    config = Qwen3Config(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    assert choose_kernel(config, CPU, torch.bfloat16) == why
    assert attention.OF_CUDNN is None if why else attention.OF_CUDNN == (4, 2, 16)


def test_heads_that_it_does_not_take_are_told():
    assert kernel.try_out(CPU, torch.bfloat16, 4, 2, 256) == "its heads are 256 wide"
