"""One entry of `dataset_info.json` → a `DatasetAttr`: where the rows lie, their format, their columns and tags.

{"file_name": "pairs.jsonl", "columns": {"prompt": "question", "response": "answer"}}

Entries are LLaMA-Factory's. A key that is not known, or whose work burnish cannot do, is told, not passed over.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, Literal

from burnish.data.rows import FILE_TYPES, file_type
from burnish.errors import Problem

Formatting = Literal["alpaca", "sharegpt", "openai", "auto"]  # auto: told from the first row, for a file named directly
FORMATS = ("alpaca", "sharegpt", "openai")
LoadFrom = Literal["file", "hf_hub", "ms_hub"]


@dataclass(frozen=True)
class Columns:
    """Which column of a row holds what. None: the rows have no such column."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = "history"
    messages: str | None = "conversations"
    system: str | None = "system"
    tools: str | None = "tools"


@dataclass(frozen=True)
class Tags:
    """The words of a turn: which key holds the role, which the text, and what each role is called."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


OPENAI_COLUMNS = Columns(messages="messages")
OPENAI_TAGS = Tags("role", "content", "user", "assistant", "tool", "function_call", "system")


@dataclass(frozen=True)
class DatasetAttr:
    """One data set, as its entry describes it."""

    name: str  # as the user wrote it
    load_from: LoadFrom
    path: str  # a file, a folder, or the name of a repository
    formatting: Formatting = "alpaca"
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)


_PLACES = ("hf_hub_url", "ms_hub_url", "file_name")
_REFUSED = {  # key → (what is wrong with it, what to do)
    "script_url": ("names a loading script, which datasets no longer runs", "save its rows as parquet or jsonl"),
    "om_hub_url": ("is not read from openMind", "download it and give the folder as file_name"),
    "cloud_file_name": ("is not read from cloud storage", "download it and give the file as file_name"),
}
_KEYS: dict[LoadFrom, str] = {"file": "file_name", "hf_hub": "hf_hub_url", "ms_hub": "ms_hub_url"}
_HARMLESS = ("file_sha1",)  # the check sum of 2023's entries; LLaMA-Factory has not read it since 2024
_OPTIONS = ("formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags")
_OTHER_COLUMNS = {
    **dict.fromkeys(("images", "videos", "audios"), "burnish trains on text alone"),
    **dict.fromkeys(("chosen", "rejected", "kto_tag"), "stages rm, dpo and kto are not built"),
}
_OLD_COLUMNS = {"role": "role_tag", "content": "content_tag"}  # where LLaMA-Factory kept two of the tags in 2023


_SAVE_AS = {
    **dict.fromkeys(("gz", "zip", "zst", "bz2", "xz", "tar", "7z", "rar"), "unpack it"),
    **dict.fromkeys(("xlsx", "xls", "ods", "tsv"), "save it as csv, with commas and in UTF-8"),
}


def asks_modelscope() -> bool:
    """Whether USE_MODELSCOPE_HUB says that ModelScope is asked where a set or a name could come from either hub."""
    return os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "y", "yes")


def missing_modelscope(place: str, setting: str, value: str) -> Problem | None:
    if find_spec("modelscope"):
        return None
    remedy = "pip install modelscope, or download it and name the folder"
    return Problem(place, setting, value, "is read by the package modelscope, which is not installed", remedy)


def inside(folder: str, path: str) -> str:
    return os.path.join(os.path.expanduser(folder), os.path.expanduser(path))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def files_of_data(folder: str) -> list[str]:
    """Names of the files in a folder that burnish can read, in order. Folders inside it are not entered."""
    return sorted(
        name
        for name in (os.listdir(folder) if os.path.isdir(folder) else [])
        if file_type(name) in FILE_TYPES
        and not name.startswith(".")
        and name != "dataset_info.json"
        and not os.path.isdir(os.path.join(folder, name))
    )


def wrong_file(path: str, place: str, setting: str, value: str | None) -> Problem | None:
    """What keeps a path from being read as data, told without opening it."""
    allowed = ", ".join(FILE_TYPES)
    if os.path.islink(path) and not os.path.exists(path):
        message = f"is a link that leads to no file: {path} → {os.readlink(path)}"
        return Problem(place, setting, value, message, "give the path of the file itself")
    if not os.path.exists(path):
        folder = os.path.dirname(path) or "."
        near = did_you_mean(os.path.basename(path), files_of_data(folder))
        return Problem(place, setting, value, f"is not there: {path}", near or "give the path of a file or a folder")
    if os.path.isdir(path):
        if not files_of_data(path):
            remedy = f"it may hold {allowed}; folders inside it are not read"
            return Problem(place, setting, value, "is a folder without a file of data", remedy)
        inside_it = (os.path.join(path, name) for name in files_of_data(path))
        if wrong := next((file for file in inside_it if not os.path.isfile(file)), None):
            return Problem(place, setting, value, f"holds what is no file: {wrong}", "take it out of the folder")
    elif file_type(path) not in FILE_TYPES:
        remedy = _SAVE_AS.get(file_type(path), "save it as jsonl")
        return Problem(place, setting, value, f"is of a type that burnish does not read: not {allowed}", remedy)
    elif not os.path.isfile(path):
        return Problem(place, setting, value, "is neither a file nor a folder", "save its rows in a file")
    return None


@dataclass(frozen=True)
class Entry:
    """One entry of the catalog, on its way to a DatasetAttr."""

    name: str
    entry: Any
    catalog: str  # the path of dataset_info.json, for messages
    dataset_dir: str
    split: str  # where the entry names none

    def read(self) -> tuple[DatasetAttr | None, list[Problem]]:
        if not isinstance(self.entry, dict):
            return None, [self._wrong("", self.entry, "is not an object", 'write {"file_name": …}')]
        wrong = [*self._wrong_keys(), *self._wrong_values(), *self._wrong_place()]
        if wrong:
            return None, wrong
        formatting: Formatting = self.entry.get("formatting", "alpaca")
        load_from = self._load_from()
        key = _KEYS[load_from]
        attr = DatasetAttr(
            self.name,
            load_from,
            inside(self.dataset_dir, self.entry[key]) if load_from == "file" else self.entry[key],
            formatting,
            split=self.entry.get("split") or self.split,
            columns=self._columns(formatting),
            tags=self._tags(formatting),
            **{key: self.entry.get(key) for key in ("subset", "folder", "num_samples")},
        )
        return attr, []

    def _load_from(self) -> LoadFrom:
        """A hub wins over a file. Of two hubs it is Hugging Face's, unless the environment says ModelScope."""
        if "ms_hub_url" in self.entry and (asks_modelscope() or "hf_hub_url" not in self.entry):
            return "ms_hub"
        return "hf_hub" if "hf_hub_url" in self.entry else "file"

    def _columns(self, formatting: Formatting) -> Columns:
        """Columns that are named replace the usual ones as a whole, as LLaMA-Factory reads them."""
        given = self.entry.get("columns", {})
        usual = OPENAI_COLUMNS if formatting == "openai" else Columns()
        if not given:
            return usual
        kept = {"messages": usual.messages, "tools": usual.tools} if formatting == "openai" else {}
        return Columns(**{column.name: given.get(column.name, kept.get(column.name)) for column in fields(Columns)})

    def _tags(self, formatting: Formatting) -> Tags:
        given = dict(self.entry.get("tags", {}))
        for old, new in _OLD_COLUMNS.items():
            if old in self.entry.get("columns", {}):
                given.setdefault(new, self.entry["columns"][old])
        usual = OPENAI_TAGS if formatting == "openai" else Tags()
        return Tags(**{tag.name: given.get(tag.name) or getattr(usual, tag.name) for tag in fields(Tags)})

    def _wrong_keys(self) -> list[Problem]:
        found: list[Problem] = []
        known_columns = [*(column.name for column in fields(Columns)), *_OLD_COLUMNS, *_OTHER_COLUMNS]
        for where, given, known in (
            ("", self.entry, (*_PLACES, *_OPTIONS, *_REFUSED, *_HARMLESS)),
            ("columns.", self.entry.get("columns", {}), known_columns),
            ("tags.", self.entry.get("tags", {}), [tag.name for tag in fields(Tags)]),
        ):
            if not isinstance(given, dict):
                found.append(self._wrong(where[:-1], given, "is not an object"))
                continue
            for key, value in given.items():
                if key not in known and not key.startswith("_"):  # _comment and the like
                    remedy = did_you_mean(key, known) or f"known are {', '.join(known)}"
                    found.append(self._wrong(where + key, None, "is not known", remedy))
                elif where and not isinstance(value, str | None):
                    found.append(self._wrong(where + key, value, "is not a name"))
                elif where and key in _OTHER_COLUMNS and value:
                    found.append(self._wrong(where + key, value, "cannot be used", _OTHER_COLUMNS[key]))
        return found

    def _wrong_values(self) -> list[Problem]:
        entry, found = self.entry, []
        formatting = entry.get("formatting", "alpaca")
        if formatting not in FORMATS:
            near = did_you_mean(str(formatting), FORMATS)
            found.append(self._wrong("formatting", formatting, f"is not one of {', '.join(FORMATS)}", near))
        if entry.get("ranking"):
            message = "pairs of answers are for stages rm and dpo, which are not built"
            found.append(self._wrong("ranking", True, message, "use a set of single answers"))
        samples = entry.get("num_samples")
        if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
            found.append(self._wrong("num_samples", samples, "is not a number of rows", "give 1 or more"))
        if self._load_from() == "file":
            split = entry.get("split") or self.split
            given = {"subset": entry.get("subset"), "folder": entry.get("folder"), "split": split}
            for key, usual in (("subset", None), ("folder", None), ("split", "train")):
                if given[key] != usual:
                    found.append(self._wrong(key, given[key], "is for repositories of a hub", f"name the {key}'s file"))
        return found

    def _wrong_place(self) -> list[Problem]:
        """Where its rows lie. What burnish cannot read is told where there is no other."""
        entry = self.entry
        found = [
            self._wrong(key, entry[key], "is not a name")
            for key in _PLACES
            if key in entry and not (isinstance(entry[key], str) and entry[key])
        ]
        load_from = self._load_from()
        if found or load_from == "hf_hub":
            return found
        if load_from == "ms_hub":
            missing = missing_modelscope(self.catalog, f"{self.name}.ms_hub_url", entry["ms_hub_url"])
            return [missing] if missing else []
        if "file_name" in entry:
            path = inside(self.dataset_dir, entry["file_name"])
            wrong = wrong_file(path, self.catalog, f"{self.name}.file_name", entry["file_name"])
            return [wrong] if wrong else []
        refused = [self._wrong(key, entry[key], *_REFUSED[key]) for key in _REFUSED if key in entry]
        return refused or [self._wrong("", None, "does not say where its rows lie", "give file_name or hf_hub_url")]

    def _wrong(self, key: str, value: Any, message: str, remedy: str = "") -> Problem:
        return Problem(self.catalog, f"{self.name}.{key}" if key else self.name, value, message, remedy)
