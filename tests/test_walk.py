"""docs/walk.md is run as it stands: every value that it shows is what the code gives today."""

from __future__ import annotations

import doctest
import os
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "walk.md"


@pytest.mark.filterwarnings("ignore")
def test_every_value_of_the_walk_is_what_the_code_gives(tmp_path, fixture_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "data").mkdir()
    os.symlink(fixture_path("smollm2"), tmp_path / "models" / "SmolLM2-135M-Instruct")
    examples = PAGE.read_text().count(">>> ")
    result = doctest.testfile(
        str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert result.failed == 0
    assert result.attempted == examples > 100
