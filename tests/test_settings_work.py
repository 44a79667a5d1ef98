"""Settings that only a whole run shows to work: `burnish train` on a tiny random model and a real tokenizer.

What a setting does inside one room is shown by that room's tests; tests/honoured.toml says which test shows what.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import arguments, samples, small_model, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging as transformers_logging

from burnish import workflow
from burnish.arguments.parse import parse_command
from burnish.chat.template import load_template
from burnish.data.loader import order_of
from burnish.errors import UserError
from burnish.generate.arguments import GeneratingArguments
from burnish.generate.engine import Engine
from burnish.workflow import load_engine, run_train


class Look(TrainerCallback):
    """What a run shows its callbacks, and so its integrations."""

    args: Any
    model: Any
    optimizer: Any
    loader: Any
    groups: list[dict[str, Any]]

    def __init__(self) -> None:
        self.eval_batches, self.logged = 0, []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        self.args, self.model, self.optimizer, self.loader = args, model, optimizer, train_dataloader
        self.groups = [{"lr": group["lr"], "params": list(group["params"])} for group in optimizer.param_groups]

    def on_prediction_step(self, args, state, control, **kwargs):
        self.eval_batches += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append({**logs, "step": state.global_step})

    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.logged if "loss" in entry]


def pair(number: int) -> dict[str, str]:
    return {"instruction": f"question {number}", "output": f"answer {number}"}


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(fixture_path: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(fixture_path("smollm2"))


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A Llama of two small layers in a folder with SmolLM2's tokenizer, and eight rows."""
    folder = tmp_path_factory.mktemp("base")
    model = small_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2, tie_word_embeddings=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {
        "model_name_or_path": folder / "model",
        "dataset": write(folder / "rows.jsonl", map(pair, range(8))),
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 1,
        "use_cpu": "true",
    }


@pytest.fixture
def go(base: dict[str, Any], tmp_path: Path) -> Callable[..., Look]:
    """`burnish train` with these settings; → what its callbacks saw. It ends in tmp_path/out."""

    def run(*callbacks: TrainerCallback, **changes: Any) -> Look:
        look = Look()
        run_train(settings({**base, "output_dir": tmp_path / "out", **changes}), [look, *callbacks])
        return look

    return run


def settings(given: dict[str, Any], command: str = "train") -> Any:
    return parse_command(command, [f"{name}={value}" for name, value in given.items() if value is not None])


def texts(look: Look, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(sample.input_ids) for sample in look.loader.dataset]


# ---- where things come from ------------------------------------------------------------------------------------------


def test_a_hub_is_asked_with_the_cache_the_revision_and_the_token_that_are_given(go, base, tmp_path, monkeypatch):
    asked: dict[str, list[dict[str, Any]]] = {"model": [], "rows": []}

    def fetch_model(name: str, **how: Any) -> str:
        asked["model"].append({"name": name, **how})
        return str(base["model_name_or_path"])

    def fetch_rows(path: str, **how: Any) -> list[dict[str, str]]:
        asked["rows"].append({**how, "name": path})
        return [pair(number) for number in range(4)]

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch_model)
    monkeypatch.setattr("datasets.load_dataset", fetch_rows)
    (tmp_path / "dataset_info.json").write_text('{"it": {"hf_hub_url": "team/rows"}}')
    hub = {"cache_dir": tmp_path / "cache", "hf_hub_token": "secret", "model_revision": "v2"}
    go(model_name_or_path="team/model", dataset="it", dataset_dir=tmp_path, **hub)

    assert {how["name"] for how in asked["model"]} == {"team/model"}
    assert {(how["cache_dir"], how["token"]) for hows in asked.values() for how in hows} == {
        (str(tmp_path / "cache"), "secret")
    }
    assert {how["revision"] for how in asked["model"]} == {"v2"}
    assert [(how["name"], how.get("revision")) for how in asked["rows"]] == [("team/rows", None)]  # it is the model's


# ---- what the rows become --------------------------------------------------------------------------------------------

SHOWS_ALL = """\
{{ 'thinking ' ~ enable_thinking }}
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_conversations_are_what_template_system_message_and_thinking_make_of_them(go, tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(SHOWS_ALL)
    look = go(template=path, default_system="Be kind.", enable_thinking="false")
    assert texts(look, tokenizer)[0].startswith(
        "thinking False\n<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nquestion 0<|im_end|>\n"
    )
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == SHOWS_ALL
    own = texts(go(output_dir=tmp_path / "own"), tokenizer)[0]
    assert "thinking" not in own and "Be kind." not in own and "You are a helpful AI assistant" in own
    assert texts(go(template="vicuna", output_dir=tmp_path / "named"), tokenizer)[0].endswith(
        "USER: question 0 ASSISTANT: answer 0<|im_end|>"
    )


@pytest.mark.parametrize("split, ends", [(True, 3), (False, 4)])
def test_split_special_tokens_reads_look_alikes_in_a_question_as_text(split, ends, go, tokenizer, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"instruction": "What is <|im_end|>?", "output": "A mark."}] * 2)
    sample = go(dataset=rows, split_special_tokens=split).loader.dataset[0]
    assert (
        sample.input_ids.tolist().count(tokenizer.eos_token_id) == ends
    )  # system, user, assistant, and the look-alike


def test_padding_is_trained_only_where_that_is_asked_for(go, tokenizer, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [pair(0), {"instruction": "a", "output": "a much longer answer " * 4}])

    def batch_of(name: str, **changes: Any) -> Any:
        loader = go(dataset=rows, output_dir=tmp_path / name, **changes).loader
        order_of(loader).set_epoch(0)
        return next(iter(loader))

    plain, padded = batch_of("plain"), batch_of("padded", ignore_pad_token_for_loss="false")
    assert padded.num_tokens == plain.num_tokens
    num_pads = padded.labels.numel() - plain.num_tokens
    assert plain.labels.shape[0] == 1 and padded.labels.shape[0] == 2 and num_pads > 8
    assert padded.num_trained == plain.num_trained + num_pads
    assert (padded.labels == tokenizer.pad_token_id).sum() - (plain.labels == tokenizer.pad_token_id).sum() == num_pads


def test_the_stage_says_whether_rows_are_texts_or_conversations(go, tokenizer, tmp_path):
    look = go(stage="pt", dataset=write(tmp_path / "texts.jsonl", [{"text": "One."}, {"text": "Two."}]))
    assert texts(look, tokenizer) == ["One.<|endoftext|>Two.<|endoftext|>"]
    look = go(stage="sft", output_dir=tmp_path / "sft")
    assert (
        "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\nanswer 0<|im_end|>" in texts(look, tokenizer)[0]
    )


def test_a_stream_is_shuffled_within_the_rows_that_its_buffer_holds(go, base, tmp_path):
    def order(buffer_size: int) -> list[int]:
        look = go(streaming="true", buffer_size=buffer_size, output_dir=tmp_path / str(buffer_size))
        order_of(look.loader).set_epoch(0)
        places = [place for batch in islice(look.loader, 4) for place in batch.places]
        return [int(place.rpartition(":")[2]) for place in places]

    in_turn, shuffled = order(1), order(8)
    assert in_turn == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sorted(shuffled) == in_turn != shuffled


# ---- evaluation and what is left -------------------------------------------------------------------------------------


def test_each_set_is_measured_by_itself_at_the_end_and_drawn(go, base, tmp_path):
    few, many = write(tmp_path / "few.jsonl", map(pair, range(3))), write(tmp_path / "many.jsonl", map(pair, range(5)))
    look = go(
        eval_dataset=f"{few},{many}", eval_on_each_dataset="true", do_train="true", do_eval="true",
        per_device_eval_batch_size=2, compute_accuracy="true", plot_loss="true", max_steps=2,
    )  # fmt: skip
    assert look.eval_batches == 2 + 3
    out = tmp_path / "out"
    measured = json.loads((out / "eval_results.json").read_text())
    for name in ("few", "many"):
        assert measured[f"eval_{name}_loss"] > 0 and 0 <= measured[f"eval_{name}_accuracy"] <= 1
    assert "eval_loss" not in measured
    left = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "training_loss.png", "training_eval_loss.png", "burnish.yaml"} <= left


def test_what_is_not_asked_for_is_neither_measured_nor_drawn(go, base, tmp_path):
    look = go(eval_dataset=base["dataset"])
    assert look.eval_batches == 0
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in left
    assert not {"eval_results.json", "training_loss.png", "training_eval_loss.png"} & left


def test_who_asks_for_evaluation_alone_gets_no_training(go, base, tmp_path):
    go(do_eval="true", eval_dataset=base["dataset"])
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] > 0
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_run_stops_early_after_as_many_evaluations_without_a_better_loss(go):
    """At a learning rate that moves nothing the first evaluation is the best."""
    changes = {"learning_rate": 1e-30, "val_size": 2, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 9}
    look = go(early_stopping_steps=3, **changes)
    assert [entry["step"] for entry in look.logged if "loss" in entry] == [1, 2, 3, 4]
    assert len({entry["eval_loss"] for entry in look.logged if "eval_loss" in entry}) == 1


def test_the_log_of_a_run_reaches_the_tracker_under_the_runs_name(go, monkeypatch):
    trackers: list[Look] = []

    class Tracker(Look):
        def __init__(self) -> None:
            super().__init__()
            trackers.append(self)

    monkeypatch.setattr("burnish.train.checks.find_spec", lambda name: True)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    look = go(report_to="tensorboard", run_name="pears")
    [tracker] = trackers
    assert tracker.args.run_name == "pears"
    assert tracker.losses() == look.losses() != []
    go(overwrite_output_dir="true")
    assert len(trackers) == 1  # nobody was told of the second


def test_a_run_is_resumed_or_begun_anew_as_its_settings_say(go, tmp_path):
    whole = go(save_strategy="steps", save_steps=2, max_steps=4)
    resumed = go(resume_from_checkpoint=tmp_path / "out" / "checkpoint-2", max_steps=4, output_dir=tmp_path / "on")
    assert [entry["step"] for entry in resumed.logged if "loss" in entry] == [3, 4]
    assert resumed.losses() == whole.losses()[2:]
    anew = go(overwrite_output_dir="true", max_steps=3)
    assert anew.losses() == pytest.approx(whole.losses()[:3], rel=0.1) and len(anew.losses()) == 3
    assert not (tmp_path / "out" / "checkpoint-2").exists()


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_run_is_smoothed_as_transformers_smooths_it(go, base, tokenizer, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [pair(0)])
    look = go(dataset=rows, label_smoothing_factor=0.2)
    sample = look.loader.dataset[0]
    outputs = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])(
        input_ids=torch.tensor(sample.input_ids[None]).long()
    )
    labels = torch.tensor(sample.labels[None]).long()
    theirs = LabelSmoother(epsilon=0.2)(outputs, labels, shift_labels=True)
    assert look.losses() == pytest.approx([theirs.item()], rel=1e-5)


def test_bf16_is_what_the_model_computes_in_and_is_saved_in(go, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # else float32 would be quicker
    dtypes = {}
    for asked in ("true", "false"):
        look = go(bf16=asked, finetuning_type="full", output_dir=tmp_path / asked)
        dtypes[asked] = {weight.dtype for weight in look.model.parameters()}
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / asked, dtype="auto")
        assert {weight.dtype for weight in saved.parameters()} == dtypes[asked]
        assert {weight.dtype for group in look.groups for weight in group["params"]} == {torch.float32}
    assert dtypes == {"true": {torch.bfloat16}, "false": {torch.float32}}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_pure_bf16_keeps_weights_and_optimizer_in_bf16_alone(method, go, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for asked, dtype in (("true", torch.bfloat16), ("false", torch.float32)):
        look = go(pure_bf16=asked, bf16="true", finetuning_type=method, output_dir=tmp_path / asked, max_steps=2)
        assert {weight.dtype for weight in look.model.parameters()} == {torch.bfloat16}
        trained = [weight for group in look.groups for weight in group["params"]]
        assert {weight.dtype for weight in trained} == {dtype}
        moments = [value for state in look.optimizer.state.values() for value in state.values() if value.dim()]
        assert {value.dtype for value in moments} == {dtype} and len(moments) == 2 * len(trained)
    assert {w.dtype for w in go(pure_bf16="true", output_dir=tmp_path / "alone").model.parameters()} == {torch.bfloat16}


def test_pure_bf16_is_float32_where_a_processor_does_not_multiply_bf16(go, monkeypatch, capsys):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    look = go(pure_bf16="true")
    assert {weight.dtype for weight in look.model.parameters()} == {torch.float32}
    assert "computing in float32 instead" in capsys.readouterr().err


@pytest.mark.parametrize("asked, precision", [("true", "tf32"), ("false", "ieee")])
def test_tf32_is_switched_on_and_off(asked, precision, go, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "ieee" if asked == "true" else "tf32"
        go(tf32=asked)
        assert torch.backends.fp32_precision == precision
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # transformers 5.23 on
def test_gradient_checkpointing_computes_each_block_twice_and_gets_its_settings(go, tmp_path, monkeypatch):
    settings_seen: list[dict[str, Any]] = []
    real = torch.utils.checkpoint.checkpoint

    def note(function: Any, *args: Any, **how: Any) -> Any:
        settings_seen.append(how)
        return real(function, *args, **how)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", note)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", note, raising=False)
    changes = {"finetuning_type": "full", "gradient_checkpointing_kwargs": '{"preserve_rng_state": false}'}
    again = go(gradient_checkpointing="true", **changes)
    assert len(settings_seen) == 2  # one for each block
    assert all(how["preserve_rng_state"] is False and how["use_reentrant"] is False for how in settings_seen)
    plain = go(finetuning_type="full", output_dir=tmp_path / "plain")
    assert len(settings_seen) == 2 and again.losses() == plain.losses()


@pytest.mark.parametrize("ratio", [None, 8.0])
def test_lora_plus_reaches_the_optimizer_of_a_run(ratio, go):
    look = go(loraplus_lr_ratio=ratio, learning_rate=1e-3)
    b = {id(weight) for name, weight in look.model.named_parameters() if "lora_B" in name}
    rates = {id(weight): group["lr"] for group in look.groups for weight in group["params"]}
    assert b and {rates[one] for one in b} == {1e-3 * (ratio or 1)}
    assert {rate for one, rate in rates.items() if one not in b} == {1e-3}


METHODS = {
    "full": lambda name: True,
    "freeze": lambda name: ".layers.1." in name,
    "lora": lambda name: "lora_" in name,
}


@pytest.mark.parametrize("method", METHODS)
def test_the_method_says_which_weights_move(method, go):
    more = {"freeze_trainable_layers": 1} if method == "freeze" else {}
    look = go(finetuning_type=method, **more)
    moved = {name for name, weight in look.model.named_parameters() if weight.requires_grad}
    assert moved == {name for name, _ in look.model.named_parameters() if METHODS[method](name)} != set()


def test_a_device_that_is_not_trained_on_gives_way_to_the_cpu_where_that_is_asked_for(base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("xpu"))
    given = {**base, "output_dir": tmp_path}
    assert settings(given).training().device.type == "cpu"
    with pytest.raises(UserError, match="xpu is a device that burnish does not train on; set use_cpu: true"):
        settings({**given, "use_cpu": None}).training()


@pytest.mark.parametrize("asked", [True, False])
def test_batches_are_pinned_for_a_gpu_unless_that_is_declined(asked, tmp_path):
    args = arguments(tmp_path, use_cpu=False, dataloader_pin_memory=asked)
    run = trainer(small_model(), args, samples(4))
    run.device = torch.device("cuda")  # nothing is moved there before the first batch
    assert run.get_train_dataloader().pin_memory is run.get_eval_dataloader(samples(2)).pin_memory is asked
    run.device = torch.device("cpu")
    assert run.get_train_dataloader().pin_memory is False


# ---- what transformers says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, given, level",
    [
        ((0, 0), {"log_level": "info"}, "INFO"),
        ((0, 0), {"log_level": "critical"}, "CRITICAL"),
        ((1, 1), {"log_level": "info"}, "WARNING"),
        ((1, 1), {"log_level": "info", "log_level_replica": "debug"}, "DEBUG"),
        ((2, 0), {"log_level": "info"}, "INFO"),  # the first process of the second node
        ((2, 0), {"log_level": "info", "log_on_each_node": "false"}, "WARNING"),
    ],
)
def test_transformers_is_as_loud_as_its_process_may_be(place, given, level, base, tmp_path, monkeypatch):
    made = settings({**base, "output_dir": tmp_path, **given})
    state = SimpleNamespace(process_index=place[0], local_process_index=place[1])
    monkeypatch.setattr(made.training(), "distributed_state", state)
    before = transformers_logging.get_verbosity()
    try:
        workflow._begin(made)
        assert transformers_logging.get_verbosity() == transformers_logging.get_log_levels_dict()[level.lower()]
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()


# ---- answers ---------------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize(
    "asked, dtype",
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16), (None, torch.float32)],
)
def test_the_model_that_is_asked_has_the_dtype_that_is_given(asked, dtype, base):
    chat = {"model_name_or_path": base["model_name_or_path"], "infer_dtype": asked}
    engine = load_engine(settings(chat, "chat"))
    on_cpu = engine.model.device.type == "cpu"
    assert {weight.dtype for weight in engine.model.parameters()} == {dtype if asked or on_cpu else torch.bfloat16}


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": True}, torch.bfloat16),
        ({"fp16": True}, torch.float16),
        ({"pure_bf16": True}, torch.bfloat16),
        ({"fp16": True, "deepspeed": "ds_z2_config.json"}, torch.bfloat16),
    ],
)
def test_what_a_run_left_is_asked_on_a_gpu_in_what_the_run_computed_in(given, dtype, base):
    run = {"model_name_or_path": base["model_name_or_path"], "output_dir": "saves", **given}
    for command in ("chat", "api"):
        assert workflow._inference_dtype(settings(run, command), "cuda") == dtype


@pytest.fixture(scope="module")
def engine(base: dict[str, Any], tokenizer: Any) -> Engine:
    model = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])
    return Engine(model, tokenizer, load_template(tokenizer, None), GeneratingArguments(max_new_tokens=12))


def answer(engine: Engine, seed: int = 0, **asked: Any) -> list[int]:
    torch.manual_seed(seed)
    [ids] = engine.generate([engine.template.prompt(QUESTION)], **asked)
    return ids


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": True, "temperature": 0.5, "top_p": 0.6, "top_k": 7, "repetition_penalty": 1.5},
        {"do_sample": False, "num_beams": 3, "length_penalty": 0.25, "max_new_tokens": 5},
    ],
)
def test_how_an_answer_is_drawn_reaches_generate_from_the_command(asked, base, monkeypatch):
    given: list[dict[str, Any]] = []
    engine = load_engine(settings({"model_name_or_path": base["model_name_or_path"], **asked}, "chat"))

    def generate(*, input_ids: torch.Tensor, generation_config: Any, **how: Any) -> torch.Tensor:
        given.append(generation_config.to_dict())
        return torch.cat([input_ids, input_ids[:, :1]], dim=1)

    monkeypatch.setattr(engine.model, "generate", generate)
    engine.generate([engine.template.prompt(QUESTION)])
    assert {name: given[0][name] for name in asked} == asked


def test_drawing_from_the_likeliest_token_alone_is_greedy_and_from_more_is_not(engine: Engine):
    greedy = answer(engine, do_sample=False)
    assert answer(engine, do_sample=True, top_k=1) == answer(engine, seed=1, top_k=1) == greedy
    assert len({tuple(answer(engine, seed, do_sample=True, top_k=0)) for seed in range(3)}) == 3


def test_a_penalty_on_repetition_keeps_an_answer_from_repeating(engine: Engine):
    free = answer(engine, do_sample=False, max_new_tokens=24)
    prompt = engine.template.prompt(QUESTION)
    penalized = answer(engine, do_sample=False, max_new_tokens=24, repetition_penalty=1e6)
    assert len(set(free)) < len(free)
    assert len(set(penalized)) == len(penalized) and not set(penalized) & set(prompt)


def test_beams_find_a_likelier_answer(engine: Engine):
    prompt = engine.template.prompt(QUESTION)

    def likelihood(ids: list[int]) -> float:
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum().item()

    greedy, beams = answer(engine, do_sample=False), answer(engine, do_sample=False, num_beams=8)
    assert len(beams) == len(greedy) and likelihood(beams) > likelihood(greedy)


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_left_out_of_the_text_unless_they_are_asked_for(skip, engine: Engine, monkeypatch):
    start, hello = engine.tokenizer.convert_tokens_to_ids("<|im_start|>"), engine.tokenizer.encode("Hello")

    def generate(*, streamer: Any, input_ids: torch.Tensor, **how: Any) -> torch.Tensor:
        streamer.put(input_ids.cpu())
        for token_id in (start, *hello):
            streamer.put(torch.tensor([token_id]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([[start, *hello]])], dim=1)

    monkeypatch.setattr(engine.model, "generate", generate)
    monkeypatch.setattr(engine, "generating", GeneratingArguments(max_new_tokens=4, skip_special_tokens=skip))
    assert "".join(engine.chat(QUESTION)) == ("Hello" if skip else "<|im_start|>Hello")
