"""LLaMA-Factory's own templates, from its source: what burnish's of the same name are compared with."""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any


@cache
def templates_of(folder: Path) -> dict[str, Any]:
    """By name. What the sources import besides is put in their place: a logger, and plugins for images."""
    for name, path, contents in (
        ("llamafactory_source", [], {}),
        ("llamafactory_source.extras", [], {"logging": ModuleType("logging")}),
        ("llamafactory_source.data", [str(folder)], {}),
        ("llamafactory_source.data.mm_plugin", [], {"get_mm_plugin": lambda name, **more: name}),
    ):
        module = ModuleType(name)
        module.__path__ = path
        module.__dict__.update(contents)
        sys.modules[name] = module
    sys.modules["llamafactory_source.extras"].logging.get_logger = logging.getLogger  # type: ignore[attr-defined]
    return importlib.import_module("llamafactory_source.data.template").TEMPLATES


def text_with(template: Any, tokenizer: Any, messages: list[dict], tools: str | None = None) -> str:
    """A conversation as a template of theirs writes it. Theirs call a call "function", its result "observation"."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = [message for message in messages if message["role"] != "system"]
    pairs = template.encode_multiturn(tokenizer, turns, system, tools)
    ids = [token for prompt, answer in pairs for token in (*prompt, *answer)]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
