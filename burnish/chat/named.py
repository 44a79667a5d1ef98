"""Chat templates by name, for models that ship none: jinja files in templates/, data rather than code.

A file begins with a comment that says what the format is and where it comes from. Three lines of it are read:

    special: markers that must each be one token of the tokenizer, else the template is refused
    stop:    tokens besides the end token at which an answer ends
    bos:     "natural": begin with bos_token only where the tokenizer's own encoding does
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from burnish.chat.pieces import is_one_token
from burnish.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELD = re.compile(r"^\s*(special|stop|bos):(.*)$", re.MULTILINE)
_BOS = "{{- bos_token }}\n"


@dataclass(frozen=True)
class NamedTemplate:
    name: str
    jinja: str
    special: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    natural_bos: bool = False

    def jinja_for(self, tokenizer: PreTrainedTokenizerBase) -> str:
        if self.natural_bos and not _adds_bos(tokenizer):
            return self.jinja.replace(_BOS, "", 1)
        return self.jinja


@cache
def named_templates() -> dict[str, NamedTemplate]:
    folder = files("burnish.chat") / "templates"
    found = (entry for entry in folder.iterdir() if entry.name.endswith(".jinja"))
    templates = [_read(entry.name.removesuffix(".jinja"), entry.read_text(encoding="utf-8")) for entry in found]
    return {template.name: template for template in sorted(templates, key=lambda template: template.name)}


def _read(name: str, jinja: str) -> NamedTemplate:
    comment = jinja.partition("#}")[0]
    fields = {key: value.split() for key, value in _FIELD.findall(comment)}
    special, stop = tuple(fields.get("special", ())), tuple(fields.get("stop", ()))
    return NamedTemplate(name, jinja, special, stop, fields.get("bos") == ["natural"])


def get_template(name: str, tokenizer: PreTrainedTokenizerBase) -> NamedTemplate:
    """Raises UserError for a name that is not there and for markers that this tokenizer would take to pieces."""
    template = named_templates().get(name)
    if template is None:
        close = difflib.get_close_matches(name, named_templates(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        remedy = f"{hint}names: {', '.join(named_templates())}; or leave it out for the tokenizer's own"
        message = "is neither a template of burnish nor a jinja file"
        raise UserError(Problem("the chat template", "template", name, message, remedy))
    broken = [marker for marker in template.special if not is_one_token(marker, tokenizer)]
    if broken:
        message = f"does not fit: {', '.join(broken)} {'is' if len(broken) == 1 else 'are'} not one token of it each"
        remedy = f"templates that fit this tokenizer: {', '.join(fitting_names(tokenizer))}"
        raise UserError(Problem(tokenizer_place(tokenizer), "template", name, message, remedy))
    return template


def fitting_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Those whose markers are all tokens of this tokenizer; templates with markers of plain text fit any."""
    fitting = [t for t in named_templates().values() if all(is_one_token(m, tokenizer) for m in t.special)]
    return [template.name for template in sorted(fitting, key=lambda t: (not t.special, t.name))]


def tokenizer_place(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "the tokenizer"


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
