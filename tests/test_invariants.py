"""What must never depend on how the work is cut: the numbers of training, on real architectures with random weights.

All in float32 on the CPU. Tolerances: loss 1e-6 relative, gradients 1e-5 relative, the losses
of 20 steps 1e-4. What is saved and taken up again is equal bit for bit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small import CONFIGS, arguments, samples, small_model, trainer
from theirs import Rows, collator
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Gemma3TextConfig,
    TrainerCallback,
)
from transformers import Trainer as TransformersTrainer

from burnish.data.loader import collate, collate_padded, make_loader
from burnish.model.head import CausalLoss
from burnish.model.probe import choose_path
from burnish.model.qwen import QWenConfig, register
from burnish.train.checkpoint import last_checkpoint
from burnish.types import IGNORE_INDEX

register()
CONFIGS["the first qwen"] = QWenConfig
CONFIGS["gemma 3"] = Gemma3TextConfig
KINDS = ["qwen3", "llama", "the first qwen"]
RTOL_LOSS, RTOL_GRADIENT, RTOL_20_STEPS = 1e-6, 1e-5, 1e-4


def loss_and_gradients(model, batches, *, objective=None):
    """Mean loss over all trained tokens of `batches`, and the gradient of every weight as one vector."""
    objective = objective or CausalLoss(model, fused=True)
    num_trained = sum(batch.num_trained for batch in batches)
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        part = objective(batch).loss / num_trained
        part.backward()
        loss += part.item()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def agree(a, b) -> None:
    (loss_a, gradient_a), (loss_b, gradient_b) = a, b
    assert loss_a == pytest.approx(loss_b, rel=RTOL_LOSS)
    assert (gradient_a - gradient_b).norm() <= RTOL_GRADIENT * gradient_b.norm()


def prepared(kind: str, **changes):
    model = small_model(kind, **changes)
    assert choose_path(model).padding_free
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_eight_passes_of_one_sample_are_one_pass_of_eight(kind):
    model, rows = prepared(kind), samples(8)
    agree(loss_and_gradients(model, [collate([row]) for row in rows]), loss_and_gradients(model, [collate(rows)]))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_end_to_end_give_what_padded_batches_and_plain_transformers_give(kind):
    rows = samples(6)
    packed = loss_and_gradients(prepared(kind), [collate(rows)])

    padded_model = small_model(kind)
    padded = loss_and_gradients(padded_model, [collate_padded(rows, collator=collator())])
    agree(packed, padded)

    plain = small_model(kind)  # no line of burnish: the model's own forward and loss
    batch = collator()(
        [{"input_ids": r.input_ids.tolist(), "attention_mask": [1] * len(r), "labels": r.labels.tolist()} for r in rows]
    )
    loss = plain(**batch).loss
    loss.backward()
    agree(packed, (loss.item(), torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])))


ROW = 100  # tokens of a packed row
WINDOW = 8  # of Gemma 3's sliding layers: less than a row, and than most samples
PACKED = {kind: {} for kind in KINDS} | {
    "gemma 3": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_rows_give_what_their_samples_give_by_themselves_and_padded(kind):
    rows = samples(24)
    packed = list(make_loader(rows, 1, collate, seed=3, pack_to=ROW))
    assert len(packed) < 8 and max(len(batch.places) for batch in packed) > 3
    assert min(batch.inputs["max_length_q"] for batch in packed) > WINDOW
    model = prepared(kind, **PACKED[kind])
    by_rows = loss_and_gradients(model, packed)
    agree(by_rows, loss_and_gradients(model, list(make_loader(rows, 4, collate, seed=3, pack_to=ROW))))
    agree(by_rows, loss_and_gradients(model, [collate([row]) for row in rows]))
    agree(by_rows, loss_and_gradients(small_model(kind, **PACKED[kind]), [collate_padded(rows, collator=collator())]))
    if kind == "gemma 3":  # so the window does show
        wide = prepared(kind, **PACKED[kind] | {"sliding_window": 1000})
        assert (loss_and_gradients(wide, packed)[1] - by_rows[1]).norm() > 1e-3 * by_rows[1].norm()


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_run_follows_one_whose_steps_hold_the_same_samples(kind, tmp_path):
    """Ten epochs of one step: the rows differ from epoch to epoch, the samples of a step do not."""
    rows, runs = samples(24), []
    for name, more in [("packed", {"pack_to": ROW}), ("unpacked", {})]:
        args = arguments(tmp_path / name, per_device_train_batch_size=24, num_train_epochs=10, max_grad_norm=1.0)
        run = trainer(small_model(kind, **PACKED[kind]), args, rows, **more)
        run.train()
        runs.append([(entry["loss"], entry["grad_norm"]) for entry in run.state.log_history if "loss" in entry])
    assert len(runs[0]) == 10
    assert runs[0] == [pytest.approx(entry, rel=RTOL_20_STEPS) for entry in runs[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_of_accumulation_follow_twenty_steps_without(kind, tmp_path):
    rows = samples(80)
    losses = []
    for name, batch, accumulation in [("whole", 4, 1), ("cut", 1, 4)]:
        args = arguments(
            tmp_path / name, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=20
        )
        run = trainer(small_model(kind), args, rows)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=RTOL_20_STEPS)


def test_the_models_own_forward_gives_what_the_fused_head_gives():
    model, rows = prepared("qwen3"), samples(5)
    own = CausalLoss(model, fused=False, label_smoothing=0.1)
    fused = CausalLoss(model, fused=True, label_smoothing=0.1)
    batch = [collate(rows)]
    agree(loss_and_gradients(model, batch, objective=fused), loss_and_gradients(model, batch, objective=own))


def test_the_loss_is_the_mean_over_trained_tokens_of_all_samples():
    """Against cross_entropy on logits of each sample by itself: a reference one can read."""
    model, rows = prepared("llama"), samples(4)
    plain = small_model("llama")
    total, count = 0.0, 0
    for row in rows:
        logits = plain(input_ids=torch.tensor(row.input_ids[None], dtype=torch.long)).logits[0, :-1]
        labels = torch.tensor(row.labels[1:], dtype=torch.long)
        total += cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX).item()
        count += row.num_trained
    assert loss_and_gradients(model, [collate(rows)])[0] == pytest.approx(total / count, rel=RTOL_LOSS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_switched_off_leaves_the_base(kind):
    model, rows = small_model(kind), samples(3)
    base = small_model(kind)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    choose_path(adapted), choose_path(base)
    batch = collate(rows)
    expected = CausalLoss(base, fused=True)(batch).loss
    assert not torch.allclose(CausalLoss(adapted, fused=True)(batch).loss, expected, rtol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(CausalLoss(adapted, fused=True)(batch).loss, expected)


def test_a_saved_adapter_gives_the_same_logits_in_plain_peft(tmp_path):
    base = small_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False)
    run = trainer(model, arguments(tmp_path / "run", max_steps=4), samples(16))
    run.train()
    run.save_model()
    ids = torch.arange(3, 20)[None]
    model.eval()
    model.get_base_model().set_attn_implementation("sdpa")

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run")
    with torch.no_grad():
        expected, base_logits = model(ids).logits, small_model("llama")(ids).logits
        assert torch.equal(plain.eval()(ids).logits, expected)
        assert not torch.allclose(base_logits, expected, atol=1e-3)


# ---- resumed = uninterrupted ---------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small import arguments, samples, small_model, trainer
from peft import LoraConfig, get_peft_model
import torch
from burnish.train.checkpoint import last_checkpoint
torch.set_num_threads(1)
out, method, slow = Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
dtype = torch.bfloat16 if "bf16" in method else torch.float32
model = small_model("qwen3", dtype=dtype, attention_dropout=0.0)
if "lora" in method:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
class Slow(__import__("transformers").TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        __import__("time").sleep(slow)
args = arguments(out, gradient_accumulation_steps=2, num_train_epochs=2, save_strategy="steps", save_steps=3,
                 lr_scheduler_type="cosine", warmup_steps=2, logging_steps=2)
run = trainer(model, args, samples(31), callbacks=[Slow])
run.train(last_checkpoint(out))
run.save_model()
run.state.save_to_json(str(out / "trainer_state.json"))
"""


def run_process(out: Path, method: str, slow: float = 0.0) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(out), method, str(slow)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("method", ["full", "lora", "full-bf16"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(method, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_process(whole, method).wait() == 0

    process = run_process(killed, method, slow=0.2)
    deadline = time.time() + 120
    while last_checkpoint(killed) is None and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # somewhere between two checkpoints
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert last_checkpoint(killed) is not None and not (killed / "trainer_state.json").exists()
    assert run_process(killed, method).wait() == 0

    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert (whole / name).read_bytes() == (killed / name).read_bytes()
    histories = [losses(folder / "trainer_state.json") for folder in (whole, killed)]
    assert histories[0] == histories[1] and len(histories[0]) >= 8


def losses(state_file: Path) -> list[tuple]:
    from transformers import TrainerState

    history = TrainerState.load_from_json(str(state_file)).log_history
    return [(e["step"], e["loss"], e["grad_norm"], e["learning_rate"], e["epoch"]) for e in history if "loss" in e]


# ---- the same run as transformers' Trainer -------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Every event with the step it came at, and the learning rate after every step."""

    def __init__(self):
        self.events: list[tuple[str, int]] = []
        self.rates: list[float] = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args, state, control, lr_scheduler=None, **kwargs):
            kind = name if name != "on_log" else f"on_log({'eval' if 'eval_loss' in kwargs['logs'] else 'train'})"
            self.events.append((kind, state.global_step))
            if name == "on_optimizer_step":
                self.rates.append(lr_scheduler.get_last_lr()[0])

        return note


CASES = {
    "43 rows, batch 2, accumulation 2, 8 epochs": (43, dict(gradient_accumulation_steps=2, num_train_epochs=8)),
    "max_steps": (20, dict(max_steps=7, gradient_accumulation_steps=3)),
    "fractions of an epoch": (11, dict(num_train_epochs=1.5)),
    "drop_last": (11, dict(dataloader_drop_last=True, gradient_accumulation_steps=2, num_train_epochs=2)),
    "fewer rows than a step holds": (3, dict(gradient_accumulation_steps=8, num_train_epochs=2)),
    "evaluated and saved by steps": (
        21,
        dict(
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=4,
            num_train_epochs=2,
            logging_steps=5,
        ),
    ),
    "evaluated and saved by epoch": (
        13,
        dict(eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch", num_train_epochs=2),
    ),
    "shares of the run": (20, dict(eval_strategy="steps", eval_steps=0.25, logging_steps=0.1, save_steps=0.5)),
    "first step, start, delay": (
        12,
        dict(
            logging_first_step=True,
            logging_steps=4,
            eval_on_start=True,
            eval_strategy="steps",
            eval_steps=2,
            eval_delay=4,
        ),
    ),
    "best model": (  # as many rows as a batch: no order of rows decides which evaluation is the best
        2,
        dict(
            eval_strategy="steps", eval_steps=2, save_strategy="best", metric_for_best_model="loss", num_train_epochs=9
        ),
    ),
    "cosine with warm-up": (30, dict(lr_scheduler_type="cosine", warmup_steps=0.2)),
    "restarts": (
        30,
        dict(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2}, warmup_steps=3),
    ),
    "constant": (8, dict(lr_scheduler_type="constant_with_warmup", warmup_steps=2)),
    "polynomial": (20, dict(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 2.0})),
    "inverse square root": (20, dict(lr_scheduler_type="inverse_sqrt", warmup_steps=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_rates_and_events_are_those_of_transformers(case, tmp_path):
    count, settings = CASES[case]
    rows, evaluation = samples(count), samples(5, seed=7)
    ours, theirs = Recorder(), Recorder()

    run = trainer(
        small_model(), arguments(tmp_path / "ours", **settings), rows, eval_dataset=evaluation, callbacks=[ours]
    )
    run.train()
    other = TransformersTrainer(
        small_model(),
        arguments(tmp_path / "theirs", **settings),
        data_collator=collator(),
        train_dataset=Rows(rows),
        eval_dataset=Rows(evaluation),
        callbacks=[theirs],
    )
    other.train()

    assert run.state.global_step == other.state.global_step
    assert ours.rates == pytest.approx(theirs.rates, rel=1e-12)
    assert ours.events == theirs.events
    for name in ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "epoch"):
        assert getattr(run.state, name) == getattr(other.state, name), name


def test_43_rows_are_11_steps_an_epoch_and_88_in_8(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=8, logging_steps=44)
    run = trainer(small_model(), args, samples(43))
    run.train()
    assert (run.steps.per_epoch, run.state.max_steps, run.state.global_step) == (11, 88, 88)


def test_the_losses_of_a_run_are_those_of_transformers_on_the_same_batches(tmp_path):
    """With as many rows as a step holds, the order of rows does not matter: full training, ten steps, clipping on."""
    rows = samples(6)
    settings = dict(per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=10, weight_decay=0.1)
    run = trainer(small_model(), arguments(tmp_path / "ours", **settings), rows)
    run.train()
    other = TransformersTrainer(
        small_model(), arguments(tmp_path / "theirs", **settings), data_collator=collator(), train_dataset=Rows(rows)
    )
    other.train()
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        ours, theirs = ([e[key] for e in t.state.log_history if key in e] for t in (run, other))
        assert len(ours) == 10
        assert ours == pytest.approx(theirs, rel=tolerance), key


def test_a_users_callback_can_stop_save_and_evaluate(tmp_path):
    class Mine(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, processing_class=None, train_dataloader=None, **kwargs):
            assert model is run.model and train_dataloader is not None and kwargs["optimizer"] is run.optimizer
            if state.global_step == 2:
                control.should_save = control.should_evaluate = True
            if state.global_step == 5:
                control.should_training_stop = True
            return control

    run = trainer(small_model(), arguments(tmp_path), samples(40), eval_dataset=samples(3), callbacks=[Mine])
    run.train()
    assert run.state.global_step == 5
    assert (tmp_path / "checkpoint-2").is_dir()
    assert [e["step"] for e in run.state.log_history if "eval_loss" in e] == [2]
    assert isinstance(run.pop_callback(Mine), Mine)


def test_early_stopping_stops_when_the_loss_no_longer_falls(tmp_path):
    settings = dict(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False, learning_rate=1.0, num_train_epochs=20,
        save_total_limit=2,
    )  # fmt: skip
    run = trainer(
        small_model(),
        arguments(tmp_path, **settings),
        samples(20),
        eval_dataset=samples(4, seed=5),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    run.train()
    evaluations = [e["eval_loss"] for e in run.state.log_history if "eval_loss" in e]
    assert run.state.global_step < run.state.max_steps
    assert run.state.best_metric == min(evaluations)
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{run.state.best_global_step}")
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluations), rel=1e-6)  # the best weights were loaded
