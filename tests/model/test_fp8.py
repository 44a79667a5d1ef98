"""`base_dtype: fp8`: what is held so, what is computed, and that such a model is trained and asked alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import make_base, mistakes
from families import ids, logits, make, save, shake
from peft import LoraConfig, PeftModel, get_peft_model
from processes import losses, make_run, weights

from burnish.arguments.parse import parse_command
from burnish.cli import main
from burnish.errors import UserError
from burnish.kernels.frozen_linear import dequantized
from burnish.model.arguments import ModelArguments
from burnish.model.fp8 import Fp8Linear
from burnish.model.loader import load_model, parameter_table
from burnish.model.patch import enable_gradient_checkpointing
from burnish.model.probe import choose_path
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.fuse import FusedLinear, FusedMlp, fuse_lora, fuse_mlp
from burnish.workflow import load_engine


def tuned(folder, *, dtype=torch.float32, fused=True, base_dtype="fp8", **settings):
    args = ModelArguments(model_name_or_path=str(folder), base_dtype=base_dtype)
    torch.manual_seed(0)
    model = load_model(args, dtype=dtype, trainable=True)
    model = init_adapter(model, FinetuningArguments(**settings), args, trainable=True)
    shake(model)
    return fuse_lora(model) if fused else model


def held_layers(model):
    return {path: each for path, each in model.named_modules() if isinstance(each, Fp8Linear)}


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def gradients(model):
    """(loss, name → gradient) of a pass in training."""
    model.zero_grad()
    loss = model.train()(input_ids=ids(), labels=ids(), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_the_blocks_linear_layers_are_held_in_fp8_and_nothing_else(tmp_path, family, capsys):
    save(family, tmp_path)
    model, whole = tuned(tmp_path).get_base_model(), make(family)
    held = {path.removesuffix(".base_layer"): layer for path, layer in held_layers(model).items()}
    for path, layer in held.items():
        assert 0 < distance(dequantized(layer.frozen), whole.get_submodule(path).weight) < 0.04
        assert layer.weight.is_contiguous()  # DeepSpeed sends every parameter from process to process
        assert not any(p.requires_grad for p in layer.parameters())
    linear = {path for path, each in whole.named_modules() if type(each) is torch.nn.Linear}
    assert held.keys() == {path for path in linear if path != "lm_head" and not path.endswith(("mlp.gate", "router"))}
    assert f"{len(held)} layers held in fp8" in "".join(capsys.readouterr())
    assert parameter_table(model).all - parameter_table(model).trainable == parameter_table(whole).all
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_largest_channels_that_a_layer_reads_are_held_in_two_numbers(tmp_path):
    """Which these are, norms say here. Layers that read one tensor hold one choice; every start makes the same."""
    whole = make("llama")
    large = torch.randperm(32, generator=torch.Generator().manual_seed(3))[:8].sort().values
    for block in whole.model.layers:
        block.input_layernorm.weight.data[large] = 20
        block.post_attention_layernorm.weight.data[large] = 20
    whole.save_pretrained(tmp_path)
    first, again = (held_layers(tuned(tmp_path)) for _ in range(2))
    assert all(torch.equal(first[path].channels, layer.channels) for path, layer in again.items())
    for path, layer in first.items():
        channels, name = layer.channels.long(), path.removesuffix(".base_layer")
        weight, held = whole.get_submodule(name.removeprefix("base_model.model.")).weight, dequantized(layer.frozen)
        assert distance(held[:, channels], weight[:, channels]) < 0.002 and 0.01 < distance(held, weight) < 0.04
        parent, name = name.rsplit(".", 1)
        beside = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}.get(name, ())
        for other in beside:
            assert torch.equal(channels, large) and first[f"{parent}.{other}.base_layer"].channels is layer.channels
        if name == "down_proj":
            assert layer.channels is not first[f"{parent}.up_proj.base_layer"].channels


def test_a_layer_that_is_called_by_keyword_is_held_too(tmp_path, monkeypatch):
    save("llama", tmp_path)
    mlp = type(make("llama").model.layers[0].mlp)

    def forward(self, x):
        return self.down_proj(input=self.act_fn(self.gate_proj(input=x)) * self.up_proj(input=x))

    called = held_layers(tuned(tmp_path))
    monkeypatch.setattr(mlp, "forward", forward)
    by_keyword = held_layers(tuned(tmp_path))
    assert all(torch.equal(by_keyword[path].channels, layer.channels) for path, layer in called.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_are_those_of_the_whole_base_to_fp8s_rounding(tmp_path, dtype):
    save("qwen3", tmp_path)
    whole_loss, whole = gradients(tuned(tmp_path, dtype=dtype, base_dtype=None))
    loss, found = gradients(tuned(tmp_path, dtype=dtype))
    assert loss == pytest.approx(whole_loss, rel=0.02) and loss != whole_loss
    assert found.keys() == whole.keys() and all(".lora_" in name for name in found)
    together = [torch.cat([each.flatten() for each in every.values()]) for every in (found, whole)]
    assert distance(*together) < 0.2


def test_every_form_of_a_layer_computes_the_same(tmp_path):
    """peft's own, in one operation, and the whole block in one."""
    save("llama", tmp_path)
    model = tuned(tmp_path, fused=False)
    loss, wanted = gradients(model)
    assert sum(isinstance(each, FusedLinear) for each in fuse_lora(model).modules()) == 7 * 3
    found = [gradients(model)]
    assert sum(isinstance(each, FusedMlp) for each in fuse_mlp(model).modules()) == 3
    found.append(gradients(model))
    for fused_loss, got in found:
        assert fused_loss == pytest.approx(loss, rel=1e-3)
        # A number that lies between two of fp8 may go to the other when it was added up otherwise.
        assert all(distance(got[name], wanted[name]) < 0.05 for name in wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gemma3"])
def test_the_fast_path_stays(tmp_path, family):
    save(family, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        path = choose_path(tuned(tmp_path, dtype=dtype))
        assert path.padding_free and path.fused_head, str(path)


def test_blocks_that_are_computed_again_give_the_same_gradients(tmp_path):
    save("llama", tmp_path)
    model = tuned(tmp_path)
    loss, wanted = gradients(model)
    enable_gradient_checkpointing(model)
    again, got = gradients(model)
    assert again == loss and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_what_begins_as_an_adapter_is_not_rounded(tmp_path):
    save("llama", tmp_path)
    found = []
    for base_dtype in ("fp8", None):
        model = tuned(tmp_path, fused=False, base_dtype=base_dtype)
        found.append({name: p for name, p in model.named_parameters() if "lora_A" in name})
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# A whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = [*make_run(folder), "--base_dtype", "fp8", "--eval_steps", "2"]
    assert main(["train", *words, f"output_dir={folder / 'out'}", "use_cpu=true"]) == 0
    return words, folder


def test_the_loss_falls_and_is_evaluated_on_the_same_numbers(run):
    _, folder = run
    lines = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(evaluated) >= 3 and evaluated[0] > max(evaluated[1:])


def test_a_run_that_goes_on_from_a_checkpoint_ends_as_the_whole_one(run, tmp_path):
    words, folder = run
    (tmp_path / "out").mkdir()
    shutil.copytree(folder / "out" / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    told = [f"output_dir={tmp_path / 'out'}", "use_cpu=true", "resume_from_checkpoint=true"]
    assert main(["train", *words, *told]) == 0
    whole, resumed = weights(folder / "out"), weights(tmp_path / "out")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert losses(tmp_path / "out")[-2:] == losses(folder / "out")[-2:]


def test_what_is_asked_is_the_fp8_base_with_the_adapter_beside_it(run):
    _, folder = run
    engine = load_engine(parse_command("chat", [str(folder / "out" / "burnish.yaml"), "use_cpu=true"]))
    assert len(held_layers(engine.model)) == 7 * 3 and not any(p.requires_grad for p in engine.model.parameters())
    assert engine.generate([[5, 6, 7]], do_sample=False, max_new_tokens=4)[0]
    args = ModelArguments(
        model_name_or_path=str(folder / "model"), base_dtype="fp8", adapter_name_or_path=[str(folder / "out")]
    )
    base = load_model(args, dtype=torch.float32, trainable=True)
    trained = init_adapter(base, FinetuningArguments(), args, trainable=True)
    assert distance(logits(engine.model), logits(trained.eval())) < 1e-5


def test_an_export_of_such_a_run_merges_into_the_weights_as_they_were(run, tmp_path, capsys):
    _, folder = run
    assert main(["export", str(folder / "out" / "burnish.yaml"), f"export_dir={tmp_path / 'whole'}"]) == 0
    assert "base_dtype is not used" in " ".join("".join(capsys.readouterr()).split())
    plain = PeftModel.from_pretrained(make("qwen3"), folder / "out")
    args = ModelArguments(model_name_or_path=str(tmp_path / "whole"))
    assert distance(logits(load_model(args, dtype=torch.float32, trainable=False)), logits(plain)) < 1e-5


def test_settings_that_do_not_go_with_it_are_refused(tmp_path):
    base = make_base(tmp_path)

    def told(*words):
        return " ".join(mistakes(*words, **base))

    assert "base_dtype 'fp16'" in told("base_dtype=fp16")
    line = told("base_dtype=fp8", "finetuning_type=full")
    assert "finetuning_type: full trains them" in line and "set finetuning_type: lora" in line
    assert "leave base_dtype out" in told("base_dtype=fp8", "pissa_init=true")
    assert "scales whole weights" in told("base_dtype=fp8", "use_dora=true")
    assert "choose one" in told("base_dtype=fp8", "quantization_bit=4")
    zero_3 = f"deepspeed={Path(__file__).parents[2] / 'examples/deepspeed/ds_z3_config.json'}"
    assert "divides weights (stage 3)" in told("base_dtype=fp8", zero_3)
    args = ModelArguments(model_name_or_path=str(base["model_name_or_path"]), base_dtype="fp8")
    save("llama", tmp_path / "llama")
    for method in ("full", "freeze"):  # of a program that uses burnish without its command line
        args = ModelArguments(model_name_or_path=str(tmp_path / "llama"), base_dtype="fp8")
        model = load_model(args, dtype=torch.float32, trainable=True)
        with pytest.raises(UserError, match="base_dtype"):
            init_adapter(model, FinetuningArguments(finetuning_type=method), args, trainable=True)


def test_a_model_without_a_layer_that_can_be_held_is_refused(tmp_path):
    save("gpt2", tmp_path)
    with pytest.raises(UserError, match="holds no layer of this model"):
        tuned(tmp_path)


def test_an_adapter_that_scales_or_takes_apart_whole_weights_is_refused(tmp_path):
    save("llama", tmp_path / "model")

    def tuned_by(adapter=None, base_dtype=None, **settings):
        args = ModelArguments(
            model_name_or_path=str(tmp_path / "model"), base_dtype=base_dtype, adapter_name_or_path=adapter
        )
        model = load_model(args, dtype=torch.float32, trainable=not adapter)
        return init_adapter(model, FinetuningArguments(**settings), args, trainable=not adapter)

    for name, settings in (("DoRA", {"use_dora": True}), ("PiSSA", {"pissa_init": True})):
        tuned_by(**settings).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=name):
            tuned_by(adapter=[str(tmp_path / name)], base_dtype="fp8")
    with pytest.raises(UserError, match="scales whole weights"):
        tuned_by(base_dtype="fp8", use_dora=True)


def test_an_adapter_that_trains_biases_of_the_base_is_refused_for_training_alone(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="all")
    get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    args = ModelArguments(base_dtype="fp8", adapter_name_or_path=[str(tmp_path)])
    with pytest.raises(UserError, match=r"trains biases of the base \(bias: all\)"):
        init_adapter(make("llama"), FinetuningArguments(), args, trainable=True)
    init_adapter(make("llama"), FinetuningArguments(), args, trainable=False)
