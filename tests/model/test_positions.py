"""How far positions reach, on small models with new weights."""

from __future__ import annotations

import json

import pytest
import torch
from families import ids, logits, make, save
from processes import make_run
from small import samples, small_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from burnish.cli import main
from burnish.data.loader import collate
from burnish.errors import UserError
from burnish.model.arguments import ModelArguments
from burnish.model.head import CausalLoss
from burnish.model.loader import load_model
from burnish.model.positions import check_positions, rotate_by_document
from burnish.model.probe import choose_path


def load(folder, *, max_length=None, **settings):
    args = ModelArguments(model_name_or_path=str(folder), **settings)
    return load_model(args, dtype=torch.float32, trainable=False, max_length=max_length)


def refusal(folder, **settings) -> str:
    with pytest.raises(UserError) as raised:
        load(folder, **settings)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_positions_are_stretched_as_far_as_the_longest_sample(tmp_path, kind):
    save("llama", tmp_path)
    model = load(tmp_path, rope_scaling=kind, max_length=3 * 2048 - 5)
    assert model.config.rope_parameters["rope_type"] == kind
    assert model.config.rope_parameters["factor"] == 3.0
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    assert logits(model).isfinite().all()


def test_linear_stretching_is_the_same_as_dividing_positions(tmp_path):
    save("llama", tmp_path)
    stretched = load(tmp_path, rope_scaling="linear", max_length=2 * 2048)
    positions = torch.arange(ids().shape[1])[None]
    with torch.no_grad():
        halved = make("llama")(ids(), position_ids=positions / 2).logits
    assert torch.allclose(logits(stretched), halved, atol=1e-5)


def test_layers_with_a_sliding_window_keep_their_positions(tmp_path):
    save("gemma3", tmp_path)
    before = load(tmp_path).config.rope_parameters
    after = load(tmp_path, rope_scaling="linear", max_length=10**6).config.rope_parameters
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"]["rope_type"] == "linear"


def test_stretching_what_is_long_enough_changes_nothing_and_says_so(tmp_path, capsys):
    save("llama", tmp_path)
    assert torch.equal(logits(load(tmp_path, rope_scaling="yarn", max_length=512)), logits(make("llama")))
    assert "rope_scaling does nothing" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("max_length", [10**6, None])
def test_a_stretched_model_saved_and_loaded_is_not_stretched_twice(tmp_path, family, kind, max_length):
    save(family, tmp_path / "model")
    stretched = load(tmp_path / "model", rope_scaling=kind, max_length=max_length)
    stretched.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", rope_scaling=kind, max_length=max_length)
    assert again.config.rope_parameters == stretched.config.rope_parameters
    assert again.config.max_position_embeddings == stretched.config.max_position_embeddings
    assert again.config.rope_parameters == stretched.config.rope_parameters
    assert torch.equal(logits(again), logits(stretched))


def test_a_model_without_rotary_positions_cannot_be_stretched(tmp_path):
    save("gpt2", tmp_path)
    assert "gpt2 models have no rope_parameters" in refusal(tmp_path, rope_scaling="linear")


def test_a_model_with_a_scaling_of_its_own_keeps_it(tmp_path):
    save("llama", tmp_path)
    own = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": own}))
    assert "its own scaling (linear, factor 2.0)" in refusal(tmp_path, rope_scaling="yarn", max_length=9999)


def test_a_cutoff_beyond_the_models_positions_is_said_and_refused_where_there_are_none(capsys):
    rotary = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=64)
    )  # fmt: skip
    check_positions(rotary, 64, scaled=False)
    check_positions(rotary, 128, scaled=True)
    assert capsys.readouterr().err == ""
    check_positions(rotary, 128, scaled=False)
    assert "cutoff_len 128 is beyond the model's 64 positions" in capsys.readouterr().err

    learned = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    )
    with pytest.raises(UserError, match=r"cutoff_len 128 is more than the 64 positions.*set cutoff_len: 64"):
        check_positions(learned, 128, scaled=False)


BY_LENGTH = {
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 32),
    "longrope": (
        {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]}
        | {"original_max_position_embeddings": 32},
        128,
    ),
}


def by_length(kind):
    """A Llama that turns texts of more than 32 tokens with other frequencies."""
    own, positions = BY_LENGTH[kind]
    rope = {"rope_theta": 10000.0} | own
    model = small_model("llama", max_position_embeddings=positions, rope_parameters=rope, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 8.0 if "self_attn" in name else 1.0  # new weights hardly look at positions
    return model


def alone(kind, row):
    """As it is served: by a model that has read nothing before."""
    ids, labels = (torch.tensor(part[None], dtype=torch.long) for part in (row.input_ids, row.labels))
    return by_length(kind)(input_ids=ids, labels=labels).loss.item() * row.num_trained


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_document_is_to_the_model_what_it_is_alone_whatever_lies_beside_it(kind):
    rows = [row for row in samples(40, longest=64) if len(row) > 8]
    rows = [*rows[:12], *sorted(rows, key=len)[-2:], *sorted(rows, key=len)[:2]]
    assert {len(row) > 32 for row in rows} == {True, False}
    model = by_length(kind)
    assert choose_path(model).padding_free
    rotate_by_document(model, 64, padding_free=True)
    objective = CausalLoss(model, fused=True)
    each = [objective(collate([row])).loss.item() for row in rows]
    assert each == pytest.approx([alone(kind, row) for row in rows], rel=1e-6)
    assert objective(collate(rows)).loss.item() == pytest.approx(sum(each), rel=1e-6)
    assert objective(collate(rows[::-1])).loss.item() == pytest.approx(sum(each), rel=1e-6)


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_model_generates_while_it_is_trained_what_it_does_otherwise(kind):
    model, begin = by_length(kind), torch.arange(3, 33)[None]
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    plain = by_length(kind).generate(begin, output_logits=True, return_dict_in_generate=True, **how)
    rotate_by_document(model, 64, padding_free=True)
    found = model.generate(begin, output_logits=True, return_dict_in_generate=True, **how)
    assert torch.equal(torch.cat(found.logits), torch.cat(plain.logits))


def test_padded_rows_that_change_each_others_positions_are_said(capsys):
    for kind in BY_LENGTH:
        rotate_by_document(by_length(kind), 32, padding_free=False)
        rotate_by_document(by_length(kind), 64, padding_free=True)
    rotate_by_document(small_model("llama"), 10**6, padding_free=False)
    assert capsys.readouterr().err == ""
    rotate_by_document(by_length("dynamic"), 64, padding_free=False)
    assert "rope_type dynamic: a row of more than 32 tokens changes" in capsys.readouterr().err


@pytest.mark.parametrize("padded", [True, False])
def test_training_prepares_the_positions_of_its_model(padded, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("burnish.prepare.rotate_by_document", lambda *given, **how: asked.append((given[1], how)))
    words = [*make_run(tmp_path, rows=4), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert main(["train", *words, "--cutoff_len", "77", *(["--flash_attn", "sdpa"] if padded else [])]) == 0
    assert asked == [(77, {"padding_free": not padded})]
