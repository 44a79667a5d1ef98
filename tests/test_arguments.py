"""Settings from every source: their places, types and precedence, and every mistake in them told at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import here, make_base, mistakes, train, write_yaml

DIAGNOSIS = "import sys; from burnish.cli import main; s = main(sys.argv[1:]); print(s, 'torch' in sys.modules)"


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return make_base(tmp_path)


# ---- sources and precedence ----------------------------------------------------------------------------------------


def test_flags_yaml_json_and_overrides_say_the_same(base: dict[str, Any], tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", base, "learning_rate: 1e-5", "lora_target: [q_proj, v_proj]", "bf16: true")
    values = {**base, "learning_rate": 1e-5, "lora_target": ["q_proj", "v_proj"], "bf16": True}
    (tmp_path / "run.json").write_text(json.dumps(values))
    flags = [word for name, value in base.items() for word in (f"--{name.replace('_', '-')}", value)]
    ways = [
        train(yaml),
        train(str(tmp_path / "run.json")),
        train(*flags, "--learning_rate=1e-5", "--lora_target", "q_proj", "v_proj", "--bf16"),
        train("learning_rate=0.00001", "lora_target=q_proj,v_proj", "bf16=yes", **base),
    ]
    for settings in ways:
        assert settings.value("learning_rate") == 1e-5
        assert settings.finetuning.lora_target == ["q_proj", "v_proj"]
        assert settings.value("bf16") is True
        assert settings.as_yaml() == ways[0].as_yaml()


def test_later_sources_win_args_files_then_the_file_then_the_command_line(base: dict[str, Any], tmp_path: Path) -> None:
    first, second = tmp_path / "first.args", tmp_path / "second.args"
    first.write_text("--seed 1 --cutoff_len 100 --max_samples 1 --lora_rank 2")
    second.write_text("--cutoff_len 200\n--max_samples 2 --lora_rank 3")
    yaml = write_yaml(tmp_path / "run.yaml", base, "max_samples: 30", "lora_rank: 4")
    settings = train("--lora_rank", "5", "--args_file", str(first), yaml, f"--args_file={second}", "lora_rank=6")
    got = {name: settings.value(name) for name in ("seed", "cutoff_len", "max_samples", "lora_rank")}
    assert got == {"seed": 1, "cutoff_len": 200, "max_samples": 30, "lora_rank": 6}


def test_an_args_file_beside_the_entry_script_is_read(base: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "tune.py"
    script.write_text(
        "import sys\nfrom burnish.arguments.parse import parse_command\n"
        "print(parse_command('train', sys.argv[1:]).value('seed'))\n"
    )
    (tmp_path / "tune.args").write_text("--seed 7")
    words = [f"{name}={value}" for name, value in base.items()]
    run = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=True, env=here())
    assert run.stdout.strip() == "7"


def test_an_option_without_its_value_is_one_mistake(base: dict[str, Any], tmp_path: Path) -> None:
    named = {name: value for name, value in base.items() if name != "model_name_or_path"}
    assert mistakes("--model_name_or_path", "--bf16", **named) == [
        "--model_name_or_path: has no value; write --model_name_or_path VALUE"
    ]
    for words in (("--args_file",), ("--args_file=",), ("--args_file", "--bf16")):
        assert mistakes(*words) == ["--args_file: has no value; write --args_file FILE"]


def test_a_second_file_of_settings_is_told(base: dict[str, Any], tmp_path: Path) -> None:
    (line,) = mistakes(write_yaml(tmp_path / "run.yaml", base), "other.yaml")
    assert line.startswith("command line: 'other.yaml' is a second file of settings; give one")


def test_an_args_file_that_is_no_text_is_a_mistake(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "picture.args").write_bytes(b"\xff\xd8\xff")
    assert mistakes("--args_file", str(tmp_path / "picture.args"), **base) == [
        f"{tmp_path / 'picture.args'}: cannot be read: it is not text in UTF-8; give a text file in UTF-8"
    ]


def test_an_args_file_that_is_not_there_is_a_mistake(base: dict[str, Any]) -> None:
    assert mistakes("--args_file", "nowhere.args", **base) == [
        "nowhere.args: is not there; check the name of the args file"
    ]


def test_a_bare_flag_leaves_the_next_word_alone(base: dict[str, Any], tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", base)
    settings = train("--plot_loss", yaml, "--gradient_checkpointing", "seed=3", "--no_use_fast_tokenizer", "--tf32")
    assert settings.finetuning.plot_loss and settings.value("gradient_checkpointing") is True
    assert settings.value("seed") == 3 and not settings.model.use_fast_tokenizer and settings.value("tf32") is True


def test_the_word_that_deepspeeds_launcher_puts_first_is_taken(base: dict[str, Any]) -> None:
    words = [word for name, value in base.items() for word in (f"--{name}", value)]
    assert train("--local_rank=3", *words, "--bf16").value("local_rank") == 3


def test_deepspeeds_settings_are_a_file_or_the_json_itself(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert train(f"deepspeed={tmp_path / 'ds.json'}", **base).value("deepspeed") == str(tmp_path / "ds.json")
    mapping = {"zero_optimization": {"stage": 2}}
    yaml = write_yaml(tmp_path / "run.yaml", base, "deepspeed: {zero_optimization: {stage: 2}}")
    for settings in (train("--deepspeed", json.dumps(mapping), **base), train(yaml)):
        assert settings.value("deepspeed") == mapping
        (tmp_path / "again.yaml").write_text(settings.as_yaml())
        assert train(str(tmp_path / "again.yaml")).value("deepspeed") == mapping
    (tmp_path / "ds.json").write_text("[1]")
    (line,) = mistakes(f"deepspeed={tmp_path / 'ds.json'}", **base)
    assert "is not an object of settings" in line


def test_a_negative_number_is_a_value_and_no_flag(base: dict[str, Any]) -> None:
    settings = train("--finetuning_type", "freeze", "--freeze_trainable_layers", "-1", **base)
    assert settings.finetuning.freeze_trainable_layers == -1


def test_names_are_never_abbreviated(base: dict[str, Any]) -> None:
    (line,) = mistakes("--label_smoothing", "0.1", **base)
    assert line == "command line: --label_smoothing '0.1' is not a setting; did you mean 'label_smoothing_factor'?"


# ---- types -----------------------------------------------------------------------------------------------------------


def test_yaml_values_are_what_was_written_not_what_yaml_makes_of_them(base: dict[str, Any], tmp_path: Path) -> None:
    yaml = write_yaml(
        tmp_path / "run.yaml",
        base,
        *("learning_rate: 1e-5", "save_strategy: no", "flash_attn: off", "run_name: 007", "max_samples: 1e3"),
        *("lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_kwargs: {min_lr: 1e-6}", "eval_steps: null"),
    )
    settings = train(yaml)
    values = {name: settings.value(name) for name in ("learning_rate", "save_strategy", "run_name", "max_samples")}
    assert values == {"learning_rate": 1e-5, "save_strategy": "no", "run_name": "007", "max_samples": 1000}
    assert settings.model.flash_attn == "off"
    assert settings.value("lr_scheduler_kwargs") == {"min_lr": 1e-6}
    assert settings.value("eval_steps") is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bf16=maybe", "'maybe' is neither true nor false; write true or false"),
        ("seed=1.5", "'1.5' is not a whole number; write 1 or 2"),
        ("learning_rate=fast", "'fast' is not a number; write a number such as 0.1 or 1e-5"),
        ("learning_rate=nan", "'nan' is not a number; write a number such as 0.1 or 1e-5"),
        ("lr_scheduler_type=cosin", "did you mean 'cosine'?"),
        ("lr_scheduler_kwargs=path.json", """'path.json' is not a mapping; write {"name": value}"""),
        ('lr_scheduler_kwargs={"a": 1', "check its brackets and quotes"),
        ("interleave_probs=0.5,half", "'0.5,half' is not a number"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_what_would_fit(base: dict[str, Any], word: str, message: str) -> None:
    (line,) = mistakes(word, **base)
    assert line.startswith(f"command line: {word.partition('=')[0]} ") and message in line


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: [1, 2\n", 3, "is not YAML"),
        ("seed: 1\n\tb: 2\n", 2, "is not YAML"),
        ("- seed\n- 1\n", 1, "found no `name: value` lines"),
        ("seed: 1\nbf16: true\nseed: 2\n", 3, "seed stands twice, first at line 1"),
    ],
)
def test_malformed_yaml_is_one_mistake_with_its_line(
    base: dict[str, Any], tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    (told,) = mistakes(str(path), **base)
    assert told.startswith(f"{path} line {line}: ") and message in told


def test_malformed_json_is_one_mistake_with_its_line(base: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{\n  "seed": 1,\n  "bf16": tru\n}\n')
    (told,) = mistakes(str(path), **base)
    assert told.startswith(f"{path} line 3: is not JSON")
    path.write_text('{\n  "seed": 1,\n  "seed": 2, "lora_rnk": 3\n}\n')
    assert [line.partition(": ")[2] for line in mistakes(str(path), **base)] == [
        "seed stands twice, first at line 2; keep one of them",
        "lora_rnk 3 is not a setting; did you mean 'lora_rank'?",
    ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("run.yaml", "", "holds no settings; write some, as in examples/"),
        ("run.yaml", "# nothing\n", "holds no settings; write some, as in examples/"),
        ("run.json", "{}", "holds no settings; write some, as in examples/"),
        ("run.yaml", "seed: 1\n\tbf16: true\n", "is not YAML"),
        ("rum.yaml", None, "is not there; did you mean '"),
        ("run.yaml", b"seed: \xff\xfe", "cannot be read: it is not text in UTF-8"),
    ],
)
def test_of_a_file_that_gives_nothing_only_that_is_told(
    tmp_path: Path, name: str, text: str | bytes | None, told: str
) -> None:
    (tmp_path / "run.yml").write_text("seed: 1\n")
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    (line,) = mistakes(str(path))
    assert told in line
    if text is None:
        assert line.endswith("run.yml'?")


def test_a_misspelt_file_of_rows_is_told_with_the_one_that_is_there(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "rows.jsonl"}}))
    for item, near in (
        (str(tmp_path / "rows.json"), str(tmp_path / "rows.jsonl")),  # in its own folder
        ("row.jsonl", "rows.jsonl"),  # in dataset_dir
        ("pairz", "pairs"),
    ):
        (line,) = mistakes(f"dataset_dir={tmp_path}", **{**base, "dataset": item})
        assert line.endswith(f"did you mean {near!r}?"), line


def test_a_catalog_on_a_hub_is_refused_by_name(base: dict[str, Any]) -> None:
    (line,) = mistakes("dataset_dir=REMOTE:someone/data", **{**base, "dataset": "pairs"})
    assert line.endswith(
        "names a catalog on a hub, which burnish does not read; give a folder that holds dataset_info.json"
    )


# ---- mistakes --------------------------------------------------------------------------------------------------------

SEVEN = """\
model_name_or_path: ./nowhere
stage: sfft
lora_rnk: 8
learning_rate: fast
dataset: pears
dataset_dir: {dataset_dir}
output_dir: out
template: qwem
val_size: 0.1
eval_dataset: pairs
do_eval: true
"""


def test_seven_different_mistakes_are_seven_lines_and_no_torch(tmp_path: Path, base: dict[str, Any]) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "rows.jsonl"}}))
    (tmp_path / "run.yaml").write_text(SEVEN.format(dataset_dir=tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", DIAGNOSIS, "train", "run.yaml"],
        cwd=tmp_path, env=here(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout.split() == ["2", "False"], run.stderr  # exit status, whether torch was imported
    lines = run.stderr.splitlines()
    starts = [
        "run.yaml line 1: model_name_or_path './nowhere' is not there",
        "run.yaml line 2: stage 'sfft' is not one of pt, sft; did you mean 'sft'?",
        "run.yaml line 3: lora_rnk '8' is not a setting; did you mean 'lora_rank'?",
        "run.yaml line 4: learning_rate 'fast' is not a number",
        f"run.yaml line 5: dataset 'pears' is not in {tmp_path / 'dataset_info.json'}; did you mean 'pairs'?",
        "run.yaml line 8: template 'qwem' is neither a template of burnish nor a file; did you mean 'qwen'?",
        "run.yaml line 9: val_size 0.1 and eval_dataset exclude each other",
    ]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


def test_what_is_required_and_missing_is_told(tmp_path: Path) -> None:
    told = mistakes()
    assert [line.split(" is missing")[0] for line in told] == [
        f"command line: {name}" for name in ("model_name_or_path", "dataset", "output_dir")
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["eval_strategy=steps"], "eval_strategy 'steps' has no rows to evaluate on"),
        (["do_eval=true"], "do_eval True has no rows to evaluate on"),
        (["streaming=true"], "streaming True does not know how many rows there are; set max_steps"),
        (["mask_history=true", "train_on_prompt=true"], "mask_history True and train_on_prompt exclude each other"),
        (
            ["interleave_probs=0.5,0.5", "mix_strategy=interleave_under"],
            "interleave_probs [0.5, 0.5] are 2 numbers for 1",
        ),
        (["interleave_probs=1"], "interleave_probs [1.0] does nothing with mix_strategy: concat"),
        (["finetuning_type=freeze", "lora_rank=16"], "lora_rank 16 does nothing with finetuning_type: freeze"),
        (["freeze_trainable_layers=3"], "freeze_trainable_layers 3 does nothing with finetuning_type: lora"),
        (["use_dora=true", "pissa_init=true"], "use_dora True and pissa_init exclude each other"),
        (["lora_dropout=1"], "lora_dropout 1.0 is not in [0, 1)"),
        (["save_strategy=best"], "save_strategy 'best' needs evaluation while training"),
        (["early_stopping_steps=3"], "early_stopping_steps 3 needs evaluation while training"),
        (["lr_scheduler_type=reduce_lr_on_plateau"], "needs evaluation while training"),
        (["lr_scheduler_type=warmup_stable_decay"], "needs num_decay_steps"),
        (
            ["lr_scheduler_type=constant_with_warmup", "warmup_steps=5", 'lr_scheduler_kwargs={"num_cycles": 1}'],
            "lr_scheduler_kwargs {'num_cycles': 1} does nothing with lr_scheduler_type: constant_with_warmup",
        ),
        (["warmup_ratio=0.1", "warmup_steps=10"], "warmup_ratio 0.1 and warmup_steps exclude each other"),
        (["seed=4294967296"], "seed 4294967296 is not in [0, 2**32)"),
        (["seed=-1"], "seed -1 is not in [0, 2**32)"),
        (["logging_steps=2.5"], "logging_steps 2.5 is neither a number of steps nor a share below 1"),
        (["per_device_train_batch_size=0"], "per_device_train_batch_size 0 is not at least 1"),
        (["dataloader_prefetch_factor=2"], "dataloader_prefetch_factor 2 needs workers"),
        (["fp16=true", "bf16=true"], "fp16 True and bf16 exclude each other"),
        (["fp16=true", "pure_bf16=true"], "pure_bf16 True and fp16 exclude each other"),
        (["pure_bf16=true", "optim=adafactor"], "optim 'adafactor' is not built for pure_bf16"),
        (
            ["pure_bf16=true", "deepspeed=examples/deepspeed/ds_z2_config.json"],
            "pure_bf16 True is not built with deepspeed",
        ),
        (["logging_nan_inf_filter=true"], "would hide a loss that is not a number"),
        (["deepspeed=ds.json"], "deepspeed 'ds.json' is not there; looked for the file /"),
        (["deepspeed=pyproject.toml"], "deepspeed 'pyproject.toml' is not JSON; correct it: Expecting value"),
        (["fsdp=full_shard"], "fsdp 'full_shard' is not built yet"),
        (["ddp_backend=mpi"], "ddp_backend 'mpi' is of a device that burnish does not train on"),
        (["ddp_timeout=0"], "ddp_timeout 0 is not at least 1"),
        (["skip_memory_metrics=false"], "skip_memory_metrics 'false' is not built"),
        (["dataloader_in_order=false"], "would let the order of rows depend on time"),
        (
            ["train_sampling_strategy=group_by_length", "streaming=true", "max_steps=1"],
            "train_sampling_strategy 'group_by_length' needs all rows at hand, not a stream",
        ),
        (["length_penalty=2"], "length_penalty 2.0 does nothing without beams"),
        (["optim=lomo"], "optim 'lomo' is not built"),
        (["report_to=wandbb"], "report_to 'wandbb' is not something transformers reports to; did you mean 'wandb'?"),
        (["resume_from_checkpoint=gone"], "resume_from_checkpoint 'gone' is not there"),
        (
            ["val_size=0.1", "load_best_model_at_end=true", "eval_strategy=epoch"],
            "needs save_strategy and eval_strategy to be the same, not steps and epoch",
        ),
        (
            [
                *("val_size=0.1", "load_best_model_at_end=true", "eval_strategy=steps"),
                *("eval_steps=4", "save_steps=6"),
            ],
            "needs save_steps (6) to be a multiple of eval_steps (4)",
        ),
        (["temperature=-1"], "temperature -1.0 is below 0"),
    ],
)
def test_what_cannot_go_together_is_told(
    base: dict[str, Any], words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    (line,) = mistakes(*words, **base)
    assert told in line and "; " in line  # what is wrong, and what to do


def test_what_is_refused_is_welcome_at_its_default(base: dict[str, Any]) -> None:
    words = ("fp16=false", "hub_strategy=every_save", "--deepspeed", "", "push_to_hub=no", "skip_memory_metrics=true")
    settings = train(*words, **base)
    assert settings.changes_that_matter(train(**base)) == []
    assert settings.value("deepspeed") is None and settings.as_yaml() == train(**base).as_yaml()


def test_a_wrong_value_that_a_later_one_replaces_is_no_mistake(base: dict[str, Any], tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", base, "stage: sfft")
    assert train(yaml, "stage=pt").finetuning.stage == "pt"


def test_a_hub_name_passes_and_a_path_must_be_there(base: dict[str, Any]) -> None:
    assert train(**{**base, "model_name_or_path": "Qwen/Qwen3-0.6B"}).model.model_name_or_path == "Qwen/Qwen3-0.6B"
    for wrong in ("./model", "/models/qwen", "a/b/c", "~/qwen-that-is-not-here"):
        (line,) = mistakes(**{**base, "model_name_or_path": wrong})
        assert "is not there; looked for the folder /" in line


def test_training_is_what_train_does_unless_only_evaluation_is_asked_for(base: dict[str, Any]) -> None:
    assert train(**base).value("do_train") is True
    assert train("do_eval=true", "val_size=0.5", **base).value("do_train") is False


def test_a_home_that_nobody_has_is_a_name_like_any_other(base: dict[str, Any]) -> None:
    settings = train(**{**base, "output_dir": "~nobody_here/out"})
    assert settings.value("output_dir").endswith("~nobody_here/out")
    (line,) = mistakes("resume_from_checkpoint=~nobody_here/checkpoint-1", **base)
    assert "is not there" in line
