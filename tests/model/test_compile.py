"""Compiled blocks: the same numbers, the same names, and a model that cannot be compiled is left as it is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import make_run
from small import arguments, samples, small_model, trainer, tuned
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.cli import main
from burnish.data.loader import collate
from burnish.errors import RunStopped
from burnish.model.attention import ATTENTION_NAME
from burnish.model.compile import compile_blocks, why_in_pieces
from burnish.model.head import CausalLoss, unwrap
from burnish.model.patch import enable_gradient_checkpointing
from burnish.model.probe import choose_path, try_out
from burnish.tuning.blocks import find_blocks
from burnish.tuning.fuse import FusedLinear, FusedMlp, SharedInput, SharedLinear, fuse_lora, fuse_mlp, fuse_qkv

pytestmark = pytest.mark.slow


def adapted(num_hidden_layers=3, **config):
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    base = small_model("llama", num_hidden_layers=num_hidden_layers)
    model = get_peft_model(base, LoraConfig(**settings), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return fuse_lora(model).train()


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = CausalLoss(model, fused=True)(batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compiled(model):
    if unwrap(model).config._attn_implementation != ATTENTION_NAME:
        assert choose_path(model).padding_free
    why = compile_blocks(find_blocks(unwrap(model)).values(), partial(try_out, model))
    assert why == ""
    return model


@pytest.mark.parametrize("make", [adapted, lambda: small_model("qwen3")], ids=["lora", "full"])
def test_compiled_blocks_give_the_same_loss_and_gradients_at_every_length(make):
    plain, fast = make(), make()
    choose_path(plain)
    names = list(fast.state_dict())
    compiled(fast)
    assert list(fast.state_dict()) == names
    assert all(p.grad is None for p in fast.parameters())
    for count in (1, 3, 8):
        batch = collate(samples(count, seed=count))
        (loss, wanted), (other, got) = loss_and_gradients(plain, batch), loss_and_gradients(fast, batch)
        assert other == pytest.approx(loss, rel=1e-6) and got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert (got[name] - value).norm() <= 1e-5 * value.norm(), name


def test_all_blocks_share_what_is_compiled_once():
    counts = []
    for blocks in (2, 3):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled(adapted(num_hidden_layers=blocks))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] > 0


class Counting(TorchDispatchMode):
    """How many matrix products are made outside of burnish's operators."""

    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "make, graphs",
    # The first block beside a frozen embedding needs no gradient of its input: another graph.
    [(adapted, 2), (lambda: small_model("llama", num_hidden_layers=3), 1)],
    ids=["lora", "full"],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_are_one_graph(make, graphs, checkpointed, monkeypatch):
    """Attention document by document, the only thing that is not compiled, and not used on a GPU, is left out.

    Computed again, too, where transformers does that inside the block and where around it (5.23, 5.17).
    """
    own, fast = make().train(), fuse_qkv(fuse_mlp(make())).train()
    assert choose_path(own).padding_free and choose_path(fast).padding_free
    monkeypatch.setattr("burnish.model.attention._by_document", something_of_all_three)
    if checkpointed:
        enable_gradient_checkpointing(fast)
    compiled(fast)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert why_in_pieces() == ""
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    batch = collate(samples(4))
    (loss, wanted), (other, got) = loss_and_gradients(own, batch), loss_and_gradients(fast, batch)
    assert other == pytest.approx(loss, rel=1e-6) and got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm(), name


def something_of_all_three(query, key, value, *_):
    return (query + (key + value).repeat_interleave(query.shape[1] // key.shape[1], dim=1)).transpose(1, 2)


def test_what_q_k_and_v_read_is_rounded_to_fp8_once(monkeypatch):
    """And what o reads; the SwiGLU block rounds inside its operation."""
    model = fuse_mlp(fuse_lora(tuned(small_model("llama", num_hidden_layers=3, head_dim=16), "fp8")))
    assert choose_path(model).padding_free
    monkeypatch.setattr("burnish.model.attention._by_document", something_of_all_three)
    rounded = []

    def count(graph, _inputs):
        rounded.append(sum(node.target is torch.ops.burnish.quantize_rows.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    for block in find_blocks(unwrap(model)).values():
        block.compile(backend=backend, dynamic=True)
    loss_and_gradients(model, collate(samples(4)))
    assert rounded == [2, 0, 2, 0]  # the first block, forward and backward, and the others


def test_what_cuts_a_block_into_pieces_is_told(monkeypatch):
    model = compiled(adapted())
    assert why_in_pieces() == ""  # attention document by document is meant to
    norm = type(find_blocks(unwrap(model))["model.layers.0"].input_layernorm)
    whole = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: torch._dynamo.graph_break() or whole(self, x))
    compiled(model)
    assert "torch._dynamo.graph_break()" in why_in_pieces() and "\n" not in why_in_pieces()


def trained():
    return small_model("llama", num_hidden_layers=3, attention_bias=True).train()


@pytest.mark.parametrize(
    "make, fuse, kind, saved",
    [
        # t and ∂A in three blocks, and ∂x in all but the first: one in the place of three
        (adapted, lambda model: model, FusedLinear, 3 * (2 + 2) + 2 * 2),
        # y, ∂W and ∂x, in the first block too, below which an embedding is trained; with biases
        (trained, fuse_qkv, SharedLinear, 3 * (2 + 2 + 2)),
    ],
    ids=["lora", "full"],
)
def test_q_k_and_v_read_their_input_once(make, fuse, kind, saved):
    """Eager and compiled: the same gradients as each layer by itself, and nothing is held when the pass is over."""
    batch, alone, shared = collate(samples(4)), make(), fuse(make())
    layers = [each for each in shared.modules() if isinstance(each, kind)]
    assert sum(isinstance(each, SharedInput) for each in shared.modules()) == 3
    for module in alone.modules():
        if isinstance(module, SharedInput):
            module.__class__ = type(module).__mro__[2]
    assert not any(isinstance(each, SharedInput) for each in alone.modules())
    choose_path(alone), choose_path(shared)
    loss, wanted = loss_and_gradients(alone, batch)
    made = {}
    for name, model in [("alone", alone), ("shared", shared)]:
        with Counting() as counted:
            loss_and_gradients(model, batch)
        made[name] = counted.products
    assert made["alone"] - made["shared"] == saved
    for model in (shared, compiled(shared)):
        again, got = loss_and_gradients(model, batch)
        assert again == pytest.approx(loss, rel=1e-6) and got.keys() == wanted.keys()
        assert all((got[name] - value).norm() <= 1e-5 * value.norm() for name, value in wanted.items())
        assert all(layer.given is None for layer in layers)


def test_trained_layers_of_which_one_has_a_bias_or_stands_still_are_products_of_their_own():
    alone, shared = trained(), trained()
    attentions = [layer.self_attn for layer in shared.model.layers]
    attentions[0].k_proj.bias = None
    alone.model.layers[0].self_attn.k_proj.bias = None
    attentions[1].v_proj.weight.requires_grad_(False)
    alone.model.layers[1].self_attn.v_proj.weight.requires_grad_(False)
    fuse_qkv(shared)
    assert [isinstance(attention, SharedInput) for attention in attentions] == [True, False, True]
    choose_path(alone), choose_path(shared)
    batch = collate(samples(4))
    loss, wanted = loss_and_gradients(alone, batch)
    again, got = loss_and_gradients(shared, batch)
    assert again == pytest.approx(loss, rel=1e-6) and got.keys() == wanted.keys()
    assert all((got[name] - value).norm() <= 1e-5 * value.norm() for name, value in wanted.items())


def test_layers_that_lost_their_adapters_are_products_of_their_own():
    """As peft leaves them: plain layers under an attention that shares."""
    batch, model = collate(samples(4)), adapted()
    choose_path(model)
    plain = model.unload()
    attentions = [layer.self_attn for layer in plain.model.layers]
    assert all(isinstance(each, SharedInput) and type(each.q_proj) is torch.nn.Linear for each in attentions)
    wanted = small_model("llama", num_hidden_layers=3)
    choose_path(wanted)
    assert CausalLoss(plain, fused=True)(batch).loss.item() == CausalLoss(wanted, fused=True)(batch).loss.item()


def twice_as_wide(_module, args, kwargs):
    return args, kwargs | {"hidden_states": torch.cat([kwargs["hidden_states"]] * 2, dim=-1)}


def test_layers_that_read_something_else_under_the_same_names_compute_as_they_are_written():
    model = adapted()
    choose_path(model)
    batch = collate(samples(3))
    loss, wanted = loss_and_gradients(model, batch)
    for attention in [each for each in model.modules() if isinstance(each, SharedInput)]:

        class Halving(type(attention).__mro__[2]):
            def forward(self, hidden_states, **others):
                return super().forward(hidden_states.chunk(2, dim=-1)[0], **others)

        attention.__class__ = type("SharedHalving", (SharedInput, Halving), {})
        attention.register_forward_pre_hook(twice_as_wide, with_kwargs=True)
    again, got = loss_and_gradients(model, batch)
    assert again == pytest.approx(loss, rel=1e-6)
    assert all((got[name] - value).norm() <= 1e-5 * value.norm() for name, value in wanted.items())


def test_what_is_shared_is_let_go_of_where_a_pass_fails():
    model = adapted()
    choose_path(model)
    layers = [each for each in model.modules() if isinstance(each, FusedLinear)]
    attention = unwrap(model).model.layers[1].self_attn

    def fail(*_):
        assert attention.v_proj.given is not None
        raise ZeroDivisionError

    attention.o_proj.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        CausalLoss(model, fused=True)(collate(samples(2)))
    assert all(layer.given is None for layer in layers)


def test_a_swiglu_block_is_one_operation_with_the_same_result():
    plain, fused = adapted(), fuse_mlp(adapted())
    choose_path(plain), choose_path(fused)
    blocks = [module for module in fused.modules() if isinstance(module, FusedMlp)]
    assert len(blocks) == 3 and len({type(block) for block in blocks}) == 1
    batch = collate(samples(4))
    (loss, wanted), (other, got) = loss_and_gradients(plain, batch), loss_and_gradients(fused, batch)
    assert other == pytest.approx(loss, rel=1e-6) and got.keys() == wanted.keys()
    assert all((got[name] - value).norm() <= 1e-5 * value.norm() for name, value in wanted.items())


@pytest.mark.parametrize(
    "config", [{"lora_dropout": 0.5}, {"use_dora": True}, {"target_modules": ["up_proj"]}], ids=str
)
def test_other_adapters_leave_the_block_as_it_is(config):
    assert not any(isinstance(module, FusedMlp) for module in fuse_mlp(adapted(**config)).modules())


def test_a_block_that_computes_something_else_under_the_same_names_stays_as_it_is():
    model = adapted()
    own = type(unwrap(model).model.layers[0].mlp)

    class Louder(own):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in unwrap(model).model.layers:
        layer.mlp.__class__ = Louder
    assert {type(layer.mlp) for layer in unwrap(fuse_mlp(model)).model.layers} == {Louder}


def test_a_block_that_is_merged_later_computes_without_its_adapter():
    model = fuse_mlp(adapted())
    choose_path(model)
    batch = collate(samples(2))
    with torch.no_grad():
        with_adapter = CausalLoss(model, fused=True)(batch).loss.item()
        model.merge_adapter()
        merged = CausalLoss(model, fused=True)(batch).loss.item()
        model.unmerge_adapter()
        with model.disable_adapter():
            without = CausalLoss(model, fused=True)(batch).loss.item()
    assert merged == pytest.approx(with_adapter, rel=1e-5) and without != pytest.approx(with_adapter, rel=1e-4)


def test_a_model_that_cannot_be_compiled_is_left_as_it_is_with_the_reason():
    model = small_model()

    def break_down():
        raise RuntimeError("no compiler here\nsecond line")

    assert compile_blocks(find_blocks(model).values(), break_down) == "no compiler here"
    assert all(block._compiled_call_impl is None for block in find_blocks(model).values())
    assert torch.isfinite(model(input_ids=torch.tensor([[3, 4, 5]])).logits).all()


def test_torch_compile_compiles_the_blocks_of_a_run(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("burnish.prepare.compile_blocks", lambda blocks, try_out: seen.append(list(blocks)) or "")
    words = [*make_run(tmp_path, rows=12), "--max_steps", "1", "--use_cpu"]
    for asked in ((), ("--torch_compile", "false"), ("--torch_compile", "true")):
        assert main(["train", *words, *asked, "--output_dir", str(tmp_path / "-".join(["run", *asked]))]) == 0
        assert ("blocks compiled in" in capsys.readouterr().out) == ("true" in asked)
    assert len(seen) == 1 and len(seen[0]) == 3


def test_what_is_not_finite_is_traced_to_its_module_in_compiled_blocks_too(tmp_path):
    model = small_model()
    trained = trainer(model, arguments(tmp_path), samples(8))
    compiled(model)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RunStopped, match=r"layers\.1\.mlp\.down_proj"):
        trained.train()
