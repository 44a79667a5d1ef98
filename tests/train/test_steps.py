"""The number of optimizer steps, beside what transformers' Trainer counts on the same arguments."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
from small import arguments, small_model
from torch.utils.data import DataLoader
from transformers import Trainer as TransformersTrainer

from burnish.train.steps import Steps, count_steps


def settings(epochs=3.0, accumulation=1, max_steps=-1):
    return SimpleNamespace(num_train_epochs=epochs, gradient_accumulation_steps=accumulation, max_steps=max_steps)


def test_43_rows_in_batches_of_2_with_accumulation_2_are_11_steps_an_epoch_and_88_in_8():
    steps = count_steps(settings(epochs=8, accumulation=2), batches_per_epoch=22)
    assert steps == Steps(batches_per_epoch=22, per_epoch=11, epochs=8, total=88, accumulation=2)


@pytest.mark.parametrize("max_steps", [-1, 1, 7, 100])
@pytest.mark.parametrize("epochs", [1.0, 0.3, 2.5, 8.0])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 50])
@pytest.mark.parametrize("rows", [1, 6, 13, 44])
def test_steps_are_counted_as_transformers_does(rows, accumulation, epochs, max_steps, theirs):
    changes = dict(num_train_epochs=epochs, gradient_accumulation_steps=accumulation, max_steps=max_steps)
    for name, value in changes.items():
        setattr(theirs.args, name, value)
    num_train_epochs, per_epoch, _, _, _, _, total = initial_values(theirs, rows)
    ours = count_steps(settings(epochs, accumulation, max_steps), batches_per_epoch=rows)
    assert (ours.epochs, ours.per_epoch, ours.total) == (num_train_epochs, per_epoch, total)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return TransformersTrainer(small_model(), arguments(tmp_path_factory.mktemp("out"), per_device_train_batch_size=1))


def initial_values(trainer, rows):
    """Epochs, steps an epoch, ... and steps in all, as the installed transformers works them out before training."""
    count = trainer.set_initial_training_values
    per_step = [trainer.args.gradient_accumulation_steps]  # rows; older versions of transformers want to be told
    told = per_step if "total_train_batch_size" in inspect.signature(count).parameters else []
    return count(trainer.args, DataLoader(range(rows), batch_size=1), *told)


def test_the_last_step_of_an_epoch_holds_what_is_left():
    steps = count_steps(settings(accumulation=3), batches_per_epoch=8)
    held = [steps.batches_in(step) for step in range(steps.per_epoch)]
    assert held == [3, 3, 2] and sum(held) == 8


def test_a_position_is_the_epoch_and_the_steps_done_in_it():
    steps = count_steps(settings(epochs=3, accumulation=2), batches_per_epoch=5)
    assert [steps.position(step) for step in (0, 2, 3, 8, 9)] == [(0, 0), (0, 2), (1, 0), (2, 2), (3, 0)]


def test_a_stream_is_one_epoch_of_max_steps_full_steps():
    steps = count_steps(settings(max_steps=7, accumulation=4), batches_per_epoch=None)
    assert (steps.per_epoch, steps.total, steps.epochs) == (7, 7, sys.maxsize)
    assert [steps.batches_in(step) for step in range(7)] == [4] * 7
    assert steps.position(5) == (0, 5)
