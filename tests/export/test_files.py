"""What stands beside the weights: the base's own files wherever they still hold, new ones where they do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from export.parts import export, make_adapter, make_base
from huggingface_hub import HfApi
from transformers import AutoTokenizer, GenerationConfig

from burnish.chat.template import load_template
from burnish.errors import RunStopped, UserError
from burnish.export.run import Order, export_model
from burnish.model.arguments import ModelArguments

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path: Path, **changes: object) -> dict:
    content = read(path) | changes
    path.write_text(json.dumps(content), encoding="utf-8")
    return content


def export_with_template(base: Path, out: Path, name: str | None, **settings: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = load_template(tokenizer, name)
    args = ModelArguments(model_name_or_path=str(base), export_dir=str(out), **settings)  # type: ignore[arg-type]
    export_model(Order(args, tokenizer, template))


@pytest.fixture
def base(tmp_path: Path, fixture_path: Callable[[str], Path]) -> Path:
    """A small model with SmolLM2's tokenizer."""
    from small import small_model

    folder = tmp_path / "base"
    small_model("llama", vocab_size=49152).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(fixture_path("smollm2") / name, folder / name)
    return folder


def test_config_and_tokenizer_stay_in_the_form_that_older_programs_read(base: Path, tmp_path: Path):
    config = read(base / "config.json")
    old = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 50_000.0, "torch_dtype": "float32", "transformers_version": "4.40.0"}
    (base / "config.json").write_text(json.dumps(old), encoding="utf-8")
    export_with_template(base, tmp_path / "out", None)
    assert read(tmp_path / "out" / "config.json") == old
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).exists()
    kept, published = (read(folder / "tokenizer_config.json") for folder in (tmp_path / "out", base))
    assert kept.pop("chat_template") and published.pop("chat_template") and kept == published
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_chat_template_of_the_run_is_saved_and_its_stop_tokens_end_answers(base: Path, tmp_path: Path):
    edit(base / "generation_config.json", eos_token_id=0, temperature=0.6)  # contradicts itself: no sampling
    export_with_template(base, tmp_path / "out", "chatml")
    jinja = (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8")
    assert "ChatML: every turn between" in jinja
    assert read(tmp_path / "out" / "tokenizer_config.json")["chat_template"] == jinja
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == jinja
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [2, 0]  # <|im_end|>, then the model's own
    assert generation.do_sample is True and generation.temperature == 0.6
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")


def test_added_tokens_are_in_a_new_tokenizer(base: Path, tmp_path: Path):
    args = ModelArguments(
        str(base), export_dir=str(tmp_path / "out"), add_special_tokens=["<|tool|>"], resize_vocab=True
    )
    from burnish.model.tokenizer import load_tokenizer

    export_model(Order(args, load_tokenizer(args), None))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|tool|>") == 49152


def test_licences_and_unknown_small_files_come_along_and_what_a_run_left_does_not(tmp_path: Path):
    base = Path(make_base("llama", tmp_path / "base"))
    kept = ("LICENSE", "Notice.txt", "USE_POLICY.md", "preprocessor_config.json", "tekken.json")
    left = (
        *("trainer_state.json", "train_results.json", "optimizer.pt", "burnish.yaml", "trainer_log.jsonl", "x.gguf"),
        *("modeling_own.py", "training_loss.png", "Modelfile", "export_report.json", "model.safetensors.index.json"),
    )
    for name in (*kept, *left):
        (base / name).write_text("{}")
    export(str(base), tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(kept) <= written
    assert written - set(kept) == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("README.md", "Modelfile", "export_report.json"),
    }
    assert (tmp_path / "out" / "Modelfile").read_text() != "{}"


def test_code_of_the_base_comes_along_only_where_it_may_run(tmp_path: Path):
    base = Path(make_base("llama", tmp_path / "base"))
    (base / "own.py").write_text("x = 1\n")
    edit(base / "config.json", auto_map={"AutoModel": "own.Model"})
    export(str(base), tmp_path / "out")
    assert not (tmp_path / "out" / "own.py").exists() and "auto_map" not in read(tmp_path / "out" / "config.json")
    export(str(base), tmp_path / "trusted", trust_remote_code=True)
    assert (tmp_path / "trusted" / "own.py").exists()
    assert read(tmp_path / "trusted" / "config.json")["auto_map"] == {"AutoModel": "own.Model"}


# ---- the model card ----------------------------------------------------------------------------------------------


def test_the_card_says_what_it_was_made_of_and_keeps_what_the_run_said(tmp_path: Path):
    base = Path(make_base("llama", tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\ntags: [chat]\n---\n# Base\n")
    adapter = Path(make_adapter(str(base), tmp_path / "adapter"))
    (adapter / "README.md").write_text(
        "---\nbase_model: base\ntags: [burnish, sft, lora]\n---\n\n# adapter\n\n## Data\n\n- identity\n\n"
        "## Talk with it\n\nburnish chat\n\n## Results\n\n| measure | value |\n|---|---|\n| train_loss | 1.5000 |\n\n"
        "![training loss](training_loss.png)\n\n## Made with\n"
    )
    export(str(base), tmp_path / "out", str(adapter))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "base_model": "base", "base_model_relation": "finetune", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["burnish", "sft", "lora"],
        "license": "apache-2.0", "language": ["en"],
    }  # fmt: skip
    assert "by merging the adapter `adapter` in float32, written in float32" in text
    assert (
        "burnish chat --model_name_or_path out" in text and "- identity" in text and "| train_loss | 1.5000 |" in text
    )
    assert "training_loss.png" not in text and "Made with" not in text
    assert str(tmp_path) not in text + (tmp_path / "out" / "export_report.json").read_text(encoding="utf-8")


def test_the_card_of_a_full_run_names_the_model_it_was_tuned_from(tmp_path: Path):
    run = Path(make_base("llama", tmp_path / "run"))
    (run / "README.md").write_text(
        "---\nbase_model: owner/first\ntags: [burnish, sft, full]\n---\n\n## Data\n\n- identity\n"
    )
    export(str(run), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "base_model: owner/first" in text and "Made from **owner/first**" in text and "- identity" in text


# ---- the hub -----------------------------------------------------------------------------------------------------


def test_a_hub_that_cannot_be_reached_is_told_before_anything_is_read(tmp_path: Path):
    base = make_base("llama", tmp_path / "base")
    with pytest.raises(UserError, match=r"export_hub_model_id 'ann/tuned' cannot be uploaded to the hub .*HF_TOKEN"):
        export(base, tmp_path / "out", export_hub_model_id="ann/tuned")
    assert not (tmp_path / "out").exists()


def test_the_finished_folder_is_uploaded_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "ann"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, exist_ok: _Address(name))
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda self, *, repo_id, folder_path, **_: sent.append((self.token, repo_id, folder_path)),
    )
    base = make_base("llama", tmp_path / "base")
    export(base, tmp_path / "out", export_hub_model_id="tuned", hf_hub_token="secret")
    assert sent == [("secret", "ann/tuned", tmp_path / "out")]

    def broken(self: HfApi, **_: object) -> None:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(HfApi, "upload_folder", broken)
    with pytest.raises(RunStopped, match=r"the model is whole in .*, but was not uploaded as tuned") as stopped:
        export(base, tmp_path / "second", export_hub_model_id="tuned")
    assert stopped.value.status == 1 and (tmp_path / "second" / "model.safetensors").is_file()


class _Address(str):
    @property
    def repo_id(self) -> str:
        return f"ann/{self}"
