from __future__ import annotations

import json

import pytest
import torch
from families import SHAPE, VOCABULARY, ids, logits, make, save, save_tokenizer
from processes import make_run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from burnish.cli import main
from burnish.errors import UserError
from burnish.model.arguments import ModelArguments
from burnish.model.loader import fit_vocabulary, load_model, parameter_table
from burnish.model.tokenizer import load_tokenizer


def load(folder, *, trainable=False, dtype=torch.float32, tokenizer=None, **settings):
    args = ModelArguments(model_name_or_path=str(folder), **settings)
    return load_model(args, dtype=dtype, trainable=trainable, tokenizer=tokenizer)


def refusal(folder, **settings) -> str:
    with pytest.raises(UserError) as raised:
        load(folder, **settings)
    return str(raised.value)


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# What is loaded


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe", "gpt2"])
def test_a_model_has_the_logits_that_were_saved(tmp_path, family):
    save(family, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(make(family)))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_the_dtype_is_the_one_asked_for_whatever_the_file_holds(tmp_path, stored, wanted):
    save("llama", tmp_path, dtype=stored)
    model = load(tmp_path, dtype=wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model.dtype == wanted


def test_a_model_that_sees_is_loaded_for_its_text(tmp_path):
    save("gemma3_with_eyes", tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(make("gemma3_with_eyes")))


@pytest.mark.parametrize("keep", [True, False])
def test_answers_keep_keys_and_values_unless_told_not_to(tmp_path, monkeypatch, keep):
    save("llama", tmp_path)
    model = load(tmp_path, use_kv_cache=keep)
    lengths = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: lengths.append(inputs["input_ids"].shape[1]) or forward(**inputs)
    )
    model.generate(ids(5), max_new_tokens=3, min_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids(5)))
    assert lengths == ([5, 1, 1] if keep else [5, 6, 7])


def test_training_leaves_the_published_setting_of_the_cache_in_what_it_saves(tmp_path):
    save("llama", tmp_path)
    assert load(tmp_path, trainable=True).config.use_cache is True


@pytest.mark.parametrize(
    ("flash_attn", "name"),
    [("auto", "sdpa"), ("fa2", "sdpa"), ("fa3", "sdpa"), ("sdpa", "sdpa"), ("disabled", "eager"), ("off", "eager")],
)
def test_flash_attn_names_the_attention(tmp_path, flash_attn, name):
    save("llama", tmp_path)
    assert load(tmp_path, flash_attn=flash_attn).config._attn_implementation == name


def test_the_folder_is_kept_as_a_path_that_holds_from_anywhere(tmp_path, monkeypatch):
    save("llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert load("model").name_or_path == str(tmp_path / "model")


def test_smollm2_is_loaded_whole(fixture_path):
    model = load(fixture_path("smollm2"), dtype=torch.bfloat16)
    assert parameter_table(model).all == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


# What is refused


def test_missing_weights_are_refused_by_name_instead_of_being_random(tmp_path):
    save("llama", tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks 1 weights of a LlamaForCausalLM: model.layers.1.mlp.up_proj.weight" in refusal(tmp_path)


def test_the_head_of_a_tied_model_is_not_missed(tmp_path):
    save("qwen3", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_weights_that_are_not_used_are_said(tmp_path, capsys):
    save("llama", tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({"extra.weight": torch.zeros(2)}))
    load(tmp_path)
    assert "1 weights are not used by LlamaForCausalLM: extra.weight" in capsys.readouterr().err


def test_weights_of_another_shape_are_refused(tmp_path):
    save("llama", tmp_path)
    change_config(tmp_path, intermediate_size=64)
    assert "cannot be loaded" in refusal(tmp_path)


def test_a_torn_file_of_weights_is_refused(tmp_path):
    save("llama", tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "check that its files are whole" in refusal(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "holds no weights (model.safetensors or pytorch_model.bin)" in refusal(tmp_path)


def test_absent_shards_are_counted(tmp_path):
    make("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[0].unlink()
    assert f"lacks 1 of {len(shards)} files of weights, {shards[0].name} the first" in refusal(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantized_weights_are_refused_by_name(tmp_path, method):
    save("llama", tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    assert f"quantized by {method}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=1)),
            "t5",
        ),
    ],
)
def test_a_model_that_does_not_continue_text_is_refused(tmp_path, model, name):
    model().save_pretrained(tmp_path)
    assert f"is a {name} model, which does not continue text" in refusal(tmp_path)


def test_an_encoder_lacks_the_weights_of_a_head(tmp_path):
    BertModel(
        BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    assert "they would be random" in refusal(tmp_path)


def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path):
    save("llama", tmp_path)
    change_config(tmp_path, model_type="llama_of_tomorrow")
    assert "llama_of_tomorrow" in refusal(tmp_path)


def test_code_that_comes_with_a_model_is_not_run_unasked_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    save("llama", tmp_path)
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    change_config(tmp_path, model_type="odd_llama", auto_map=auto_map)
    assert "needs Python code of its own (model_type odd_llama)" in refusal(tmp_path)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd_llama"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_trusted_code_is_run_and_goes_into_what_is_saved(tmp_path):
    folder, saved = tmp_path / "model", tmp_path / "saved"
    save("llama", folder)
    (folder / "odd.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    change_config(folder, model_type="odd_llama", auto_map=auto_map)
    model = load(folder, trust_remote_code=True)
    assert type(model).__name__ == "OddForCausalLM"
    model.save_pretrained(saved)
    assert (saved / "odd.py").read_text() == OWN_CODE
    assert torch.equal(logits(load(saved, trust_remote_code=True)), logits(make("llama")))


def test_where_transformers_has_the_class_foreign_code_is_left_and_not_named_in_what_is_saved(tmp_path):
    folder, saved = tmp_path / "model", tmp_path / "saved"
    save("llama", folder)
    change_config(folder, auto_map={"AutoModelForCausalLM": "odd.OddForCausalLM"})
    model = load(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    model.save_pretrained(saved)
    assert "auto_map" not in json.loads((saved / "config.json").read_text())


def test_an_adapter_alone_is_answered_with_the_two_settings_it_needs(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "models/base"}')
    message = refusal(tmp_path)
    assert "holds an adapter, not a model" in message
    assert f"model_name_or_path: models/base and adapter_name_or_path: {tmp_path}" in message


def test_an_adapter_beside_a_model_is_not_put_on_it_without_a_word(tmp_path):
    save("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "models/base"}')
    assert "holds both a model and an adapter" in refusal(tmp_path)


def test_everything_wrong_with_a_folder_is_said_at_once(tmp_path):
    save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    change_config(tmp_path, quantization_config={"quant_method": "awq"})
    assert len(refusal(tmp_path).splitlines()) == 2


# Vocabulary


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_a_grown_vocabulary_changes_no_old_logit_and_starts_at_the_mean(tmp_path, family):
    save(family, tmp_path)
    save_tokenizer(tmp_path)
    settings = {"add_special_tokens": ["<|new|>"], "resize_vocab": True}
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path), **settings))
    model = load(tmp_path, tokenizer=tokenizer, **settings)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 128
    old = logits(make(family))
    assert torch.allclose(logits(model)[..., :VOCABULARY], old, atol=1e-5)
    assert torch.allclose(logits(model)[..., VOCABULARY], old.mean(-1), atol=1e-5)
    mean = model.get_input_embeddings().weight[:VOCABULARY].mean(0)
    assert torch.allclose(model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<|new|>")], mean)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_embedding_and_head_stay_one_matrix_when_they_grow_and_when_they_are_saved(tmp_path, family):
    save(family, tmp_path / "model")
    save_tokenizer(tmp_path / "model", size=VOCABULARY + 9)
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path / "model")))
    model = load(tmp_path / "model", tokenizer=tokenizer, resize_vocab=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(logits(again), logits(model))


def test_added_tokens_without_rows_are_refused(tmp_path):
    save("llama", tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path), add_special_tokens=["<|new|>"]))
    message = refusal(tmp_path, tokenizer=tokenizer, add_special_tokens=["<|new|>"])
    assert "has 96 rows: none for <|new|>" in message
    assert "resize_vocab: true" in message


def test_added_tokens_take_rows_that_are_free(tmp_path):
    save("llama", tmp_path)
    save_tokenizer(tmp_path, size=90)
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path), add_special_tokens=["<|new|>"]))
    model = load(tmp_path, tokenizer=tokenizer, add_special_tokens=["<|new|>"])
    assert torch.equal(logits(model), logits(make("llama")))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    save("llama", tmp_path)
    save_tokenizer(tmp_path, size=VOCABULARY + 9)
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    assert "has 96 rows, its tokenizer 105 tokens" in refusal(tmp_path, tokenizer=tokenizer)


def test_a_token_that_came_without_a_row_is_said_and_the_model_still_serves(tmp_path, capsys):
    """Gemma 3 1B's tokenizer has a token for images that its embedding has no row for."""
    save("llama", tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    fit_vocabulary(make("llama"), tokenizer, ModelArguments(model_name_or_path=str(tmp_path)))
    assert "the model has no row for <image>" in capsys.readouterr().err


def test_text_with_a_token_that_has_no_row_is_refused_where_it_stands(tmp_path, capsys):
    given = [*make_run(tmp_path, rows=12), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["train", *given]) == 0  # no text holds it
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows[4] = json.dumps({"instruction": "a b", "output": "c <image> d"})
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    capsys.readouterr()
    assert main(["train", *given, "--overwrite_output_dir"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "rows.jsonl:5: '<image>' is a token that the model has no row for; take it out of the text" in said
    assert main(["train", *given, "--overwrite_output_dir", "--resize_vocab"]) == 0


# The rest


def test_settings_for_generation_that_contradict_themselves_can_be_saved_again(tmp_path):
    save("llama", tmp_path / "model")
    published = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(published))
    model = load(tmp_path / "model", trainable=True)
    model.generation_config.eos_token_id = [2, 3]  # what training adds: the end of a turn
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["temperature"] == 0.6


def test_the_table_of_parameters_counts_a_shared_matrix_once():
    model = make("qwen3")
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    table = parameter_table(model)
    assert table.trainable == VOCABULARY * SHAPE["hidden_size"]
    assert str(table) == f"trainable parameters: {table.trainable:,} of {table.all:,} ({table.share:.2%})"
    assert table.all == sum(weight.numel() for name, weight in model.state_dict().items() if name != "lm_head.weight")
