"""float32 arithmetic over narrow weights: the same answers as a widened copy, and the weights as they were."""

from __future__ import annotations

import pytest
import torch
from families import ids, make, shake

from burnish.export.precision import in_float32, named_tensors
from burnish.model.arguments import ModelArguments
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gpt2", "gemma3_with_eyes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_answers_as_its_float32_copy_and_stays_as_it_is(family: str, dtype: torch.dtype):
    model = make(family, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    with torch.no_grad(), in_float32(model):
        answers = model(ids()).logits
    after = named_tensors(model)
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    with torch.no_grad():
        assert answers.dtype == torch.float32 and torch.equal(answers, make(family, dtype=dtype).float()(ids()).logits)


def test_one_block_at_a_time_is_wide():
    model = make("llama", dtype=torch.bfloat16)
    wide: list[int] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(
            lambda *_: wide.append(sum(each.mlp.up_proj.weight.dtype == torch.float32 for each in model.model.layers))
        )
    with torch.no_grad(), in_float32(model):
        model(ids())
    assert wide == [1, 1, 1]


def test_adapters_on_experts_are_no_hindrance():
    """peft puts another parameter in the place of theirs while they compute."""
    model = init_adapter(
        make("qwen3_moe", dtype=torch.bfloat16), FinetuningArguments(), ModelArguments(), trainable=True
    )
    shake(model)
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    before = {name: tensor.clone() for name, tensor in named_tensors(experts).items()}
    with torch.no_grad(), in_float32(model):
        model(ids())
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(experts).items())


def test_a_forward_pass_that_fails_leaves_the_weights_narrow():
    model = make("llama", dtype=torch.bfloat16)
    model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), in_float32(model):
        model(ids())
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
