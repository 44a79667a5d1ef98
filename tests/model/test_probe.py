"""Which path a model is put on, for small models with new weights of the families that differ in what it takes."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import samples, small_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RwkvConfig,
)

from burnish.data.loader import collate, make_collate
from burnish.model.attention import ATTENTION_NAME
from burnish.model.head import CausalLoss
from burnish.model.probe import ForwardPath, choose_path, close

SHAPE = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 8}
STATES = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SHAPE, **HEAD),
    "qwen3": lambda: Qwen3Config(**SHAPE, **HEAD),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **HEAD, sliding_window=4),
    "phi": lambda: PhiConfig(**SHAPE),  # its head has a bias
    "gpt2": lambda: GPT2Config(
        vocab_size=211, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4),
    "mixtral with a router's loss": lambda: MixtralConfig(**SHAPE, num_local_experts=4, output_router_logits=True),
    "gemma2": lambda: Gemma2Config(**SHAPE, **HEAD),  # caps attention and logits
    "gpt_oss": lambda: GptOssConfig(**SHAPE, **HEAD, num_local_experts=4, num_experts_per_tok=2),  # sinks
    "mamba": lambda: MambaConfig(vocab_size=211, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0),
    "lfm2": lambda: Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
    "falcon_h1": lambda: FalconH1Config(**SHAPE, **STATES),  # attention beside a state
    "rwkv": lambda: RwkvConfig(vocab_size=211, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=8.0),
}
STATEFUL = "laid end to end are not what they are alone"
PADDED = {
    "gemma2": "Gemma2ForCausalLM: attention with softcap",
    "gpt_oss": "GptOssForCausalLM: attention with s_aux",
    "mamba": STATEFUL,
    "lfm2": STATEFUL,
    "falcon_h1": STATEFUL,
    "rwkv": "the attention of RwkvForCausalLM cannot be exchanged",
}
OWN_HEAD = {
    "gemma2": "the logits of Gemma2ForCausalLM are not its head's product alone",  # capped: weights are still small
    "cohere": "the logits of CohereForCausalLM are not its head's product alone",
    "granite": "the logits of GraniteForCausalLM are not its head's product alone",
    "mixtral with a router's loss": "MixtralForCausalLM adds to its loss",
}


def make(family, dtype=torch.float32, **how):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_on_the_fastest_path_its_arithmetic_allows_and_the_reason_is_said(family):
    model = make(family)
    before = model.config._attn_implementation
    path = choose_path(model)
    assert path.padding_free == (family not in PADDED), str(path)
    assert path.fused_head == (family not in OWN_HEAD), str(path)
    wanted = [reason for reason in (PADDED.get(family), OWN_HEAD.get(family)) if reason]
    assert len(path.reasons) == len(wanted)
    assert all(part in reason for part, reason in zip(wanted, path.reasons, strict=True))
    assert model.config._attn_implementation == (ATTENTION_NAME if path.padding_free else before)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"mixtral with a router's loss"}))
def test_on_its_path_a_model_has_the_loss_that_it_gives_each_sample_by_itself(family):
    rows = samples(3, longest=14)
    alone = make(family).eval()
    expected = 0.0
    for row in rows:
        one = collate([row])
        expected += alone(input_ids=one.inputs["input_ids"], labels=one.labels).loss.item() * one.num_trained
    model = make(family).eval()
    path = choose_path(model)
    pads = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0})), pad_token="<pad>")
    batch = make_collate(pads, padding_free=path.padding_free)(rows)
    loss = CausalLoss(model, fused=path.fused_head)(batch).loss.item()
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mixtral", "lfm2"])
def test_in_bf16_the_path_is_the_same(family):
    path = choose_path(make(family, torch.bfloat16))
    assert (path.padding_free, path.fused_head) == (family not in PADDED, True), str(path)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba", "gpt2"])
def test_weights_modes_gradients_hooks_and_random_numbers_are_left_as_they_were(family, training):
    model = make(family).train(training)
    model.get_input_embeddings().weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    choose_path(model)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert {module.training for module in model.modules()} == {training}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    assert torch.is_grad_enabled()


def test_a_model_keeps_its_mode_when_the_probe_itself_fails():
    class Broken(nn.Module):
        def forward(self, hidden):
            raise RuntimeError("broken")

    model = make("llama").train()
    model.model.layers[0].mlp = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        choose_path(model)
    assert model.training


def test_who_asks_for_another_attention_keeps_it_and_gets_padding():
    model = make("llama", attn_implementation="eager")
    path = choose_path(model, keep_padding="flash_attn: sdpa")
    assert path == ForwardPath(False, True, ("flash_attn: sdpa",))
    assert model.config._attn_implementation == "eager"


def test_asked_again_a_model_answers_the_same():
    for family in ("llama", "gemma2"):
        model = make(family)
        assert choose_path(model) == choose_path(model)


def test_adapters_do_not_change_the_path_but_one_on_the_head_does():
    body = get_peft_model(small_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert choose_path(body) == ForwardPath(True, True)
    headed = get_peft_model(small_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    path = choose_path(headed)
    assert path.padding_free and not path.fused_head
    assert path.reasons == ("the head of Qwen3ForCausalLM is a peft Linear",)


def test_a_path_reads_as_a_sentence():
    assert str(ForwardPath(True, True)) == "samples end to end, no padding; fused head"
    assert str(ForwardPath(False, False, ("one", "two"))) == "padded batches; the model's own head and loss (one) (two)"


def test_what_is_not_a_number_is_never_close():
    assert close(torch.ones(3), torch.ones(3) + 1e-5, rounding=1e-3)
    assert not close(torch.ones(3), torch.ones(3) + 1e-2, rounding=1e-3)
    assert not close(torch.tensor([1.0, torch.nan]), torch.ones(2), rounding=10.0)
    assert not close(torch.ones(2), torch.tensor([1.0, torch.inf]), rounding=10.0)
