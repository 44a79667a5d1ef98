"""A batch is filled up to one of few shapes; a shape that comes again is recorded; nothing of it shows in a number."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recorded import Again
from small import samples, small_model
from torch import nn

from burnish.data.loader import collate
from burnish.model.graphs import BORDERS, LONGEST, MOST, TOKENS, PassGraphs, Shape, fill, has_dropout, pays
from burnish.model.head import CausalLoss
from burnish.model.probe import choose_path
from burnish.tuning.blocks import find_blocks
from burnish.types import IGNORE_INDEX


class Kept:
    """Gradients that stay where they are, as the weights' own do if nobody lets go of them."""

    def __init__(self, model):
        self.model, self.keep = model, False

    def keep_places(self, keep):
        self.keep = keep

    def places(self):
        return tuple(0 if w.grad is None else w.grad.data_ptr() for w in self.model.parameters() if w.requires_grad)


def prepared(**changes):
    model = small_model(**changes)
    assert choose_path(model).padding_free
    return model.train(), CausalLoss(model, fused=True)


def recorded(model, objective, recorder=None):
    recorder = recorder or Again()
    return PassGraphs(objective, Kept(model), recorder), recorder


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_pass(model, objective, batch):
    model.zero_grad(set_to_none=False)
    loss = objective(batch).loss
    loss.backward()
    return loss.item(), gradients(model)


# ---- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 15, 16, 40])
def test_a_filled_batch_has_one_of_few_shapes_and_its_own_tokens_in_front(count):
    batch = collate(samples(count))
    filled = fill(batch)
    tokens, borders = batch.labels.shape[1], batch.inputs["cu_seq_lens_q"]
    shape = Shape.of(filled.inputs)
    assert shape.tokens % TOKENS == 0 and 0 <= shape.tokens - tokens < TOKENS
    assert shape.borders >= max(BORDERS, len(borders) + 1) and shape.borders.bit_count() == 1
    assert shape.longest == LONGEST
    for name in ("input_ids", "position_ids"):
        assert (
            torch.equal(filled.inputs[name][:, :tokens], batch.inputs[name])
            and not filled.inputs[name][:, tokens:].any()
        )
    assert torch.equal(filled.labels[:, :tokens], batch.labels) and (filled.labels[:, tokens:] == IGNORE_INDEX).all()
    ends = filled.inputs["cu_seq_lens_q"]
    assert torch.equal(ends[: len(borders)], borders) and (ends[len(borders) :] == shape.tokens).all()
    assert ends.dtype == borders.dtype and ends.diff().max() <= shape.longest
    assert filled.trained_at is batch.trained_at and filled.targets is batch.targets
    assert (filled.num_tokens, filled.num_trained, filled.places) == (batch.num_tokens, batch.num_trained, batch.places)


def test_a_batch_that_is_full_gets_no_token_and_a_long_document_a_longer_longest():
    whole = collate(samples(1, longest=5))
    for name in ("input_ids", "position_ids"):
        whole.inputs[name] = whole.inputs[name].new_ones(1, 1536)
    borders = torch.tensor([0, 700, 1536], dtype=torch.int32)
    whole.inputs.update(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=836, max_length_k=836)
    object.__setattr__(whole, "labels", torch.full((1, 1536), IGNORE_INDEX))
    assert Shape.of(fill(whole).inputs) == (1536, BORDERS, 1024)
    whole.inputs.update(max_length_q=1100)
    assert Shape.of(fill(whole).inputs) == (1536, BORDERS, 1536)  # never longer than all of it


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_filled_batch_gives_the_same_loss_and_gradients(kind):
    model, objective = prepared(kind=kind)
    batch = collate(samples(9))
    loss, wanted = one_pass(model, objective, batch)
    other, got = one_pass(model, objective, fill(batch))
    assert other == pytest.approx(loss, rel=1e-6)
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-6 * value.norm(), name


def test_recording_pays_for_blocks_that_are_computed_faster_than_launched():
    def blocks(hidden, wide):
        block = nn.Sequential(nn.Linear(hidden, hidden, device="meta"), nn.Linear(hidden, 3 * wide, device="meta"))
        return [block.requires_grad_(False)]

    assert pays(blocks(896, 4864), 8192) and pays(blocks(1536, 8960), 8192)  # 0.5B, 1.5B
    assert not pays(blocks(3584, 18944), 8192)  # 7B
    full = [block.requires_grad_(True) for block in blocks(1536, 8960)]
    assert not pays(full, 16384) and not pays([], 1)


def test_dropout_counts_where_something_is_dropped():
    model = small_model("llama")
    assert not has_dropout(model)
    assert has_dropout(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)))


# ---- recordings ----------------------------------------------------------------------------------------------------


def test_a_shape_is_recorded_when_it_comes_again_and_gives_what_it_gave():
    model, objective = prepared()
    batches = [fill(collate(samples(5, seed=seed))) for seed in range(3)]
    wanted = [one_pass(model, objective, batch) for batch in batches]
    graphs, recorder = recorded(model, objective)
    found = [one_pass(model, objective, batch) for batch in batches]
    assert (recorder.recorded, recorder.rehearsed, recorder.replayed, graphs.count) == (2, 1, 4, 1)
    for (loss, value), (other, got) in zip(wanted, found, strict=True):
        assert loss == other and value.keys() == got.keys()
        assert all(torch.equal(got[name], each) for name, each in value.items())


def test_passes_of_a_step_add_up_and_gradients_stay_where_they_are():
    model, objective = prepared()
    batches = [fill(collate(samples(4, seed=seed))) for seed in range(4)]
    sum(objective(batch).loss for batch in batches).backward()
    wanted = gradients(model)
    model.zero_grad()
    recorded(model, objective)
    places = None
    for _ in range(3):
        for batch in batches:
            objective(batch).loss.backward()
        if places:
            assert places == [p.grad.data_ptr() for p in model.parameters()]
        places = [p.grad.data_ptr() for p in model.parameters()]
        for name, value in gradients(model).items():
            assert (value - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name
        model.zero_grad(set_to_none=False)


def test_what_is_rehearsed_adds_nothing_to_gradients_that_are_there():
    model, objective = prepared()
    batch = fill(collate(samples(5)))
    graphs, recorder = recorded(model, objective)
    objective(batch).loss.backward()
    before = gradients(model)
    objective(batch)  # recorded, and its forward done
    assert recorder.rehearsed == 1 and graphs.count == 1
    assert all(torch.equal(value, before[name]) for name, value in gradients(model).items())


def test_there_are_no_more_recordings_than_allowed(monkeypatch):
    monkeypatch.setattr("burnish.model.graphs.MOST", 1)
    model, objective = prepared()
    graphs, _ = recorded(model, objective)
    for count in (3, 40, 3, 40, 40):
        one_pass(model, objective, fill(collate(samples(count))))
    assert graphs.count == 1 and MOST > 1


def test_weights_or_gradients_that_moved_are_noticed():
    model, objective = prepared()
    batch = fill(collate(samples(5)))
    wanted = one_pass(model, objective, batch)
    graphs, recorder = recorded(model, objective)
    for _ in range(2):
        one_pass(model, objective, batch)
    assert recorder.recorded == 2
    model.zero_grad(set_to_none=True)
    loss = objective(batch).loss
    loss.backward()
    assert (recorder.recorded, recorder.forgotten) == (4, 1) and loss.item() == wanted[0]
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert one_pass(model, objective, batch)[0] == wanted[0] and recorder.recorded == 6
    model.model.embed_tokens.weight.requires_grad_(False)
    one_pass(model, objective, batch)
    assert recorder.recorded == 8 and graphs.count == 1


@pytest.mark.parametrize("fail_at", [1, 2, 4])
@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nmore"), torch.OutOfMemoryError("too much")])
def test_a_recording_that_breaks_down_is_said_once_and_changes_no_number(fail_at, error, capsys):
    model, objective = prepared()
    batches = [fill(collate(samples(count))) for count in (4, 4, 40, 40, 4)]
    wanted = []
    for batch in batches:
        objective(batch).loss.backward()
        wanted.append(gradients(model))
    model.zero_grad()
    graphs, recorder = recorded(model, objective, Again(fail_at, error))
    for batch, sums in zip(batches, wanted, strict=True):
        objective(batch).loss.backward()
        assert all(torch.equal(value, sums[name]) for name, value in gradients(model).items())
    told = capsys.readouterr().err
    assert told.count("not recorded as CUDA graphs") == 1 and str(error).splitlines()[0] in told and "more" not in told
    assert graphs.count == 0 and recorder.forgotten >= 1 and not graphs._gradients.keep


def test_evaluation_and_what_is_stopped_or_released_are_computed_as_ever():
    model, objective = prepared()
    batch = fill(collate(samples(5)))
    graphs, recorder = recorded(model, objective)
    with torch.no_grad():
        for _ in range(3):
            objective(batch)
    assert recorder.recorded == 0
    for _ in range(2):
        one_pass(model, objective, batch)
    assert graphs.stop() and not graphs.stop() and recorder.replayed == 2
    one_pass(model, objective, batch)
    assert recorder.replayed == 2
    graphs.release()
    assert objective.graphs is None


def test_hooks_and_models_of_which_only_the_head_is_trained_are_not_recorded(capsys):
    model, objective = prepared()
    model.model.layers[1].register_forward_hook(lambda *_: None)
    graphs, _ = recorded(model, objective)
    batch = fill(collate(samples(5)))
    for _ in range(2):
        one_pass(model, objective, batch)
    assert graphs.count == 0 and "a hook at layers.1 would not be called" in capsys.readouterr().err
    model, objective = prepared(tie_word_embeddings=False)
    model.model.requires_grad_(False)
    graphs, _ = recorded(model, objective)
    for _ in range(2):
        one_pass(model, objective, batch)
    assert graphs.count == 0 and "nothing before the head is trained" in capsys.readouterr().err


def test_a_models_blocks_have_no_hooks_of_their_own():
    """Else nothing would ever be recorded."""
    model, objective = prepared(kind="llama")
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), autocast_adapter_dtype=False)
    objective = CausalLoss(model, fused=True)
    graphs, recorder = recorded(model, objective)
    for _ in range(2):
        one_pass(model, objective, fill(collate(samples(5))))
    assert graphs.count == 1 and recorder.replayed == 2 and len(find_blocks(model.get_base_model())) == 3
