"""The operator around cuDNN's attention against attention document by document; tests/gpu has cuDNN itself.

On a CPU the operator computes its formula, written out; shapes, layouts and reasons are plain Python.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from burnish.kernels import cudnn_attention as kernel
from burnish.model import attention
from burnish.model.attention import _by_document, choose_kernel, packed_attention

LENGTHS = [5, 1, 0, 9, 2, 0]
BORDERS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
CPU = torch.device("cpu")


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
        return attention._cudnn(q, k, v, borders, longest, 0.3, None)

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


def test_a_backward_pass_through_a_part_of_the_graph_asks_for_nothing_of_what_is_kept():
    q, k, v = (x.detach()[0].transpose(0, 1).requires_grad_() for x in rows(2, 1, 8))
    output, stats = torch.ops.burnish.cudnn_attention(q, k, v, BORDERS, 9, 0.5)
    assert torch.autograd.grad(output.sum(), q)[0].isfinite().all() and stats.shape == (sum(LENGTHS), 2)


# ---- shapes --------------------------------------------------------------------------------------------------------


def shape_of(tokens=4000, borders=17, longest=700, *, backward=True, dtype=torch.bfloat16):
    q, k = torch.empty(tokens, 8, 64, dtype=dtype, device="meta"), torch.empty(tokens, 2, 64, device="meta")
    return kernel.Shape.of(q, k, borders, longest, 0.125, backward=backward)


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
    lengths, places = kernel._layout(borders, 4, 10, torch.tensor([[8], [4], [2]], dtype=torch.int32))
    assert lengths.tolist() == [3, 7, 0, 0]
    assert places.tolist() == [[0, 24, 80, 80, 80], [0, 12, 40, 40, 40], [0, 6, 20, 20, 20]]
    assert lengths.dtype == places.dtype == torch.int32
    exact, _ = kernel._layout(borders, 2, 10, torch.ones(3, 1, dtype=torch.int32))
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
    assert kernel.fits(query, query[..., :value_dim]) is fits


# ---- where it is used ----------------------------------------------------------------------------------------------


class Config(SimpleNamespace):
    def get_text_config(self):
        return self


CONFIG = Config(num_attention_heads=4, num_key_value_heads=2, hidden_size=256)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU as far as anyone asks."""
    monkeypatch.setattr(attention, "WITH_CUDNN", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return torch.device("cuda")


def test_a_missing_library_is_told_with_its_remedy(hopper, monkeypatch):
    monkeypatch.setattr(kernel, "find_spec", lambda _: None)
    why = choose_kernel(CONFIG, hopper, torch.bfloat16, deterministic=False)
    assert why == "nvidia-cudnn-frontend is not installed (pip install 'burnish[cudnn]')"
    assert not attention.WITH_CUDNN


def test_other_devices_and_dtypes_are_not_spoken_of(hopper, monkeypatch):
    assert choose_kernel(CONFIG, hopper, torch.float32, deterministic=False) == ""
    assert choose_kernel(CONFIG, CPU, torch.bfloat16, deterministic=True) == ""
    assert choose_kernel(Config(d_inner=3), hopper, torch.bfloat16, deterministic=False) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert choose_kernel(CONFIG, hopper, torch.bfloat16, deterministic=False) == ""
    assert not attention.WITH_CUDNN


def test_it_is_used_where_it_was_tried_and_not_with_full_determinism(hopper, monkeypatch):
    tried = []
    monkeypatch.setattr(kernel, "why_not", lambda *what: tried.append(what) or "")
    assert choose_kernel(CONFIG, hopper, torch.bfloat16, deterministic=False) == "" and attention.WITH_CUDNN
    assert tried == [(hopper, torch.bfloat16, 4, 2, 64)]
    assert choose_kernel(CONFIG, hopper, torch.bfloat16, deterministic=True) == "full_determinism"
    assert not attention.WITH_CUDNN


@pytest.mark.parametrize("window, is_cudnn", [(None, True), (4, False)])
def test_windows_stay_with_torch(window, is_cudnn, monkeypatch):
    called = []
    monkeypatch.setattr(attention, "WITH_CUDNN", True)
    monkeypatch.setattr(attention, "_varlen_fits", lambda *_: True)
    for name in ("_cudnn", "_varlen"):
        monkeypatch.setattr(attention, name, lambda *_, name=name: called.append(name))
    parts = rows(2, 1, 8, torch.bfloat16)
    module = SimpleNamespace(is_causal=True)
    packed_attention(module, *parts, None, sliding_window=window, cu_seq_lens_q=BORDERS, max_length_q=9)
    assert called == ["_cudnn" if is_cudnn else "_varlen"]


@pytest.mark.parametrize("fault, why", [(None, ""), ("wrong", "its numbers are wrong by"), ("raises", "RuntimeError")])
def test_its_numbers_are_looked_at_before_it_is_used(fault, why, monkeypatch):
    """The formula stands in for cuDNN, on the CPU."""

    def backward(*given):
        if fault == "raises":
            raise RuntimeError("no engine\nmore")
        dq, dk, dv = kernel.reference_backward(*given)
        return dq, dk * (1.1 if fault else 1), dv

    monkeypatch.setattr(kernel, "forward_of", kernel.reference)
    monkeypatch.setattr(kernel, "backward_of", backward)
    found = kernel.try_out(CPU, torch.bfloat16, 4, 2, 16)
    assert found.startswith(why) and bool(found) is bool(fault) and "\n" not in found


def test_heads_that_it_does_not_take_are_told():
    assert kernel.try_out(CPU, torch.bfloat16, 4, 2, 256) == "its heads are 256 wide"
