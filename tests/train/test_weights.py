"""Weights that were saved are those that are loaded. How ZeRO-3 divides them stands in test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import small_model
from transformers import LlamaConfig, LlamaForCausalLM

from burnish.train.weights import load_weights, save_weights


def equal_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_loaded_into_a_model_of_the_same_shape(dtype, tmp_path):
    model, other = small_model("llama", dtype=dtype), small_model("llama", seed=1, dtype=dtype)
    save_weights(model, None, tmp_path)
    assert not equal_weights(model, other)
    load_weights(other, tmp_path)
    assert equal_weights(model, other)
    assert next(other.parameters()).dtype == dtype


def test_an_adapter_is_loaded_onto_the_same_base(tmp_path):
    def adapted(seed):
        model = small_model("qwen3")
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))

    model, other = adapted(1), adapted(2)
    save_weights(model, None, tmp_path)
    assert not equal_weights(model, other)
    load_weights(other, tmp_path)
    assert equal_weights(model, other)


def test_a_model_of_a_class_that_transformers_does_not_know_is_loaded_too(tmp_path):
    class OddConfig(LlamaConfig):
        model_type = "odd_llama"

    class OddForCausalLM(LlamaForCausalLM):
        config_class = OddConfig

    torch.manual_seed(0)
    shape = small_model("llama").config.to_dict() | {"model_type": "odd_llama"}
    model, other = (OddForCausalLM(OddConfig(**shape)) for _ in range(2))
    save_weights(model, None, tmp_path)
    load_weights(other, tmp_path)
    assert equal_weights(model, other)
