"""Optimizers, float32 masters and schedules; what transformers has is compared with transformers' own Trainer."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import arguments, samples, small_model, trainer
from theirs import Rows, collator
from torch import nn
from transformers import Trainer as TransformersTrainer
from transformers.trainer_utils import SchedulerType

from burnish.data.loader import collate
from burnish.errors import UserError
from burnish.train.masters import Masters
from burnish.train.optimizer import OPTIMIZERS, create_optimizer, create_scheduler, steps_on_metric


class OneWeight(nn.Module):
    def __init__(self, value, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 2), value, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)

    def forward(self):
        return self.weight.float().sum()


def settings(**changes):
    """What create_optimizer reads of transformers' arguments, at their defaults there."""
    usual = {
        "optim": "adamw_torch",
        "optim_args": None,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
    }
    return SimpleNamespace(**(usual | changes))


def problem_of(**changes):
    with pytest.raises(UserError) as caught:
        create_optimizer(settings(**changes), Masters(OneWeight(1.0, torch.float32)).by_name)
    (problem,) = caught.value.problems
    return str(problem)


# ---- masters ---------------------------------------------------------------------------------------------------------


def test_a_float32_weight_is_its_own_master_and_a_frozen_one_has_none():
    model = OneWeight(1.0, torch.float32)
    masters = Masters(model)
    assert list(masters.by_name) == ["weight"] and masters.by_name["weight"] is model.weight
    assert masters.state_dict() == {}
    model().backward()
    assert model.weight.grad is not None


def test_small_updates_of_a_bf16_weight_are_not_lost():
    """1e-4 is far less than bf16's step near 1 (0.0078): added to the weight itself it would vanish every time."""
    model = OneWeight(1.0, torch.bfloat16)
    masters = Masters(model)
    optimizer = create_optimizer(settings(optim="sgd", learning_rate=1e-4, weight_decay=0.0), masters.by_name)
    assert (model.weight - 1e-4 * torch.ones_like(model.weight) == 1.0).all()
    for _ in range(200):
        model().backward()
        masters.give_gradients()
        optimizer.step()
        masters.publish()
        optimizer.zero_grad(set_to_none=True)
    torch.testing.assert_close(masters.by_name["weight"].data, torch.full((4, 2), 0.98), rtol=0, atol=1e-5)
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight.data, torch.full((4, 2), 0.98).bfloat16())  # the rounding of the master, no more


def test_gradients_of_many_passes_are_added_up_in_float32_and_leave_the_model():
    model = OneWeight(1.0, torch.bfloat16)
    masters = Masters(model)
    for _ in range(600):  # in bf16 the sum would stop at 256
        model().backward()
        assert model.weight.grad is None
    assert torch.equal(masters.by_name["weight"].grad, torch.full((4, 2), 600.0))


def test_the_gradient_of_one_pass_is_kept_as_it_is_until_somebody_needs_it_in_float32():
    model = OneWeight(1.0, torch.bfloat16)
    masters = Masters(model)
    master = masters.by_name["weight"]
    model().backward()
    assert masters.gradient_of(master).dtype == torch.bfloat16 and model.weight.grad is None and master.grad is None
    masters.forget()
    assert masters.gradient_of(master) is None
    for passes in (1, 2):
        model().backward()
        masters.give_gradients()
        assert torch.equal(master.grad, torch.full((4, 2), float(passes)))
        assert masters.gradient_of(master) is master.grad


def test_a_weight_that_serves_twice_has_one_master_with_both_gradients():
    model = small_model("llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    reference = small_model("llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    masters = Masters(model)
    assert "lm_head.weight" not in masters.by_name
    ids = torch.arange(3, 20)[None]
    for each in (model, reference):
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    masters.give_gradients()
    ours, theirs = masters.by_name["model.embed_tokens.weight"].grad, reference.model.embed_tokens.weight.grad
    assert ours.dtype == torch.float32 and theirs.any()
    assert torch.equal(ours, theirs.float())


def test_masters_are_saved_where_they_are_copies_and_published_when_they_are_loaded():
    first, second = OneWeight(1.0, torch.bfloat16), OneWeight(3.0, torch.bfloat16)
    masters, others = Masters(first), Masters(second)
    with torch.no_grad():
        masters.by_name["weight"].fill_(1.2345678)
    state = masters.state_dict()
    assert list(state) == ["weight"] and state["weight"].dtype == torch.float32
    others.load_state_dict(state)
    assert torch.equal(others.by_name["weight"], masters.by_name["weight"])
    assert torch.equal(second.weight.data, torch.full((4, 2), 1.2345678).bfloat16())


# ---- optimizers ------------------------------------------------------------------------------------------------------


def groups_of(model, **how):
    masters = Masters(model)
    names = {id(weight): name for name, weight in masters.by_name.items()}
    optimizer = create_optimizer(settings(), masters.by_name, **how)
    return {
        (group["weight_decay"], group["lr"]): {names[id(weight)] for weight in group["params"]}
        for group in optimizer.param_groups
    }


def test_matrices_are_decayed_and_norms_and_biases_are_not():
    model = small_model("llama", attention_bias=True)
    groups = groups_of(model)
    assert groups.keys() == {(0.1, 1e-3), (0.0, 1e-3)}
    everything = {name for name, _ in model.named_parameters()}
    plain = {name for name in everything if "norm" in name or name.endswith("bias")}
    assert len(plain) == 7 + 3 * 4
    assert groups[0.0, 1e-3] == plain and groups[0.1, 1e-3] == everything - plain


def test_lora_plus_lets_b_learn_faster():
    model = get_peft_model(small_model(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    groups = groups_of(model, loraplus_lr_ratio=16.0)
    assert groups.keys() == {(0.1, 1e-3), (0.1, 16e-3)}
    assert all("lora_B" in name or "lora_embedding_B" in name for name in groups[0.1, 16e-3])
    assert len(groups[0.1, 16e-3]) == len(groups[0.1, 1e-3]) == 4
    assert groups_of(model).keys() == {(0.1, 1e-3)}


def test_optim_args_become_the_optimizers_keywords():
    masters = Masters(OneWeight(1.0, torch.float32))
    optimizer = create_optimizer(settings(optim="sgd", optim_args="momentum=0.9, nesterov=True"), masters.by_name)
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["nesterov"] is True
    optimizer = create_optimizer(settings(optim="adafactor", optim_args="clip_threshold=2,beta1=0.5"), masters.by_name)
    assert optimizer.defaults["clip_threshold"] == 2 and optimizer.defaults["beta1"] == 0.5


def test_adams_settings_reach_it():
    args = settings(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = create_optimizer(args, Masters(OneWeight(1.0, torch.float32)).by_name)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-6)


def test_an_unknown_optimizer_is_refused_with_those_there_are():
    assert problem_of(optim="adamw_hf").startswith("--optim: optim 'adamw_hf' is not one of adamw_torch, adamw_torch_f")


def test_optim_args_that_do_not_suit_are_refused():
    assert "does not suit sgd" in problem_of(optim="sgd", optim_args="rank=8")
    assert "does not suit sgd" in problem_of(optim="sgd", optim_args="nesterov=true")  # torch: it needs a momentum
    assert "'rank' is no key=value pair" in problem_of(optim="sgd", optim_args="momentum=0.9, rank")
    assert "set learning_rate instead" in problem_of(optim="sgd", optim_args="lr=1")


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
def test_an_optimizer_of_a_package_that_is_not_here_says_how_to_get_it():
    text = problem_of(optim="paged_adamw_8bit")
    assert "needs bitsandbytes" in text and "pip install 'burnish[quant]'" in text


OF_TORCH = [name for name, (module, _, _) in OPTIMIZERS.items() if not module.startswith("bitsandbytes")]


def both_trainers(folder, rows, evaluation=None, **changes):
    """Our Trainer and transformers', each after its run on the same arguments. One batch holds all rows: no order."""
    changes = {"per_device_train_batch_size": len(rows), "per_device_eval_batch_size": 8} | changes
    ours = trainer(small_model("llama"), arguments(folder / "ours", **changes), rows, eval_dataset=evaluation)
    ours.train()
    theirs = TransformersTrainer(
        small_model("llama"),
        arguments(folder / "theirs", **changes),
        data_collator=collator(),
        train_dataset=Rows(rows),
        eval_dataset=Rows(evaluation or []),
    )
    theirs.train()
    return ours, theirs


@pytest.mark.parametrize("name", OF_TORCH)
def test_an_optimizer_moves_the_weights_as_it_does_in_transformers(name, tmp_path):
    rates = {"sgd": 1.0, "adafactor": 1e-3, "rmsprop": 1e-3}
    settings = dict(
        optim=name, learning_rate=rates.get(name, 1e-2), weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-5
    )
    ours, theirs = both_trainers(tmp_path, samples(4), num_train_epochs=3, **settings)
    start = small_model("llama")
    assert ours.state.global_step == 3
    for (path, weight), other, before in zip(
        ours.model.named_parameters(), theirs.model.parameters(), start.parameters(), strict=True
    ):
        moved = (other - before).norm()
        assert moved > 0, path
        # The two sum in another order; what nearly cancels may round either way where steps have one length (Adam).
        assert (weight - other).norm() <= 2e-2 * moved, path
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert losses == pytest.approx([e["loss"] for e in theirs.state.log_history if "loss" in e], rel=1e-3)
    assert losses[-1] < losses[0]


def test_a_bf16_model_trains_on_updates_that_bf16_cannot_hold(tmp_path):
    """Plain SGD whose steps are below the rounding of most weights: the masters follow a float32 model."""
    changes = dict(optim="sgd", learning_rate=1e-3, num_train_epochs=60, per_device_train_batch_size=4)
    start = {name: weight.clone() for name, weight in small_model("llama", dtype=torch.bfloat16).named_parameters()}
    low = trainer(small_model("llama", dtype=torch.bfloat16), arguments(tmp_path / "low", **changes), samples(4))
    low.train()
    full = small_model("llama")
    full.load_state_dict({name: weight.float() for name, weight in start.items()})
    high = trainer(full, arguments(tmp_path / "high", **changes), samples(4))
    high.train()
    name = "model.layers.0.mlp.up_proj.weight"
    moved = high.update.masters.by_name[name] - start[name].float()
    assert (low.update.masters.by_name[name] - high.update.masters.by_name[name]).norm() < 0.1 * moved.norm()
    assert torch.equal(low.model.get_parameter(name), low.update.masters.by_name[name].bfloat16())


def test_a_bf16_model_that_is_trained_twice_gives_its_gradients_to_the_masters_of_the_second_run_alone(tmp_path):
    again = trainer(small_model("llama", dtype=torch.bfloat16), arguments(tmp_path / "again"), samples(4))
    again.train()
    first = again.update.masters
    again.train()
    again.objective(collate(samples(2))).loss.backward()
    second = again.update.masters
    assert all(first.gradient_of(master) is None for master in first.by_name.values())
    assert all(second.gradient_of(master) is not None for master in second.by_name.values())


# ---- schedules -------------------------------------------------------------------------------------------------------

NEEDS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5},
    "greedy": {"patience": 0, "factor": 0.5, "min_lr": 1e-4, "max_lr": 10.0},
}


def rates(run):
    return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize("schedule", [one.value for one in SchedulerType])
def test_every_schedule_of_transformers_gives_its_rates_in_a_run(schedule, tmp_path):
    ours, theirs = both_trainers(
        tmp_path,
        samples(3),
        samples(3, seed=9),
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=NEEDS.get(schedule),
        warmup_steps=2,
        num_train_epochs=7,
        learning_rate=0.1,  # too much: evaluation gets better and worse
        eval_strategy="steps",
        eval_steps=2,
    )
    assert len(rates(ours)) == 7
    assert rates(ours) == pytest.approx(rates(theirs), rel=1e-9)
    assert len(set(rates(ours))) > 1 or schedule == "constant"


@pytest.mark.parametrize("schedule, when_better", [("reduce_lr_on_plateau", 1.0), ("greedy", 2.0)])
def test_a_schedule_by_metric_moves_after_an_evaluation_and_only_then(schedule, when_better, tmp_path):
    args = arguments(
        tmp_path,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=NEEDS[schedule],
        num_train_epochs=3,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=3,
    )
    run = trainer(small_model(), args, samples(10), eval_dataset=samples(3, seed=9))
    run.train()
    expected, rate, best = [], 0.5, float("inf")
    for entry in run.state.log_history:
        if "eval_loss" in entry:
            rate *= when_better if entry["eval_loss"] < best else 0.5
            best = min(best, entry["eval_loss"])
        elif "learning_rate" in entry:
            expected.append(rate)
    assert len(expected) == 15 and rates(run) == pytest.approx(expected)
    assert len(set(expected)) > 1


def test_a_schedule_that_needs_no_metric_says_so():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    args = SimpleNamespace(
        lr_scheduler_type="linear", lr_scheduler_kwargs=None, get_warmup_steps=lambda steps: steps // 5
    )
    scheduler = create_scheduler(args, optimizer, 10)
    assert not steps_on_metric(scheduler)
    values = []
    for _ in range(10):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
    assert values == pytest.approx([0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


@pytest.mark.parametrize(
    ("schedule", "kwargs", "told"),
    [("cosine", {"min_lr": 1e-6}, "min_lr"), ("polynomial", {"lr_end": 1.0}, "lr_end"), ("greedy", {"x": 1}, "x")],
)
def test_what_a_schedule_does_not_take_is_a_mistake_of_the_settings(schedule, kwargs, told):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1e-3)
    args = SimpleNamespace(
        lr_scheduler_type=SchedulerType(schedule), lr_scheduler_kwargs=kwargs, get_warmup_steps=lambda steps: 0
    )
    with pytest.raises(UserError) as caught:
        create_scheduler(args, optimizer, 10)
    text = str(caught.value)
    assert text.startswith(f"--lr_scheduler_kwargs: lr_scheduler_kwargs {kwargs!r} does not suit {schedule}: ")
    assert told in text.partition(schedule)[2]


@pytest.mark.parametrize(("schedule", "told"), [("constant", True), ("greedy", True), ("constant_with_warmup", False)])
def test_a_warmup_that_a_schedule_does_not_have_is_told(schedule, told, capsys):
    """And not refused: such files run elsewhere."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1e-3)
    args = SimpleNamespace(lr_scheduler_type=schedule, lr_scheduler_kwargs=None, get_warmup_steps=lambda steps: 5)
    create_scheduler(args, optimizer, 10)
    assert (f"lr_scheduler_type: {schedule} has no warmup" in capsys.readouterr().err) == told
