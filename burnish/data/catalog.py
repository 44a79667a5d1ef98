"""Names of data sets → `DatasetAttr`s, through `dataset_info.json`; a name that stands in no entry may be a file.

No file of data is opened here and nothing heavy is imported: mistakes in the names are told before a model is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from burnish.data.entry import (
    DatasetAttr,
    Entry,
    LoadFrom,
    asks_modelscope,
    did_you_mean,
    files_of_data,
    inside,
    missing_modelscope,
    wrong_file,
)
from burnish.data.rows import FILE_TYPES, file_type
from burnish.errors import Problem, UserError

if TYPE_CHECKING:
    from burnish.data.arguments import DataArguments

DATA_CONFIG = "dataset_info.json"
ONLINE = "ONLINE"  # as dataset_dir: there is no catalog, every name is a repository of the hub


def get_dataset_list(args: DataArguments, names: Sequence[str] | str | None = None) -> list[DatasetAttr]:
    """The data sets called `names` (without it: those of `dataset`). Raises UserError with all that is wrong."""
    attrs, wrong = _resolve(args, "dataset", split_names(args.dataset if names is None else names))
    if wrong:
        raise UserError(wrong)
    return attrs


def problems(args: DataArguments) -> list[Problem]:
    """What is wrong with `dataset`, `eval_dataset` and their entries, without opening a file of data."""
    found: list[Problem] = []
    for setting, names in (("dataset", args.dataset), ("eval_dataset", args.eval_dataset)):
        found += [problem for problem in _resolve(args, setting, split_names(names))[1] if problem not in found]
    return found


def split_names(names: Sequence[str] | str | None) -> list[str]:
    """`"a, b"` and `["a", "b"]` both name two data sets."""
    parts = names.split(",") if isinstance(names, str) else names or []
    return [name for part in parts if (name := part.strip())]


def _resolve(args: DataArguments, setting: str, names: list[str]) -> tuple[list[DatasetAttr], list[Problem]]:
    if not names:
        return [], []
    if args.dataset_dir == ONLINE:
        return _online(args, setting, names)
    path = inside(args.dataset_dir, DATA_CONFIG)
    entries, unreadable = _read_catalog(path)
    attrs: list[DatasetAttr] = []
    wrong = list(unreadable)
    for name in names:
        if name in entries:
            attr, mistakes = Entry(name, entries[name], path, args.dataset_dir, args.split).read()
        else:
            attr, mistakes = _named_directly(name, args)
            if not attr and not mistakes and not unreadable:  # else the name may stand in the catalog
                mistakes = [_unknown(name, setting, entries, path, args)]
        attrs += [attr] if attr else []
        wrong += mistakes
    return attrs, wrong


def _online(args: DataArguments, setting: str, names: list[str]) -> tuple[list[DatasetAttr], list[Problem]]:
    load_from: LoadFrom = "ms_hub" if asks_modelscope() else "hf_hub"
    missing = missing_modelscope("USE_MODELSCOPE_HUB", setting, ",".join(names)) if load_from == "ms_hub" else None
    if missing:
        return [], [missing]
    return [DatasetAttr(name, load_from, name, formatting="auto", split=args.split) for name in names], []


def _read_catalog(path: str) -> tuple[dict[str, Any], list[Problem]]:
    """No catalog is no mistake as long as every name is a file: that is found out name by name."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = json.load(file)
    except FileNotFoundError:
        return {}, []
    except json.JSONDecodeError as error:
        return {}, [Problem(f"{path}:{error.lineno}", "", None, f"is not valid JSON: {error.msg}", "mend that line")]
    except UnicodeDecodeError:
        return {}, [Problem(path, "", None, "is not UTF-8", "save it as UTF-8")]
    except (OSError, ValueError, RecursionError) as error:
        return {}, [Problem(path, "", None, f"cannot be read: {error}")]
    if not isinstance(entries, dict):
        return {}, [Problem(path, "", None, "is not an object of names", 'write {"name": {"file_name": …}}')]
    return entries, []


def _named_directly(name: str, args: DataArguments) -> tuple[DatasetAttr | None, list[Problem]]:
    """A file or a folder, from where the command runs or inside dataset_dir; (None, []) where there is none."""
    for path in (os.path.expanduser(name), inside(args.dataset_dir, name)):
        if os.path.lexists(path):
            wrong = wrong_file(path, path, "", None)
            if not wrong and args.split != "train":
                message = "is for repositories of a hub: a file has one split"
                wrong = Problem(path, "split", args.split, message, "leave it out")
            return (None, [wrong]) if wrong else (DatasetAttr(name, "file", path, formatting="auto"), [])
    return None, []


def _unknown(name: str, setting: str, entries: dict[str, Any], path: str, args: DataArguments) -> Problem:
    near = did_you_mean(name, [*entries, *files_of_data(inside(args.dataset_dir, ""))])
    if entries and file_type(name) not in FILE_TYPES:
        known = ", ".join(list(entries)[:8]) + (" …" if len(entries) > 8 else "")
        return Problem(path, setting, name, "is not in it", near or f"it has {known}")
    message = "is not a file that is there" if entries else "is not a file, and there is no such catalog"
    return Problem(path, setting, name, message, near or "give the path of a file, or dataset_dir")
