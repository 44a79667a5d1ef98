from __future__ import annotations

import json
import warnings

import pytest
import torch
from families import ids, logits, make, shake
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from burnish.errors import UserError
from burnish.model.arguments import ModelArguments
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.lora import merge_adapters

FAMILIES = ["llama", "qwen3", "gemma3", "mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt2", "gemma3_with_eyes"]

# peft asks transformers for gradient checkpointing by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def lora(model, *, adapters=None, resize_vocab=False, **settings):
    args = FinetuningArguments(**settings)
    model_args = ModelArguments(adapter_name_or_path=adapters, resize_vocab=resize_vocab)
    return init_adapter(model, args, model_args, trainable=True)


def ask(model, *adapters: str):
    model_args = ModelArguments(adapter_name_or_path=list(adapters))
    return init_adapter(model, FinetuningArguments(), model_args, trainable=False)


def in_plain_peft(family: str, folder, **how):
    return PeftModel.from_pretrained(make(family, **how), folder, autocast_adapter_dtype=False)


def save(model, folder) -> str:
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def adapted(model) -> set[str]:
    """What has two small matrices, by its path in the base model."""
    names = {name for name, _ in model.named_parameters() if ".lora_" in name}
    return {name.split(".lora_")[0].removeprefix("base_model.model.").replace(".base_layer", "") for name in names}


def last_words(paths) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def refusal(model, **settings) -> str:
    with pytest.raises(UserError) as raised:
        lora(model, **settings)
    return str(raised.value)


def trained_adapter(family, folder, *, seed=1, base=None, **settings) -> str:
    model = lora(base if base is not None else make(family), **settings)
    shake(model, seed)
    return save(model, folder)


# Where adapters go


def test_all_takes_every_linear_layer_of_the_blocks_and_not_the_head():
    model = lora(make("llama"))
    assert last_words(adapted(model)) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adapted(model)) == 7 * 3


def test_a_name_hits_every_layer_whose_path_ends_with_it():
    model = lora(make("gpt2"), lora_target=["c_proj"])
    assert adapted(model) == {f"transformer.h.{n}.{part}.c_proj" for n in range(3) for part in ("attn", "mlp")}


def test_a_longer_name_hits_fewer_layers():
    model = lora(make("llama"), lora_target=["layers.1.mlp.up_proj"])
    assert adapted(model) == {"model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_all_takes_fused_experts_and_leaves_out_routers(family):
    model = lora(make(family))
    experts = [n for n in range(3) if not (family == "deepseek_v3" and n == 0)]
    assert {f"model.layers.{n}.mlp.experts" for n in experts} <= adapted(model)
    assert last_words(adapted(model)).isdisjoint({"gate", "router", "shared_expert_gate", "lm_head"})


def test_a_shared_expert_and_a_dense_block_beside_fused_experts_are_adapted_too():
    """peft would take their names for those of the experts before they were fused, and leave them out."""
    model = lora(make("deepseek_v3"))
    assert {f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")} <= adapted(model)
    assert {f"model.layers.1.mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj")} <= adapted(model)


@pytest.mark.parametrize(("family", "names"), [("qwen3_moe", ["gate_proj", "down_proj"]), ("mixtral", ["w1", "w2"])])
def test_experts_answer_to_the_names_they_had_before_they_were_fused(family, names):
    assert adapted(lora(make(family), lora_target=names)) == {f"model.layers.{n}.mlp.experts" for n in range(3)}


def test_the_eyes_of_a_model_get_no_adapters_though_their_layers_have_the_same_names():
    for target in (["all"], ["q_proj"]):
        assert all("language_model" in path for path in adapted(lora(make("gemma3_with_eyes"), lora_target=target)))


def test_a_name_that_is_not_there_is_answered_with_those_that_are_and_all_of_them_at_once():
    message = refusal(make("llama"), lora_target=["q_prj", "mlp"], additional_target=["embedding"])
    assert len(message.splitlines()) == 3
    assert "lora_target 'q_prj' is no layer of this model; there are: down_proj, embed_tokens" in message
    assert "additional_target 'embedding' is no module of this model; such as: embed_tokens, lm_head, norm" in message


# What they are


def test_alpha_is_twice_the_rank_unless_it_is_given():
    assert lora(make("llama"), lora_rank=4).peft_config["default"].lora_alpha == 8
    assert lora(make("llama"), lora_rank=4, lora_alpha=4).peft_config["default"].lora_alpha == 4


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 2.0), (True, 2.0 * 16**0.5)])
def test_the_scale_is_alpha_over_the_rank_or_over_its_root(stabilized, scale):
    model = lora(make("llama"), lora_rank=16, use_rslora=stabilized)
    assert model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").scaling["default"] == scale


def test_a_new_adapter_changes_no_logit():
    for family in FAMILIES:
        assert torch.equal(logits(lora(make(family))), logits(make(family))), family


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"additional_target": ["norm"]}])
def test_what_is_trained_has_the_dtype_of_the_base_and_nothing_else_is_trained(settings):
    model = lora(make("llama", dtype=torch.bfloat16), **settings)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name or "modules_to_save" in name}


def test_every_trained_matrix_is_reached_by_the_gradient():
    for family in FAMILIES:
        model = lora(make(family))
        shake(model)
        model(ids(), labels=ids()).loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == [], family


def test_dropout_acts_in_training_only():
    model = lora(make("llama"), lora_dropout=0.5)
    shake(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(model(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("setting", [{"lora_dropout": 0.1}, {"use_dora": True}, {"pissa_init": True}])
def test_what_fused_experts_cannot_do_is_refused_by_name(setting):
    message = refusal(make("qwen3_moe"), **setting)
    assert next(iter(setting)) in message
    assert "does not work with fused experts (mlp.experts.down_proj, mlp.experts.gate_up_proj)" in message
    lora(make("qwen3_moe"), lora_target=["q_proj", "v_proj"], **setting)


# The file is peft's


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_has_the_same_logits_in_plain_peft_and_when_it_is_trained_on(tmp_path, family, dtype):
    model = lora(make(family, dtype=dtype))
    shake(model)
    folder = save(model, tmp_path)
    assert not torch.equal(logits(model), logits(make(family, dtype=dtype)))
    assert torch.equal(logits(in_plain_peft(family, folder, dtype=dtype)), logits(model))
    again = lora(make(family, dtype=dtype), adapters=[folder])
    assert torch.equal(logits(again), logits(model))
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_has_the_logits_of_the_unmerged_one(tmp_path, family):
    folder = trained_adapter(family, tmp_path)
    merged = ask(make(family), folder)
    assert not isinstance(merged, PeftModel)
    assert torch.allclose(logits(merged), logits(in_plain_peft(family, folder)), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_target": ["q_proj", "embed_tokens", "lm_head"]},
        {"additional_target": ["embed_tokens", "lm_head"]},
        {"additional_target": ["norm"]},
    ],
)
def test_every_kind_of_adapter_loads_in_plain_peft_and_merges(tmp_path, settings):
    model = lora(make("llama"), **settings)
    shake(model)
    folder = save(model, tmp_path)
    assert torch.equal(logits(in_plain_peft("llama", folder)), logits(model))
    assert torch.allclose(logits(ask(make("llama"), folder)), logits(model), atol=1e-5)


def test_names_in_the_file_are_short_where_they_can_be(tmp_path):
    trained_adapter("llama", tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


# Matrices that are embedding and head at once


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_shared_matrix_trained_whole_stays_one_in_training_in_the_file_and_merged(tmp_path, family, name):
    model = lora(make(family), additional_target=[name])
    shake(model)
    folder = save(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    embedding = stored["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(embedding, stored["base_model.model.lm_head.weight"])
    assert not torch.equal(embedding, make(family).get_input_embeddings().weight)
    assert torch.equal(logits(in_plain_peft(family, folder)), logits(model))
    merged = ask(make(family), folder)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model), atol=1e-5)


def test_small_matrices_beside_a_shared_matrix_are_refused():
    assert "is embedding and head at once" in refusal(make("qwen3"), lora_target=["q_proj", "lm_head"])


def test_a_shared_matrix_that_peft_would_tear_apart_is_refused():
    message = refusal(make("gpt2"), additional_target=["wte"])
    assert "peft does not keep transformer.wte and lm_head one matrix" in message


def test_a_layer_cannot_be_both_adapted_and_trained_whole():
    message = refusal(make("llama"), lora_target=["q_proj", "lm_head"], additional_target=["lm_head"])
    assert "is trained whole by additional_target too" in message


@pytest.mark.parametrize(("family", "count"), [("llama", 2), ("qwen3", 1)])
def test_a_grown_vocabulary_is_learned_without_being_asked_for(family, count, capsys):
    model = lora(make(family), resize_vocab=True)
    whole = [n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert len(whole) == count
    assert "model.embed_tokens and lm_head are trained whole" in capsys.readouterr().out


def test_added_tokens_that_nothing_trains_are_said(capsys):
    args = ModelArguments(add_special_tokens=["<|tool|>"])
    init_adapter(make("llama"), FinetuningArguments(), args, trainable=True)
    assert "additional_target: embed_tokens,lm_head would train them" in capsys.readouterr().err


# PiSSA


@pytest.mark.parametrize("stabilized", [False, True])
def test_pissa_begins_at_the_base_and_is_found_again_from_its_file(tmp_path, stabilized):
    model = lora(make("llama"), pissa_init=True, use_rslora=stabilized)
    assert torch.allclose(logits(model), logits(make("llama")), atol=1e-5)
    assert model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_B["default"].weight.norm() > 0
    shake(model)
    folder = save(model, tmp_path)
    assert torch.equal(logits(in_plain_peft("llama", folder)), logits(model))
    assert torch.equal(logits(lora(make("llama"), adapters=[folder])), logits(model))
    assert torch.allclose(logits(ask(make("llama"), folder)), logits(model), atol=1e-5)


# Several adapters


def test_all_but_the_last_are_merged_and_the_last_is_trained_on(tmp_path):
    first = trained_adapter("llama", tmp_path / "first", seed=1)
    second = trained_adapter("llama", tmp_path / "second", seed=2, base=ask(make("llama"), first), lora_rank=4)
    model = lora(make("llama"), adapters=[first, second])
    assert model.peft_config["default"].r == 4
    assert list(model.peft_config) == ["default"]
    assert {p.shape[0] for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n} == {4}
    by_hand = PeftModel.from_pretrained(in_plain_peft("llama", first).merge_and_unload(), second)
    assert torch.equal(logits(model), logits(by_hand))


def test_adapters_are_merged_in_the_order_they_are_given(tmp_path):
    """DoRA scales the weight it finds, so order shows."""
    first = trained_adapter("llama", tmp_path / "first", seed=1, use_dora=True)
    second = trained_adapter("llama", tmp_path / "second", seed=2, use_dora=True)
    by_hand = in_plain_peft("llama", first).merge_and_unload()
    by_hand = PeftModel.from_pretrained(by_hand, second).merge_and_unload()
    assert torch.allclose(logits(ask(make("llama"), first, second)), logits(by_hand), atol=1e-6)
    assert not torch.allclose(logits(ask(make("llama"), second, first)), logits(by_hand), atol=1e-3)


def test_a_new_adapter_begins_on_top_of_all_that_are_given(tmp_path):
    first = trained_adapter("llama", tmp_path / "first", seed=1)
    second = trained_adapter("llama", tmp_path / "second", seed=2)
    model = lora(make("llama"), adapters=[first, second], create_new_adapter=True, lora_rank=2)
    assert {p.shape[0] for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n} == {2}
    assert torch.equal(logits(model), logits(ask(make("llama"), first, second)))


def test_an_adapter_goes_on_with_its_own_settings_and_that_is_said(tmp_path, capsys):
    folder = trained_adapter("llama", tmp_path, lora_rank=3, lora_target=["v_proj"])
    model = lora(make("llama"), adapters=[folder], lora_rank=16)
    assert last_words(adapted(model)) == {"v_proj"}
    assert "its own rank 3, alpha 6 and targets" in capsys.readouterr().out


# Adapters that do not fit


def test_an_adapter_of_a_wider_model_is_refused(tmp_path):
    folder = trained_adapter("llama", tmp_path)
    other = AutoModelForCausalLM.from_config(type(make("llama").config)(hidden_size=64, num_hidden_layers=2))
    with pytest.raises(UserError, match="does not fit this model"):
        ask(other, folder)


def test_an_adapter_of_a_deeper_model_is_refused_and_not_put_on_in_part(tmp_path):
    folder = trained_adapter("llama", tmp_path)
    shallow = make("llama")
    del shallow.model.layers[2]
    with pytest.raises(UserError, match="14 of its matrices have no counterpart"):
        ask(shallow, folder)


def test_an_adapter_that_lacks_matrices_is_refused(tmp_path):
    folder = trained_adapter("llama", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(UserError, match="does not fit this model"):
        ask(make("llama"), folder)


def test_a_folder_that_holds_no_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        ask(make("llama"), str(tmp_path))


def test_another_kind_of_adapter_is_refused_by_name(tmp_path):
    get_peft_model(make("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="is an adapter of kind IA3, not LORA"):
        ask(make("llama"), str(tmp_path))


def test_an_adapter_of_another_base_is_put_on_with_a_word(tmp_path, capsys):
    model = make("llama")
    model.name_or_path = "models/first"
    folder = trained_adapter("llama", tmp_path, base=model)
    other = make("llama")
    other.name_or_path = "models/second"
    ask(other, folder)
    assert "was trained on models/first; here it is put on models/second" in capsys.readouterr().err


def test_smollm2_with_an_adapter_answers_the_same_in_plain_peft(tmp_path, fixture_path):
    def base():
        return AutoModelForCausalLM.from_pretrained(fixture_path("smollm2"), dtype=torch.float32)

    model = lora(base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_442_240
    shake(model)
    folder = save(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), folder)), logits(model))
    assert torch.allclose(logits(ask(base(), folder)), logits(model), rtol=1e-3, atol=1e-2)


def test_merging_an_adapter_of_the_head_alone_leaves_the_tied_embedding_as_it_was(tmp_path):
    model = make("gemma3")
    assert model.config.tie_word_embeddings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        tuned = get_peft_model(model, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    shake(tuned)
    expected = logits(tuned)
    merged = merge_adapters(make("gemma3"), [save(tuned, tmp_path)], ModelArguments())
    assert torch.equal(merged.get_input_embeddings().weight, make("gemma3").get_input_embeddings().weight)
    assert torch.allclose(logits(merged), expected, atol=1e-5)
