"""Models whose blocks are held in 4 or 8 bits: what is quantized, what is computed, and that they go on learning."""

from __future__ import annotations

import json
import shutil
from importlib import util
from pathlib import Path

import pytest
import torch
from commands import make_base, mistakes, train
from families import SHAPE, ids, logits, make, save, shake
from peft import PeftModel
from processes import losses, make_run, weights
from transformers import AutoModelForCausalLM, LlamaConfig

pytest.importorskip("bitsandbytes")

from bitsandbytes.nn import Linear4bit, Linear8bitLt

from burnish.arguments.parse import parse_command
from burnish.cli import main
from burnish.errors import UserError
from burnish.model.arguments import ModelArguments
from burnish.model.loader import load_model, parameter_table
from burnish.model.patch import enable_gradient_checkpointing
from burnish.model.probe import choose_path
from burnish.model.quantized import Dequantizing
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.fuse import FusedQuantized, fuse_lora
from burnish.workflow import load_engine

BITS = [4, 8]
KINDS = {4: Linear4bit, 8: Linear8bitLt}
FLOATS = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


def load(folder, bits, *, dtype=torch.float32, **settings):
    args = ModelArguments(model_name_or_path=str(folder), quantization_bit=bits, **settings)
    return load_model(args, dtype=dtype, trainable=True)


def tuned(folder, bits, *, dtype=torch.float32, fused=True, **settings):
    model_args = ModelArguments(model_name_or_path=str(folder), quantization_bit=bits)
    model = load(folder, bits, dtype=dtype)
    model = init_adapter(model, FinetuningArguments(**settings), model_args, trainable=True)
    shake(model)
    return fuse_lora(model) if fused else model


def quantized_layers(model):
    return {path: each for path, each in model.named_modules() if isinstance(each, tuple(KINDS.values()))}


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def gradients(model, tokens=None):
    """(loss, name → gradient) of a pass in training."""
    tokens = ids() if tokens is None else tokens
    model.zero_grad()
    loss = model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# What is held, and how


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_blocks_linear_layers_are_quantized_and_nothing_else(tmp_path, family, bits):
    save(family, tmp_path)
    model, whole = load(tmp_path, bits), make(family)
    for path, layer in quantized_layers(model).items():
        assert isinstance(layer, KINDS[bits]) and isinstance(layer, Dequantizing)
        original = whole.get_submodule(path).weight
        original = original.T if family == "gpt2" else original  # whose own layers hold it the other way round
        assert 0 < distance(layer.dequantized(torch.float32), original) < {4: 0.13, 8: 0.02}[bits]
    linear = [path for path, each in whole.named_modules() if type(each).__name__ in ("Linear", "Conv1D")]
    assert set(quantized_layers(model)) == {path for path in linear if path != "lm_head"}
    rest = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in rest.items())
    assert parameter_table(model).all == parameter_table(whole).all


def test_4_bits_are_nf4_with_scales_in_8_bits_unless_told_otherwise(tmp_path):
    save("llama", tmp_path)

    def held(**settings):
        states = [layer.weight.quant_state for layer in quantized_layers(load(tmp_path, 4, **settings)).values()]
        return {(state.quant_type, state.nested) for state in states}

    assert held() == {("nf4", True)}
    assert held(quantization_type="fp4") == {("fp4", True)}
    assert held(double_quantization=False) == {("nf4", False)}


# What is computed


@pytest.mark.parametrize("dtype, rounding", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_layer_computes_what_bitsandbytes_own_does_forward_and_backward(tmp_path, bits, dtype, rounding):
    config = LlamaConfig(
        **(SHAPE | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128})
    )  # rows of whole blocks
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for layer in list(quantized_layers(load(tmp_path, bits, dtype=dtype)).values())[:7]:
        x = torch.randn(9, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        got = layer(x)
        got_gradient = torch.autograd.grad(got.sum(), x)[0]
        layer.__class__ = KINDS[bits]
        wanted = layer.train()(x)
        assert got.dtype == wanted.dtype == dtype
        assert distance(got, wanted) < rounding
        assert distance(got_gradient, torch.autograd.grad(wanted.sum(), x)[0]) < rounding


@pytest.mark.parametrize("dtype, rounding", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_the_one_operation_of_a_lora_layer_computes_what_pefts_layer_does(tmp_path, bits, dtype, rounding):
    save("qwen3", tmp_path)
    model = tuned(tmp_path, bits, dtype=dtype, fused=False)
    loss, wanted = gradients(model)
    assert sum(isinstance(each, FusedQuantized) for each in fuse_lora(model).modules()) == 7 * 3
    fused_loss, got = gradients(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    assert fused_loss == pytest.approx(loss, rel=rounding)
    assert got.keys() == wanted.keys() and all(".lora_" in name for name in got)
    assert all(distance(got[name], wanted[name]) < 10 * rounding for name in wanted)


@pytest.mark.parametrize("bits", BITS)
def test_dropout_and_dora_go_pefts_own_way(tmp_path, bits):
    save("llama", tmp_path)
    for settings in ({"lora_dropout": 0.5}, {"use_dora": True}):
        torch.manual_seed(3)
        plain = gradients(tuned(tmp_path, bits, fused=False, **settings))
        torch.manual_seed(3)
        assert gradients(tuned(tmp_path, bits, **settings))[0] == plain[0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "qwen3_moe", "gemma3"])
def test_the_fast_path_stays(tmp_path, family, bits):
    save(family, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        path = choose_path(tuned(tmp_path, bits, dtype=dtype))
        assert path.padding_free and path.fused_head, str(path)


@pytest.mark.parametrize("bits", BITS)
def test_blocks_that_are_computed_again_give_the_same_gradients(tmp_path, bits):
    save("llama", tmp_path)
    model = tuned(tmp_path, bits)
    loss, wanted = gradients(model)
    enable_gradient_checkpointing(model)
    again, got = gradients(model)
    assert again == loss and all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("bits", BITS)
def test_an_evaluation_changes_nothing_in_the_weights_that_are_trained_on(tmp_path, bits):
    """bitsandbytes' own 4-bit layer turns its weight round at the first evaluation on a CPU with AVX512_BF16, and
    gives no gradients from then on."""
    save("llama", tmp_path)
    model = tuned(tmp_path, bits)
    for layer in quantized_layers(model).values():
        layer.support_avx512bf16_for_cpu = True  # as on such a CPU
    loss, before = gradients(model)
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids(), labels=ids(), use_cache=False).loss.item()
    assert evaluated == loss
    again, after = gradients(model)
    assert again == loss and all(torch.equal(after[name], before[name]) for name in before)
    assert all(gradient.any() for gradient in after.values())


# A whole run


def settings_of(folder: Path, **changes) -> list[str]:
    given = {"output_dir": folder / "out", "use_cpu": "true", **changes}
    return [f"{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module", params=BITS)
def run(request, tmp_path_factory):
    """(words of the command, folder, bits) of a run of six steps that evaluates every second and saves at the third."""
    folder = tmp_path_factory.mktemp("run")
    words = [*make_run(folder), "--quantization_bit", str(request.param), "--eval_steps", "2"]
    assert main(["train", *words, *settings_of(folder)]) == 0
    return words, folder, request.param


def test_the_loss_goes_on_falling_after_evaluations_and_no_gradient_is_zero(run):
    _, folder, _ = run
    lines = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(norms) == 6 and min(norms) > 0.01
    assert len(evaluated) >= 3 and evaluated[0] > max(evaluated[1:])


def test_a_run_that_goes_on_from_a_checkpoint_ends_as_the_whole_one(run, tmp_path):
    words, folder, _ = run
    (tmp_path / "out").mkdir()
    shutil.copytree(folder / "out" / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    assert main(["train", *words, *settings_of(tmp_path, resume_from_checkpoint="true")]) == 0
    whole, resumed = weights(folder / "out"), weights(tmp_path / "out")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert losses(tmp_path / "out")[-2:] == losses(folder / "out")[-2:]


def test_the_adapter_is_one_for_the_whole_base_in_plain_peft_and_here(run):
    _, folder, _ = run
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder / "model"
    )
    model = PeftModel.from_pretrained(make("qwen3"), folder / "out")
    plain = logits(model)
    with model.disable_adapter():
        assert distance(plain, logits(model)) > 0.05
    args = ModelArguments(model_name_or_path=str(folder / "model"), adapter_name_or_path=[str(folder / "out")])
    base = load_model(args, dtype=torch.float32, trainable=False)
    assert distance(logits(init_adapter(base, FinetuningArguments(), args, trainable=False)), plain) < 1e-5


def test_what_is_asked_is_the_quantized_base_with_the_adapter_beside_it(run):
    _, folder, bits = run
    engine = load_engine(parse_command("chat", [str(folder / "out" / "burnish.yaml"), "use_cpu=true"]))
    assert all(isinstance(layer, KINDS[bits]) for layer in quantized_layers(engine.model).values())
    assert len(quantized_layers(engine.model)) == 7 * 3 and not any(p.requires_grad for p in engine.model.parameters())
    assert engine.generate([[5, 6, 7]], do_sample=False, max_new_tokens=4)[0]
    args = ModelArguments(adapter_name_or_path=[str(folder / "out")])
    trained = init_adapter(load(folder / "model", bits), FinetuningArguments(), args, trainable=True)
    assert distance(logits(engine.model), logits(trained.eval())) < 1e-5


def test_an_export_of_such_a_run_merges_into_the_weights_as_they_were(run, tmp_path, capsys):
    _, folder, _ = run
    words = [str(folder / "out" / "burnish.yaml"), f"export_dir={tmp_path / 'whole'}"]
    assert main(["export", *words]) == 0
    assert "quantization_bit is not used" in " ".join("".join(capsys.readouterr()).split())
    plain = PeftModel.from_pretrained(make("qwen3"), folder / "out")
    args = ModelArguments(model_name_or_path=str(tmp_path / "whole"))
    assert distance(logits(load_model(args, dtype=torch.float32, trainable=False)), logits(plain)) < 1e-5


# What cannot be


def test_settings_that_quantized_weights_cannot_follow_are_refused(tmp_path):
    base = make_base(tmp_path)

    def told(*words):
        return " ".join(mistakes(*words, **base))

    assert "quantization_bit 3 is not 4 or 8" in told("quantization_bit=3")
    for method in ("full", "freeze"):
        line = told("quantization_bit=4", f"finetuning_type={method}")
        assert f"finetuning_type: {method} trains them" in line and "set finetuning_type: lora" in line
    assert "pissa_init True takes the weights apart" in told("quantization_bit=8", "pissa_init=true")
    assert "merges adapters into weights" in told("quantization_bit=4", "create_new_adapter=true")
    assert "does nothing with quantization_bit: 8" in told("quantization_bit=8", "quantization_type=fp4")
    assert "does nothing without quantization_bit: 4" in told("double_quantization=false")
    assert "'hqq' is a library that burnish does not use" in told("quantization_bit=4", "quantization_method=hqq")
    zero_3 = f"deepspeed={Path(__file__).parents[2] / 'examples/deepspeed/ds_z3_config.json'}"
    assert "divides weights (stage 3)" in told("quantization_bit=4", zero_3)
    assert "quantization_device_map 'auto'" in told("quantization_bit=4", "quantization_device_map=auto")
    settings = train("quantization_bit=4", "quantization_method=bitsandbytes", **base)
    assert settings.model.quantization_method == "bnb"


def test_without_bitsandbytes_one_line_says_what_to_install(tmp_path, monkeypatch):
    base = make_base(tmp_path)
    find = util.find_spec
    monkeypatch.setattr(
        "burnish.model.arguments.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    (line,) = mistakes("quantization_bit=4", **base)
    assert line.endswith("quantization_bit 4 needs bitsandbytes, which is not here; pip install 'burnish[quant]'")


def test_adapters_are_not_merged_into_quantized_weights(tmp_path):
    save("llama", tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path), quantization_bit=4, adapter_name_or_path=["a", "b"])
    for trainable in (True, False):
        with pytest.raises(UserError, match="burnish export"):
            init_adapter(load(tmp_path, 4), FinetuningArguments(), args, trainable=trainable)


def test_a_quantized_layer_is_not_trained_whole(tmp_path):
    save("llama", tmp_path)
    with pytest.raises(UserError, match="q_proj"):
        tuned(tmp_path, 4, lora_target=["v_proj"], additional_target=["q_proj"])


def test_an_embedding_and_a_head_are_trained_whole_beside_quantized_blocks(tmp_path):
    save("llama", tmp_path)
    _, found = gradients(tuned(tmp_path, 4, additional_target=["embed_tokens", "lm_head"]))
    whole = {name.split(".modules_to_save")[0].rpartition(".")[2] for name in found if "modules_to_save" in name}
    assert whole == {"embed_tokens", "lm_head"}
