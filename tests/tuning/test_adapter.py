from __future__ import annotations

import pytest
import torch
from families import VOCABULARY, ids, logits, make, shake
from transformers import AutoModelForCausalLM

from burnish.errors import UserError
from burnish.model.arguments import ModelArguments
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments


def full(model, **settings):
    args = FinetuningArguments(finetuning_type="full")
    return init_adapter(model, args, ModelArguments(**settings), trainable=True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gpt2"])
def test_full_trains_every_parameter(family):
    model = full(make(family))
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(ids(), labels=ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_full_trains_the_text_of_a_model_that_sees_and_says_what_it_leaves(capsys):
    model = full(make("gemma3_with_eyes"))
    model(ids(), labels=ids()).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "parameters that no text passes through are not trained" in capsys.readouterr().out


def test_a_fully_trained_model_with_a_shared_matrix_is_saved_and_loaded_with_it(tmp_path):
    model = full(make("qwen3"))
    shake(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_an_adapter_is_refused_where_it_would_do_nothing(method):
    args = FinetuningArguments(finetuning_type=method)
    model_args = ModelArguments(adapter_name_or_path=["saves/adapter"])
    with pytest.raises(UserError, match=f"cannot be trained with finetuning_type: {method}"):
        init_adapter(make("llama"), args, model_args, trainable=True)


@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
def test_a_model_that_is_only_asked_trains_nothing(method):
    args = FinetuningArguments(finetuning_type=method)
    model = init_adapter(make("llama"), args, ModelArguments(), trainable=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert logits(model).shape == (1, 12, VOCABULARY)
