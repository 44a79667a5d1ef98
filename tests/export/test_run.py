"""An export through all its steps, on small models: what stands in the folder is base and adapter, and nothing less."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from export.parts import export, make_adapter, make_base, out_of
from families import logits, shake
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from burnish.errors import RunStopped, UserError
from burnish.export import run
from burnish.export.listing import read_listing

FAMILIES = ["llama", "qwen3", "gemma3", "mixtral", "qwen2_moe", "deepseek_v3", "gpt2", "gemma3_with_eyes"]
# peft asks transformers for gradient checkpointing by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def unmerged(base: str, *adapters: str) -> Any:
    """Plain peft in float32: every adapter but the last merged, the last one beside the weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return PeftModel.from_pretrained(model, adapters[-1]) if adapters else model


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# ---- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_answers_as_base_and_adapter_and_holds_what_the_base_holds(tmp_path: Path, family: str):
    base = make_base(family, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    report = export(base, tmp_path / "out", adapter, shard_bytes=40_000)
    out = tmp_path / "out"
    assert torch.allclose(logits(loaded(out)), logits(unmerged(base, adapter)), atol=1e-5)
    assert not torch.allclose(logits(loaded(out)), logits(loaded(Path(base))), atol=1e-2)
    assert read_listing(out) == read_listing(Path(base))
    assert report["passed"] and report["differs_from_base"] and report["adapters"][0]["unused_tensors"] == []
    assert json.loads((out / "export_report.json").read_text()) == report


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"pissa_init": True},
        {"lora_target": ["q_proj", "embed_tokens", "lm_head"]},
        {"additional_target": ["embed_tokens", "lm_head", "norm"]},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_adapter_is_merged(tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype):
    base = make_base("llama", tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    report = export(base, tmp_path / "out", adapter)
    assert report["from_disk_against_base_and_adapters"]["relative"] < (1e-5 if dtype == torch.float32 else 1e-2)
    assert read_listing(tmp_path / "out") == read_listing(Path(base))


def test_a_bf16_weight_is_computed_in_float32_and_rounded_once(tmp_path: Path):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    file = Path(adapter) / "adapter_model.safetensors"
    small = {name: 1.001 * tensor.float() for name, tensor in load_file(file).items()}  # more than bf16 can hold
    save_file(small, file, metadata={"format": "pt"})
    export(base, tmp_path / "out", adapter)
    name = "model.layers.1.self_attn.q_proj"
    before, after = load_file(Path(base) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    a, b = (small[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    exact = before[f"{name}.weight"].float() + 2.0 * (b @ a)  # alpha is twice the rank
    assert torch.equal(after[f"{name}.weight"], exact.bfloat16())
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_a_few_float32_weights_in_a_bf16_model_stay_float32(tmp_path: Path):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    file = Path(base) / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.k_proj.weight"] = weights["model.layers.0.self_attn.k_proj.weight"].float()
    weights["model.layers.0.self_attn.k_proj.weight"] += 1e-5  # what bf16 cannot hold
    save_file(weights, file, metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", lora_target=["q_proj"])
    report = export(base, tmp_path / "out", adapter)
    assert read_listing(tmp_path / "out") == read_listing(Path(base)) and report["dtype"] == "bfloat16"
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(after[name], weights[name])


def test_infer_dtype_writes_the_weights_in_another_dtype(tmp_path: Path):
    base = make_base("qwen3", tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    report = export(base, tmp_path / "out", adapter, infer_dtype="float32")
    assert report["dtype"] == "float32" and report["from_disk_against_base_and_adapters"]["relative"] < 1e-5
    assert {entry.dtype for entry in read_listing(tmp_path / "out").values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_shards_are_no_larger_than_asked_and_an_index_names_them(tmp_path: Path):
    base = make_base("llama", tmp_path / "base")
    report = export(base, tmp_path / "out", make_adapter(base, tmp_path / "adapter"), shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report["files"]) and len(report["files"]) > 2
    header = 8_000  # names and shapes come on top
    assert all(size <= 40_000 + header for size in report["files"].values())
    assert index["metadata"]["total_size"] == 4 * report["parameters"]


def test_adapters_are_merged_in_their_order(tmp_path: Path):
    """DoRA scales the weight it finds, so order shows."""
    base = make_base("llama", tmp_path / "base")
    first = make_adapter(base, tmp_path / "first", seed=1, use_dora=True)
    second = make_adapter(base, tmp_path / "second", seed=2, use_dora=True)
    report = export(base, tmp_path / "out", first, second)
    assert torch.allclose(logits(loaded(tmp_path / "out")), logits(unmerged(base, first, second)), atol=1e-5)
    assert [adapter["name"] for adapter in report["adapters"]] == ["first", "second"]


def test_without_adapters_the_model_itself_is_written(tmp_path: Path):
    """What a full or freeze run left."""
    base = make_base("qwen3", tmp_path / "base", torch.bfloat16)
    report = export(base, tmp_path / "out", shard_bytes=40_000)
    assert report["from_disk_against_base"]["relative"] == 0 and report["differs_from_base"] is None
    assert read_listing(tmp_path / "out") == read_listing(Path(base))


@pytest.mark.parametrize(
    "where", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_head_that_another_program_tuned_apart_from_its_embedding_becomes_a_matrix_of_its_own(
    tmp_path: Path, where: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    base = make_base("qwen3", tmp_path / "base")
    model: Any = get_peft_model(loaded(Path(base)), LoraConfig(task_type="CAUSAL_LM", **where))
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what peft has to say of it is not repeated
        report = export(base, tmp_path / "out", str(tmp_path / "adapter"))
    assert report["untied_by_the_adapter"] == ["lm_head.weight"]
    assert "embedding and head are two matrices now" in capsys.readouterr().err
    assert torch.allclose(logits(loaded(tmp_path / "out")), logits(model), atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_grown_vocabulary_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = make_base("llama", tmp_path / "base")
    settings = {"resize_vocab": True, "add_special_tokens": ["<|tool|>"]}
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    report = export(base, tmp_path / "out", adapter, **settings)
    assert report["grown_by_resize_vocab"] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert "larger than in the base (resize_vocab): lm_head.weight" in capsys.readouterr().err
    assert read_listing(tmp_path / "out")["lm_head.weight"].shape == (128, 32)
    assert "<|tool|>" in (tmp_path / "out" / "tokenizer.json").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 128


def test_a_base_with_names_of_an_older_format_is_written_with_todays(tmp_path: Path):
    """GPT-2's own files lack the `transformer.` before every name and hold masks that are no weights."""
    base = make_base("gpt2", tmp_path / "base")
    file = Path(base) / "model.safetensors"
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, file, metadata={"format": "pt"})
    report = export(base, tmp_path / "out", make_adapter(base, tmp_path / "adapter"))
    assert report["weights_of_the_base_left_out"] == ["h.0.attn.bias"]
    assert "transformer.wte.weight" in read_listing(tmp_path / "out")


def test_a_base_of_pickled_weights_becomes_safetensors(tmp_path: Path):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    file = Path(base) / "model.safetensors"
    torch.save(load_file(file), Path(base) / "pytorch_model.bin")
    file.unlink()
    adapter = make_adapter(base, tmp_path / "adapter")
    assert export(base, tmp_path / "out", adapter)["dtype"] == "bfloat16"
    assert read_listing(tmp_path / "out") == read_listing(Path(base))


# ---- what is found to be wrong -----------------------------------------------------------------------------------


def fault(*given: Any, **settings: Any) -> str:
    with pytest.raises(RunStopped) as stopped:
        export(*given, **settings)
    assert stopped.value.status == 1
    return str(stopped.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_weight_in_one_shard_is_caught(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    base = make_base("llama", tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter")
    write = run.write_weights

    def write_and_break(model: Any, folder: Path, most_bytes: int, **how: Any) -> None:
        write(model, folder, most_bytes, **how)
        file = sorted(folder.glob("*.safetensors"))[-1]
        weights = load_file(file)
        weights["model.layers.2.mlp.down_proj.weight"][3, 5] += 0.25
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(run, "write_weights", write_and_break)
    assert "the files do not hold what was written" in fault(base, tmp_path / "out", adapter)
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "out.failed" / "export_report.json").read_text())
    assert report["passed"] is False and "do not hold" in report["faults"][0]


def test_a_wrong_merge_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge = run.merge_exactly

    def merge_without_the_last_layer(tuned: Any, name: str) -> Any:
        for parameter in tuned.base_model.model.model.layers[2].mlp.down_proj.lora_B.parameters():
            parameter.data.zero_()
        return merge(tuned, name)

    monkeypatch.setattr(run, "merge_exactly", merge_without_the_last_layer)
    message = fault(base, tmp_path / "out", adapter)
    assert "adapter answers differently" in message and "it does not answer as base and adapter" in message


def test_names_and_number_formats_that_are_not_the_bases_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nobody who loads the folder would miss them: the answers are the same."""
    base = make_base("llama", tmp_path / "base")
    write = run.write_weights

    def write_more(model: Any, folder: Path, most_bytes: int, **how: Any) -> None:
        write(model, folder, most_bytes, **how)
        weights = load_file(folder / "model.safetensors")
        more = {"model.extra.weight": torch.ones(3), "model.norm.weight": weights["model.norm.weight"].bfloat16()}
        save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(run, "write_weights", write_more)
    message = fault(base, tmp_path / "out", make_adapter(base, tmp_path / "adapter"))
    assert "1 weights are not in the base: model.extra.weight" in message
    assert "1 weights have another number format than they were to have: model.norm.weight" in message


def test_an_untrained_adapter_is_no_export(tmp_path: Path):
    base = make_base("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", trained=False)
    assert "changes no answer: it is untrained" in fault(base, tmp_path / "out", adapter)


def test_an_adapter_that_bf16_rounds_away_is_told_with_what_keeps_it(tmp_path: Path):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", trained=False)
    file = Path(adapter) / "adapter_model.safetensors"
    weights = {n: torch.full_like(w, 2e-6) if "lora_B" in n else w for n, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    message = fault(base, tmp_path / "out", adapter)
    assert "bfloat16 rounds away what it learned" in message and "infer_dtype: float32" in message
    assert export(base, tmp_path / "wide", adapter, infer_dtype="float32")["lost_to_rounding"] < 0.01


def test_an_adapter_with_numbers_that_are_none_is_refused(tmp_path: Path):
    base = make_base("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    file = Path(adapter) / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot be merged"):
        export(base, tmp_path / "out", adapter)
    assert out_of(tmp_path) == []


# ---- the folder --------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused_and_left_as_it_is(tmp_path: Path):
    base = make_base("llama", tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"export_dir .*is not empty; name a folder that is not there yet"):
        export(base, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"] and out_of(tmp_path) == ["out"]


def test_an_empty_folder_is_taken_and_a_file_is_refused(tmp_path: Path):
    base = make_base("llama", tmp_path / "base")
    (tmp_path / "out").mkdir()
    assert export(base, tmp_path / "out")["passed"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        export(base, tmp_path / "file")


def test_a_link_leads_to_the_folder_that_is_filled_and_a_disk_of_its_own_is_refused(tmp_path: Path):
    base = make_base("llama", tmp_path / "base")
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk" / "tuned")
    export(base, tmp_path / "out")
    assert (tmp_path / "large disk" / "tuned" / "model.safetensors").is_file() and (tmp_path / "out").is_symlink()
    with pytest.raises(UserError, match="export_dir '/dev' is a disk of its own; name a folder on it"):
        export(base, Path("/dev"))


def test_a_disk_that_is_too_full_is_told_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make_base("llama", tmp_path / "base")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    monkeypatch.setattr(run, "load_model", lambda *a, **k: pytest.fail("was loaded"))
    with pytest.raises(UserError, match=r"needs 0\.0 GB, and its disk has 0\.0 GB free"):
        export(base, tmp_path / "out")
    assert out_of(tmp_path) == []


def test_what_stops_in_the_middle_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make_base("llama", tmp_path / "base")

    def stop(*given: Any, **how: Any) -> None:
        assert (tmp_path / ".out.partial" / "model.safetensors").is_file() and not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "keep_config", stop)
        with pytest.raises(KeyboardInterrupt):
            export(base, tmp_path / "out")
    assert out_of(tmp_path) == []
    (tmp_path / ".out.partial").mkdir()  # what a kill leaves
    (tmp_path / ".out.partial" / "stale.json").write_text("{}")
    export(base, tmp_path / "out")
    assert not (tmp_path / "out" / "stale.json").exists() and out_of(tmp_path) == ["out"]


def test_a_disk_that_becomes_full_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make_base("llama", tmp_path / "base")

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, "write_tokenizer", full)
    assert fault(base, tmp_path / "out").endswith("could not be written: [Errno 28] No space left on device")
    assert out_of(tmp_path) == []


def test_a_model_is_whole_though_nobody_reads_about_it_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`burnish export … | head -1`"""
    base = make_base("llama", tmp_path / "base")

    def gone(message: str = "") -> None:
        raise SystemExit(1)  # what rich makes of a broken pipe

    monkeypatch.setattr(run.console, "say", gone)
    with pytest.raises(SystemExit):
        export(base, tmp_path / "out")
    assert out_of(tmp_path) == ["out"]


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08" + bytes(7) + b"{}      "])
def test_a_file_of_weights_that_is_none_is_told(tmp_path: Path, content: bytes):
    base = make_base("llama", tmp_path / "base")
    (Path(base) / "model.safetensors").write_bytes(content)
    with pytest.raises(
        UserError, match=r"model\.safetensors: cannot be read|base: holds files of weights with no weights"
    ):
        export(base, tmp_path / "out")
    assert out_of(tmp_path) == []


def test_a_device_without_the_memory_is_told_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make_base("llama", tmp_path / "base")

    def too_large(*given: Any, **how: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(run, "load_model", too_large)
    assert "set export_device: cpu" in fault(base, tmp_path / "out")


# ---- the first Qwen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_the_first_qwen_keeps_its_names_and_needs_no_code(tmp_path: Path, trust_remote_code: bool):
    from qwen1 import make_qwen1

    base = str(make_qwen1(tmp_path / "base"))
    adapter = make_adapter(base, tmp_path / "adapter", lora_target=["c_attn", "c_proj"])
    out = tmp_path / "out"
    report = export(base, out, adapter, trust_remote_code=trust_remote_code)
    assert report["adapters"][0]["tensors"] == 2 * 3 * 2  # A and B of three layers in two blocks
    assert read_listing(out) == read_listing(Path(base))
    assert "transformer.h.0.attn.c_attn.weight" in read_listing(out)
    config = json.loads((out / "config.json").read_text())
    published = json.loads((Path(base) / "config.json").read_text())
    assert "auto_map" not in config
    published.pop("auto_map")
    assert {name: config[name] for name in published} == published
    assert not list(out.glob("*.py")) and (out / "tokenizer.json").is_file()
