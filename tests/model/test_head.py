"""CausalLoss: the sum over the trained tokens of a batch, fused or the model's own, beside logits one can look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from small import samples, small_model
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PhiConfig
from transformers.trainer_pt_utils import LabelSmoother

from burnish.data.loader import collate
from burnish.model.head import CausalLoss, decoder_of, unwrap
from burnish.model.probe import choose_path
from burnish.types import IGNORE_INDEX, Sample

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "own"])
VOCABULARY = 64


def packed(model):
    """The model on the path for samples laid end to end."""
    assert choose_path(model).padding_free
    return model


def other_model(kind):
    """Phi's head has a bias; GPT-2 calls its decoder `transformer` and ties its head to the embedding."""
    config = {
        "phi": lambda: PhiConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
    }[kind]()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def short_rows(count=3):
    """Rows whose ids fit the small vocabulary."""
    return [
        Sample(row.input_ids % VOCABULARY, np.where(row.labels < 0, row.labels, row.labels % VOCABULARY), row.place)
        for row in samples(count)
    ]


def logits_and_labels(model, rows):
    """At every trained position of every row, each row by itself: logits [M, V] and what should come there [M]."""
    logits, labels = [], []
    for row in rows:
        one = collate([row])
        predicted = model(**one.inputs, use_cache=False).logits[0, :-1]
        wanted = one.labels[0, 1:]
        logits.append(predicted[wanted != IGNORE_INDEX])
        labels.append(wanted[wanted != IGNORE_INDEX])
    return torch.cat(logits), torch.cat(labels)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@FUSED
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_a_sum_over_trained_tokens_and_correct_counts_the_first_choices(smoothing, fused):
    model, rows = packed(small_model("llama")), samples(4)
    logits, labels = logits_and_labels(model, rows)
    best = logits.argmax(-1)
    result = CausalLoss(model, fused=fused, label_smoothing=smoothing)(collate(rows), count_correct=True)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert result.correct.item() == (best == labels).sum().item()


@FUSED
def test_correct_is_found_where_the_model_is_right(fused):
    """Labels set to what the model says: all are counted; to the second choice: none."""
    model, row = packed(small_model()), samples(1, seed=3)[0]
    logits = model(**collate([row]).inputs, use_cache=False).logits[0, :-1]
    first, second = logits.topk(2).indices.T.numpy().astype(np.int32)
    objective = CausalLoss(model, fused=fused)
    for choice, hits in ((first, len(row) - 1), (second, 0)):
        labels = np.concatenate([[IGNORE_INDEX], choice]).astype(np.int32)
        result = objective(collate([Sample(row.input_ids, labels)]), count_correct=True)
        assert result.correct.item() == hits
    assert objective(collate([row])).correct is None


@FUSED
def test_label_smoothing_gives_the_loss_and_gradient_of_transformers(fused):
    """As its Trainer computes them: LabelSmoother on the logits, a mean over the labels that are not ignored."""
    rows, plain = samples(5), small_model("llama")
    batch = collate(rows)
    model = packed(small_model("llama"))
    ours = CausalLoss(model, fused=fused, label_smoothing=0.1)(batch).loss / batch.num_trained
    inputs = {name: batch.inputs[name] for name in ("input_ids", "position_ids")}
    outputs = plain(**inputs, use_cache=False)  # without a cache it keeps documents apart by their positions
    theirs = LabelSmoother(epsilon=0.1)(outputs, batch.labels, shift_labels=True)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    mine, reference = gradient(model, ours), gradient(plain, theirs)
    assert (mine - reference).norm() <= 1e-5 * reference.norm()


@FUSED
@pytest.mark.parametrize("kind", ["phi", "gpt2"])
def test_heads_with_a_bias_and_decoders_of_other_names(kind, fused):
    model, rows = packed(other_model(kind)), short_rows()
    if kind == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    logits, labels = logits_and_labels(model.eval(), rows)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    loss = CausalLoss(model, fused=fused)(collate(rows)).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    mine, reference = (
        gradient(model, loss),
        gradient(model, F.cross_entropy(*logits_and_labels(model, rows)) * len(labels)),
    )
    assert (mine - reference).norm() <= 1e-5 * reference.norm()


@FUSED
def test_a_batch_with_nothing_to_train_gives_zero_and_no_gradient_of_anything(fused):
    model = packed(small_model())
    silent = [Sample(row.input_ids, np.full_like(row.labels, IGNORE_INDEX)) for row in samples(2)]
    result = CausalLoss(model, fused=fused, label_smoothing=0.1)(collate(silent), count_correct=True)
    assert result.loss.item() == 0.0 and result.correct.item() == 0
    result.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


def test_the_head_is_never_asked_for_logits_of_what_is_not_trained():
    """The fused way hands it the trained positions only; the model's own forward is not used."""
    model, rows = packed(small_model("llama")), samples(3)
    batch = collate(rows)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model.register_forward_hook(lambda module, inputs, output: seen.append("forward"))
    CausalLoss(model, fused=True)(batch).loss.backward()
    assert seen == [] and model.lm_head.weight.grad is not None
    CausalLoss(model, fused=False)(batch)
    assert seen == [(1, batch.num_tokens, 211), "forward"]


def test_a_frozen_head_gets_no_gradient_and_changes_nobody_elses():
    rows = samples(3)
    free, frozen = packed(small_model("llama")), packed(small_model("llama"))
    frozen.lm_head.weight.requires_grad_(False)
    for model in (free, frozen):
        CausalLoss(model, fused=True)(collate(rows)).loss.backward()
    assert frozen.lm_head.weight.grad is None
    others = [name for name, _ in free.named_parameters() if name != "lm_head.weight"]
    assert len(others) > 20
    for name in others:
        torch.testing.assert_close(frozen.get_parameter(name).grad, free.get_parameter(name).grad)


def test_adapters_are_in_the_decoder_that_gives_the_hidden_states():
    base = small_model("llama")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert unwrap(adapted) is base and unwrap(base) is base
    assert decoder_of(unwrap(adapted)) is base.model
    packed(adapted)
    loss = CausalLoss(adapted, fused=True)(collate(samples(2))).loss
    loss.backward()
    trained = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 3 and all(gradient is not None and gradient.any() for gradient in trained)


def test_a_models_auxiliary_loss_is_kept_for_every_trained_token():
    """Mixtral means its router's loss over a batch; here it counts as one part of each token's loss."""

    def mixtral(coefficient):
        config = MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=coefficient,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        return packed(AutoModelForCausalLM.from_config(config))

    batch = collate(short_rows())
    model, without = mixtral(0.5), mixtral(0.0)
    plain = CausalLoss(without, fused=True)(batch).loss
    loss = CausalLoss(model, fused=False)(batch).loss
    auxiliary = model(**batch.inputs, use_cache=False).aux_loss
    assert auxiliary.item() > 0.1
    assert loss.item() == pytest.approx(plain.item() + 0.5 * auxiliary.item() * batch.num_trained, rel=1e-5)
