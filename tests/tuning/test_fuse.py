"""What peft's layers compute in one operation is what they compute without, or they keep to peft's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import ids, make, shake
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig

from burnish.tuning.fuse import FusedLinear, fuse_lora, plain_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "KaSA": {"kasa_config": KasaConfig()},  # a third matrix between the two
    "biases of all layers": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "biases of B": {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
}


def tuned(settings: dict[str, Any]) -> Any:
    """A small model whose q, k and v have biases, with an adapter that has learned something."""
    settings = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]} | settings
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
    model = get_peft_model(make("qwen2_moe"), config, autocast_adapter_dtype=False)
    shake(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_adapter_has_the_loss_and_every_gradient_that_peft_gives_it(kind):
    own, fused = tuned(KINDS[kind]), fuse_lora(tuned(KINDS[kind]))
    losses = [model(ids(), labels=ids()).loss for model in (own, fused)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    theirs = dict(own.named_parameters())
    trained = [name for name, p in theirs.items() if p.requires_grad]
    for name, parameter in fused.named_parameters():
        assert parameter.requires_grad == (name in trained)
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


def test_only_what_is_plain_is_computed_in_one_operation():
    def in_one(kind):
        model = fuse_lora(tuned(KINDS[kind]))
        return {
            name.rpartition(".")[2]
            for name, layer in model.named_modules()
            if isinstance(layer, FusedLinear) and plain_lora(layer)
        }

    assert in_one("plain") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert in_one("biases of adapted layers") == {"o_proj"}  # the one that has no bias
    assert in_one("DoRA") == in_one("KaSA") == in_one("biases of B") == set()
