"""Evaluation: means over tokens, whatever the batches; and what is kept of the best."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small import arguments, samples, small_model, trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback

from burnish.data.loader import make_collate
from burnish.data.store import SampleStore
from burnish.errors import UserError
from burnish.model.head import CausalLoss
from burnish.train.trainer import Trainer
from burnish.types import IGNORE_INDEX


def measure(folder, rows, *, model=None, accuracy=True, **changes):
    run = trainer(model or small_model(), arguments(folder, **changes), eval_dataset=rows, count_correct=accuracy)
    return run.evaluate()


def by_hand(model, rows):
    """Each row by itself, position by position: (mean loss of the trained tokens, share that is the first choice)."""
    losses, hits = [], []
    for row in rows:
        logits = model(input_ids=torch.tensor(row.input_ids[None]).long(), use_cache=False).logits[0]
        for position in range(1, len(row)):
            if row.labels[position] != IGNORE_INDEX:
                predicted, target = logits[position - 1], torch.tensor(int(row.labels[position]))
                losses.append(F.cross_entropy(predicted, target).item())
                hits.append(predicted.argmax().item() == target.item())
    return sum(losses) / len(losses), sum(hits) / len(hits)


def knowing(model, rows):
    """Teach the model some of the rows, so that it is right at times."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    objective = CausalLoss(model, fused=True)
    collate = make_collate(None, padding_free=True)
    for _ in range(7):
        objective(collate(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    rows = samples(9, seed=2)
    run = trainer(small_model(), arguments(tmp_path_factory.mktemp("out")), rows)  # puts the model on its path
    return knowing(run.model, rows), rows


@pytest.mark.parametrize("batch", [1, 2, 4, 9])
def test_loss_accuracy_and_perplexity_are_those_found_by_hand_whatever_the_batch_size(batch, taught, tmp_path):
    model, rows = taught
    plain = small_model()
    plain.load_state_dict(model.state_dict())
    loss, accuracy = by_hand(plain.eval(), rows)
    assert 0.05 < accuracy < 0.95
    metrics = measure(tmp_path, rows, model=model, per_device_eval_batch_size=batch)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))


def test_accuracy_is_counted_only_when_it_is_asked_for(tmp_path):
    assert "eval_accuracy" not in measure(tmp_path, samples(3), accuracy=False)


@pytest.mark.parametrize("padding_free, fused", [(False, True), (True, False), (False, False)])
def test_every_path_measures_the_same(padding_free, fused, taught, tmp_path):
    model, rows = taught
    expected = measure(tmp_path, rows, model=model)
    pads = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0})), pad_token="<pad>")
    other = small_model()
    other.load_state_dict(model.state_dict())
    if padding_free:
        other.set_attn_implementation("burnish")
    run = Trainer(
        CausalLoss(other, fused=fused),
        arguments(tmp_path),
        collate=make_collate(pads, padding_free=padding_free),
        eval_dataset=rows,
        count_correct=True,
    )
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert metrics["eval_accuracy"] == expected["eval_accuracy"] > 0


def test_labels_are_smoothed_to_train_and_not_to_measure(taught, tmp_path):
    """transformers smooths eval_loss too, whose exponential is then no perplexity."""
    model, rows = taught
    metrics = measure(tmp_path, rows[:1], model=model, label_smoothing_factor=0.2)
    plain = small_model()
    plain.load_state_dict(model.state_dict())
    ids, labels = (torch.tensor(part[None]).long() for part in (rows[0].input_ids, rows[0].labels))
    assert metrics["eval_loss"] == pytest.approx(plain.eval()(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


def test_sets_with_names_are_measured_each_under_its_own(tmp_path):
    sets = {"law": samples(3, seed=1), "code": samples(5, seed=2)}
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(sorted(name for name in metrics if name.endswith("_loss")))

    run = trainer(small_model(), arguments(tmp_path), eval_dataset=sets, callbacks=[Look])
    metrics = run.evaluate()
    for name, rows in sets.items():
        alone = measure(tmp_path, rows)["eval_loss"]
        assert metrics[f"eval_{name}_loss"] == pytest.approx(alone, rel=1e-6)
    assert metrics["eval_law_loss"] != metrics["eval_code_loss"] and "eval_loss" not in metrics
    assert seen == [["eval_law_loss"], ["eval_code_loss"]]
    logged = [entry for entry in run.state.log_history if any(key.endswith("_loss") for key in entry)]
    assert len(logged) == 2


def test_a_set_may_be_handed_over_with_its_own_name(tmp_path):
    run = trainer(small_model(), arguments(tmp_path), eval_dataset=samples(3))
    other = SampleStore.from_samples(samples(4, seed=3))
    metrics = run.evaluate(other, metric_key_prefix="test")
    assert metrics["test_loss"] == pytest.approx(measure(tmp_path, samples(4, seed=3))["eval_loss"], rel=1e-6)
    assert all(name.startswith("test_") or name == "epoch" for name in metrics)


def test_evaluation_changes_nothing_of_the_training(tmp_path):
    """Dropout is off, no gradient is made, and the training goes on as if it had not been."""
    changes = dict(num_train_epochs=2)

    def run(name, **more):
        model = small_model("llama", attention_dropout=0.3)
        made = trainer(
            model, arguments(tmp_path / name, **changes, **more), samples(8), eval_dataset=samples(4, seed=3)
        )
        made.train()
        return made

    evaluated, plain = run("evaluated", eval_strategy="steps", eval_steps=1), run("plain")
    for ours, theirs in zip(evaluated.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    measured = [entry["eval_loss"] for entry in evaluated.state.log_history if "eval_loss" in entry]
    assert len(measured) == 8
    assert evaluated.evaluate()["eval_loss"] == evaluated.evaluate()["eval_loss"] == measured[-1]
    assert evaluated.objective.training
    evaluated.objective.eval()
    evaluated.evaluate()
    assert not evaluated.objective.training


def test_nothing_of_a_batch_is_kept(tmp_path):
    """What prediction_step gives are two scalars without a graph, so memory does not grow with the set."""
    run = trainer(small_model(), arguments(tmp_path), eval_dataset=samples(6), count_correct=True)
    seen = []
    real = run.prediction_step
    run.prediction_step = lambda batch: seen.append(real(batch)) or seen[-1]
    run.evaluate()
    assert len(seen) == 3
    assert all(value.numel() == 1 and not value.requires_grad for pair in seen for value in pair)


def test_a_set_with_nothing_trained_has_no_loss_to_speak_of(tmp_path):
    rows = samples(2)
    for row in rows:
        row.labels[:] = IGNORE_INDEX
    metrics = measure(tmp_path, rows)
    assert (metrics["eval_loss"], metrics["eval_accuracy"]) == (0.0, 0.0)


def test_a_metric_that_was_not_measured_is_refused_with_those_that_were(tmp_path):
    run = trainer(small_model(), arguments(tmp_path, metric_for_best_model="rouge"), eval_dataset=samples(2))
    with pytest.raises(UserError) as caught:
        run.note_best(run.evaluate())
    text = str(caught.value)
    assert "metric_for_best_model 'rouge' was not measured" in text and "eval_loss" in text


@pytest.mark.parametrize("greater, name, best", [(False, "loss", 2), (True, "eval_accuracy", 1)])
def test_the_best_is_noted_by_its_metric_and_direction(greater, name, best, tmp_path):
    args = arguments(tmp_path, metric_for_best_model=name, greater_is_better=greater, save_strategy="steps")
    run = trainer(small_model(), args, eval_dataset=samples(2))
    values = [
        {"eval_loss": 3.0, "eval_accuracy": 0.5},
        {"eval_loss": 1.0, "eval_accuracy": 0.4},
        {"eval_loss": 1.0, "eval_accuracy": 0.5},  # as good is not better
    ]
    better = []
    for step, metrics in enumerate(values, start=1):
        run.state.global_step = step
        better.append(run.note_best(metrics))
    assert better == [True, best == 2, False]
    assert run.state.best_global_step == best
    assert run.state.best_metric == values[best - 1][name if name.startswith("eval") else f"eval_{name}"]
