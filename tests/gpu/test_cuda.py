"""What only a CUDA device shows: torch's variable-length attention, steps that nobody waits for, determinism.

    python -m pytest tests/gpu

Skipped, with the reason, where there is no CUDA device.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import ROOT, losses, make_run, run, weights
from small import arguments, samples, small_model, trainer
from transformers import AutoModelForCausalLM, TrainerCallback

from burnish.data.loader import collate
from burnish.errors import RunStopped
from burnish.kernels import linear_cross_entropy as head_kernel
from burnish.kernels import lora_linear as lora_kernel
from burnish.kernels import lora_mlp as mlp_kernel
from burnish.model.attention import _by_document, packed_attention
from burnish.model.compile import compile_blocks
from burnish.model.head import CausalLoss, unwrap
from burnish.model.probe import choose_path, try_out
from burnish.model.qwen import QWenLMHeadModel
from burnish.model.qwen_config import QWenConfig
from burnish.train.checkpoint import last_checkpoint
from burnish.train.passes import AUTO
from burnish.train.rounding import round_at_random
from burnish.tuning.blocks import find_blocks
from burnish.tuning.fuse import fuse_lora, fuse_mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("sliding_window", [None, 2, 17, 300])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 64), (9, 3, 64), (8, 2, 128), (4, 1, 256)])
def test_variable_length_attention_is_attention_by_document(heads, kv_heads, head_dim, sliding_window):
    torch.manual_seed(0)
    lengths = [1, 70, 256, 3, 129]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    q, k, v = (
        torch.randn(1, n, sum(lengths), head_dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )

    class Module(torch.nn.Module):
        is_causal = True

    fast, _ = packed_attention(
        Module(), q, k, v, None, sliding_window=sliding_window, cu_seq_lens_q=borders, max_length_q=max(lengths)
    )
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    slow = _by_document(*exact, borders, None, sliding_window, 0.0)
    assert fast.shape == slow.shape and distance(fast, slow) < 1e-2
    weights = torch.randn_like(slow)
    (fast.double() * weights).sum().backward()
    (slow * weights).sum().backward()
    for low, high in zip((q, k, v), exact, strict=True):
        assert distance(low.grad, high.grad) < 2e-2


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_kernels_give_what_their_references_give_in_float64(dtype, rounding):
    torch.manual_seed(0)
    hidden = torch.randn(2049, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(503, 64, device=DEVICE, dtype=dtype)
    targets = torch.randint(0, 503, (2049,), device=DEVICE)
    loss, _ = head_kernel.linear_cross_entropy(hidden, weight, targets)
    exact = hidden.detach().double().requires_grad_()
    # The reference rounds its logits to float32; in float64 that is written out.
    expected = torch.nn.functional.cross_entropy(exact @ weight.double().T, targets, reduction="sum")
    (loss / 2049).backward()
    (expected / 2049).backward()
    assert distance(loss, expected) < rounding and distance(hidden.grad, exact.grad) < rounding

    x, a, b = (torch.randn(*s, device=DEVICE, dtype=dtype, requires_grad=True) for s in [(77, 64), (8, 64), (96, 8)])
    w = torch.randn(96, 64, device=DEVICE, dtype=dtype)
    exact_parts = [t.detach().double().requires_grad_() for t in (x, a, b)]
    out = lora_kernel.lora_linear(x, [w], None, x @ a.T, b, 2.0)
    ref = lora_kernel.reference(exact_parts[0], w.double(), None, exact_parts[1], exact_parts[2], 2.0)
    out.sum().backward()
    ref.sum().backward()
    assert distance(out, ref) < rounding
    for low, high in zip((x, a, b), exact_parts, strict=True):
        assert distance(low.grad, high.grad) < rounding


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "dtype, rounding, boost", [(torch.float32, 1e-5, 1.0), (torch.bfloat16, 1e-2, 1.0), (torch.float16, 2e-3, 1024.0)]
)
@pytest.mark.parametrize("rows, vocabulary", [(1, 97), (300, 5003), (2049, 151_936)])
def test_the_heads_kernel_gives_losses_hits_and_gradients_of_plain_torch(
    rows, vocabulary, dtype, rounding, boost, smoothing
):
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocabulary, device=DEVICE) * 3).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    targets[::2] = logits[::2].argmax(-1)
    given, asked = (targets, smoothing, boost), {"needs_grad": True, "counts": True}
    losses, hits, grad = head_kernel._tile_loss(logits.clone(), *given, **asked)
    ours, our_hits, our_grad = head_kernel._tile_loss_on_gpu(logits, *given, **asked)
    assert distance(ours, losses) < 1e-5 and torch.equal(our_hits.bool(), hits)
    assert our_grad is logits and distance(our_grad, grad) < rounding
    logits = torch.full_like(logits, float("nan"))
    assert not torch.isfinite(head_kernel._tile_loss_on_gpu(logits, *given, needs_grad=False, counts=False)[0]).any()


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows, hidden, wide, rank", [(1, 64, 96, 8), (77, 64, 200, 3), (1000, 512, 1408, 64)])
def test_the_swiglu_block_gives_what_its_layers_give_in_float64(rows, hidden, wide, rank, dtype, rounding):
    torch.manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, device=DEVICE) / shape[-1] ** 0.5).to(dtype)

    shapes = [(wide, hidden), (wide, hidden), (hidden, wide)]
    layers = [mlp_kernel.LoraWeights([draw(n, k)], draw(rank, k), draw(n, rank)) for n, k in shapes]
    x = torch.randn(rows, hidden, device=DEVICE).to(dtype)
    results = []
    for function, cast in ((mlp_kernel.lora_mlp, dtype), (mlp_kernel.reference, torch.float64)):
        own = [
            mlp_kernel.LoraWeights([w.to(cast) for w in weight], a.to(cast).clone(), b.to(cast).clone())
            for weight, a, b in layers
        ]
        leaves = [x.to(cast).clone(), *(part for layer in own for part in layer[1:])]
        for leaf in leaves:
            leaf.requires_grad_()
        out = function(leaves[0], *own, 2.0)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert max(distance(a, b) for a, b in zip(*results, strict=True)) < rounding


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_compiled_blocks_give_the_gradients_of_plain_ones(method, dtype, rounding):
    found = []
    for fast in (False, True):
        model = small_model("llama", dtype=dtype, head_dim=16).to(DEVICE)
        if method == "lora":
            config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
            torch.manual_seed(1)
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.1)
        model.train()
        assert choose_path(model).padding_free
        if fast:
            fuse_mlp(fuse_lora(model))
            torch._dynamo.utils.counters.clear()
            assert compile_blocks(find_blocks(unwrap(model)).values(), partial(try_out, model)) == ""
            if dtype == torch.bfloat16:  # in float32 attention goes document by document, which is not compiled
                assert not torch._dynamo.utils.counters["graph_break"]
                # with and without ∂x of the first block
                assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
        losses = []
        for count in (1, 5, 9):
            loss = CausalLoss(model, fused=True)(collate(samples(count, seed=count)).to(torch.device(DEVICE))).loss
            loss.backward()
            losses.append(loss.item())
        gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        found.append((losses, gradient))
    assert found[1][0] == pytest.approx(found[0][0], rel=rounding)
    for name, value in found[0][1].items():
        assert distance(found[1][1][name], value) < 3 * rounding, name


def test_a_step_that_does_not_fit_into_memory_is_run_again_in_smaller_passes(tmp_path):
    """With room for less than half of what the passes took, the losses are those of a device with room for all."""
    total, found = torch.cuda.get_device_properties(0).total_memory, []
    for allowed in (None, 0.45):
        model = small_model(dtype=torch.bfloat16, head_dim=16, num_hidden_layers=8, intermediate_size=4096).to(DEVICE)
        run = trainer(
            model, on_device(tmp_path, per_device_train_batch_size=100, max_steps=3), samples(300, longest=300)
        )
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        if allowed:
            torch.cuda.set_per_process_memory_fraction((before + allowed * found[0][1]) / total)
        torch.cuda.reset_peak_memory_stats()
        try:
            run.train()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        found.append((losses, torch.cuda.max_memory_allocated() - before))
        assert (run.passes.most_tokens < AUTO) == bool(allowed)
        del run, model
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_loss_on_the_device_is_that_of_the_cpu(kind, dtype, rounding):
    batch, cpu = collate(samples(9)), small_model(kind, head_dim=16)
    assert choose_path(cpu).padding_free
    expected = CausalLoss(cpu, fused=True)(batch).loss
    model = small_model(kind, dtype=dtype, head_dim=16).to(DEVICE)
    path = choose_path(model)
    assert path.padding_free and path.fused_head, str(path)
    assert distance(CausalLoss(model, fused=True)(batch.to(torch.device(DEVICE))).loss.cpu(), expected) < rounding


def on_device(output_dir: Path, **changes):
    return arguments(output_dir, use_cpu=False, **changes)


def lora(dtype=torch.bfloat16, seed: int = 0):
    model = small_model("qwen3", dtype=dtype, seed=seed, head_dim=16).to(DEVICE)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    return fuse_lora(get_peft_model(model, config, autocast_adapter_dtype=False))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_resumed_is_uninterrupted_bit_for_bit_with_full_determinism(method, tmp_path):
    from transformers import enable_full_determinism

    enable_full_determinism(42)
    weights = []
    try:
        for resume in (False, True):
            model = lora() if method == "lora" else small_model(dtype=torch.bfloat16, head_dim=16).to(DEVICE)
            args = on_device(tmp_path, save_strategy="steps", save_steps=4, max_steps=10, full_determinism=True)
            run = trainer(model, args, samples(40))
            run.train(tmp_path / "checkpoint-4" if resume else None)
            weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    finally:
        torch.use_deterministic_algorithms(False)
    assert weights[0] and all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_step_that_is_not_finite_is_not_applied_and_stops_at_the_next_log(tmp_path):
    class Break(TrainerCallback):
        """Poison a frozen-for-this-test weight before step 3, note the trained ones, mend it never."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                self.before = {n: p.detach().clone() for n, p in model.named_parameters()}
                model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")

    run = trainer(small_model().to(DEVICE), on_device(tmp_path, logging_steps=5), samples(40), callbacks=[Break])
    with pytest.raises(RunStopped, match=r"step 3: .*not finite(.|\n)*rows\.jsonl:\d+(.|\n)*layers\.1\.mlp\.down_proj"):
        run.train()
    assert run.state.global_step == 2 and (tmp_path / "checkpoint-2").is_dir()
    before = next(c for c in run.callback_handler.callbacks if isinstance(c, Break)).before
    for name, value in run.model.named_parameters():
        if "layers.1.mlp.down_proj" not in name:
            assert torch.equal(value, before[name]), name


def test_ten_steps_on_the_device_follow_ten_on_the_cpu(tmp_path):
    losses = []
    for place in ("cpu", DEVICE):
        args = arguments(tmp_path / place, use_cpu=place == "cpu", max_steps=10, learning_rate=1e-3)
        run = trainer(small_model().to(place), args, samples(30))
        run.train()
        losses.append([e["loss"] for e in run.state.log_history if "loss" in e])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("precision, rounding", [([], 1e-4), (["--bf16"], 2e-2), (["--fp16"], 2e-2)])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_on_a_gpu_what_the_plain_run_does(tmp_path, stage, precision, rounding):
    pytest.importorskip("deepspeed")
    words = [*make_run(tmp_path), "--finetuning_type", "full", "--per_device_train_batch_size", "4", *precision]
    words += ["--eval_on_start"]  # shows ZeRO another course through the layers than training takes
    config = ROOT / "examples" / "deepspeed" / f"ds_z{stage}_config.json"
    # fp16 under ZeRO is bf16; by itself it leaves its first steps out, until the loss's scale fits
    plain = ["--bf16" if word == "--fp16" else word for word in words]
    run(1, [*plain, "--output_dir", str(tmp_path / "plain")])
    divided = run(1, [*words, "--output_dir", str(tmp_path / "zero"), "--deepspeed", str(config)])
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "plain"), rel=rounding)
    assert weights(tmp_path / "zero").keys() == weights(tmp_path / "plain").keys()
    assert ("computing in bf16" in divided) == ("--fp16" in precision)


@pytest.mark.filterwarnings("ignore:Requested unified CUBLASLT workspace")  # full_determinism made it small
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_the_first_qwen_takes_the_fast_path_and_gives_the_loss_of_its_documents(dtype, rounding):
    torch.manual_seed(0)
    config = QWenConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, kv_channels=16, vocab_size=211,
                        intermediate_size=256, seq_length=128)  # fmt: skip
    model = QWenLMHeadModel(config).to(DEVICE, dtype)
    path = choose_path(model)
    assert path.padding_free and path.fused_head, str(path)
    rows = samples(12, longest=100)
    objective = CausalLoss(model.train(), fused=True)
    packed = objective(collate(rows).to(torch.device(DEVICE))).loss
    packed.backward()
    gradient = model.transformer.h[0].attn.c_attn.weight.grad.clone()
    model.zero_grad()
    alone = sum(objective(collate([row]).to(torch.device(DEVICE))).loss for row in rows)
    alone.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=rounding)
    assert distance(gradient, model.transformer.h[0].attn.c_attn.weight.grad) < 10 * rounding


# ---- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fp16_computes_in_float16_with_a_scaled_loss(tmp_path, method):
    words = [*make_run(tmp_path), "--finetuning_type", method, "--per_device_train_batch_size", "4"]
    words[words.index("--learning_rate") + 1] = "1e-3"
    # Its embedding of id 0 is zero, whose gradient each norm makes a thousand times larger: the scale that suits it is
    # far from the first, and six steps would be left out.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.get_input_embeddings().weight.data[0] = 0.02
    model.save_pretrained(tmp_path / "model")
    run(1, [*words, "--output_dir", str(tmp_path / "float32")])
    said = run(1, [*words, "--output_dir", str(tmp_path / "float16"), "--fp16"])
    assert "fp16 is not used" not in said
    assert losses(tmp_path / "float16") == pytest.approx(losses(tmp_path / "float32"), rel=2e-2)
    assert {weight.dtype for weight in weights(tmp_path / "float16").values()} == {torch.float16}
    logged = json.loads((tmp_path / "float16" / "trainer_state.json").read_text())["log_history"]
    assert all(entry["loss_scale"] >= 1 for entry in logged if "loss" in entry)
    assert (tmp_path / "float16" / "checkpoint-3" / "scaler.pt").is_file()


def test_fp16_asks_the_device_nothing_between_two_logs(tmp_path):
    """What overflows is left out by the fused optimizer, with no step that waits."""

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if 0 < state.global_step < 9 else "default")

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    class Break(TrainerCallback):
        hook = None

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                blow_up = lambda *call: call[-1] * 1e8  # noqa: E731
                self.hook = model.get_input_embeddings().register_forward_hook(blow_up)
                self.before = model.model.norm.weight.detach().clone()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                self.hook.remove()
                self.after = model.model.norm.weight.detach().clone()

    broken = Break()
    model = small_model(dtype=torch.float16, head_dim=16).to(DEVICE)
    args = on_device(tmp_path, logging_steps=10, max_steps=10, dataloader_pin_memory=True)
    run = trainer(model, args, samples(40), callbacks=[broken, Watch()])
    run.train()
    assert torch.equal(broken.before, broken.after)
    logged = run.state.log_history[0]
    assert logged["overflows"] >= 1 and 3 < logged["loss"] < 8


def test_pure_bf16_rounds_at_random_on_the_device_and_waits_for_nothing(tmp_path):
    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if 1 < state.global_step < 9 else "default")

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    found = []
    for pure in (True, False):
        model = small_model(dtype=torch.bfloat16, head_dim=16).to(DEVICE)
        args = on_device(tmp_path, logging_steps=10, max_steps=20, learning_rate=2e-3, dataloader_pin_memory=True)
        run = trainer(model, args, samples(40), callbacks=[Watch()] if pure else [], pure_bf16=pure)
        run.train()
        found.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], rel=0.02)
    drawn = round_at_random(torch.full((100_000,), 1.001, device=DEVICE), torch.Generator(DEVICE).manual_seed(0))
    assert drawn.double().mean().item() == pytest.approx(1.001, rel=1e-4)
