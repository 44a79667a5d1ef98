"""What tests of settings share: words of a command line, files of settings, and the mistakes that were told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from burnish.arguments.parse import parse_command
from burnish.arguments.settings import Settings
from burnish.errors import UserError


def make_base(folder: Path) -> dict[str, Any]:
    """The three settings without which nothing is trained: a folder that looks like a model, a file of rows."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "rows.jsonl").write_text('{"instruction": "hello", "output": "hi"}\n')
    names = {"model_name_or_path": "model", "dataset": "rows.jsonl", "output_dir": "out"}
    return {name: str(folder / path) for name, path in names.items()}


def here() -> dict[str, str]:
    """The environment of a command that finds this checkout from any folder."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def write_yaml(path: Path, base: dict[str, Any], *lines: str) -> str:
    path.write_text("\n".join([*(f"{name}: {value}" for name, value in base.items()), *lines]) + "\n")
    return str(path)


def train(*words: str, **base: Any) -> Settings:
    return parse_command("train", [*words, *(f"{name}={value}" for name, value in base.items())])


def mistakes(*words: str, command: str = "train", **base: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_command(command, [*words, *(f"{name}={value}" for name, value in base.items())])
    return [str(problem) for problem in caught.value.problems]
