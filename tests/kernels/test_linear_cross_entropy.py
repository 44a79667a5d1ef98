"""The fused head against the same loss written as one matrix product, in float64, float32 and bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_pt_utils import LabelSmoother

from burnish.kernels import linear_cross_entropy as kernel
from burnish.kernels.linear_cross_entropy import CPU_TILE, linear_cross_entropy, reference

HIDDEN, VOCABULARY = 12, 97
LENGTHS = [1, 7, CPU_TILE - 1, CPU_TILE, CPU_TILE + 1, 2 * CPU_TILE + 3]  # around the borders of tiles


def parts(count, dtype=torch.float64, *, bias=True, trainable_head=True, seed=0):
    """hidden [count, HIDDEN], weight [VOCABULARY, HIDDEN], bias or None, targets [count]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return (
        draw(count, HIDDEN).requires_grad_(),
        draw(VOCABULARY, HIDDEN).requires_grad_(trainable_head),
        draw(VOCABULARY).requires_grad_(trainable_head) if bias else None,
        torch.randint(0, VOCABULARY, (count,), generator=generator),
    )


def exact(hidden, weight, bias, targets, epsilon=0.0):
    """The formula at the top of the kernel's file, in float64, with no cross_entropy of torch's."""
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    log_sum = logits.logsumexp(-1)
    at_target = logits[torch.arange(len(targets)), targets]
    return ((1 - epsilon) * (log_sum - at_target) + epsilon * (log_sum - logits.mean(-1))).sum()


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None and tensor.requires_grad])


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", LENGTHS)
def test_loss_and_gradients_are_those_of_the_formula(count, bias, epsilon):
    hidden, weight, offset, targets = parts(count, torch.float32, bias=bias)
    loss, _ = linear_cross_entropy(hidden, weight, targets, offset, label_smoothing=epsilon)
    expected = exact(hidden, weight, offset, targets, epsilon)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = (gradients(value * 0.37, hidden, weight, offset) for value in (loss, expected))
    assert len(ours) == len(theirs) == 2 + bias
    assert max(map(distance, ours, theirs)) < 1e-5


def test_the_formula_is_what_torch_means_by_cross_entropy_and_by_label_smoothing():
    hidden, weight, offset, targets = parts(50)
    for epsilon in (0.0, 0.2):
        torchs = reference(hidden, weight, targets, offset, label_smoothing=epsilon)
        assert exact(hidden, weight, offset, targets, epsilon).item() == pytest.approx(torchs.item(), rel=1e-6)


def test_the_gradient_is_the_derivative_of_the_loss():
    """Against finite differences along random directions: nothing but the loss itself is asked."""
    hidden, weight, offset, targets = parts(9)

    def loss_at(h, w, b):
        return linear_cross_entropy(h, w, targets, b, label_smoothing=0.3)[0].double()

    loss = loss_at(hidden, weight, offset)
    for number, (tensor, gradient) in enumerate(
        zip((hidden, weight, offset), gradients(loss, hidden, weight, offset), strict=True)
    ):
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        step = 1e-2 * direction  # the loss itself is rounded to float32
        there, back = ([hidden, weight, offset] for _ in range(2))
        there[number], back[number] = tensor + step, tensor - step
        slope = (loss_at(*there) - loss_at(*back)).item() / 2e-2
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=2e-3)


@pytest.mark.parametrize("count", [1, 2 * CPU_TILE + 3])
def test_bf16_is_as_near_to_the_truth_as_one_matrix_product_in_bf16(count):
    hidden, weight, offset, targets = parts(count, torch.bfloat16)
    truth = exact(hidden, weight, offset, targets)
    loss, _ = linear_cross_entropy(hidden, weight, targets, offset)
    plain = reference(hidden, weight, targets, offset)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)  # the same logits, rounded to bf16
    assert loss.item() == pytest.approx(truth.item(), rel=1e-2)
    wanted = gradients(truth, hidden, weight, offset)
    for ours, theirs, right in zip(
        gradients(loss, hidden, weight, offset), gradients(plain, hidden, weight, offset), wanted, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert distance(ours, right) <= max(1.2 * distance(theirs, right), 5e-3)


@pytest.mark.parametrize("count", [1389, 2779])
def test_the_mean_over_tokens_is_not_rounded_to_bf16(count):
    """1/1389 in bf16 is 0.14 % off, and would be a factor on every gradient below the head."""
    hidden, weight, _, targets = parts(count, torch.bfloat16, bias=False, trainable_head=False)
    (summed,) = gradients(linear_cross_entropy(hidden, weight, targets)[0], hidden)
    (ours,) = gradients(linear_cross_entropy(hidden, weight, targets)[0] / count, hidden)
    assert (ours.float().abs().sum() / summed.float().abs().sum() * count).item() == pytest.approx(1, abs=2e-4)


def test_fp16_loses_no_small_probabilities_of_a_large_vocabulary():
    """20,000 words at 2e-9 each: in fp16 they are zero, and with them most of ∂h, before any scale of the loss."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20_000, HIDDEN, generator=generator).half()
    weight[:, 0], weight[0, 0] = 1.0, 21.0
    hidden = torch.zeros(1, HIDDEN)
    hidden[0, 0] = 1.0
    targets = torch.zeros(1, dtype=torch.int64)
    hidden, weight = hidden.half().requires_grad_(), weight.requires_grad_()
    scale = 2.0**16
    ours = gradients(linear_cross_entropy(hidden, weight, targets)[0] * scale, hidden, weight)
    right = gradients(exact(hidden, weight, None, targets) * scale, hidden, weight)
    assert max(map(distance, ours, right)) < 0.02
    assert (ours[1][:, 0] != 0).all()


def test_many_tiles_of_bf16_do_not_lose_small_addends_of_the_heads_gradient(monkeypatch):
    """The same row in every tile: were the sum kept in bf16, it would stop growing after a few hundred."""
    monkeypatch.setattr(kernel, "CPU_TILE", 1)
    hidden, weight, _, targets = parts(1, torch.bfloat16, bias=False)
    copies = 1000
    loss, _ = linear_cross_entropy(hidden.expand(copies, -1), weight, targets.expand(copies))
    single, _ = linear_cross_entropy(hidden, weight, targets)
    (whole,), (one,) = gradients(loss, weight), gradients(single, weight)
    assert distance(whole, one.float() * copies) < 1e-2


@pytest.mark.parametrize("trainable_head", [True, False])
def test_a_batch_with_nothing_to_train_adds_nothing_and_still_goes_backward(trainable_head):
    hidden, weight, offset, targets = parts(0, trainable_head=trainable_head)
    loss, correct = linear_cross_entropy(hidden, weight, targets, offset, count_correct=True)
    assert loss.item() == 0.0 and correct.item() == 0 and loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad is not None and not hidden.grad.any()


def test_a_batch_with_nothing_to_train_goes_backward_where_only_the_head_is_trained():
    hidden, weight, _, targets = parts(0)
    loss, _ = linear_cross_entropy(hidden.detach(), weight, targets)
    loss.backward()
    assert weight.grad is not None and not weight.grad.any()


def test_label_smoothing_is_that_of_transformers_label_smoother():
    """Its LabelSmoother shifts logits [B, S, V] and means over the labels that are not ignored."""
    hidden, weight, offset, targets = parts(24)
    labels = torch.cat([torch.tensor([-100]), targets[:-1]])[None]  # [1, 24]: position i predicts label i + 1
    labels[0, 5:9] = -100
    outputs = CausalLMOutput(logits=F.linear(hidden, weight, offset)[None])
    theirs = LabelSmoother(epsilon=0.15)(outputs, labels, shift_labels=True)
    trained = (labels[0, 1:] != -100).nonzero()[:, 0]
    ours, _ = linear_cross_entropy(hidden[trained], weight, labels[0, 1:][trained], offset, label_smoothing=0.15)
    assert len(trained) == 19
    assert ours.item() / len(trained) == pytest.approx(theirs.item(), rel=1e-6)


def test_a_frozen_head_gets_no_gradient_and_a_frozen_body_none_either():
    hidden, weight, offset, targets = parts(11, trainable_head=False)
    linear_cross_entropy(hidden, weight, targets, offset)[0].backward()
    assert hidden.grad is not None and weight.grad is None and offset.grad is None

    hidden, weight, offset, targets = parts(11)
    body = hidden.detach()
    linear_cross_entropy(body, weight, targets, offset)[0].backward()
    assert body.grad is None and weight.grad is not None and offset.grad is not None


def test_correct_counts_the_positions_whose_first_choice_is_the_target():
    count = CPU_TILE + 20
    hidden, weight, offset, targets = parts(count)
    best = F.linear(hidden, weight, offset).argmax(-1)
    targets[::3] = best[::3]
    expected = int((best == targets).sum())
    assert count // 3 < expected < count
    _, correct = linear_cross_entropy(hidden, weight, targets, offset, count_correct=True)
    assert correct.item() == expected and correct.dtype == torch.int64
    assert not correct.requires_grad
    assert linear_cross_entropy(hidden, weight, targets, offset)[1].item() == 0


class Watch(TorchFunctionMode):
    """Notes how many numbers the largest tensor holds that any call of torch gives, and the calls."""

    def __init__(self):
        super().__init__()
        self.largest, self.names = 0, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.__name__)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("trainable_head", [True, False])
def test_no_tensor_ever_holds_tokens_times_vocabulary(trainable_head):
    count = 5 * CPU_TILE
    hidden, weight, offset, targets = parts(count, trainable_head=trainable_head)
    saved = []
    with (
        Watch() as watch,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        linear_cross_entropy(hidden, weight, targets, offset, label_smoothing=0.1, count_correct=True)[0].backward()
    assert watch.largest == CPU_TILE * VOCABULARY  # the logits of one tile
    assert CPU_TILE * 50_000 * 4 < 100e6  # bytes of them at a usual vocabulary
    assert max(saved) == count * HIDDEN  # what waits for the backward pass: the gradient of `hidden`
    assert len(saved) == (3 if trainable_head else 1)
    with Watch() as plain:
        reference(hidden, weight, targets, offset).backward()
    assert plain.largest == count * VOCABULARY  # so the watch does see it


def test_without_gradients_none_is_computed():
    hidden, weight, offset, targets = parts(CPU_TILE + 5)
    wanted = exact(hidden, weight, offset, targets).item()
    with torch.no_grad(), Watch() as watch:
        loss, _ = linear_cross_entropy(hidden, weight, targets, offset)
    assert loss.item() == pytest.approx(wanted, rel=1e-6) and not loss.requires_grad
    of_the_gradient = {"empty_like", "zeros_like", "scatter_add_", "mm", "matmul"}
    assert "linear" in watch.names and not watch.names & of_the_gradient
    with Watch() as watch:
        linear_cross_entropy(hidden, weight, targets, offset)
    assert watch.names >= of_the_gradient  # so the watch does see them
