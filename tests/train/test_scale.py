"""float16: the loss is scaled, what overflows is left out and counted, and a resumed run goes on exactly.

A float16 model on the CPU, where a command would use float32: torch multiplies it there too, slowly.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import ROOT, run_script
from small import arguments, samples, small_model, trainer
from transformers import TrainerCallback

from burnish.data.loader import collate
from burnish.errors import RunStopped
from burnish.model.head import CausalLoss
from burnish.train.checkpoint import checkpoints
from burnish.train.optimizer import LocalUpdate
from burnish.train.peers import Peers
from burnish.train.scale import LossScale

HALF = torch.float16


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def logged(run, name):
    return [entry[name] for entry in run.state.log_history if "loss_scale" in entry]


class Overflow(TrainerCallback):
    """Makes the gradients of some steps overflow, or their loss too, as a large activation would."""

    def __init__(self, *steps, loss=False):
        self.steps, self.loss, self.hook = steps, loss, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 in self.steps and self.hook is None:
            where = model.get_input_embeddings()
            if self.loss:
                self.hook = where.register_forward_hook(lambda *call: call[-1] * 1e8)  # beyond float16's 65,504
            else:
                self.hook = where.register_forward_hook(self._blow_up)

    @staticmethod
    def _blow_up(module, inputs, output):
        output.register_hook(lambda gradient: gradient * float("inf"))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.hook is not None and state.global_step + 1 not in self.steps:
            self.hook.remove()
            self.hook = None


def test_the_scale_moves_as_torchs_grad_scaler_moves_it():
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=2000), LossScale(torch.device("cpu"))
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight])
    draw = random.Random(0)
    total = 0
    for _ in range(9000):
        overflow = draw.random() < 0.0005
        total += overflow
        weight.grad = torch.full((1,), float("inf") if overflow else 1.0)
        theirs.scale(weight)
        theirs.unscale_(optimizer)
        theirs.update()
        ours.update(torch.tensor(overflow))
        assert ours.value.item() == theirs.get_scale()
    assert total > 3 and ours.value.item() != 2.0**16
    state = ours.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (theirs.get_scale(), theirs.state_dict()["_growth_tracker"])
    assert state["overflows"] == total


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_losses_are_those_of_float32(method, tmp_path):
    found = []
    for dtype in (torch.float32, HALF):
        model = small_model(dtype=dtype)
        if method == "lora":
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False)
        run = trainer(model, arguments(tmp_path, num_train_epochs=4, learning_rate=2e-3), samples(24))
        run.train()
        found.append(losses(run))
        kept = {weight.dtype for weight in run.update.weights.values()}
        assert kept == {torch.float32}
    apart = [abs(half / exact - 1) for exact, half in zip(*found, strict=True)]
    assert 0 < sum(apart) / len(apart) < 2e-3 and max(apart) < 2e-2  # one loss of 48 may be 0.6 % off
    assert found[0][-1] < found[0][0] - 0.05
    assert logged(run, "loss_scale")[-1] >= 2**10


def test_gradients_too_small_for_float16_are_not_lost():
    """A loss of so little weight that its gradient is below 6e-8 everywhere: float16 has no such number."""
    found = {}
    for scaled in (True, False):
        update = LocalUpdate(CausalLoss(small_model(dtype=HALF), fused=True), arguments(Path("unused")), Peers())
        if not scaled:
            update.scale.value.fill_(1.0)
        loss = update.forward(collate(samples(8))) * 1e-9
        update.backward(loss, last=True)
        update.gather_gradients(0.0)
        found[scaled] = update.weights["model.layers.0.mlp.up_proj.weight"].grad
    assert found[False].eq(0).float().mean() > 0.9 and found[True].eq(0).float().mean() < 0.5
    assert 0 < found[True].abs().max() < 6e-8


@pytest.mark.parametrize("loss", [False, True], ids=["gradient", "loss"])
def test_a_step_that_overflows_is_left_out_counted_and_halves_the_scale(loss, tmp_path, capsys):
    class Note(TrainerCallback):
        weights = ()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights = [*self.weights, model.model.embed_tokens.weight.detach().clone()]

    note = Note()
    args = arguments(tmp_path, logging_steps=4, max_steps=8)
    run = trainer(small_model(dtype=HALF), args, samples(24), callbacks=[Overflow(3, 4, loss=loss), note])
    result = run.train()
    assert torch.equal(note.weights[1], note.weights[3]) and not torch.equal(note.weights[3], note.weights[4])
    assert logged(run, "loss_scale") == [2.0**14, 2.0**14] and logged(run, "overflows") == [2, 2]
    assert result.metrics["overflows"] == 2
    assert "step 4: 2 steps overflowed and were left out; the loss is scaled by 16384 now" in capsys.readouterr().err
    assert all(3 < value < 7 for value in [*losses(run), result.training_loss])  # a lost loss is no zero in the mean
    assert "grad_norm" in run.state.log_history[1] and "grad_norm" not in run.state.log_history[0]


def test_many_overflows_in_a_row_stop_the_run_and_are_traced(tmp_path):
    steps = tuple(range(3, 30))
    args = arguments(tmp_path, max_steps=30)
    run = trainer(small_model(dtype=HALF), args, samples(60), callbacks=[Overflow(*steps, loss=True)])
    with pytest.raises(
        RunStopped, match=r"^step 19: .*however little the loss is scaled(.|\n)*embed_tokens"
    ) as stopped:
        run.train()
    assert "with --bf16 in the place of --fp16" in str(stopped.value)
    assert run.update.scale.overflows.item() == 17  # 2^16 to 1, and once more
    (place,) = checkpoints(tmp_path)
    assert place.name == "checkpoint-18"
    again = trainer(small_model(dtype=HALF), args, samples(60))
    again.train(place)  # whose scale is the least: a good step goes on
    assert again.state.global_step == 30 and again.overflows() == 17


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("burnish.train.scale.INTERVAL", 3)  # so that the scale grows within the run

    def go(folder, resume=None, **changes):
        args = arguments(folder, num_train_epochs=2, save_strategy="steps", save_steps=5, **changes)
        run = trainer(small_model(dtype=HALF), args, samples(20), callbacks=[Overflow(2, 3, 8, 17)])
        run.train(resume)
        return run

    whole = go(tmp_path / "whole")
    parted = go(tmp_path / "parted", tmp_path / "whole" / "checkpoint-5")
    assert parted.state.log_history[:-1] == whole.state.log_history[:-1]
    assert len(set(logged(whole, "loss_scale"))) > 2
    # The four, and what grows too large by itself at a scale of 2^16: that depends on how this CPU multiplies.
    assert whole.overflows() == parted.overflows() >= 4
    for name, master in whole.update.weights.items():
        assert torch.equal(master, parted.update.weights[name])
    saved = torch.load(tmp_path / "whole" / "checkpoint-5" / "scaler.pt")
    assert saved["overflows"] == 2 and saved["scale"] == 2.0**14


SCRIPT = """
import json, sys
from datetime import timedelta
from pathlib import Path

sys.path[:0] = {paths}
import torch
from small import arguments, samples, small_model, trainer
from test_scale import Overflow, logged, losses
from burnish import ranks
from burnish.train.peers import meet, part

if ranks.world_size() > 1:
    meet("gloo", timedelta(seconds=60))
size = 4 // ranks.world_size()
# The second process, where there is one, is the only one that overflows.
steps = (2, 5) if ranks.rank() == ranks.world_size() - 1 else ()
args = arguments(Path(sys.argv[1]), per_device_train_batch_size=size)
run = trainer(small_model(dtype=torch.float16), args, samples(24), callbacks=[Overflow(*steps)])
run.train()
sums = [float(weight.double().sum()) for weight in run.update.weights.values()]
Path(sys.argv[1], f"{{ranks.world_size()}}-{{ranks.rank()}}.json").write_text(
    json.dumps([losses(run), logged(run, "loss_scale"), logged(run, "overflows"), sums])
)
if ranks.world_size() > 1:
    part()
"""


def test_processes_agree_on_what_overflowed_in_one_of_them(tmp_path):
    paths = [str(ROOT / "tests"), str(ROOT / "tests" / "train")]
    (tmp_path / "run.py").write_text(SCRIPT.format(paths=paths))
    for processes in (1, 2):
        run_script(processes, tmp_path / "run.py", str(tmp_path))
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    assert first[1] == alone[1] == [2.0**16, *[2.0**15] * 3, *[2.0**14] * 2] and first[2] == alone[2]
    assert first[0] == pytest.approx(alone[0], rel=2e-3)
