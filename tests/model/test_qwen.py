"""The first Qwen against what its published code computes (tests/golden/qwen1), and in all the ways it is used."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from qwen1 import CONFIG, make_qwen1, write_json
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from burnish.chat.template import load_template
from burnish.errors import UserError
from burnish.generate.arguments import GeneratingArguments
from burnish.generate.engine import Engine
from burnish.model.arguments import ModelArguments
from burnish.model.loader import grow_vocabulary, load_model
from burnish.model.patch import enable_gradient_checkpointing
from burnish.model.probe import choose_path, packed_inputs
from burnish.model.qwen import QWenLMHeadModel, register
from burnish.model.qwen_config import QWenConfig
from burnish.model.qwen_rotary import lengths
from burnish.model.tokenizer import load_tokenizer
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen1"
ATOL = 1e-5


@cache
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def golden_model(attention: str = "sdpa", **changes) -> QWenLMHeadModel:
    register()
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "model", attn_implementation=attention, **changes)
    return model.eval()


def load(folder: Path, *, trainable: bool = False, dtype: torch.dtype = torch.float32, **settings):
    args = ModelArguments(model_name_or_path=str(folder), **settings)
    return load_model(args, dtype=dtype, trainable=trainable)


@torch.no_grad()
def logits(model, input_ids, **inputs) -> torch.Tensor:
    return model(input_ids=input_ids, use_cache=False, **inputs).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=ATOL)


# The numbers of the published code


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [7, 32, 33, 70, 130])
def test_asked_it_computes_what_the_published_code_does_also_beyond_the_length_it_was_trained_on(length, attention):
    ids, wanted = expected()[f"eval_{length}.input_ids"], expected()[f"eval_{length}.logits"]
    assert close(logits(golden_model(attention), ids), wanted)
    assert close(logits(golden_model(attention), ids, attention_mask=torch.ones_like(ids)), wanted)


def test_in_training_neither_dynamic_ntk_nor_logn_is_at_work():
    model = golden_model().train()
    assert close(logits(model, expected()["train.input_ids"]), expected()["train.logits"])
    mask = expected()["train_padded.attention_mask"]
    found = logits(model, expected()["train_padded.input_ids"], attention_mask=mask)
    assert close(found[mask.bool()], expected()["train_padded.logits"][mask.bool()])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_published_code(checkpointing):
    model = golden_model().train()
    if checkpointing:
        enable_gradient_checkpointing(model)
    loss = model(expected()["loss.input_ids"], labels=expected()["loss.labels"]).loss
    loss.backward()
    assert close(loss, expected()["loss.value"][0])
    wanted = {name.removeprefix("loss.grad."): x for name, x in expected().items() if name.startswith("loss.grad.")}
    assert len(wanted) == 2
    assert all(close(model.get_parameter(name).grad, gradient) for name, gradient in wanted.items())


# Texts of a batch do not know each other


@pytest.mark.parametrize("attention", ["burnish", "sdpa", "eager"])
def test_texts_laid_end_to_end_are_what_they_are_alone_also_beyond_the_length_it_was_trained_on(attention):
    model = golden_model()
    choose_path(model)  # makes burnish's attention known
    model.set_attn_implementation(attention)
    names = ("eval_7", "eval_130", "eval_33")
    ids = torch.cat([expected()[f"{name}.input_ids"][0] for name in names])[None]
    wanted = torch.cat([expected()[f"{name}.logits"][0] for name in names])[None]
    inputs = packed_inputs(ids, (7, 130, 33))
    if attention != "burnish":  # transformers' own see the borders in position_ids alone
        inputs = {name: inputs[name] for name in ("input_ids", "position_ids")}
    assert close(logits(model, **inputs), wanted)


@pytest.mark.parametrize("length", [7, 33, 70])
def test_padding_on_the_left_changes_nothing(length):
    ids = expected()[f"eval_{length}.input_ids"]
    pads = torch.full((2, 60), 3)
    mask = torch.cat([torch.zeros_like(pads), torch.ones_like(ids)], dim=1)
    found = logits(golden_model(), torch.cat([pads, ids], dim=1), attention_mask=mask)
    assert close(found[:, 60:], expected()[f"eval_{length}.logits"])


def test_the_length_of_a_text_is_that_of_its_run_of_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [4, 5, 9, 0, 1, 2]])
    assert lengths(positions).tolist() == [[3, 3, 3, 2, 2, 1], [6] * 6, [6, 6, 10, 3, 3, 3]]


# With a cache


@pytest.mark.parametrize("prompt", [66, 69])
def test_a_text_read_piece_by_piece_is_the_text_read_at_once(prompt):
    """70 tokens and the prompts given here are in the same doubling of seq_length 32, so the frequencies are those."""
    model, ids, cache = golden_model(), expected()["eval_70.input_ids"], DynamicCache()
    pieces = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    with torch.no_grad():
        found = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    assert close(torch.cat(found, dim=1), expected()["eval_70.logits"])


def test_an_answer_goes_on_with_the_frequencies_of_its_prompt():
    """Keys stay turned as they are: an answer that crosses a doubling is as if there were no dynamic NTK."""
    ids, cache = expected()["eval_33.input_ids"], DynamicCache()
    model = golden_model()
    with torch.no_grad():
        model(ids[:, :31], past_key_values=cache, use_cache=True)
        found = model(ids[:, 31:], past_key_values=cache, use_cache=True).logits
    assert close(found, logits(golden_model(use_dynamic_ntk=False), ids)[:, 31:])
    assert not close(found, expected()["eval_33.logits"][:, 31:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_in_a_batch_padded_on_the_left_are_those_given_alone(tmp_path, attention):
    folder = make_qwen1(tmp_path, seq_length=32)
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(folder)))
    model = load(folder, flash_attn="disabled" if attention == "eager" else "sdpa")
    engine = Engine(model, tokenizer, load_template(tokenizer, "qwen"), GeneratingArguments(do_sample=False))
    prompts = [torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 31, 80)]
    alone = engine.generate(prompts, max_new_tokens=8)
    assert engine.generate(prompts, batch_size=3, max_new_tokens=8) == alone
    assert len({tuple(answer) for answer in alone}) == 3
    model.config.use_cache = model.generation_config.use_cache = False
    assert engine.generate(prompts[:1], max_new_tokens=8) == alone[:1]


def test_settings_for_generation_of_published_chat_models_are_read_and_kept(tmp_path):
    model = load(make_qwen1(tmp_path / "model"), trainable=True)
    assert (model.generation_config.eos_token_id, model.generation_config.top_p) == (151643, 0.8)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["chat_format"], saved["max_window_size"], saved["max_new_tokens"]) == ("chatml", 6144, 512)


# Files


def test_weights_have_the_names_of_published_checkpoints():
    block = ["ln_1.weight", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "ln_2.weight"]
    block += ["mlp.w1.weight", "mlp.w2.weight", "mlp.c_proj.weight"]
    names = {f"transformer.h.{layer}.{name}" for layer in range(2) for name in block}
    model = golden_model()
    assert set(model.state_dict()) == names | {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"}
    assert not list(model.buffers())


def test_a_checkpoint_of_august_2023_is_read_with_its_names_buffers_and_bin_file(tmp_path, capsys):
    make_qwen1(tmp_path / "new", vocab_size=512)
    new = load(tmp_path / "new")
    old = make_qwen1(tmp_path / "old", vocab_size=512)
    (old / "model.safetensors").unlink()
    buffers = {
        f"transformer.h.{layer}.attn.{name}": torch.zeros(2) for layer in range(2) for name in ("masked_bias", "bias")
    }
    buffers |= {f"transformer.h.{layer}.attn.rotary_emb.inv_freq": torch.zeros(2) for layer in range(2)}
    torch.save(new.state_dict() | buffers, old / "pytorch_model.bin")
    named = {
        "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 8192, "ffn_hidden_size": 256, "attn_pdrop": 0.0,
        "embd_pdrop": 0.0, "resid_pdrop": 0.1, "vocab_size": 151851, "padded_vocab_size": 512, "n_inner": None,
        "params_dtype": "torch.bfloat16", "kv_channels": 16, "layer_norm_epsilon": 1e-6, "seq_length": 2048,
        "use_dynamic_ntk": True, "use_logn_attn": True, "model_type": "qwen", "bf16": True, "fp16": False,
    }  # fmt: skip
    write_json(old / "config.json", named)
    capsys.readouterr()
    model = load(old)
    assert "weights are not used" not in capsys.readouterr().err
    ids = torch.arange(40)[None]
    assert torch.equal(logits(model, ids), logits(new, ids))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (saved["hidden_size"], saved["intermediate_size"], saved["vocab_size"], saved["seq_length"]) == (
        64,
        256,
        512,
        2048,
    )
    assert not {"n_embd", "n_layer", "ffn_hidden_size", "padded_vocab_size"} & set(saved)
    assert torch.equal(logits(load(tmp_path / "saved"), ids), logits(new, ids))


def test_a_length_that_config_json_does_not_give_is_that_of_its_positions():
    assert QWenConfig(n_positions=4096).seq_length == 4096
    assert QWenConfig(max_position_embeddings=8192, seq_length=2048).seq_length == 2048


def test_what_is_saved_is_a_first_qwen_again_and_names_no_code_that_it_lacks(tmp_path):
    folder = make_qwen1(tmp_path / "model")
    model = load(folder, trainable=True)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: saved.get(name) for name in CONFIG if name not in ("auto_map", "transformers_version")} == {
        name: value
        for name, value in json.loads((folder / "config.json").read_text()).items()
        if name not in ("auto_map", "transformers_version", "hidden_size", "num_hidden_layers")
        if name in CONFIG
    }
    assert "auto_map" not in saved
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(load_file(folder / "model.safetensors"))
    ids = torch.arange(50)[None]
    assert torch.equal(logits(load(tmp_path / "saved"), ids), logits(model.eval(), ids))


@pytest.mark.parametrize("trusted", [False, True])
def test_code_in_the_folder_is_never_run_and_the_reason_is_said(tmp_path, capsys, trusted):
    model = load(make_qwen1(tmp_path), trust_remote_code=trusted)  # the code there raises
    assert type(model) is QWenLMHeadModel
    assert "its .py files are not run" in capsys.readouterr().err


def test_a_missing_weight_is_refused_and_none_is_made_up(tmp_path):
    folder = make_qwen1(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.h.1.attn.c_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a QWenLMHeadModel: transformer\.h\.1\.attn\.c_proj"):
        load(folder)


def test_positions_are_not_scaled_from_outside(tmp_path):
    with pytest.raises(UserError, match="qwen models have no rope_parameters"):
        load(make_qwen1(tmp_path), rope_scaling="linear")


# As a model of transformers


def tiny(**changes) -> QWenLMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 211, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return QWenLMHeadModel(
        QWenConfig(**(sizes | {"kv_channels": 16, "intermediate_size": 64, "seq_length": 32} | changes))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_on_the_fast_path(dtype):
    path = choose_path(tiny().to(dtype))
    assert path.padding_free and path.fused_head, str(path)


def test_new_weights_start_small_and_smaller_where_they_flow_back():
    model = tiny(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif ".ln_" in name:
            assert (parameter == 1).all()
        else:
            wanted = 0.02 / 4 if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name


def test_made_without_memory_it_needs_nothing_but_its_weights():
    config = golden_model().config
    with torch.device("meta"):
        model = QWenLMHeadModel(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(golden_model().state_dict(), assign=True)
    assert close(logits(model.eval(), expected()["eval_70.input_ids"]), expected()["eval_70.logits"])


def test_dtypes_are_those_of_the_weights_and_bf16_is_close_to_float32():
    model, ids = golden_model(), expected()["eval_130.input_ids"]
    half = logits(golden_model(dtype=torch.bfloat16), ids)
    assert half.dtype == torch.bfloat16
    exact = logits(model, ids)
    assert (half.float() - exact).norm() < 0.02 * exact.norm()


def test_hidden_states_attentions_last_logits_and_tuples_are_given_when_asked_for():
    ids = expected()["eval_7.input_ids"]
    model = golden_model("eager")
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True, output_attentions=True, logits_to_keep=1)
        assert torch.is_tensor(model(ids, return_dict=False)[0])
    assert [state.shape for state in outputs.hidden_states] == [(2, 7, 64)] * 3
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, 7, 7)] * 2
    assert close(outputs.logits, expected()["eval_7.logits"][:, -1:])
    assert close(model.lm_head(outputs.hidden_states[-1]), expected()["eval_7.logits"])


def test_token_type_ids_are_taken_and_mean_nothing():
    ids = expected()["eval_7.input_ids"]
    assert torch.equal(logits(golden_model(), ids, token_type_ids=torch.ones_like(ids)), logits(golden_model(), ids))


def test_embeddings_may_be_given_in_place_of_ids():
    ids = expected()["eval_33.input_ids"]
    model = golden_model()
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(logits(model, None, inputs_embeds=embedded), logits(model, ids))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embedded)


def test_its_vocabulary_grows():
    model, ids = golden_model(), expected()["eval_7.input_ids"]
    grow_vocabulary(model, 600)
    assert model.config.vocab_size == model.transformer.wte.num_embeddings == model.lm_head.out_features == 640
    assert close(logits(model, ids)[..., :512], expected()["eval_7.logits"])


def test_embedding_and_head_are_one_matrix_where_config_json_says_so(tmp_path):
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert tiny().lm_head.weight is not tiny().transformer.wte.weight


def test_channels_beyond_rotary_pct_are_not_turned():
    """With nothing in the turned half of queries and keys it does not matter where tokens stand."""
    model = tiny(rotary_pct=0.5, use_logn_attn=False).eval()
    ids, mask = torch.arange(20)[None], torch.ones(1, 20)
    apart = {"attention_mask": mask, "position_ids": 3 * ids}
    assert not close(logits(model, ids, **apart), logits(model, ids, attention_mask=mask))
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.view(3, 2, 16, 32)[:2, :, :8] = 0  # q, k, v of 2 heads of 16 channels
    assert close(logits(model, ids, **apart), logits(model, ids, attention_mask=mask))


# Tuned


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_last_blocks_of_24_are_22_and_23():
    tuned = init_adapter(
        tiny(num_hidden_layers=24),
        FinetuningArguments(finetuning_type="freeze", freeze_trainable_layers=2),
        ModelArguments(),
        trainable=True,
    )
    assert {name.split(".")[2] for name in trained(tuned)} == {"22", "23"}
    assert all(name.startswith("transformer.h.") for name in trained(tuned))


@pytest.mark.parametrize("module", ["attn", "mlp", "ln_1", "ln_2"])
def test_parts_of_a_block_are_trained_by_name(module):
    args = FinetuningArguments(finetuning_type="freeze", freeze_trainable_layers=1, freeze_trainable_modules=[module])
    names = trained(init_adapter(tiny(), args, ModelArguments(), trainable=True))
    assert names == {name for name, _ in tiny().named_parameters() if name.startswith(f"transformer.h.1.{module}.")}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["c_attn", "c_proj"], {"attn.c_attn", "attn.c_proj", "mlp.c_proj"}),
        (["all"], {"attn.c_attn", "attn.c_proj", "mlp.c_proj", "mlp.w1", "mlp.w2"}),
    ],
)
def test_adapters_go_where_they_are_meant_to_and_merge_into_the_same_names(targets, layers):
    args = FinetuningArguments(finetuning_type="lora", lora_rank=2, lora_target=targets)
    tuned = init_adapter(tiny(), args, ModelArguments(), trainable=True)
    adapted = {name.partition(".h.")[2].partition(".")[2].partition(".lora_")[0] for name in trained(tuned)}
    assert adapted == layers
    path = choose_path(tuned)
    assert path.padding_free and path.fused_head, str(path)
    assert set(tuned.merge_and_unload().state_dict()) == set(tiny().state_dict())


def test_an_adapter_learns_with_recomputed_blocks_what_it_learns_without():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], init_lora_weights=False)
        model = get_peft_model(tiny(), config).train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        ids = torch.arange(40)[None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*gradients)


def test_transformers_knows_it_once_it_is_registered_however_often():
    register()
    register()
    config = AutoConfig.for_model("qwen", hidden_size=32, num_attention_heads=2, kv_channels=16, vocab_size=64)
    assert type(config) is QWenConfig
    assert type(AutoModelForCausalLM.from_config(config)) is QWenLMHeadModel
