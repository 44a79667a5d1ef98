"""Names of other years and other tools: translated, told or refused, each by name and never silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.arguments import legacy, refused
from burnish.arguments.fields import known_fields
from burnish.arguments.parse import parse_command
from burnish.arguments.settings import Settings
from burnish.errors import UserError


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return [
        *(f"model_name_or_path={tmp_path}", f"dataset={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'out'}"),
    ]


def refusal(words: list[str], *more: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_command("train", [*words, *more])
    (problem,) = caught.value.problems
    return str(problem)


def given(settings: Settings, *names: str) -> dict[str, object]:
    return {name: settings.value(name) for name in names}


@pytest.mark.parametrize(
    ("old", "name", "value"),
    [
        ("--evaluation_strategy steps --val_size 1", "eval_strategy", "steps"),
        ("--evaluation-strategy=steps --val_size 1", "eval_strategy", "steps"),
        ("--new_special_tokens <a>,<b>", "add_special_tokens", ["<a>", "<b>"]),
        ("--use_cache false", "use_kv_cache", False),
        ("--resume_lora_training false", "create_new_adapter", True),
        ("--disable_gradient_checkpointing", "gradient_checkpointing", False),
        ("--use_reentrant_gc", "gradient_checkpointing_kwargs", {"use_reentrant": True}),
        ("--activation_checkpointing", "gradient_checkpointing", True),
        ("--flash_attn true", "flash_attn", "auto"),
        ("--flash_attn --seed 1", "flash_attn", "auto"),
        ("--flash_attn false", "flash_attn", "disabled"),
        ("--per_gpu_train_batch_size 3", "per_device_train_batch_size", 3),
        ("--no_cuda", "use_cpu", True),
        ("--adafactor", "optim", "adafactor"),
        ("--num_layer_trainable 1 --finetuning_type freeze", "freeze_trainable_layers", 1),
        ("--name_module_trainable mlp,attn --finetuning_type freeze", "freeze_trainable_modules", ["mlp", "attn"]),
        ("--group_by_length", "train_sampling_strategy", "group_by_length"),
        ("--disable_shuffling", "train_sampling_strategy", "sequential"),
        ("--train_last_turn_only", "mask_history", True),
        ("--lora_lr_ratio 16", "loraplus_lr_ratio", 16.0),
        ("--sft_packing", "packing", True),
        ("--neat_packing true", "packing", True),
        ("packing=true neat_packing=false", "packing", True),
        ("--cache_path tokens", "tokenized_path", "tokens"),
        ("--warmup_ratio 0.1", "warmup_ratio", 0.1),
        ("--logging_dir logs", "logging_dir", "logs"),
        ("--overwrite_output_dir", "overwrite_output_dir", True),
    ],
)
def test_an_old_name_means_todays(words: list[str], old: str, name: str, value: object) -> None:
    assert parse_command("train", [*words, *old.split()]).value(name) == value


def test_what_was_translated_is_kept_for_one_table(words: list[str]) -> None:
    more = ("--evaluation_strategy", "no", "--use_unsloth", "--preprocessing_num_workers", "16", "sft_packing=false")
    assert parse_command("train", [*words, *more]).translated == [
        ("evaluation_strategy: no", "eval_strategy: no", ""),
        ("use_unsloth", "", "the fused head and packed attention are always on"),
        ("preprocessing_num_workers", "", "the number of workers is chosen by itself"),
    ]


@pytest.mark.parametrize("name", sorted(set(refused.REFUSED) - set(refused.OF_EXPORT)))
def test_what_burnish_does_not_have_is_refused_by_name_and_welcome_when_off(words: list[str], name: str) -> None:
    line = refusal(words, f"{name}=17.5")
    assert line.startswith(f"command line: {name} '17.5' {refused.REFUSED[name][0]}; ")
    if name in refused.ASK_WHEN_OFF:
        assert refusal(words, f"{name}=false").endswith("leave it out")
    else:
        parse_command("train", [*words, f"{name}=false", f"{name}=", f"{name}=null"])


@pytest.mark.parametrize("name", sorted(refused.DEFAULTS_OF_REFUSED))
def test_what_burnish_does_not_have_is_welcome_at_its_own_default(words: list[str], name: str) -> None:
    assert name in refused.REFUSED
    parse_command("train", [*words, f"{name}={refused.DEFAULTS_OF_REFUSED[name]}"])


def test_numbers_are_the_default_however_they_are_written(words: list[str]) -> None:
    parse_command("train", [*words, "video_fps=2.0", "ppo_target=6.0", "loraplus_lr_embedding=1e-6"])


def test_an_old_switch_that_is_off_leaves_todays_setting_alone(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim: sgd\nadafactor: false\ngroup_by_length: true\ntrain_sampling_strategy: group_by_length\n")
    settings = parse_command("train", [str(path), *words])
    assert given(settings, "optim", "train_sampling_strategy") == {
        "optim": "sgd",
        "train_sampling_strategy": "group_by_length",
    }
    path.write_text("group_by_length: true\n")
    settings = parse_command("train", [str(path), *words, "--group_by_length", "false"])
    assert settings.value("train_sampling_strategy") == "random"


@pytest.mark.parametrize("stage", ["rm", "dpo", "kto", "ppo"])
def test_a_stage_that_is_not_built_is_refused_by_name(words: list[str], stage: str) -> None:
    assert refusal(words, f"stage={stage}") == f"command line: stage '{stage}' is not built yet; choose pt or sft"


@pytest.mark.parametrize(
    ("old", "told"),
    [
        ("dpo_beta=0.2", "dpo_beta '0.2' is of preference training"),
        ("resume_lora_training=perhaps", "resume_lora_training 'perhaps' is neither true nor false"),
        ("export_legacy_format=true", "weights are always saved as safetensors"),
        ("save_safetensors=false", "weights are always saved as safetensors"),
        ("infer_backend=vllm", "the only engine for now is huggingface"),
        ("train_sampling_strategy=batch_rebalance", "choose random, sequential or group_by_length"),
        ("tpu_num_cores=8", "is of TPUs, which burnish does not train on"),
        ("use_mps_device=true", "or set use_cpu: true"),
        ("push_to_hub_token=secret", "upload output_dir with `hf upload`"),
        ("sharded_ddp=simple", "deepspeed: examples/deepspeed/ds_z2_config.json divides the optimizer"),
        ("fsdp=full_shard", "deepspeed: examples/deepspeed/ds_z3_config.json divides a model"),
        ("max_source_length=512", "set cutoff_len to the sum of the two"),
    ],
)
def test_a_refusal_names_what_was_typed(words: list[str], old: str, told: str) -> None:
    assert told in refusal(words, old)


def test_a_setting_that_changes_nothing_any_more_is_told(words: list[str]) -> None:
    settings = parse_command("train", [*words, "save_safetensors=true", "visual_inputs=false", "reserved_label_len=1"])
    assert [old for old, _, _ in settings.translated] == ["save_safetensors", "visual_inputs", "reserved_label_len"]


def test_what_export_needs_is_told_to_train_and_read_by_export(words: list[str]) -> None:
    more = ("--export_dir", "out/whole", "--export_size", "2", "--export_quantization_bit", "4")
    settings = parse_command("train", [*words, *more])
    told = [(name, "", "is for burnish export") for name in ("export_dir", "export_size", "export_quantization_bit")]
    assert settings.translated == told and settings.value("export_dir") is None
    words = [word for word in words if not word.startswith("dataset")]
    more = (*more[:4], "--export_legacy_format", "False", "finetuning_type=full")
    settings = parse_command("export", [*words, *more])
    assert given(settings, "export_dir", "export_size") == {"export_dir": "out/whole", "export_size": 2}
    assert settings.translated == [("export_legacy_format", "", "weights are always safetensors")]
    with pytest.raises(UserError) as caught:
        parse_command("export", [*words, *more, "--export_quantization_bit", "4", "--export_legacy_format"])
    assert [str(problem) for problem in caught.value.problems] == [
        "--export_legacy_format: 'true' is refused; weights are always saved as safetensors",
        "--export_quantization_bit: '4' is not built yet; leave it out; the weights are exported in their own dtype",
    ]


def test_two_names_of_one_setting_that_disagree_in_one_file_are_a_mistake(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("eval_strategy: 'no'\nevaluation_strategy: steps\nval_size: 1\n")
    assert refusal([str(path), *words]).startswith(
        f"{path} line 2: evaluation_strategy 'steps' says otherwise than eval_strategy"
    )


def test_a_file_of_llama_factory_runs_as_it_is(words: list[str], tmp_path: Path) -> None:
    """The settings that its recipes for LoRA carry, each of them."""
    path = tmp_path / "qwen3_lora_sft.yaml"
    path.write_text(
        "\n".join(
            [
                *("trust_remote_code: true", "stage: sft", "do_train: true", "finetuning_type: lora", "lora_rank: 8"),
                *("lora_target: all", "template: qwen3_nothink", "cutoff_len: 2048", "max_samples: 1000"),
                *("preprocessing_num_workers: 16", "dataloader_num_workers: 4", "logging_steps: 10", "save_steps: 500"),
                *("plot_loss: true", "overwrite_output_dir: true", "save_only_model: false"),
                *("report_to: none  # choices: [none, wandb]", "per_device_train_batch_size: 1"),
                *("gradient_accumulation_steps: 8", "learning_rate: 1.0e-4", "num_train_epochs: 3.0"),
                *("lr_scheduler_type: cosine", "warmup_ratio: 0.1", "bf16: true", "ddp_timeout: 180000000"),
                "resume_from_checkpoint: null",
            ]
        )
    )
    settings = parse_command("train", [str(path), *words])
    assert settings.value("report_to") == ["none"] and settings.value("resume_from_checkpoint") is None
    assert given(settings, "learning_rate", "num_train_epochs") == {"learning_rate": 1e-4, "num_train_epochs": 3.0}
    assert [old for old, _, _ in settings.translated] == ["preprocessing_num_workers"]


def test_no_name_is_in_two_tables_and_every_new_name_is_known() -> None:
    tables = [legacy.RENAMED, legacy.ALSO_CALLED, legacy.TOLD, legacy.TOLD_AT, refused.REFUSED]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    known = set(known_fields()) | set(refused.REFUSED)
    assert {new for new, _ in legacy.RENAMED.values()} | set(legacy.ALSO_CALLED.values()) <= known
    assert not set(names) & (set(known_fields()) - set(legacy.ALSO_CALLED))
