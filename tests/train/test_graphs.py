"""A run whose passes are recorded: the same losses, weights, counts and events, resumed bit for bit."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import make_run
from recorded import Again
from small import arguments, samples, small_model, trainer
from transformers import TrainerCallback

from burnish.arguments.parse import parse_command
from burnish.cli import main
from burnish.data.loader import collate
from burnish.errors import RunStopped, UserError
from burnish.model.head import CausalLoss
from burnish.model.probe import choose_path
from burnish.model.recompute import Recompute
from burnish.train.optimizer import LocalUpdate
from burnish.train.passes import Passes
from burnish.train.peers import Peers
from burnish.tuning.blocks import find_blocks


def model_of(method, dtype):
    model = small_model(dtype=dtype, tie_word_embeddings=method == "tied")
    if method != "lora":
        return model
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


class Watch(TrainerCallback):
    """Events, and where gradients stand when the optimizer reads them. `stop`: nothing is recorded."""

    def __init__(self, stop=False):
        self.stop, self.events, self.places, self.run = stop, [], [], None

    def on_train_begin(self, args, state, control, **_):
        if self.stop:
            self.run.graphs.stop()

    def on_substep_end(self, args, state, control, **_):
        self.events.append("substep")

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.places.append(self.run.update.places())

    def on_step_end(self, args, state, control, **_):
        self.events.append((state.global_step, state.num_input_tokens_seen, state.total_flos))


def a_run(folder, method="full", dtype=torch.bfloat16, *, recorder=None, stop=False, resume=None, **changes):
    watch = Watch(stop)
    settings = {"gradient_accumulation_steps": 3, "num_train_epochs": 4, "max_grad_norm": 1.0} | changes
    run = watch.run = trainer(
        model_of(method, dtype),
        arguments(folder, **settings),
        samples(16),
        callbacks=[watch],
        recorder=recorder,
        micro_batch_tokens="60",
    )
    run.train(resume)
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    return run, watch, [entry["loss"] for entry in run.state.log_history if "loss" in entry], weights


def test_gradients_of_a_run_that_may_be_recorded_are_float32_from_the_first_pass_on(tmp_path):
    """Else the norm of a step of one pass would be that of other rounding before it is recorded than afterwards."""
    given = [collate(samples(3))]
    for recorded in (False, True):
        model = small_model(dtype=torch.bfloat16)
        update = LocalUpdate(CausalLoss(model, fused=True), arguments(tmp_path), Peers(), recorded=recorded)
        assert choose_path(model).padding_free
        update.backward(update.forward(given[0]), last=True)
        assert {update.masters.gradient_of(weight).dtype for weight in update.weights.values()} == {
            torch.float32 if recorded else torch.bfloat16
        }
        assert all(update.places()) == recorded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["full", "tied", "lora"])
def test_a_recorded_run_is_the_unrecorded_one_bit_for_bit(method, dtype, tmp_path):
    recorder = Again()
    _, watched, losses, weights = a_run(tmp_path / "recorded", method, dtype, recorder=recorder)
    assert recorder.recorded >= 2 and recorder.replayed > 20 and recorder.rehearsed == 1
    _, other, expected, wanted = a_run(tmp_path / "not", method, dtype, recorder=Again(), stop=True)
    assert losses == expected and all(torch.equal(value, wanted[name]) for name, value in weights.items())
    assert watched.events == other.events and "substep" in watched.events
    assert len(set(watched.places[3:])) == 1  # gradients have not moved since passes are recorded


def test_what_is_filled_up_is_no_token_of_a_log(tmp_path):
    plain, watched, losses, _ = a_run(tmp_path / "plain", dtype=torch.float32)
    filled, other, found, _ = a_run(tmp_path / "filled", dtype=torch.float32, recorder=Again())
    assert watched.events == other.events and found == pytest.approx(losses, rel=1e-4)
    assert plain.state.num_input_tokens_seen == filled.state.num_input_tokens_seen == 4 * sum(map(len, samples(16)))
    assert filled.graphs is not None and filled.graphs.count == 0 and filled.objective.graphs is None  # after the run


@pytest.mark.parametrize("method", ["full", "tied"])
def test_a_resumed_run_that_records_anew_is_the_uninterrupted_one_bit_for_bit(method, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12}
    _, _, losses, weights = a_run(tmp_path, method, recorder=Again(), **how)
    recorder = Again()
    _, _, again, resumed = a_run(tmp_path, method, recorder=recorder, resume=tmp_path / "checkpoint-5", **how)
    assert recorder.replayed and again == losses
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


def test_a_callback_that_leaves_a_step_leaves_no_gradient_behind(tmp_path):
    class Leave(TrainerCallback):
        left = False

        def on_substep_end(self, args, state, control, **_):
            if state.global_step == 3 and not self.left:
                self.left = control.should_epoch_stop = True

    found = []
    for stop in (False, True):
        watch = Watch(stop)
        args = arguments(tmp_path / str(stop), gradient_accumulation_steps=3, num_train_epochs=3)
        run = watch.run = trainer(
            small_model(), args, samples(24), callbacks=[watch, Leave()], recorder=Again(), micro_batch_tokens="60"
        )
        run.train()
        found.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert found[0] == found[1] and len(found[0]) > 5


def test_a_recording_that_fails_leaves_a_run_that_goes_on(tmp_path, capsys):
    _, _, losses, weights = a_run(tmp_path / "broken", recorder=Again(fail_at=2))
    assert capsys.readouterr().err.count("passes are not recorded as CUDA graphs: operation not permitted\n") == 1
    _, _, expected, wanted = a_run(tmp_path / "not", recorder=Again(), stop=True)
    assert losses == expected and all(torch.equal(value, wanted[name]) for name, value in weights.items())


def test_what_is_not_finite_is_traced_to_its_module_in_a_recorded_run_too(tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 6:
                model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")

    run = trainer(
        small_model(), arguments(tmp_path), samples(40), callbacks=[Break()], recorder=Again(), micro_batch_tokens="60"
    )
    with pytest.raises(RunStopped, match=r"step 7: (.|\n)*layers\.1\.mlp\.down_proj"):
        run.train()


class Held:
    """What has been recorded, as far as passes know it."""

    def __init__(self, had_any):
        self.had_any, self.stopped = had_any, 0

    def stop(self):
        self.stopped += 1
        had_any, self.had_any = self.had_any, False
        return had_any


def test_out_of_memory_recordings_go_first_and_then_passes_get_smaller(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    graphs, asked = Held(True), []
    passes = Passes("auto", torch.device("cuda"), graphs=graphs)

    def one_pass(batch, *, last):
        asked.append(batch.labels.numel())
        if len(asked) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(1.0)

    given = [collate(samples(8))]
    passes.run(given, one_pass, end_batch=lambda: False, forget=lambda: None)
    whole = given[0].labels.numel()
    assert asked[:2] == [whole, whole] and asked[2] <= whole // 2 and graphs.stopped == 2
    told = capsys.readouterr().err
    assert "from here on passes are not recorded as CUDA graphs, with the same gradients" in told
    assert "passes of at most" in told


def test_where_blocks_are_computed_again_nothing_is_recorded():
    model = small_model()
    for go_on in (lambda p: p.remember({"most_tokens": 4096, "recomputed": 1}), lambda p: p._need_less([])):
        graphs = Held(False)
        passes = Passes(
            "auto",
            torch.device("cuda"),
            why_whole="DeepSpeed",
            recompute=Recompute(model, find_blocks(model).values()),
            graphs=graphs,
        )
        go_on(passes)
        assert graphs.stopped


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, told",
    [
        ("--use_cpu", "the run is on the CPU"),
        ("--gradient_checkpointing true", "exclude each other"),
        ("--neftune_noise_alpha 5", "drawn anew in each pass"),
        ("--lora_dropout 0.1 --finetuning_type lora", "drawn anew in each pass"),
        ("--full_determinism", "one by one"),
        ("--bf16 false", "set bf16: true"),
    ],
)
def test_what_cannot_be_recorded_is_refused_where_it_is_asked_for(words, told, tmp_path):
    given = [*make_run(tmp_path, rows=12), "--output_dir", str(tmp_path / "run"), "--bf16", "--cuda_graphs", "true"]
    if "bf16" in words:
        given.remove("--bf16")
    with pytest.raises(UserError) as refused:
        parse_command("train", [*given, *words.split()])
    assert "cuda_graphs" in str(refused.value) and told in str(refused.value)


def test_cuda_graphs_says_whether_a_run_is_recorded(tmp_path, monkeypatch, capsys):
    """As on a GPU, with what stands in for its graphs."""
    made = []
    monkeypatch.setattr("burnish.prepare.CudaRecorder", lambda: made.append(Again()) or made[-1])
    monkeypatch.setattr("burnish.prepare._why_not_recorded", lambda *_: "")
    words = [*make_run(tmp_path, rows=40), "--bf16"]
    for asked in ((), ("--cuda_graphs", "false"), ("--cuda_graphs", "true")):
        assert main(["train", *words, *asked, "--output_dir", str(tmp_path / "-".join(["run", *asked]))]) == 0
        assert ("recorded as CUDA graphs" in capsys.readouterr().out) == ("false" not in asked)
    assert len(made) == 2 and all(each.replayed for each in made)


def test_what_has_no_gpu_says_so_where_recording_is_asked_for(tmp_path, capsys):
    words = [*make_run(tmp_path, rows=12), "--bf16", "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *words, "--cuda_graphs", "true"]) == 0
    assert "passes are not recorded as CUDA graphs: there is no GPU" in capsys.readouterr().out
