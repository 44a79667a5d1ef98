"""What is made of checked settings: the object that training gets, the run's own file, what chat asks."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import here, make_base, mistakes, train, write_yaml

from burnish.arguments.coerce import choices as choices_of
from burnish.arguments.fields import known_fields
from burnish.arguments.parse import for_inference, parse, parse_command, read_settings
from burnish.errors import UserError


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return make_base(tmp_path)


# ---- the object of transformers -------------------------------------------------------------------------------------


def test_the_fields_read_from_the_source_are_those_of_the_class() -> None:
    from transformers import Seq2SeqTrainingArguments

    from burnish.train.fields import transformers_fields

    read = {field.name: field for field in transformers_fields()}
    real = {field.name: field for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    assert list(read) == list(real)
    for name, field in real.items():
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore
        assert read[name].default == default, name
        assert read[name].help == field.metadata["help"], name
        if choices := field.metadata.get("choices"):
            assert choices_of(read[name].hint) == tuple(choices), name


def test_what_is_reported_to_and_the_optimizers_are_those_that_are_there() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from burnish.train import checks
    from burnish.train.fields import reporters
    from burnish.train.optimizer import OPTIMIZERS

    assert reporters() == tuple(INTEGRATION_TO_CALLBACK)
    assert set(checks.OPTIMIZERS) == set(OPTIMIZERS)
    assert set(checks.PACKAGES_OF_REPORTERS) <= set(reporters())


def test_a_package_that_is_not_installed_is_told_before_anything_is_loaded(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.train.checks.find_spec", lambda name: None)
    (line,) = mistakes("optim=adamw_8bit", **base)
    assert line.endswith("needs bitsandbytes, which is not here; pip install 'burnish[quant]'")
    (line,) = mistakes("report_to=wandb", **base)
    assert line == "command line: report_to 'wandb' is not installed; pip install wandb"


def test_enumerations_of_transformers_are_the_choices() -> None:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(known_fields()["lr_scheduler_type"].choices) == {kind.value for kind in SchedulerType}
    assert set(known_fields()["optim"].choices) == {kind.value for kind in OptimizerNames}


def test_training_gets_transformers_own_arguments(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Seq2SeqTrainingArguments

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # else bf16 would become float32
    settings = train(
        *("bf16=true", "warmup_ratio=0.1", "gradient_checkpointing=true", "overwrite_output_dir=true", "tf32=false"),
        *("lr_scheduler_type=cosine", "project=pears", "run_name=first", "logging_dir=logs", "save_steps=10"),
        **base,
    )
    args = settings.training()
    assert isinstance(args, Seq2SeqTrainingArguments) and args is settings.training()
    assert (args.bf16, args.warmup_steps, args.gradient_checkpointing) == (True, 0.1, True)
    assert (args.lr_scheduler_type, args.project, args.run_name) == ("cosine", "pears", "first")
    assert (args.overwrite_output_dir, args.save_steps, args.n_gpu) == (True, 10, 1)
    assert (args.report_to, args.logging_nan_inf_filter) == ([], False)
    assert args.train_batch_size == 8
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"


TWO_THAT_MEET = """
import os, signal, sys, time
import torch.distributed as dist
from burnish.arguments.parse import parse_command
from burnish.train.distributed import together

settings = parse_command("train", sys.argv[1:])
peer = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "1" if peer == 0 else "0"
with together(settings):
    if dist.get_rank() == 1:
        time.sleep(60)  # the other one waits for it in vain
    begin = time.monotonic()
    try:
        dist.barrier()
    except RuntimeError:
        print(dist.get_backend(), time.monotonic() - begin, flush=True)
    os.kill(peer, signal.SIGKILL)
    os._exit(0)
"""


def test_processes_meet_over_the_backend_and_wait_as_long_as_is_said(base: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = here() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [f"{name}={value}" for name, value in base.items()]
    command = [sys.executable, "-c", TWO_THAT_MEET, *words, "ddp_backend=gloo", "ddp_timeout=2", "use_cpu=true"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    backend, seconds = run.stdout.split()
    assert backend == "gloo" and 2 <= float(seconds) < 20, run.stderr


def test_what_trackio_is_told_reaches_its_callback_as_it_is(base: dict[str, Any]) -> None:
    told = {
        "project": "pears",
        "trackio_space_id": "me/board",
        "trackio_bucket_id": "b",
        "trackio_static_space_id": "s",
    }
    args = train(**base, **told).training()
    assert {name: getattr(args, name) for name in told} == told


def test_without_an_accelerator_the_cpu_is_used(base: dict[str, Any]) -> None:
    import torch

    args = train(**base).training()
    assert args.use_cpu == (torch.accelerator.current_accelerator(check_available=True) is None)


def test_early_stopping_watches_the_loss_when_nothing_else_is_named(base: dict[str, Any]) -> None:
    settings = train("early_stopping_steps=2", "eval_strategy=steps", "val_size=0.5", **base)
    assert settings.training().metric_for_best_model == "loss"


def test_what_only_transformers_knows_is_a_mistake_of_the_user_too(base: dict[str, Any]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("tf32 is welcome here")
    with pytest.raises(UserError, match="tf32"):
        train("tf32=true", **base).training()


# ---- from Python -----------------------------------------------------------------------------------------------------


def test_parse_gives_the_five_dataclasses(base: dict[str, Any]) -> None:
    model, data, training, finetuning, generating = parse({**base, "learning_rate": "1e-5", "top_k": 3})
    assert model.model_name_or_path == base["model_name_or_path"] and data.dataset == [base["dataset"]]
    assert training.learning_rate == 1e-5 and finetuning.lora_alpha == 16 and generating.top_k == 3


def test_parse_gives_back_what_is_no_setting_when_asked_to(base: dict[str, Any]) -> None:
    words = [word for name, value in base.items() for word in (f"--{name}", value)]
    *_, remaining = parse([*words, "--bogus", "1", "word"], return_remaining_strings=True)
    assert remaining == ["word", "--bogus", "1"]
    with pytest.raises(UserError, match="bogus"):
        parse([*words, "--bogus", "1"])


def test_parse_passes_over_extra_keys_of_a_dict_when_asked_to(base: dict[str, Any]) -> None:
    assert len(parse({**base, "bogus": 1}, allow_extra_keys=True)) == 5
    with pytest.raises(UserError, match="bogus"):
        parse({**base, "bogus": 1})


def test_args_files_mean_what_they_mean_to_transformers(base: dict[str, Any], tmp_path: Path) -> None:
    named, flagged = tmp_path / "named.args", tmp_path / "flagged.args"
    named.write_text("--seed 1 --cutoff_len 10 --max_samples 5")
    flagged.write_text("--cutoff_len 20 --max_samples 6")
    words = [word for name, value in base.items() for word in (f"--{name}", value)]
    files = {"args_filename": named, "args_file_flag": "--cfg"}
    _, data, training, *_ = parse([*words, "--cfg", str(flagged), "--cfg", "missing", "--max_samples", "7"], **files)
    assert (training.seed, data.cutoff_len, data.max_samples) == (1, 20, 7)


# ---- burnish.yaml ----------------------------------------------------------------------------------------------------


def test_the_runs_own_file_repeats_it(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = {**base, "model_name_or_path": "./model", "dataset": "./rows.jsonl", "output_dir": "out"}
    settings = train("hf_hub_token=secret", "lora_rank=4", "bf16=true", "overwrite_output_dir=true", **relative)
    settings.dump(tmp_path / "deep" / "burnish.yaml")
    text = (tmp_path / "deep" / "burnish.yaml").read_text()
    assert "secret" not in text and "token" not in text and "overwrite" not in text
    assert f"output_dir: {tmp_path / 'out'}\n" in text and f"model_name_or_path: {tmp_path / 'model'}\n" in text
    monkeypatch.chdir("/")
    again = train(str(tmp_path / "deep" / "burnish.yaml"), "output_dir=/elsewhere")
    assert again.changes_that_matter(settings) == []
    assert again.as_yaml() == text.replace(str(tmp_path / "out"), "/elsewhere")


def test_the_runs_own_file_holds_the_paths_of_folders_and_the_names_of_data_sets(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("pairs", "known"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"known": {"file_name": "../rows.jsonl"}}')
    settings = train("tokenized_path=tokens", **{**base, "dataset": "pairs,known,rows.jsonl"})
    text = settings.as_yaml()
    assert f"dataset:\n- {tmp_path}/pairs\n- known\n- {tmp_path}/rows.jsonl\n" in text
    assert f"tokenized_path: {tmp_path}/tokens\n" in text
    online = train("dataset_dir=ONLINE", **{**base, "dataset": "pairs"}).as_yaml()
    assert "dataset:\n- pairs\ndataset_dir: ONLINE\n" in online


def test_what_is_said_of_conversations_is_idle_where_texts_are_read(base: dict[str, Any]) -> None:
    words = ("mask_history=true", "overlong=drop", "default_system=hello")
    assert train(*words, "stage=sft", **base).translated == []
    assert train(*words, "stage=pt", **base).translated == [
        (name, "", "is not used in stage pt: a text is learned as it stands")
        for name in ("overlong", "mask_history", "default_system")
    ]


def test_only_what_changes_training_matters_when_a_folder_is_used_again(base: dict[str, Any], tmp_path: Path) -> None:
    first = train(**base)
    first.dump(tmp_path / "burnish.yaml")
    before = read_settings(tmp_path / "burnish.yaml")
    quiet = ("logging_steps=1", "save_steps=3", "plot_loss=true", "run_name=x", "output_dir=/other")
    quiet += ("temperature=0.5", "eval_strategy=steps", "eval_steps=3", f"eval_dataset={base['dataset']}")
    assert train(*quiet, **base).changes_that_matter(before) == []
    loud = train("learning_rate=1", "lora_rank=4", "cutoff_len=9", "seed=1", "val_size=1", **base)
    assert set(loud.changes_that_matter(before)) == {"learning_rate", "lora_rank", "cutoff_len", "seed", "val_size"}


def test_evaluation_matters_where_it_chooses_the_model(base: dict[str, Any]) -> None:
    chosen = ("val_size=1", "load_best_model_at_end=true", "eval_strategy=steps", "save_steps=10")
    one, other = train("eval_steps=5", *chosen, **base), train("eval_steps=10", *chosen, **base)
    assert one.changes_that_matter(other) == ["eval_steps"]


# ---- one file for every command -------------------------------------------------------------------------------------


def test_chat_takes_from_a_training_file_what_it_needs(base: dict[str, Any], tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", base, "fp16: true", "packing: true", "num_train_epochs: x", "top_p: 0.5")
    settings = parse_command("chat", [yaml, "temperature=0.1"])
    assert (settings.generating.top_p, settings.generating.temperature) == (0.5, 0.1)
    assert mistakes(yaml, "learning_rate=1", "nonsense=1", command="chat") == [
        "command line: learning_rate '1' does nothing in burnish chat; leave it out",
        "command line: nonsense '1' is not a setting; `burnish chat --help` lists them all",
    ]


@pytest.mark.parametrize("command", ["api", "export"])
def test_the_other_commands_take_from_a_training_file_what_they_need(
    base: dict[str, Any], tmp_path: Path, command: str
) -> None:
    lines = ("stage: dpo", "packing: true", "num_train_epochs: x", "deepspeed: gone.json", "top_p: 0.5", "fp16: true")
    yaml = write_yaml(tmp_path / "run.yaml", base, *lines, "rope_scaling: yarn", "export_dir: there", "export_size: 3")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    settings = parse_command(command, [yaml])
    assert for_inference(settings)[0].adapter_name_or_path == [str(tmp_path / "out")]
    assert settings.model.rope_scaling == "yarn" and settings.value("fp16") is True
    assert settings.generating.top_p == (0.5 if command == "api" else None)
    assert settings.model.export_size == (3 if command == "export" else 5)
    assert mistakes(yaml, "learning_rate=1", "num_layer_trainable=1", command=command) == [
        f"command line: learning_rate '1' does nothing in burnish {command}; leave it out",
        f"command line: num_layer_trainable '1' does nothing in burnish {command}; leave it out",
    ]
    assert mistakes(command=command)[0].startswith("command line: model_name_or_path is missing") == (command == "api")


def test_export_needs_a_folder_and_a_size(base: dict[str, Any], tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", base)
    assert mistakes(yaml, "export_size=0", "export_device=gpu", command="export") == [
        "command line: export_device 'gpu' is not one of cpu, auto; did you mean 'cpu'?",
        "command line: export_size 0 is not at least 1; 5 is usual, in gigabytes",
        f"{yaml}: export_dir is missing; give the folder for the exported model",
    ]


def test_chat_on_a_lora_file_asks_the_runs_adapter(base: dict[str, Any], tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", base)
    with pytest.raises(UserError, match=r"run.yaml line 3: output_dir .* holds no tuned adapter yet; train first"):
        for_inference(parse_command("chat", [yaml]))
    for step in (9, 10):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter_config.json").write_text("{}")
    model, notes = for_inference(parse_command("chat", [yaml]))
    assert model.adapter_name_or_path == [str(tmp_path / "out" / "checkpoint-10")] and "checkpoint-10" in notes[0]
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    assert for_inference(parse_command("chat", [yaml])) == (
        dataclasses.replace(model, adapter_name_or_path=[str(tmp_path / "out")]),
        [],
    )


def test_chat_keeps_the_adapters_below_a_new_one(base: dict[str, Any], tmp_path: Path) -> None:
    out, old = tmp_path / "out", tmp_path / "old"
    for folder in (out, old):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    yaml = write_yaml(tmp_path / "run.yaml", base, f"adapter_name_or_path: {old}")
    assert for_inference(parse_command("chat", [yaml]))[0].adapter_name_or_path == [str(out)]
    both = for_inference(parse_command("chat", [yaml, "create_new_adapter=true"]))[0]
    assert both.adapter_name_or_path == [str(old), str(out)]
    chosen = for_inference(parse_command("chat", [yaml, f"adapter_name_or_path={old}"]))[0]
    assert chosen.adapter_name_or_path == [str(old)]


def test_chat_on_a_full_file_asks_the_runs_model(base: dict[str, Any], tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", base, "finetuning_type: full")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no tuned model yet"):
        for_inference(parse_command("chat", [yaml]))
    (out / "model.safetensors").touch()
    assert for_inference(parse_command("chat", [yaml]))[0].model_name_or_path == str(out)


def test_chat_without_a_run_asks_the_model_itself(base: dict[str, Any]) -> None:
    settings = parse_command("chat", ["--model_name_or_path", base["model_name_or_path"]])
    assert for_inference(settings) == (settings.model, [])


# ---- mistakes that no parser expects ---------------------------------------------------------------------------------

DEEP = "[" * 50_000


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "run.yaml",
            "seed: 1\nstage: \x07\n",
            " line 2: is not YAML: a control character (U+0007) stands in it; take it",
        ),
        (
            "run.yaml",
            "seed: 1\nlr_scheduler_kwargs: {a: 2024-13-45}\n",
            " line 2: lr_scheduler_kwargs holds what YAML cannot read: month must be in 1..12; put it in quotes",
        ),
        (
            "run.yaml",
            "lr_scheduler_kwargs: {a: !!bool x}\n",
            " line 1: lr_scheduler_kwargs holds what YAML cannot read",
        ),
        ("run.yaml", f"lr_scheduler_kwargs: {DEEP}\n", ": cannot be read: it is nested too deeply; write it flatter"),
        ("run.json", f'{{"seed": {DEEP}', ": cannot be read: it is nested too deeply; write it flatter"),
        ("run.json", f'{{"seed": {"9" * 5000}}}', ": cannot be read: Exceeds the limit (4300 digits)"),
    ],
    ids=["control character", "month 13", "tag", "deep YAML", "deep JSON", "5000 digits"],
)
def test_what_a_parser_of_files_stumbles_over_is_one_problem(
    base: dict[str, Any], tmp_path: Path, name: str, text: str, told: str
) -> None:
    (tmp_path / name).write_text(text)
    (line,) = mistakes(str(tmp_path / name), **base)
    assert line.startswith(f"{tmp_path / name}{told}"), line


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (f"seed={'9' * 400}", "is too large a number; write a number such as 8"),
        (f"learning_rate={'9' * 400}", "is too large a number; write a number such as 0.1 or 1e-5"),
        ("lr_scheduler_kwargs={a: 2024-13-45}", "is not JSON (month must be in 1..12); check its brackets and quotes"),
        (f'lr_scheduler_kwargs={{"a": {DEEP}', "is not JSON (it is nested too deeply); check its brackets and quotes"),
        ("val_size=-1", "is neither a share below 1 nor a number of rows; write a share such as 0.1"),
        ("dataset=~nobody_here/x", "is not there; data/dataset_info.json has other names"),
    ],
    ids=["seed", "learning_rate", "month 13", "deep", "val_size", "dataset"],
)
def test_a_value_that_nothing_can_hold_is_one_problem(base: dict[str, Any], word: str, told: str) -> None:
    base.pop(word.partition("=")[0], None)
    (line,) = mistakes(word, **base)
    assert line.endswith(told), line[-200:]


@pytest.mark.parametrize("words", [["~nobody_here/run.yaml"], ["--args_file", "~nobody_here/x.args"]])
def test_the_home_of_a_user_that_is_not_there_is_no_file(base: dict[str, Any], words: list[str]) -> None:
    (line,) = mistakes(*words, **base)
    assert line.startswith(f"{words[-1]}: is not there; ")


def test_the_home_of_a_user_that_is_not_there_is_no_model(base: dict[str, Any]) -> None:
    (line,) = mistakes("--model_name_or_path", "~nobody_here/x", dataset=base["dataset"], output_dir=base["output_dir"])
    assert line.startswith("--model_name_or_path: '~nobody_here/x' is not there; looked for the folder ")
