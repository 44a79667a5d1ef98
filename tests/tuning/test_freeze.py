from __future__ import annotations

import pytest
from families import make
from torch import nn

from burnish.errors import UserError
from burnish.model.arguments import ModelArguments
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments


def freeze(model, **settings):
    args = FinetuningArguments(finetuning_type="freeze", **settings)
    return init_adapter(model, args, ModelArguments(), trainable=True)


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def under(model, *paths: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if any(name.startswith(f"{path}.") for path in paths)}


def refusal(model, **settings) -> str:
    with pytest.raises(UserError) as raised:
        freeze(model, **settings)
    return str(raised.value)


@pytest.mark.parametrize(
    ("count", "blocks"),
    [(1, [2]), (2, [1, 2]), (99, [0, 1, 2]), (-1, [0]), (-2, [0, 1]), (-99, [0, 1, 2])],
)
def test_a_positive_number_frees_the_last_blocks_and_a_negative_one_the_first(count, blocks):
    model = freeze(make("llama"), freeze_trainable_layers=count)
    assert trained(model) == under(model, *(f"model.layers.{n}" for n in blocks))


def test_two_blocks_are_freed_when_nothing_is_said():
    model = freeze(make("qwen3"))
    assert trained(model) == under(model, "model.layers.1", "model.layers.2")


@pytest.mark.parametrize("name", ["mlp", "self_attn", "input_layernorm", "self_attn.q_proj", "down_proj"])
def test_only_the_named_modules_of_the_chosen_blocks_are_freed(name):
    model = freeze(make("llama"), freeze_trainable_layers=1, freeze_trainable_modules=[name])
    expected = {path for path in under(model, "model.layers.2") if f".{name}." in path}
    assert expected
    assert trained(model) == expected


def test_several_names_are_freed_together():
    model = freeze(make("gpt2"), freeze_trainable_layers=1, freeze_trainable_modules=["attn", "ln_2"])
    assert trained(model) == under(model, "transformer.h.2.attn", "transformer.h.2.ln_2")


def test_a_name_that_is_in_no_block_is_answered_with_those_that_are():
    message = refusal(make("llama"), freeze_trainable_modules=["attention", "mlp", "ffn"])
    assert message.count("is in no block") == 2
    assert "there are: self_attn, mlp, input_layernorm, post_attention_layernorm" in message


def test_a_module_that_only_later_blocks_have_can_be_named():
    """The first block of DeepSeek-V3 is dense: experts begin at block 1."""
    model = freeze(make("deepseek_v3"), freeze_trainable_layers=-2, freeze_trainable_modules=["experts"])
    assert trained(model) == under(model, "model.layers.1.mlp.experts")


def test_blocks_that_are_counted_from_one_are_chosen_by_their_order():
    model = make("llama")
    model.model.layers = nn.ModuleDict({str(n + 1): block for n, block in enumerate(model.model.layers)})
    freeze(model, freeze_trainable_layers=1, freeze_trainable_modules=["mlp"])
    assert trained(model) == under(model, "model.layers.3.mlp")


def test_the_block_two_is_never_the_expert_two():
    """Experts that are modules have numbers of their own in their paths."""
    model = make("llama")
    for block in model.model.layers:
        block.mlp = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
    freeze(model, freeze_trainable_layers=1)
    assert trained(model) == under(model, "model.layers.2")
    assert "model.layers.0.mlp.2.weight" not in trained(model)


def test_modules_outside_the_blocks_are_freed_by_name():
    model = freeze(make("llama"), freeze_trainable_layers=1, freeze_extra_modules=["norm", "lm_head"])
    assert trained(model) == under(model, "model.layers.2") | {"model.norm.weight", "lm_head.weight"}


def test_a_name_outside_the_blocks_that_is_not_there_is_answered_with_those_that_are():
    message = refusal(make("llama"), freeze_extra_modules=["embeddings"])
    assert "freeze_extra_modules 'embeddings' is not outside the blocks" in message
    assert "there are: embed_tokens, norm, lm_head" in message


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_either_name_of_a_shared_matrix_frees_it_and_that_is_said(name, capsys):
    model = freeze(make("qwen3"), freeze_trainable_layers=1, freeze_extra_modules=[name])
    assert trained(model) == under(model, "model.layers.2") | {"model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "are one matrix in this model: both move" in capsys.readouterr().out


def test_no_block_at_all_is_allowed_when_something_else_is_trained():
    model = freeze(make("llama"), freeze_trainable_layers=0, freeze_extra_modules=["norm"])
    assert trained(model) == {"model.norm.weight"}
    assert "nothing to train" in refusal(make("llama"), freeze_trainable_layers=0)


def test_the_eyes_of_a_model_stay_frozen():
    model = freeze(make("gemma3_with_eyes"), freeze_trainable_layers=1)
    assert trained(model) == under(model, "model.language_model.layers.2")
