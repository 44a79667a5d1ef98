"""A step is cut into passes as memory wants; loss, gradients, callbacks and counts do not notice."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from processes import make_run
from small import arguments, samples, small_model, trainer, tuned
from transformers import TrainerCallback

from burnish.cli import main
from burnish.data.loader import collate
from burnish.errors import RunStopped
from burnish.model.head import CausalLoss
from burnish.model.probe import choose_path
from burnish.model.recompute import Recompute
from burnish.train import passes
from burnish.train.passes import Passes, cut, join
from burnish.tuning.blocks import find_blocks


def batches(*sizes, seed=0):
    rows = samples(sum(sizes), seed=seed)
    return [collate(rows[sum(sizes[:n]) : sum(sizes[: n + 1])]) for n in range(len(sizes))]


def test_batches_laid_end_to_end_are_the_batch_of_all_their_rows():
    whole = collate(samples(5))
    joined = join(batches(2, 3))
    for name, value in whole.inputs.items():
        assert torch.equal(torch.as_tensor(joined.inputs[name]), torch.as_tensor(value)), name
        assert torch.as_tensor(joined.inputs[name]).dtype == torch.as_tensor(value).dtype, name
    for name in ("labels", "trained_at", "targets"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert (joined.num_trained, joined.num_tokens, joined.places) == (whole.num_trained, whole.num_tokens, whole.places)


@pytest.mark.parametrize("most", [1, 30, 50, 64, 10_000])
def test_a_cut_gives_every_document_once_in_order_and_no_pass_is_longer_than_asked(most):
    given = batches(3, 1, 4)
    rows = samples(8)
    made = cut(given, most)
    assert [place for each in made for place in each.places] == [row.place for row in rows]
    for each in made:
        own = [row for row in rows if row.place in each.places]
        again = collate(own)
        assert each.labels.numel() <= most or len(own) == 1
        assert torch.equal(each.inputs["input_ids"], again.inputs["input_ids"])
        assert torch.equal(each.inputs["cu_seq_lens_q"], again.inputs["cu_seq_lens_q"])
        assert torch.equal(each.trained_at, again.trained_at) and torch.equal(each.targets, again.targets)
        assert each.inputs["max_length_q"] == again.inputs["max_length_q"] and each.num_trained == again.num_trained
    for first, second in pairwise(made):  # the next document would not have gone in
        assert first.labels.numel() + int(second.inputs["cu_seq_lens_q"][1]) > most


def test_without_a_number_the_batches_are_the_passes():
    given = batches(3, 1)
    assert cut(given, None) == given


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("most", [None, 1, 40, 10_000])
def test_loss_and_gradients_are_the_same_however_a_step_is_cut(most):
    model = small_model(dtype=torch.float64)
    assert choose_path(model).padding_free
    objective, found = CausalLoss(model, fused=True), []
    for each in (None, most):
        model.zero_grad()
        loss = sum(objective(one).loss for one in cut(batches(3, 2, 4), each))
        loss.backward()
        found.append((loss.item(), gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert (found[1][1] - found[0][1]).norm() < 1e-6 * found[0][1].norm()


class Told(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_step_begin(self, args, state, control, **_):
        self.events.append("step")

    def on_substep_end(self, args, state, control, **_):
        self.events.append("substep")

    def on_step_end(self, args, state, control, **_):
        self.events.append(state.num_input_tokens_seen)


@pytest.mark.parametrize("most", ["7", "60", "100000"])
def test_a_run_is_the_same_run_whatever_its_passes(tmp_path, most):
    runs = []
    for number, asked in enumerate(("auto", most)):
        told = Told()
        args = arguments(tmp_path / str(number), gradient_accumulation_steps=3, num_train_epochs=2)
        run = trainer(small_model(), args, samples(16), callbacks=[told], micro_batch_tokens=asked)
        run.train()
        runs.append((told.events, [e["loss"] for e in run.state.log_history if "loss" in e]))
    assert runs[0][0] == runs[1][0] and runs[0][0].count("substep") > 5
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-5)


class Small:
    """A device of so many tokens of memory, and a loss that draws from the generators."""

    def __init__(self, fits):
        self.fits, self.seen, self.gradient, self.draws = fits, [], 0.0, []

    def one_pass(self, batch, *, last):
        self.seen.append((batch.labels.numel(), last))
        self.draws.append(torch.rand(()).item())
        if batch.labels.numel() > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.gradient += batch.labels.numel()
        return torch.tensor(float(batch.num_trained))

    def forget(self):
        self.gradient, self.draws = 0.0, []


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return Passes("auto", torch.device("cuda"))


def test_out_of_memory_the_whole_step_is_run_again_in_halves_from_the_same_random_numbers(on_a_gpu, capsys):
    given = batches(4, 4)
    whole, ended, device = join(given), [], Small(fits=0)
    device.fits = whole.labels.numel() // 2
    torch.manual_seed(3)
    expected = torch.rand(()).item()
    torch.manual_seed(3)
    loss = on_a_gpu.run(given, device.one_pass, end_batch=lambda: ended.append(1) or False, forget=device.forget)
    assert loss.item() == whole.num_trained and device.gradient == whole.labels.numel()
    assert device.draws[0] == expected and len(ended) == 1
    assert on_a_gpu.most_tokens <= device.fits and device.seen[0] == (whole.labels.numel(), True)
    assert [last for _, last in device.seen][-2:] == [False, True]
    assert "with the same gradients" in capsys.readouterr().err
    device.seen.clear()
    on_a_gpu.run(given, device.one_pass, end_batch=lambda: False, forget=device.forget)
    assert all(tokens <= device.fits for tokens, _ in device.seen)  # the next step begins with what fitted


def test_a_single_document_that_does_not_fit_ends_the_run_with_what_to_change(on_a_gpu):
    device = Small(fits=2)
    with pytest.raises(RunStopped, match=r"out of memory(.|\n)*--cutoff_len(.|\n)*gradient_checkpointing"):
        on_a_gpu.run(batches(3), device.one_pass, end_batch=lambda: False, forget=device.forget)


def test_a_resumed_run_begins_with_the_passes_that_fitted(on_a_gpu):
    on_a_gpu.remember({"most_tokens": 4096, "recomputed": 0})
    assert on_a_gpu.most_tokens == 4096
    on_a_gpu.remember({"most_tokens": 8192, "recomputed": 0})
    assert on_a_gpu.most_tokens == 4096
    named = Passes("500", torch.device("cuda"), recompute=blocks_of(model := small_model()))
    named.remember({"most_tokens": 100, "recomputed": 2})
    assert named.most_tokens == 500
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, True, False]


def blocks_of(model):
    return Recompute(model, find_blocks(model).values())


class Fitting(Small):
    """Needs less with every block that is computed again."""

    def __init__(self, model, needed):
        super().__init__(fits=0)
        self.model, self.needed = model, needed

    def one_pass(self, batch, *, last):
        self.fits = (
            10**9 if sum(layer.gradient_checkpointing for layer in self.model.model.layers) >= self.needed else 0
        )
        return super().one_pass(batch, last=last)


def test_where_rows_cannot_be_parted_as_few_blocks_as_needed_are_computed_again(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    model = small_model(num_hidden_layers=8)
    device = Fitting(model, needed=3)
    run = Passes("auto", torch.device("cuda"), recompute=blocks_of(model))
    run.run(batches(1), device.one_pass, end_batch=lambda: False, forget=device.forget)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True] * 4 + [False] * 4
    assert not model.model.gradient_checkpointing
    assert "4 of 8 blocks are computed again" in capsys.readouterr().err and run.state()["recomputed"] == 4
    device.needed = 99
    with pytest.raises(RunStopped):
        run.run(batches(1), device.one_pass, end_batch=lambda: False, forget=device.forget)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def kept(model):
    """Bytes that one pass keeps for the backward pass beside what is computed again."""
    found = {}

    def note(tensor):
        found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        CausalLoss(model, fused=True)(collate(samples(5)))
    return sum(found.values())


def test_every_block_that_is_computed_again_frees_memory_where_the_lower_ones_stand_still():
    model = tuned(small_model(num_hidden_layers=8, tie_word_embeddings=False), "freeze")
    assert choose_path(model).padding_free
    again, held = blocks_of(model), [kept(model)]
    while again.more():
        held.append(kept(model))
    assert len(held) == 3 and held[0] > held[1] > held[2]
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [False] * 6 + [True] * 2
    assert str(again) == "2 of the last 2 blocks"
    again.set(6)  # as a checkpoint of an older run may have it
    assert again.count == 2 and not again.more()


@pytest.mark.parametrize("name, number", [
    ("model.embed_tokens.weight", 3), ("lm_head.weight", 1), ("model.layers.1.mlp.up_proj.weight", 2),
])  # fmt: skip
def test_blocks_above_whatever_is_trained_may_be_computed_again(name, number):
    model = small_model(tie_word_embeddings=False).requires_grad_(False)
    model.get_parameter("model.layers.2.mlp.up_proj.weight").requires_grad_()
    model.get_parameter(name).requires_grad_()
    assert str(blocks_of(model)).startswith("0 of ") and str(blocks_of(model)).endswith(f"{number} blocks")


@pytest.mark.parametrize("count", [1, 3])
def test_blocks_that_are_computed_again_give_the_same_gradients(count):
    model, found, calls = small_model(dtype=torch.float64), [], []
    assert choose_path(model).padding_free
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for again in (0, count):
        blocks_of(model).set(again)
        model.train().zero_grad()
        calls.clear()
        CausalLoss(model, fused=True)(collate(samples(5))).loss.backward()
        assert len(calls) == 3 + again
        found.append(gradients(model))
    assert torch.equal(*found)


def test_on_the_cpu_and_where_nothing_can_be_cut_the_batches_are_the_passes(capsys):
    assert Passes("auto", torch.device("cpu")).most_tokens is None
    assert Passes("auto", torch.device("cuda"), why_whole="DeepSpeed").most_tokens is None
    assert not capsys.readouterr().err
    assert Passes("100", torch.device("cpu"), why_whole="DeepSpeed").most_tokens is None
    assert "micro_batch_tokens is not used, batches stay whole: DeepSpeed" in capsys.readouterr().err


@pytest.mark.parametrize("words, reason", [
    ("flash_attn=sdpa", "they are padded (flash_attn: sdpa is the model's own attention)"),
    ("ignore_pad_token_for_loss=false", "they are padded (ignore_pad_token_for_loss: false trains padding)"),
    ("flash_attn=fa2", None),
])  # fmt: skip
def test_a_run_says_where_a_setting_keeps_its_batches_whole(words, reason, tmp_path, capsys):
    given = [*make_run(tmp_path, rows=4), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", words]
    assert main(["train", *given, "--micro_batch_tokens", "100"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "micro_batch_tokens" in line]
    assert len(said) == (reason is not None) and all(line.endswith(f"batches stay whole: {reason}") for line in said)


# ---- out of memory where there is no pass --------------------------------------------------------------------------


def no_memory(*_, **__):
    held = torch.zeros(3)
    HELD.append(weakref.ref(held))
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")


HELD: list[weakref.ref[torch.Tensor]] = []


@pytest.mark.parametrize("what, where, remedy", [
    ("burnish.train.adamw.AdamW.step", "in the optimizer's step", "`burnish plan`"),
    ("burnish.train.optimizer.Masters.__init__", "where the optimizer and its float32 masters are made", "pure_bf16"),
    ("burnish.train.evaluate.Evaluation.prediction_step", "in the evaluation", "--per_device_eval_batch_size"),
    ("burnish.prepare.init_adapter", "outside the steps", "finetuning_type: lora"),
])  # fmt: skip
def test_out_of_memory_outside_the_passes_is_one_message(what, where, remedy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(what, no_memory)
    given = [*make_run(tmp_path, rows=8), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert main(["train", *given, "--val_size", "2", "--do_eval"]) == 1
    told = capsys.readouterr().err
    assert f"CUDA out of memory {where}.\n" in told and remedy in told and "Traceback" not in told


def test_what_was_being_made_is_free_while_the_message_is_held(tmp_path, monkeypatch):
    run = trainer(small_model(), arguments(tmp_path), samples(4))
    monkeypatch.setattr("burnish.train.optimizer.LocalUpdate.step", no_memory)
    with pytest.raises(RunStopped) as stopped:
        run.train()
    assert stopped.value.status == 1 and HELD[-1]() is None


def test_a_checkpoint_keeps_the_cut(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    trainer(small_model(), args, samples(16), micro_batch_tokens="50").train()
    assert torch.load(tmp_path / "checkpoint-2" / "rng_state.pth")["loop"]["passes"]["most_tokens"] == 50
    assert passes.AUTO > 50
