"""Gradient checkpointing: the same gradients from less memory, under either name that transformers has for it."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import arguments, samples, small_model

from burnish.data.loader import collate
from burnish.model.head import CausalLoss
from burnish.model.patch import enable_gradient_checkpointing, wants_gradient_checkpointing
from burnish.model.probe import choose_path


def prepared(method):
    model = small_model("qwen3")
    if method == "lora":  # the embedding is frozen: nothing that goes into the first block asks for a gradient
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False)
        model = get_peft_model(model, config)
    assert choose_path(model).padding_free
    return model.train()


def gradients_and_calls(model):
    """The gradient of every trained weight, how often a block's mlp ran, and the tensors kept for the backward pass."""
    mlp = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    calls, kept = [], []
    handle = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)  # for the adapters' dropout
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        loss = CausalLoss(model, fused=True)(collate(samples(3))).loss
        held = sum(kept)
    loss.backward()
    handle.remove()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found, len(calls), held


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("settings", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradients_are_equal_and_less_is_kept_for_them(method, settings):
    model = prepared(method)
    plain, calls, held = gradients_and_calls(model)
    assert calls == 1 and len(plain) == sum(parameter.requires_grad for parameter in model.parameters())

    enable_gradient_checkpointing(model, settings)
    again, calls, held_less = gradients_and_calls(model)
    assert calls == 2  # computed again
    assert held_less < held / 2
    assert plain.keys() == again.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_the_backward_pass_ends_at_the_first_trained_block():
    """Blocks below it are frozen: nothing of them is computed again and no gradient goes through them."""
    model = small_model("qwen3")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2]))
    assert choose_path(model).padding_free
    enable_gradient_checkpointing(model)
    calls = []
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    CausalLoss(model.train(), fused=True)(collate(samples(2))).loss.backward()
    assert calls == [0, 1, 2, 2]


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_either_name_asks_for_it(name, tmp_path):
    known = arguments(tmp_path)
    if not hasattr(known, name):
        pytest.skip(f"the installed transformers does not know {name}")
    assert wants_gradient_checkpointing(known) == (False, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 would rather hear the newer one
        asked = arguments(tmp_path, **{name: True, f"{name}_kwargs": {"use_reentrant": True}})
        bare = arguments(tmp_path, **{name: True})
    assert wants_gradient_checkpointing(asked) == (True, {"use_reentrant": True})
    assert wants_gradient_checkpointing(bare)[0] is True
