"""What bitsandbytes holds in 4 and 8 bits, on the device: tests/model/test_quantized.py says it for the CPU.

    python -m pytest tests/gpu/test_quantized_on_gpu.py

Skipped, with the reason, where there is no CUDA device or no bitsandbytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import SHAPE, ids, save, shake
from peft import LoraConfig, get_peft_model
from real import LINEAR, real_rows, smollm2
from small import arguments, trainer
from theirs import run_of_plain
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

pytest.importorskip("bitsandbytes")

from bitsandbytes.nn import Linear4bit, Linear8bitLt

from burnish.arguments.parse import parse_command
from burnish.cli import main
from burnish.data.loader import collate
from burnish.model.arguments import ModelArguments
from burnish.model.loader import load_model
from burnish.model.probe import choose_path
from burnish.model.quantized import Dequantizing
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.fuse import FusedQuantized, fuse_lora
from burnish.workflow import load_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BITS = [4, 8]
KINDS = {4: Linear4bit, 8: Linear8bitLt}
FLOATS = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


def load(folder, bits, dtype):
    args = ModelArguments(model_name_or_path=str(folder), quantization_bit=bits)
    return load_model(args, dtype=dtype, trainable=True, device="cuda")


def tuned(folder, bits, dtype, **settings):
    model_args = ModelArguments(model_name_or_path=str(folder), quantization_bit=bits)
    return init_adapter(load(folder, bits, dtype), FinetuningArguments(**settings), model_args, trainable=True)


def quantized_layers(model):
    return [each for each in model.modules() if isinstance(each, Dequantizing)]


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def gradients(model):
    tokens = ids().cuda()
    model.zero_grad()
    loss = model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype, rounding", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_layer_computes_what_bitsandbytes_own_does_forward_and_backward(tmp_path, bits, dtype, rounding):
    """Its 8-bit layer rounds what it multiplies to 8 bits too, forward; the gradient is of the weight alone."""
    config = LlamaConfig(**(SHAPE | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    allowed = max(rounding, 2e-2) if bits == 8 else rounding
    layers = quantized_layers(load(tmp_path, bits, dtype))
    assert len(layers) == 7 * 3
    for layer in layers[:7]:
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        x.requires_grad_()
        got = layer(x)
        got_gradient = torch.autograd.grad(got.sum(), x)[0]
        layer.__class__ = KINDS[bits]
        wanted = layer.train()(x)
        assert got.is_cuda and got.dtype == wanted.dtype == dtype
        assert distance(got, wanted) < allowed
        assert distance(got_gradient, torch.autograd.grad(wanted.sum(), x)[0]) < allowed


@pytest.mark.parametrize("bits", BITS)
def test_the_device_dequantizes_as_the_cpu_does_also_rows_of_no_whole_block(tmp_path, bits):
    save("llama", tmp_path)  # 32 and 48 columns; a block has 64 numbers
    whole = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    model = load(tmp_path, bits, torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, Dequantizing):
            there = layer.dequantized(torch.float32).cpu()
            assert 0 < distance(there, whole[f"{name}.weight"]) < {4: 0.13, 8: 0.02}[bits]
            if bits == 4:
                here = layer.cpu().dequantized(torch.float32)
            else:  # `cpu()` leaves an 8-bit layer's scales where they are
                here = layer.weight.data.cpu().float() * (layer.weight.SCB.cpu() / 127)[:, None]
            assert distance(here, there) < 1e-6


@pytest.mark.parametrize("dtype, rounding", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_the_one_operation_of_a_lora_layer_computes_what_pefts_layer_does(tmp_path, bits, dtype, rounding):
    save("qwen3", tmp_path)
    model = tuned(tmp_path, bits, dtype)
    shake(model)
    loss, wanted = gradients(model)
    assert sum(isinstance(each, FusedQuantized) for each in fuse_lora(model).modules()) == 7 * 3
    fused_loss, got = gradients(model)
    assert fused_loss == pytest.approx(loss, rel=rounding)
    assert got.keys() == wanted.keys() and all(".lora_" in name for name in got)
    assert all(distance(got[name], wanted[name]) < 10 * rounding for name in wanted)
    path = choose_path(model)
    assert path.padding_free and path.fused_head, str(path)


def plain_base(folder, bits):
    if bits == 4:
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        place = {"": "cuda"}
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=how, device_map=place
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    for name, layer in load(folder, bits, torch.bfloat16).named_modules():
        if isinstance(layer, Dequantizing):
            model.get_submodule(name).weight.data.copy_(layer.dequantized(torch.bfloat16))
    return model


@pytest.mark.parametrize("bits", BITS)
def test_steps_of_the_real_model_follow_transformers_and_peft(bits, tmp_path, fixture_path):
    """Theirs: padded batches, adapters in float32 without autocast; in 4 bits on bitsandbytes' own layers, in 8 on
    plain ones of the same numbers (its own round what they multiply, too)."""
    folder = smollm2(fixture_path)
    rows = real_rows(AutoTokenizer.from_pretrained(folder), 8 * 20)
    model = tuned(folder, bits, torch.bfloat16, lora_rank=8)
    adapter = {name: value.float().clone() for name, value in model.state_dict().items() if "lora_" in name}
    args = arguments(
        tmp_path, use_cpu=False, per_device_train_batch_size=8, max_steps=20, num_train_epochs=1, learning_rate=1e-4,
        lr_scheduler_type="constant",
    )  # fmt: skip
    by_place, order = {row.place: row for row in rows}, []
    choose_path(model.train())
    ours = trainer(fuse_lora(model), args, rows)

    def noting(batch):
        order.append([by_place[row.place] for row in batch])
        return collate(batch)

    ours.collate = noting
    ours.train()
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    plain = get_peft_model(plain_base(folder, bits), LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR))
    assert not plain.load_state_dict(adapter, strict=False).unexpected_keys
    theirs = run_of_plain(plain.train(), order[:20], learning_rate=1e-4)
    print(f"\n{bits} bits: {losses[0]:.4f} → {losses[-1]:.4f}, theirs {theirs[0]:.4f} → {theirs[-1]:.4f}")
    assert theirs[-1] < theirs[0] and losses == pytest.approx(theirs, rel=3e-2)
    assert sum(losses) == pytest.approx(sum(theirs), rel=1e-2)


@pytest.mark.parametrize("bits", BITS)
def test_a_command_trains_goes_on_and_answers(bits, tmp_path, fixture_path):
    folder = smollm2(fixture_path)
    words = [
        "stage=sft", "do_train=true", f"model_name_or_path={folder}", f"quantization_bit={bits}", "bf16=true",
        f"dataset={Path(__file__).parents[2] / 'data/identity.json'}", "cutoff_len=256", "max_steps=12", "save_steps=6",
        "per_device_train_batch_size=8", "gradient_accumulation_steps=1", "learning_rate=2e-4", "logging_steps=1",
        "val_size=0.1", "eval_strategy=steps", "eval_steps=4", "save_strategy=steps",
    ]  # fmt: skip
    assert main(["train", *words, f"output_dir={tmp_path / 'out'}"]) == 0
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses, norms = ([line[name] for line in log if name in line] for name in ("loss", "grad_norm"))
    evaluated = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert len(losses) == 12 and min(norms) > 1e-3 and evaluated[-1] < evaluated[0] and losses[-1] < losses[0]
    words.append(f"resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-6'}")
    assert main(["train", *words, f"output_dir={tmp_path / 'again'}"]) == 0
    log = json.loads((tmp_path / "again" / "trainer_state.json").read_text())["log_history"]
    assert [line["loss"] for line in log if "loss" in line] == pytest.approx(losses, rel=2e-2)
    engine = load_engine(parse_command("chat", [str(tmp_path / "out" / "burnish.yaml")]))
    held = quantized_layers(engine.model)
    assert held and all(layer.weight.is_cuda and isinstance(layer, KINDS[bits]) for layer in held)
    assert engine.generate([[5, 6, 7]], do_sample=False, max_new_tokens=4)[0]
