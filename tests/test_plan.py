"""`burnish plan`: what it counts is what autograd keeps, its passes are training's, and what it advises helps."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import here
from small import SHAPE, samples
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config, Qwen3Config

from burnish import cli
from burnish.arguments.parse import parse_command
from burnish.data.loader import collate
from burnish.model.arguments import ModelArguments
from burnish.model.head import decoder_of, unwrap
from burnish.model.probe import packed_inputs
from burnish.plan.block import STAND_IN, Measured, measure, register
from burnish.plan.devices import find_device
from burnish.plan.fit import fit
from burnish.plan.memory import MOMENTS, Held, most_memory
from burnish.plan.model import Asked, Shape, shape_of_model
from burnish.plan.options import plan_options
from burnish.plan.run import Run
from burnish.plan.speed import BATCH, ONE_PASS, ROUNDED, Rates, Time, time_of_step
from burnish.plan.steps import Pass, Rows, passes_of
from burnish.train.optimizer import OPTIMIZERS
from burnish.train.passes import cut
from burnish.train.rounding import AdamW
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.blocks import find_blocks
from burnish.tuning.fuse import fuse_lora

RATES = Rates.of(find_device("h100"), torch.bfloat16)
WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 4}


def write_config(folder: Path, **changes: Any) -> str:
    """A model's folder with config.json and nothing else."""
    Qwen3Config(**(SHAPE | changes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(tmp_path):
    """Words of a run: a model without weights, and rows that cannot be read without its tokenizer."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "hello", "output": "hi"}\n')
    words = {"dataset": tmp_path / "rows.jsonl", "template": "qwen", "output_dir": tmp_path / "out", "bf16": True}
    return [f"{name}={value}" for name, value in words.items()]


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = cli.main(["plan", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


# ---- what is measured ------------------------------------------------------------------------------------------------


class LikeVarlen(torch.autograd.Function):
    """Keeps what torch's variable-length attention keeps; computes nothing of the kind."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = q.clone(), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(each) for each in ctx.saved_tensors[1:3])


def like_varlen(module, query, key, value, attention_mask, **_):
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return LikeVarlen.apply(q, k, v)[None], None


def tuned(kind: str, device: str, attention: str) -> Any:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**SHAPE), dtype=torch.bfloat16, attn_implementation=attention
        )
    return fuse_lora(init_adapter(model, FinetuningArguments(finetuning_type=kind), ModelArguments(), trainable=True))


def kept_by_a_real_block(model: Any, number: int, tokens: int) -> int:
    """Bytes that autograd is handed inside block `number`, weights and positions left out."""
    block = list(find_blocks(unwrap(model)).values())[number]
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}
    inside = [False]

    def enter(_, args, kwargs):
        inside[0] = True
        own.update(each.untyped_storage().data_ptr() for each in kwargs["position_embeddings"])

    def keep(tensor):
        place = tensor.untyped_storage().data_ptr()
        if inside[0] and place not in own:
            found[place] = tensor
        return tensor

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    model.train()
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder_of(unwrap(model))(**packed_inputs(ids, (tokens,)), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_a_block_keeps_is_what_autograd_keeps_of_a_real_one(kind):
    AttentionInterface.register("like-varlen", like_varlen)
    register()
    tokens = 256
    measured = measure(tuned(kind, "meta", STAND_IN), compiled=False, tokens=tokens)
    real = kept_by_a_real_block(tuned(kind, "cpu", "like-varlen"), 1, tokens)
    assert measured.blocks[1].kept.at(tokens) == real


def test_a_compiled_block_keeps_less_and_as_much_of_each_token():
    register()
    model = tuned("full", "meta", STAND_IN)
    as_written = measure(model, compiled=False, tokens=512).blocks[1]
    few, many = (measure(model, compiled=True, tokens=tokens).blocks[1] for tokens in (512, 1024))
    assert few.why_not == "" and few.kept.per_token < as_written.kept.per_token
    assert few.kept == many.kept
    assert sum(kernel.flops for kernel in few.forward.kernels) == sum(kernel.flops for kernel in many.forward.kernels)


def test_the_products_of_a_block_are_those_of_its_weights():
    """2 FLOP a weight forward, and backward as many for the input and for the weight itself."""
    register()
    model = tuned("full", "meta", STAND_IN)
    block, cost = next(iter(find_blocks(model).values())), measure(model, compiled=True).blocks[1]
    weights = sum(weight.numel() for weight in block.parameters() if weight.dim() == 2)
    assert sum(kernel.flops for kernel in cost.forward.kernels) == 2 * weights
    assert sum(kernel.flops for kernel in cost.backward.kernels) == 4 * weights


def test_a_frozen_block_below_the_trained_ones_keeps_nothing():
    register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE), attn_implementation=STAND_IN)
    init_adapter(
        model,
        FinetuningArguments(finetuning_type="freeze", freeze_trainable_layers=1),
        ModelArguments(),
        trainable=True,
    )
    costs = measure(model, compiled=True).blocks
    assert [bool(cost.kept.per_token) for cost in costs] == [False, False, True]
    assert [bool(cost.backward.kernels) for cost in costs] == [False, False, True]


def frozen_but_the_last(folder: Path) -> Shape:
    model = ModelArguments(model_name_or_path=write_config(folder))
    tuning = FinetuningArguments(finetuning_type="freeze", freeze_trainable_layers=1)
    return shape_of_model(Asked(model, tuning, torch.bfloat16, compiled=True))


def test_blocks_without_a_backward_pass_are_neither_computed_again_nor_kept(tmp_path):
    """Of three the last alone is trained: asked to compute all again, the plan does so with that one."""
    shape, each, held = frozen_but_the_last(tmp_path), Pass(4096, 4096, 4096.0**2, 4096), Held("adamw_torch")

    def time_and_kept(recomputed: int) -> tuple[Time, float]:
        time = time_of_step(shape, held, RATES, [each], recomputed=recomputed, trained_share=1.0, batches=1)
        memory = most_memory(shape, held, each, recomputed=recomputed, passes=1)
        return time, memory.parts.get("activations", 0.0)

    assert time_and_kept(2) == time_and_kept(0)
    (slower, kept), (time, all_kept) = time_and_kept(3), time_and_kept(0)
    assert slower.parts["attention"] > time.parts["attention"] and kept < all_kept


def test_where_memory_is_short_blocks_without_a_backward_pass_are_passed_over(tmp_path, base):
    """As model/recompute.py does: of three the last alone is trained, and is the first to be computed again."""
    words = ["finetuning_type=freeze", "freeze_trainable_layers=1"]
    run = Run.of(parse_command("train", [f"model_name_or_path={write_config(tmp_path / 'model')}", *base, *words]), 1)
    roomy = fit(run, Rows.unread(4096, "of no use here"), find_device("h100"))
    assert roomy.fits and roomy.computed_again == 0
    small = replace(find_device("h100"), memory_gib=roomy.memory.needed / 2**30 * 0.5)
    tight = fit(run, Rows.unread(4096, "of no use here"), small)
    assert tight.computed_again == 1


def test_a_frozen_block_that_the_compiler_cannot_read_has_no_backward_pass_either(tmp_path, monkeypatch):
    monkeypatch.setattr("burnish.plan.block._backend", lambda *_: "none of this name")
    assert [cost.goes_back for cost in frozen_but_the_last(tmp_path).measured.blocks] == [False, False, True]


# ---- steps and passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most_tokens", [None, 40, 90, 10_000])
def test_passes_are_cut_as_training_cuts_them(most_tokens):
    rows = samples(12)
    batches = [collate(rows[start : start + 4]) for start in (0, 4, 8)]
    lengths = [[len(row) for row in rows[start : start + 4]] for start in (0, 4, 8)]
    expected = [batch.labels.numel() for batch in cut(batches, most_tokens)]
    assert [each.tokens for each in passes_of(lengths, most_tokens, padded=False)] == expected


def test_every_optimizer_has_its_moments():
    assert set(MOMENTS) == set(OPTIMIZERS)


class Moved(TorchDispatchMode):
    """Adds up the bytes that operations read and write, each tensor whole."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._schema.name
        read = args[1:] if name.endswith("copy_") else args
        written = args[0] if "_foreach_" in name else result
        if not func.is_view:
            self.bytes += sum(each.nbytes for each in tree_leaves((read, kwargs, written)) if torch.is_tensor(each))
        return result


def test_what_an_update_of_pure_bf16_moves_is_counted():
    """Its gradient apart, and with what clipping moves of that: 4 bytes a weight."""
    weight = nn.Parameter(torch.ones(512, 512, dtype=torch.bfloat16))
    optimizer = AdamW([weight])
    optimizer.found_inf = torch.zeros(())  # as training gives it
    for _ in range(2):  # the first makes the moments
        weight.grad = torch.ones_like(weight)
        with Moved() as moved:
            optimizer.step()
    assert moved.bytes / weight.numel() == pytest.approx(ROUNDED + 2 - 4, abs=0.01)


def test_pure_bf16_takes_the_time_of_its_own_optimizer(tmp_path):
    shape, each = small_shape(tmp_path, kind="full"), Pass(64, 64, 64.0**2, 64)

    def seconds(held: Held) -> float:
        how: dict[str, Any] = {"recomputed": 0, "trained_share": 1.0, "batches": 1}
        return time_of_step(shape, held, RATES, [each], **how).parts["optimizer"]

    one_pass, rounded = seconds(Held("adamw_torch")), seconds(Held("adamw_torch", pure_bf16=True))
    assert rounded / one_pass == pytest.approx((ROUNDED + 4) / (ONE_PASS + 4))  # the gradient is read twice


# ---- memory ----------------------------------------------------------------------------------------------------------


def small_shape(folder: Path, kind: str = "lora", **changes: Any) -> Shape:
    model = ModelArguments(model_name_or_path=write_config(folder, **changes))
    return shape_of_model(Asked(model, FinetuningArguments(finetuning_type=kind), torch.bfloat16, compiled=True))


def test_blocks_computed_again_keep_their_input_alone(tmp_path):
    shape, each = small_shape(tmp_path), Pass(4096, 4096, 4096.0**2, 4096)
    held = Held("adamw_torch_fused")
    peaks = [most_memory(shape, held, each, recomputed=count, passes=1).allocated for count in range(4)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[3]
    measured: Measured = shape.measured
    again = most_memory(shape, held, each, recomputed=3, passes=1)
    assert again.parts["activations"] < 3 * measured.hidden.at(4096) + measured.outside.at(4096) + 4 * 4096 * 96


def test_weights_and_what_trains_them_are_counted_as_they_are_held(tmp_path):
    config = Qwen2Config(**(SHAPE | WIDE | {"head_dim": 128, "vocab_size": 1000}))
    config.save_pretrained(tmp_path)
    model = ModelArguments(model_name_or_path=str(tmp_path))
    shape = shape_of_model(Asked(model, FinetuningArguments(finetuning_type="full"), torch.bfloat16, compiled=True))
    with torch.device("meta"):
        real: nn.Module = AutoModelForCausalLM.from_config(config)
    count = sum(weight.numel() for weight in real.parameters())
    parts = most_memory(shape, Held("adamw_torch"), Pass(16, 16, 256.0, 16), recomputed=0, passes=1).parts
    assert (parts["float32 masters"], parts["optimizer state"]) == (4 * count, 8 * count)
    assert parts["weights"] == pytest.approx(2 * count, rel=1e-5)  # and a few frequencies
    divided = most_memory(shape, Held("adamw_torch", stage=3, ranks=4), Pass(16, 16, 256.0, 16), recomputed=0, passes=1)
    assert divided.parts["optimizer state"] == 2 * count and divided.parts["weights"] == parts["weights"] / 4


def test_gradients_of_recorded_passes_are_there_at_every_moment(tmp_path):
    """In float32, also while the head has its logits."""
    shape, each = small_shape(tmp_path, kind="full"), Pass(8192, 8192, 8192.0**2, 8192)
    plain, recorded = (
        most_memory(shape, Held("adamw_torch", recorded=how), each, recomputed=0, passes=1) for how in (False, True)
    )
    assert recorded.parts["gradients"] == 4 * shape.trained
    assert recorded.moment == plain.moment and plain.parts.get("gradients", 0) < shape.trained


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # a process of its own
def test_a_plan_needs_neither_weights_nor_a_gpu(tmp_path, base):
    model = f"model_name_or_path={write_config(tmp_path / 'model')}"
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    words = [sys.executable, "-m", "burnish", "plan", model, *base, "--device", "4090", "cutoff_len=512"]
    done = subprocess.run(words, env=here(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Qwen3ForCausalLM, lora, ")
    assert "every row taken as cutoff_len, 512 tokens" in done.stdout
    assert "It fits." in done.stdout and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_parts_add_up(tmp_path, base, capsys):
    model = f"model_name_or_path={write_config(tmp_path / 'model', **WIDE)}"
    status, plan = planned([model, *base, "--device", "h100"], capsys)
    assert status == 0 and plan["fits"]
    assert sum(plan["memory_gib"].values()) == pytest.approx(plan["peak_gib"], abs=0.01)
    assert plan["peak_gib"] < plan["needed_gib"] < plan["device"]["memory_gib"]
    assert plan["tokens_per_second"] == pytest.approx(plan["tokens_per_step"] / plan["step_ms"] * 1e3, rel=0.01)
    assert sum(plan["time_ms"].values()) <= plan["step_ms"]


def test_rows_are_read_for_their_lengths(tmp_path, base, capsys, fixture_path):
    from transformers import AutoConfig

    model = tmp_path / "model"
    model.mkdir()
    source = fixture_path("smollm2")
    AutoConfig.from_pretrained(source).save_pretrained(model)
    for file in source.glob("*token*.json"):
        (model / file.name).write_bytes(file.read_bytes())
    (tmp_path / "rows.jsonl").write_text('{"instruction": "hello", "output": "hi"}\n' * 50)
    words = [word for word in base if not word.startswith("template")]
    status, plan = planned([f"model_name_or_path={model}", "template=qwen", *words, "max_steps=3"], capsys)
    assert status == 0
    assert plan["rows"].startswith("50 rows of ")
    assert plan["tokens_per_step"] < 8 * 100  # eight short rows, and not eight of cutoff_len


def test_what_does_not_fit_is_told_with_changes_that_make_it_fit(tmp_path, base, capsys):
    """Whole weights of 1.2 billion, 16 bytes each, on 22 GiB."""
    shape = WIDE | {"head_dim": 128, "vocab_size": 150_000, "num_hidden_layers": 10}
    words = [f"model_name_or_path={write_config(tmp_path / 'model', **shape)}", *base, "--device", "l4"]
    words += ["finetuning_type=full", "learning_rate=1e-5"]
    status, plan = planned(words, capsys)
    assert status == 1 and not plan["fits"]
    changes = {remedy["setting"]: remedy for remedy in plan["remedies"]}
    assert {"pure_bf16: true", "finetuning_type: lora"} <= set(changes)
    for setting in ("pure_bf16: true", "finetuning_type: lora"):
        name, value = setting.split(": ")
        status, changed = planned([*words, f"{name}={value}"], capsys)
        assert status == 0 and changed["needed_gib"] == pytest.approx(changes[setting]["needed_gib"])


def test_memory_that_is_short_makes_passes_smaller_as_training_does(tmp_path, base, capsys):
    shape = WIDE | {"head_dim": 128, "vocab_size": 50_000, "num_hidden_layers": 24}
    words = [f"model_name_or_path={write_config(tmp_path / 'model', **shape)}", *base, "gradient_accumulation_steps=4"]
    roomy, tight = (planned([*words, "--device", device], capsys)[1] for device in ("h200", "l4"))
    assert (roomy["pass_tokens"], roomy["recomputed_blocks"]) == (16_384, 0)
    assert tight["fits"] and (tight["pass_tokens"] < 16_384 or tight["recomputed_blocks"])
    assert tight["needed_gib"] <= tight["device"]["memory_gib"]
    assert tight["tokens_per_step"] == roomy["tokens_per_step"]


def test_a_recorded_step_waits_for_no_batches_and_asks_little_of_the_cpu(tmp_path, base, capsys):
    words = [f"model_name_or_path={write_config(tmp_path / 'model', **WIDE)}", *base, "--device", "h100"]
    words += ["gradient_accumulation_steps=4", "per_device_train_batch_size=1"]
    recorded, launched = (planned([*words, f"cuda_graphs={how}"], capsys)[1] for how in ("true", "false"))
    assert recorded["recorded_as_cuda_graphs"] and not launched["recorded_as_cuda_graphs"]
    assert recorded["cpu_ms"] < launched["cpu_ms"]
    assert recorded["step_ms"] < launched["step_ms"] - 4 * 1e3 * BATCH  # four batches
    assert recorded["time_ms"]["between recorded kernels"] > 0 and "between recorded kernels" not in launched["time_ms"]
    assert recorded["memory_gib"]["recorded hidden states"] > 0


def test_a_change_that_cannot_be_recorded_is_planned_as_it_would_run(tmp_path, base):
    """Where a run may be recorded, and the change that is tried may not."""
    settings = parse_command("train", [f"model_name_or_path={write_config(tmp_path / 'model')}", *base])
    run, rows = Run.of(settings, 1), Rows.unread(40, "of no use here")
    changes = [run, replace(run, held=replace(run.held, pure_bf16=True)), replace(run, recompute=True)]
    assert [fit(each, rows, find_device("h100")).run.held.recorded for each in changes] == [True, False, False]


def test_passes_that_are_filled_up_end_in_a_plan_too(tmp_path, base, capsys):
    """Rows of a few tokens, passes of 512: halving them below their longest row leads nowhere."""
    shape = WIDE | {"head_dim": 128, "vocab_size": 150_000, "num_hidden_layers": 24}
    words = [f"model_name_or_path={write_config(tmp_path / 'model', **shape)}", *base, "cutoff_len=40"]
    status, plan = planned([*words, "finetuning_type=full", "cuda_graphs=true", "--device", "l4"], capsys)
    assert status == 1 and plan["pass_tokens"] == 512 and not plan["recorded_as_cuda_graphs"]


OFFLOADS = {
    "null": ({"stage": 2, "offload_optimizer": None}, 2, False),
    "an object without a device": ({"stage": 1, "offload_optimizer": {}}, 1, False),
    "to the CPU": ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, 3, True),
    "left to accelerate": ({"stage": "auto", "offload_optimizer": {"device": "auto"}}, 2, False),
    "no ZeRO": (None, 0, False),
}


@pytest.mark.parametrize("case", OFFLOADS)
def test_what_deepspeed_takes_is_planned(tmp_path, base, monkeypatch, case):
    """From a file in the home folder: training opens the path as the settings hold it."""
    zero, stage, offloaded = OFFLOADS[case]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    model = f"model_name_or_path={write_config(tmp_path / 'model')}"
    settings = parse_command("train", [model, *base, "do_train=true", "deepspeed=~/ds.json"])
    assert settings.value("deepspeed") == str(tmp_path / "ds.json")
    held = Run.of(settings, 1).held
    assert (held.stage, held.offloaded) == (stage, offloaded)


@pytest.mark.parametrize(
    ("zero", "told"),
    [
        ('{"zero_optimization": true}', 'has zero_optimization true in it, which is none; write "zero_optimization": '),
        ('{"zero_optimization": false}', "has zero_optimization false in it"),
        ("{}", "has no zero_optimization in it; write"),
        ('{"zero_optimization": {"stage": 5}}', "has stage 5 in it, which is none; write 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": null}}', "has stage null in it"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}', 'has offload_optimizer "cpu" in it'),
        ('{"zero_optimization": {"offload_param": {"device": "gpu"}}}', 'has offload_param {"device": "gpu"} in it'),
    ],
)
def test_what_deepspeed_does_not_take_is_one_line(tmp_path, base, capsys, zero, told):
    (tmp_path / "ds.json").write_text(zero)
    words = [f"model_name_or_path={write_config(tmp_path / 'model')}", *base, f"deepspeed={tmp_path / 'ds.json'}"]
    assert cli.main(["plan", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"command line: deepspeed '{tmp_path / 'ds.json'}' {told}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "h10"], "--device: 'h10' is no device of the table; did you mean 'h100'?"),
        (["--devices", "many"], "--devices: 'many' is not a number of devices; write --devices 8"),
        (["--json=yes"], "--json: 'yes' is not wanted; write --json alone"),
        (["flash_attn=disabled"], "command line: flash_attn 'disabled' is not planned"),
        (["lora_rnk=8"], "command line: lora_rnk '8' is not a setting; did you mean 'lora_rank'?"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, base, capsys, words, told):
    assert cli.main(["plan", f"model_name_or_path={write_config(tmp_path / 'model')}", *base, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)


def test_the_options_stand_anywhere_among_the_words():
    options, rest, mistakes = plan_options(["--device=H100", "run.yaml", "--devices", "8", "--bf16", "--json"])
    assert (options.device, options.devices, options.as_json) == ("H100", 8, True)
    assert rest == ["run.yaml", "--bf16"] and mistakes == []
