from __future__ import annotations

import pytest
import torch
from families import make
from torch import nn

from burnish.tuning.blocks import (
    embedding_and_head,
    expert_parameters,
    find_blocks,
    last_names,
    linear_layers,
    matches,
    text_modules,
)

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize(
    ("family", "first", "layers"),
    [
        ("llama", "model.layers.0", sorted(ATTENTION + MLP)),
        ("gemma3", "model.layers.0", sorted(ATTENTION + MLP)),
        ("gpt2", "transformer.h.0", ["c_attn", "c_fc", "c_proj"]),
        ("mixtral", "model.layers.0", ATTENTION),
        ("qwen2_moe", "model.layers.0", sorted(ATTENTION + MLP)),
        ("gemma3_with_eyes", "model.language_model.layers.0", sorted(ATTENTION + MLP)),
    ],
)
def test_blocks_and_the_linear_layers_in_them_are_found_without_head_and_routers(family, first, layers):
    model = make(family)
    assert next(iter(find_blocks(model))) == first
    assert len(find_blocks(model)) == 3
    assert last_names(linear_layers(model)) == layers


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_fused_experts_are_parameters_of_three_dimensions(family):
    experts = expert_parameters(make(family))
    assert last_names(experts) == ["down_proj", "gate_up_proj"]
    assert {parameter.shape[0] for parameter in experts.values()} == {4}


def test_the_gate_of_a_shared_expert_is_a_router():
    assert not any(path.endswith("shared_expert_gate") for path in linear_layers(make("qwen2_moe")))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 4)


class Mixture(nn.Module):
    """Experts as they were before transformers 5, and as code that comes with a model still has them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 3, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(3))


def test_experts_that_are_modules_are_adapted_and_the_linear_layer_that_chooses_among_them_is_not():
    model = make("llama")
    for block in model.model.layers:
        block.mlp = Mixture()
    assert last_names(linear_layers(model)) == sorted([*ATTENTION, "up"])
    assert not any(path.endswith("mlp.gate") for path in linear_layers(model))


def test_a_convolution_is_no_stack_of_experts():
    model = make("llama")
    model.model.layers[0].convolution = nn.Conv1d(4, 4, kernel_size=3)
    assert expert_parameters(model) == {}


def test_what_a_model_sees_with_is_not_text():
    model = make("gemma3_with_eyes")
    paths = text_modules(model)
    assert not any("vision" in path or "projector" in path for path in paths)
    assert {"lm_head", "model.language_model.embed_tokens", "model.language_model.norm"} <= set(paths)


def test_all_of_a_text_model_is_text():
    for family in ("llama", "gpt2", "qwen3_moe"):
        model = make(family)
        assert set(text_modules(model)) == {path for path, _ in model.named_modules() if path}


def test_the_head_is_text_where_a_model_has_no_base_inside(monkeypatch):
    model = make("llama")
    monkeypatch.setattr(model, "base_model_prefix", "")
    monkeypatch.setattr(model, "get_decoder", lambda: model.model)
    assert "lm_head" in text_modules(model)


@pytest.mark.parametrize(
    ("family", "embedding", "tied"),
    [("llama", "model.embed_tokens", False), ("qwen3", "model.embed_tokens", True), ("gpt2", "transformer.wte", True)],
)
def test_embedding_and_head_are_named_and_known_to_be_one_matrix(family, embedding, tied):
    assert embedding_and_head(make(family)) == (embedding, "lm_head", tied)


def test_a_name_matches_whole_words_at_the_end_of_a_path():
    assert matches("model.layers.23.mlp", "layers.23.mlp")
    assert not matches("model.layers.23.mlp", "3.mlp")
    assert not matches("model.layers.0.q_norm", "norm")


def test_blocks_of_a_dictionary_that_begin_at_one_are_blocks_too():
    model = make("llama")
    model.model.layers = nn.ModuleDict({str(n + 1): block for n, block in enumerate(model.model.layers)})
    assert list(find_blocks(model)) == ["model.layers.1", "model.layers.2", "model.layers.3"]
    assert isinstance(find_blocks(model)["model.layers.1"], nn.Module)
    assert torch.is_tensor(next(find_blocks(model)["model.layers.1"].parameters()))
