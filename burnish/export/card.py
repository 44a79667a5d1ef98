"""The model card of an export: what it was made of, how that was checked, and what its training run said of itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from burnish.model.card import page, public, table, talk_with_it

FROM_THE_BASE = ("license", "license_name", "license_link", "language")  # of the front matter of its card
FROM_THE_RUN = ("Data", "Settings", "Results")  # sections of the card that training wrote


@dataclass(frozen=True)
class Card:
    name: str
    base: str  # a name on a hub or a folder
    adapters: Sequence[str]
    dtype: str
    checks: Sequence[tuple[str, str]]  # (what was compared, how it came out)
    base_folder: Path
    run_folder: Path  # of the last adapter, else of the base: where the card of the training run may be
    has_template: bool


def render_card(card: Card) -> str:
    front, of_run = _read(card.base_folder)[0], _read(card.run_folder)
    base = public(card.base)
    is_run = "burnish" in (of_run[0].get("tags") or ())  # the model of a full or freeze run, or an adapter's
    fields = {
        "base_model": of_run[0].get("base_model", base) if is_run and not card.adapters else base,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": of_run[0]["tags"] if is_run else ["burnish"],
        **{name: front[name] for name in FROM_THE_BASE if name in front},
    }
    parts = [
        f"# {card.name}",
        _made_from(card, fields["base_model"]),
        talk_with_it(card.name, _commands(card)),
        table("Checked", ("what", "how it came out"), card.checks),
        *(_section(of_run[1], title) for title in FROM_THE_RUN if is_run),
    ]
    return page(fields, parts)


def _made_from(card: Card, base: str) -> str:
    if not card.adapters:
        return f"Made from **{base}**, written in {card.dtype} by burnish."
    adapters = ", then ".join(f"`{public(adapter)}`" for adapter in card.adapters)
    what = f"the adapter{'s' if len(card.adapters) > 1 else ''} {adapters}"
    return f"Made from **{base}** by merging {what} in float32, written in {card.dtype}, by burnish."


def _commands(card: Card) -> str:
    name = shlex.quote(card.name)
    ask = f"burnish chat --model_name_or_path {name}"
    return f"{ask}\n(cd {name} && ollama create {name.lower()} -f Modelfile)" if card.has_template else ask


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter and the text of the card in a folder; nothing where there is none."""
    path = folder / "README.md"
    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    if parts is None:
        return {}, text
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        front = None
    return (front if isinstance(front, dict) else {}), parts[2]


def _section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n.*?(?=^## |^!\[|\Z)", text, re.DOTALL | re.MULTILINE)
    return found[0].strip() if found else ""
