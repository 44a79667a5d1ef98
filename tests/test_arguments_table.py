"""Every setting stands in exactly one column of docs/arguments.md, and a test that shows it is one that is there."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import arguments_table
import pytest

from burnish.arguments.fields import known_fields, standings
from burnish.train.arguments import HIDDEN, HONOURED, NOTHING_TO_CHANGE, OURS, REFUSED, TRANSLATED
from burnish.train.fields import transformers_fields

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", known_fields())
def test_a_setting_stands_in_exactly_one_column(name: str) -> None:
    assert len(standings(name)) == 1, f"{name}: name it in one table of its room's arguments.py"


def test_the_page_has_one_line_for_each_setting() -> None:
    lines = arguments_table.PAGE.read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if re.match(r"\| `\w+` \| `.*` \| (honoured|translated|nothing|refused)", line)]
    names = [line.split("`")[1] for line in settings]
    if arguments_are_those_of_the_page(lines):
        assert names == list(known_fields())
    assert len(names) == len(set(names)) > 150


def test_the_page_is_what_its_script_writes() -> None:
    text = arguments_table.PAGE.read_text(encoding="utf-8")
    if not arguments_are_those_of_the_page(text.splitlines()):
        pytest.skip("the page was written with another transformers, whose fields differ")
    assert text == arguments_table.page(), "run python scripts/arguments_table.py"


def arguments_are_those_of_the_page(lines: list[str]) -> bool:
    return any(f"with transformers {version('transformers')};" in line for line in lines)


def test_the_tables_name_no_field_that_transformers_never_had() -> None:
    """One that an installed version lacks is fine (5.17 and 5.23 differ); a misspelt one would stand in no version."""
    fields = {field.name for field in (*transformers_fields(), *OURS)}
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert (HONOURED | set(NOTHING_TO_CHANGE) | set(TRANSLATED) | set(REFUSED) | HIDDEN) - newer <= fields


def test_the_tests_that_are_named_are_there() -> None:
    for test in set(arguments_table.tests_of_settings().values()):
        path, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), test


def test_every_setting_that_is_honoured_names_the_test_that_shows_it() -> None:
    honoured = {name for name in known_fields() if standings(name)[0][0] == "honoured"}
    shown = set(arguments_table.tests_of_settings())
    assert honoured - shown == set(), "name their tests in tests/honoured.toml"
    assert shown - honoured == set()
