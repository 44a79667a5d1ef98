"""cuDNN's attention on a Hopper GPU against attention document by document in float64.

    python -m pytest tests/gpu/test_cudnn_attention.py

Skipped, with the reason, where there is none, or no nvidia-cudnn-frontend.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from small import samples, small_model, tuned

from burnish.data.loader import collate
from burnish.kernels import cudnn_attention as kernel
from burnish.model import attention
from burnish.model.attention import _by_document, choose_kernel
from burnish.model.compile import compile_blocks
from burnish.model.cuda_recorder import CudaRecorder
from burnish.model.graphs import fill
from burnish.model.head import CausalLoss, unwrap
from burnish.model.probe import choose_path, try_out
from burnish.tuning.blocks import find_blocks

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
pytest.importorskip("cudnn") if HOPPER else None
DEVICE = torch.device("cuda", 0)
OF_SMALL = (4, 2, 16)  # heads, heads of keys and values, head_dim of the small models here


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    monkeypatch.setattr(attention, "OF_CUDNN", None)


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def parts(lengths, heads, kv_heads, head_dim, dtype=torch.bfloat16):
    torch.manual_seed(0)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    drawn = [
        torch.randn(1, n, sum(lengths), head_dim, device=DEVICE, dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    ]
    return drawn, borders


LENGTHS = {
    "one token": [1],
    "some": [1, 70, 256, 3, 129],
    "with empty ones": [0, 5, 0, 0, 64, 128, 0],
    "many": [(7 * n) % 61 for n in range(200)],
    "long": [1500, 2600, 37],
}


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 64), (9, 3, 64), (28, 4, 128), (4, 1, 96), (4, 2, 16)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_output_and_gradients_are_those_of_attention_by_document(lengths, heads, kv_heads, head_dim, dtype, rounding):
    low, borders = parts(lengths, heads, kv_heads, head_dim, dtype)
    exact = [x.detach().double().requires_grad_() for x in low]
    fast = attention._cudnn(*low, borders, max(lengths), None)
    slow = _by_document(*exact, borders, None, None, 0.0)
    assert fast.shape == slow.shape and distance(fast, slow) < rounding
    weights = torch.randn_like(slow).to(dtype)
    (fast * weights).sum().backward()
    (slow * weights.double()).sum().backward()
    for one, other in zip(low, exact, strict=True):
        if other.grad.abs().max() < 1e-6:  # of one token alone the softmax is 1 whatever Q and K are
            assert one.grad.abs().max() < 1e-2
        else:
            assert distance(one.grad, other.grad) < 2 * rounding


def test_heads_that_are_parts_of_one_product_are_read_right():
    torch.manual_seed(0)
    lengths, (heads, kv_heads, head_dim) = [100, 28], (4, 2, 64)
    whole = torch.randn(1, 128, (heads + 2 * kv_heads) * head_dim, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = (
        x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for x in whole.split([n * head_dim for n in (heads, kv_heads, kv_heads)], -1)
    )
    borders = torch.tensor([0, 100, 128], dtype=torch.int32, device=DEVICE)
    fast = attention._cudnn(q, k, v, borders, max(lengths), None)
    assert distance(fast, _by_document(q.double(), k.double(), v.double(), borders, None, None, 0.0)) < 1e-2


def test_it_is_chosen_after_its_numbers_were_looked_at(monkeypatch):
    model = small_model(head_dim=16, dtype=torch.bfloat16)
    assert choose_kernel(model.config, DEVICE, torch.bfloat16) == ""
    assert attention.OF_CUDNN == OF_SMALL
    monkeypatch.setattr(kernel, "backward_of", lambda grad, q, k, v, *_: (q, k, v))
    assert "wrong by" in choose_kernel(model.config, DEVICE, torch.bfloat16)
    assert attention.OF_CUDNN is None


def loss_and_gradient(model, batch):
    objective = CausalLoss(model, fused=True)
    loss = objective(batch.to(DEVICE)).loss
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return loss.detach(), gradient


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_has_the_loss_and_gradient_that_it_has_with_torchs_attention(compiled, monkeypatch):
    batch = collate(samples(30, longest=300))
    found = {}
    for with_cudnn in (False, True):
        monkeypatch.setattr(attention, "OF_CUDNN", OF_SMALL if with_cudnn else None)
        model = tuned(small_model(head_dim=16, dtype=torch.bfloat16).to(DEVICE), "full")
        assert choose_path(model).padding_free
        if compiled:
            assert compile_blocks(find_blocks(unwrap(model)).values(), partial(try_out, model)) == ""
        found[with_cudnn] = loss_and_gradient(model, batch)
        torch._dynamo.reset()
    assert distance(found[True][0], found[False][0]) < 1e-3
    assert distance(found[True][1], found[False][1]) < 3e-2


def test_it_is_recorded_and_replayed_for_other_documents():
    (q, k, v), borders = parts([200, 40, 16], 4, 2, 64)
    grad = torch.randn_like(q.transpose(1, 2))
    made = {}

    def work():
        for x in (q, k, v):
            x.grad = None
        output = attention._cudnn(q, k, v, borders, 256, None)
        output.backward(grad)
        made.update(o=output.detach(), q=q.grad, k=k.grad, v=v.grad)

    recorder = CudaRecorder()
    recorder.rehearse(work)
    replay = recorder.record(work)
    recorded = dict(made)
    borders.copy_(torch.tensor([0, 7, 250, 256], dtype=torch.int32))
    replay()
    torch.cuda.synchronize()
    replayed = {name: x.clone() for name, x in recorded.items()}
    work()
    for name, x in made.items():
        assert distance(replayed[name], x) < 1e-3, name


def test_filled_up_passes_have_the_gradient_of_those_that_are_not(monkeypatch):
    monkeypatch.setattr(attention, "OF_CUDNN", OF_SMALL)
    model = tuned(small_model(head_dim=16, dtype=torch.bfloat16).to(DEVICE), "full")
    assert choose_path(model).padding_free
    batch = collate(samples(9))
    (loss, gradient), (filled_loss, filled) = (loss_and_gradient(model, each) for each in (batch, fill(batch)))
    assert distance(filled_loss, loss) < 1e-3 and distance(filled, gradient) < 2e-2
