"""What only a CUDA device shows of recorded passes: a replay is the pass, and what cannot be recorded is left alone.

    python -m pytest tests/gpu/test_graphs.py

Skipped, with the reason, where there is no CUDA device.
"""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from families import EXPERTS
from peft import LoraConfig, get_peft_model
from small import SHAPE, arguments, samples, small_model, trainer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, TrainerCallback

from burnish.model.compile import compile_blocks
from burnish.model.cuda_recorder import CudaRecorder
from burnish.model.head import unwrap
from burnish.model.probe import choose_path, try_out
from burnish.tuning.blocks import find_blocks
from burnish.tuning.fuse import fuse_lora, fuse_mlp
from burnish.types import Sample

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Requested unified CUBLASLT workspace"),  # determinism makes it small
]
DEVICE = "cuda"


@pytest.fixture
def deterministic(monkeypatch):
    """Else attention's backward adds up in another order every time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def model_of(method, *, compiled=False, dtype=torch.bfloat16, **changes):
    model = small_model("llama", dtype=dtype, **({"head_dim": 16} | changes)).to(DEVICE)
    if method == "lora":
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(1)
        model = fuse_lora(get_peft_model(model, config, autocast_adapter_dtype=False))
    if compiled:
        assert choose_path(model.train()).padding_free
        fuse_mlp(model)
        assert compile_blocks(find_blocks(unwrap(model)).values(), partial(try_out, model)) == ""
    return model


class Watch(TrainerCallback):
    """How much was recorded in the end. `stop`: nothing is."""

    def __init__(self, stop=False):
        self.stop, self.count, self.run = stop, 0, None
        self.compiled = 0  # while it trained

    def on_train_begin(self, args, state, control, **_):
        self.compiled = -torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if self.stop:
            self.run.graphs.stop()

    def on_step_end(self, args, state, control, **_):
        self.count = self.run.graphs.count

    def on_train_end(self, args, state, control, **_):
        self.compiled += torch._dynamo.utils.counters["stats"]["unique_graphs"]


def a_run(folder, model, *, stop=False, resume=None, rows=None, callbacks=(), tokens="1200", **changes):
    """→ losses, weights, how many recordings there were at the end.

    Nothing is compiled while it trains; the probe in `trainer`, which a command runs before it compiles, may do so.
    """
    watch = Watch(stop)
    settings = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "max_steps": 16} | changes
    run = watch.run = trainer(
        model,
        arguments(folder, use_cpu=False, **settings),
        samples(48, longest=300) if rows is None else rows,
        callbacks=[watch, *callbacks],
        recorder=CudaRecorder(),
        micro_batch_tokens=tokens,
    )
    run.train(resume)
    assert watch.compiled == 0
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry], weights, watch.count


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_recorded_run_is_the_unrecorded_one_bit_for_bit(method, dtype, tmp_path, deterministic, capsys):
    losses, weights, count = a_run(tmp_path / "recorded", model_of(method, dtype=dtype))
    assert count >= 2 and "not recorded" not in capsys.readouterr().err
    expected, wanted, none = a_run(tmp_path / "not", model_of(method, dtype=dtype), stop=True)
    assert none == 0 and losses == expected and same(weights, wanted)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_compiled_blocks_are_recorded_too_and_not_compiled_again(method, tmp_path, capsys):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses, _, count = a_run(tmp_path / "recorded", model_of(method, compiled=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert count >= 2 and "not recorded" not in capsys.readouterr().err
    expected, _, _ = a_run(tmp_path / "not", model_of(method, compiled=True), stop=True)
    assert losses == pytest.approx(expected, rel=2e-2)


def test_a_resumed_run_that_records_anew_is_the_uninterrupted_one_bit_for_bit(tmp_path, deterministic):
    how = {"save_strategy": "steps", "save_steps": 9}
    losses, weights, _ = a_run(tmp_path, model_of("lora"), **how)
    again, resumed, count = a_run(tmp_path, model_of("lora"), resume=tmp_path / "checkpoint-9", **how)
    assert count and again == losses and same(weights, resumed)


def test_a_replayed_step_waits_for_nothing(tmp_path):
    class Strict(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            torch.cuda.set_sync_debug_mode("error" if 4 < state.global_step < 14 else "default")

        def on_step_end(self, args, state, control, **_):
            torch.cuda.set_sync_debug_mode("default")

    try:
        # One shape: 12 rows of at most 40 tokens are one pass of 512.
        how = {"rows": samples(200), "tokens": "512", "logging_steps": 16, "dataloader_pin_memory": True}
        _, _, count = a_run(tmp_path, model_of("lora"), callbacks=[Strict()], **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count == 1


def test_another_thread_may_use_the_device_while_a_pass_is_recorded(tmp_path, capsys):
    over, done = threading.Event(), []

    def use():
        while not over.is_set():
            done.append(torch.rand(1000).pin_memory().to(DEVICE, non_blocking=True).sum())
            torch.cuda.current_stream().query()
            time.sleep(1e-3)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        _, _, count = a_run(tmp_path, model_of("full"))
    finally:
        over.set()
        thread.join()
    assert count >= 2 and len(done) > 10 and "not recorded" not in capsys.readouterr().err


def test_experts_that_the_data_choose_are_left_to_python_with_one_line(tmp_path, capsys):
    def experts():
        torch.manual_seed(0)
        config = Qwen3MoeConfig(**(SHAPE | EXPERTS | {"head_dim": 16, "decoder_sparse_step": 1}))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="eager")
        return model.to(DEVICE)

    losses, _, count = a_run(tmp_path / "recorded", experts())
    told = capsys.readouterr().err
    assert count == 0 and told.count("passes are not recorded as CUDA graphs") == 1 and "waits" in told
    expected, _, _ = a_run(tmp_path / "not", experts(), stop=True)
    assert losses == pytest.approx(expected, rel=2e-2)


def test_a_recording_that_the_device_ends_leaves_a_run_that_goes_on(tmp_path, deterministic, capsys):
    """What a rehearsal does not show: here a wait that comes only while it is recorded."""

    def stumbling():
        model = model_of("full")
        own = type(model.model.norm)

        class Stumble(own):
            def forward(self, x):
                if torch.cuda.is_current_stream_capturing():
                    torch.cuda.synchronize()
                return super().forward(x)

        model.model.norm.__class__ = Stumble
        return model

    losses, weights, count = a_run(tmp_path / "broken", stumbling())
    told = capsys.readouterr().err
    assert count == 0 and told.count("passes are not recorded as CUDA graphs") == 1
    torch.rand(3, device=DEVICE)  # the generator no longer believes that it is recorded
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    large = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved  # the allocator gives back again
    expected, wanted, _ = a_run(tmp_path / "not", stumbling(), stop=True)
    assert losses == expected and same(weights, wanted)
    _, _, count = a_run(tmp_path / "after", model_of("full"))
    assert count >= 2


def test_out_of_memory_what_was_recorded_goes_first_and_the_step_is_run_again(tmp_path, capsys):
    short, long = samples(6 * 4, seed=1, longest=200), samples(3 * 40, seed=2, longest=300)
    shape = {"num_hidden_layers": 8, "intermediate_size": 4096}
    total = torch.cuda.get_device_properties(0).total_memory

    class Limit(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 6:  # from here on passes are ten times as long
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)

    found = []
    for limit in (None, Limit()):
        # Steps of 4 rows and, once those are through, of the long ones packed into each.
        rows = [*short, *(joined(long[n : n + 20]) for n in range(0, 120, 20))]
        how = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 1, "tokens": "auto"}
        try:
            losses, _, count = a_run(
                tmp_path / str(len(found)),
                model_of("full", **shape),
                rows=rows,
                callbacks=[limit] if limit else [],
                **how | {"max_steps": 7},
            )
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        found.append(losses)
        told = capsys.readouterr().err
        assert ("passes are not recorded as CUDA graphs, with the same gradients" in told) == bool(limit), told
        assert bool(count) != bool(limit)
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def joined(rows):
    """Several samples as one row, as texts are packed: documents of their own."""
    ids, labels = (np.concatenate([getattr(row, name) for row in rows]) for name in ("input_ids", "labels"))
    return Sample(ids, labels, rows[0].place, tuple(len(row) for row in rows))
