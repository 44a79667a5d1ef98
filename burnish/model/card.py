"""A model card: README.md with the front matter that the Hugging Face hub reads. What a run's and an export's share.

A card is made to be published. So a folder is shown by its last part only: no user's name and no place of this machine
gets into it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Any

import yaml


def page(front: Mapping[str, Any], parts: Iterable[str]) -> str:
    """The text of a card. `front` has the fields of https://huggingface.co/docs/hub/model-cards; empty parts go."""
    matter = "---\n" + yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True) + "---"
    return "\n\n".join(part for part in (matter, *parts) if part) + "\n"


def table(title: str, columns: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = ["| {} | {} |".format(name, value.replace("|", r"\|")) for name, value in rows]
    return "\n".join([f"## {title}\n", f"| {columns[0]} | {columns[1]} |", "|---|---|", *lines]) if lines else ""


def talk_with_it(name: str, commands: str) -> str:
    return f"## Talk with it\n\nFrom the folder that holds `{name}`:\n\n```bash\n{commands}\n```"


def public(name: str) -> str:
    """A folder by its last part alone; a name on a hub, "owner/model", as it is.

    >>> public("/home/ann/models/SmolLM2"), public("HuggingFaceTB/SmolLM2-135M-Instruct")
    ('SmolLM2', 'HuggingFaceTB/SmolLM2-135M-Instruct')
    """
    looks_local = name.startswith(("/", "~", ".")) or name.count("/") > 1 or "\\" in name or os.path.isdir(name)
    if not looks_local:
        return name
    return PureWindowsPath(os.path.abspath(os.path.expanduser(name)) if name.startswith(".") else name).name
