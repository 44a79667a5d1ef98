"""Every published template that can be had, none of them known to burnish: each turn is trained exactly, or refused.

What is looked at, and how, stands in tests/sweep.py; what was found, in docs/templates.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import fixtures
import pytest
import sweep
import templates_table
from sweep import COLLECTIONS, COUNTS, PLAIN, Published

NEEDS_MORE = {  # content in parts, tools always, or variables that nobody passes
    *("fireworks-ai-llama-3-firefunction-v2", "CohereForAI-c4ai-command-r-plus-tool_use", "llava_next"),
    *("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "idefics3"),
    *("idefics3_training", "llava_next_training", "smolvlm", "smolvlm_training"),
}


@cache
def documented() -> dict[Published, templates_table.Cells]:
    return templates_table.rows_of(templates_table.PAGE.read_text(encoding="utf-8"))


def name_of(one: Published) -> str:
    return f"{one.source}-{one.name}".replace(" ", "-")


def need(one: Published, fixture_path: Callable[[str], Path]) -> None:
    if one.source != "tokenizer":
        fixture_path("tokenizer-qwen3")


@pytest.mark.parametrize("source", COLLECTIONS)
def test_the_whole_collection_is_swept(source, fixture_path):
    fixture_path(COLLECTIONS[source])
    assert len([one for one in sweep.published() if one.source == source]) == COUNTS[source]


@pytest.mark.parametrize("one", sweep.published(), ids=name_of)
def test_every_turn_is_trained_exactly_or_the_row_is_refused_and_the_page_says_which(one, fixture_path):
    need(one, fixture_path)
    outcomes = sweep.outcomes(one)  # asserts
    refused = {name for name in PLAIN if outcomes[name].refused}
    without_system = {"system and turns"} if templates_table.cells(one, outcomes)[0] == "refused" else set()
    without_words = {"an empty answer"} if "leaves out the answer" in outcomes["an empty answer"].refused else set()
    if one.name not in NEEDS_MORE and "Ministral" not in one.name:
        assert refused <= without_system | without_words | {"a tag in an answer"}, outcomes
    for other in ("arguments as text", "an empty string beside a call"):
        assert outcomes[other] == outcomes["a call"], other
    assert documented().get(one) == templates_table.cells(one, outcomes), "run python scripts/templates_table.py"


@pytest.mark.parametrize(
    "settings", [{"split_special_tokens": True}, {"enable_thinking": True}, {"enable_thinking": False}]
)
@pytest.mark.parametrize("one", sweep.published()[::16], ids=name_of)
def test_a_setting_of_the_template_moves_no_border_either(one, settings, fixture_path):
    """Every sixteenth: all were swept so once."""
    need(one, fixture_path)
    assert sweep.outcomes(one, **settings)  # asserts


def test_the_page_is_what_its_script_writes_from_these_rows():
    page = templates_table.PAGE.read_text(encoding="utf-8")
    assert page == templates_table.page(documented()), "run python scripts/templates_table.py"
    missing = [fixture for fixture in COLLECTIONS.values() if not fixtures.is_fetched(fixture)]
    if not missing:
        assert set(sweep.published()) <= set(documented())
    if all(fixtures.is_fetched(fixture) for fixture in fixtures.pins()):
        assert set(sweep.published()) == set(documented())
