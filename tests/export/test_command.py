"""`burnish export` as a person runs it, on SmolLM2: from settings to a folder that answers as the adapter did."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import here
from export.parts import make_adapter, make_base, out_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from burnish import cli
from burnish.arguments.parse import parse_command
from burnish.export.listing import read_listing
from burnish.workflow import load_engine

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

QUESTIONS = ("What is the capital of France?", "Who are you?", "Write one sentence about the sea.")


@pytest.fixture(scope="module")
def smollm2(fixture_path: Callable[[str], Path]) -> str:
    return str(fixture_path("smollm2"))


@pytest.fixture(scope="module")
def adapter(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """It moves the answers, and they stay language."""
    folder = make_adapter(smollm2, tmp_path_factory.mktemp("run") / "adapter", trained=False)
    file = Path(folder) / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = load_file(file)
    moved = {
        name: (0.02 * torch.randn(weight.shape, generator=generator)).to(weight.dtype) if "lora_B" in name else weight
        for name, weight in weights.items()
    }
    save_file(moved, file, metadata={"format": "pt"})
    return folder


def answers(*words: str) -> list[list[int]]:
    engine = load_engine(parse_command("chat", [*words, "--use_cpu"]))
    prompts = [engine.template.prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    return engine.generate(prompts, do_sample=False, max_new_tokens=8)


@pytest.mark.slow
def test_the_command_of_2024_gives_a_folder_that_answers_as_base_and_adapter(
    smollm2: str, adapter: str, tmp_path: Path
):
    out = tmp_path / "exports" / "tuned"
    words = [
        *("--model_name_or_path", smollm2, "--adapter_name_or_path", adapter, "--template", "smollm2"),
        *(
            "--finetuning_type",
            "lora",
            "--export_dir",
            str(out),
            "--export_size",
            "2",
            "--export_legacy_format",
            "False",
        ),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "burnish", "export", *words], capture_output=True, text=True, check=False, env=here()
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "weights: bfloat16, 134,515,008 parameters in 0.27 GB, 1 file" in lines
    assert lines[-1] == f"exported model: {out}"
    assert not any(word in done.stderr for word in ("Traceback", "Loading weights", "Warning")), done.stderr
    assert read_listing(out) == read_listing(Path(smollm2))
    asked = answers("--model_name_or_path", str(out))
    assert asked == answers("--model_name_or_path", smollm2, "--adapter_name_or_path", adapter)
    assert asked != answers("--model_name_or_path", smollm2)


def test_a_training_file_exports_what_its_run_left(tmp_path: Path):
    """A6: the adapter in output_dir for lora, the model there for full; what only training reads is passed by."""
    base = make_base("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "saves")
    file = tmp_path / "run.yaml"
    settings = {"model_name_or_path": base, "output_dir": adapter, "dataset": "identity", "learning_rate": 1e-4}
    file.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()) + "finetuning_type: lora\n")
    assert cli.main(["export", str(file), f"export_dir={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert [each["name"] for each in report["adapters"]] == ["saves"]
    whole = make_base("qwen3", tmp_path / "whole")
    words = ["export", str(file), f"output_dir={whole}", "finetuning_type=full", f"export_dir={tmp_path / 'second'}"]
    assert cli.main(words) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "second").config.model_type == "qwen3"


def test_llamafactorys_file_for_merging_runs_unchanged_but_for_its_paths(
    fixture_path: Callable[[str], Path], smollm2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (file,) = (fixture_path("llamafactory-data") / "examples" / "merge_lora").glob("qwen3_lora_sft.yaml")
    base = make_base("qwen3", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    words = [f"model_name_or_path={base}", f"adapter_name_or_path={adapter}", f"export_dir={tmp_path / 'out'}"]
    # its template wants the tokens of Qwen3's tokenizer, which this small model has not
    assert cli.main(["export", str(file), *words, "template=default"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "export_legacy_format" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "device"), [([], "cpu"), (["export_device=auto"], "cuda")])
def test_the_model_is_merged_on_the_cpu_or_on_the_gpu_if_there_is_one(
    words: list[str], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base = make_base("llama", tmp_path / "base")
    asked: list[str] = []

    def load(args: object, *, device: str, **how: object) -> None:
        asked.append(device)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("burnish.export.run.load_model", load)
    status, told = refusal(capsys, f"model_name_or_path={base}", f"export_dir={tmp_path / 'out'}", *words)
    assert (asked, status) == ([device], 1) and "set export_device: cpu" in told


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = cli.main(["export", *words])
    return status, capsys.readouterr().err


def test_what_is_given_wrongly_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = make_base("llama", tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("")
    for words, message in (
        ([f"model_name_or_path={base}"], "export_dir is missing; give the folder for the exported model"),
        ([f"model_name_or_path={base}", f"export_dir={out}"], "is not empty; name a folder that is not there yet"),
        ([f"model_name_or_path={base}", "export_dir=new", "export_size=0"], "is not at least 1"),
        ([f"model_name_or_path={base}", "export_dir=new", "export_dri=x"], "did you mean 'export_dir'?"),
        ([f"model_name_or_path={tmp_path}/none", "export_dir=new"], "is not there; looked for the folder"),
        ([f"model_name_or_path={base}", "export_dir=new", "export_quantization_bit=4"], "is not built yet"),
    ):
        status, told = refusal(capsys, *words)
        assert status == 2 and message in told and "Traceback" not in told, told
        assert len(told.strip().splitlines()) == 1, told
    status, told = refusal(capsys, f"model_name_or_path={tmp_path}/none", f"export_dir={out}")
    assert status == 2 and len(told.strip().splitlines()) == 2, told


def test_an_adapter_of_another_model_is_refused_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    adapter = make_adapter(make_base("gpt2", tmp_path / "other"), tmp_path / "adapter")
    base = make_base("llama", tmp_path / "base")
    words = (f"model_name_or_path={base}", f"adapter_name_or_path={adapter}", f"export_dir={tmp_path / 'out'}")
    status, told = refusal(capsys, *words)
    assert status == 2 and "does not fit this model" in told
    assert out_of(tmp_path) == []


def test_an_untrained_adapter_is_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = make_base("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", trained=False)
    words = (f"model_name_or_path={base}", f"adapter_name_or_path={adapter}", f"export_dir={tmp_path / 'out'}")
    status, told = refusal(capsys, *words)
    assert status == 1 and "changes no answer" in told and out_of(tmp_path) == ["out.failed"]
