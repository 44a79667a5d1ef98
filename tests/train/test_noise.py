"""neftune_noise_alpha: noise on the embeddings while training, as much for a document however it lies in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import arguments, samples, small_model, trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.integrations.neftune import activate_neftune

from burnish.data.loader import collate, make_collate
from burnish.model.compile import compile_blocks
from burnish.model.head import CausalLoss, unwrap
from burnish.model.probe import choose_path
from burnish.train.noise import EmbeddingNoise, lengths_of
from burnish.train.passes import cut
from burnish.tuning.blocks import find_blocks
from burnish.types import Sample

ALPHA = 5.0


def padded_batch(documents):
    words = Tokenizer(WordLevel({"<pad>": 0}))
    return make_collate(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"), padding_free=False)(
        documents
    )


def rows(*lengths):
    draw = np.random.default_rng(0)
    found = []
    for number, length in enumerate(lengths):
        ids = draw.integers(3, 200, length).astype(np.int32)
        found.append(Sample(ids, ids.copy(), f"rows.jsonl:{number + 1}"))
    return found


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


class Embedded:
    """What comes out of a model's embedding, noise included."""

    def __init__(self, objective):
        self.values = []
        embedding = unwrap(objective.model).get_input_embeddings()
        embedding.register_forward_hook(lambda *call: self.values.append(call[-1].detach()))


def noise_of(objective, batch, times=1):
    """[times, B, S, H]: what is added to the embeddings of a batch."""
    objective.eval()
    seen = Embedded(objective)
    objective(batch)
    objective.train()
    for _ in range(times):
        objective(batch)
    return torch.stack(seen.values[1:]) - seen.values[0]


def objective_with_noise(model=None, path=None, alpha=ALPHA):
    model = model or small_model()
    choose_path(model, keep_padding="" if path is None else path)
    objective = CausalLoss(model, fused=True)
    return objective, EmbeddingNoise(objective, alpha)


@pytest.mark.parametrize("wrapped", [False, True], ids=["full", "lora"])
def test_one_document_meets_the_noise_that_transformers_draws_from_the_same_seed(wrapped):
    def model():
        bare = small_model()
        return get_peft_model(bare, LoraConfig(r=2, target_modules=["q_proj"])) if wrapped else bare

    batch = collate(rows(23))
    objective, _ = objective_with_noise(model())
    theirs = model()
    choose_path(theirs)
    activate_neftune(theirs, ALPHA)
    found = []
    for each in (objective, CausalLoss(theirs, fused=True)):
        each.train()
        seen = Embedded(each)
        torch.manual_seed(11)
        loss = each(batch).loss
        found.append((seen.values[0], loss.detach()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    plain = CausalLoss(model(), fused=True)
    choose_path(plain.model)
    assert (plain(batch).loss - found[0][1]).abs() > 1e-4


def test_a_document_meets_as_much_noise_padded_as_packed_and_in_any_pass():
    """alpha / √(3·L·d) is the deviation of what is uniform in ±alpha / √(L·d)."""
    lengths = (6, 30, 14)
    documents = rows(*lengths)
    whole, padded = collate(documents), padded_batch(documents)
    objective, _ = objective_with_noise()
    packed = noise_of(objective, whole, times=20).split(lengths, dim=2)
    passes = [noise_of(objective, each, times=20) for each in cut([whole], 30)]
    passes = [passes[0], *torch.cat(passes[1:], dim=2).split(lengths[1:], dim=2)]
    own, _ = objective_with_noise(path="a test")
    beside = [noise[:, :length] for noise, length in zip(noise_of(own, padded, 20).unbind(1), lengths, strict=True)]
    for length, *ways in zip(lengths, packed, passes, beside, strict=True):
        most = ALPHA / (length * 48) ** 0.5
        for noise in ways:
            assert noise.std().item() == pytest.approx(most / 3**0.5, rel=0.03)
            assert 0.98 * most < noise.abs().max() <= most * 1.0001
            assert abs(noise.mean().item()) < most / 20


def test_lengths_are_those_of_documents_and_count_no_padding():
    documents = rows(4, 2)
    assert lengths_of(collate(documents)).tolist() == [[4, 4, 4, 4, 2, 2]]
    assert lengths_of(padded_batch(documents)).tolist() == [[4], [2]]


def test_evaluation_meets_none_and_a_released_model_neither():
    objective, noise = objective_with_noise()
    batch = collate(rows(9, 5))
    objective.eval()
    seen = Embedded(objective)
    assert objective(batch).loss == objective(batch).loss and torch.equal(*seen.values)
    assert noise_of(objective, batch).any()
    noise.release()
    assert not noise_of(objective, batch).any()


def test_compiled_blocks_are_given_the_noise(monkeypatch):
    """The embedding is outside of them. (Compiled without a compiler of kernels: what is traced is run as it is.)"""
    # A model that an earlier test of this process loaded under DeepSpeed's ZeRO-3 leaves torch with another linear.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **how: setattr(
            self, "_compiled_call_impl", torch.compile(self._call_impl, backend="eager", **how)
        ),
    )
    found = []
    for compiled in (False, True):
        objective, _ = objective_with_noise()
        if compiled:
            assert compile_blocks(find_blocks(objective.model).values(), lambda: None) == ""
        objective.train()
        torch.manual_seed(3)
        found.append([objective(collate(rows(9, 5))).loss.item() for _ in range(2)])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and abs(found[0][0] - found[0][1]) > 1e-4


def test_a_run_has_noise_from_its_seed_and_goes_on_exactly(tmp_path):
    def go(name, resume=None, **changes):
        args = arguments(tmp_path / name, save_strategy="steps", save_steps=4, **changes)
        run = trainer(small_model(), args, samples(16), eval_dataset=samples(4, seed=1))
        run.train(resume)
        return run

    noisy, again, plain = go("a", neftune_noise_alpha=ALPHA), go("b", neftune_noise_alpha=ALPHA), go("c")
    other = go("d", neftune_noise_alpha=ALPHA, seed=7, data_seed=42)
    assert losses(noisy) == losses(again)
    assert all(abs(a - b) > 1e-5 for each in (plain, other) for a, b in zip(losses(noisy), losses(each), strict=True))
    parted = go("e", tmp_path / "a" / "checkpoint-4", neftune_noise_alpha=ALPHA)
    assert losses(parted) == losses(noisy)
    for name, value in noisy.model.state_dict().items():
        assert torch.equal(value, parted.model.state_dict()[name]), name
    assert not noise_of(noisy.objective, collate(rows(9))).any()  # after the run the model is as published
