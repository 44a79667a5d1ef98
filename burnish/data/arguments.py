"""DataArguments: which rows, in which template, how long and how mixed. The names are LLaMA-Factory's."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from burnish.arguments.given import files_called_like

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings
    from burnish.errors import Problem

CATALOG = "dataset_info.json"


@dataclass
class DataArguments:
    """What the model learns from, and how rows become tokens."""

    template: str | None = field(
        default=None,
        metadata={"help": "Chat template: not given is the tokenizer's own; else a name, or a path to a jinja file."},
    )
    dataset: list[str] | None = field(
        default=None,
        metadata={"help": "What to train on: names in dataset_info.json or paths of files, separated by commas."},
    )
    eval_dataset: list[str] | None = field(
        default=None, metadata={"help": "What to evaluate on: names or files, as dataset."}
    )
    dataset_dir: str = field(default="data", metadata={"help": "The folder that holds dataset_info.json."})
    split: str = field(default="train", metadata={"help": "Which split of a data set, unless dataset_info.json says."})
    cutoff_len: int = field(default=2048, metadata={"help": "Most tokens of a sample."})
    overlong: Literal["truncate", "drop"] = field(
        default="truncate", metadata={"help": "Samples beyond cutoff_len lose their oldest turns, or are left out."}
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "A batch is per_device_train_batch_size rows of up to cutoff_len tokens, each of several samples "
            "that do not see each other. Stage pt always has such rows."
        },
    )
    cross_document_attention: bool = field(
        default=False, metadata={"help": "Stage pt: documents in a row see those before them, as one text."}
    )
    train_on_prompt: bool = field(default=False, metadata={"help": "Train on the prompt's tokens too."})
    mask_history: bool = field(default=False, metadata={"help": "Train on a conversation's last answer only."})
    ignore_pad_token_for_loss: bool = field(
        default=True, metadata={"help": "Leave padding out of the loss; false trains it, in padded batches."}
    )
    default_system: str | None = field(
        default=None, metadata={"help": "System message of conversations that have none."}
    )
    enable_thinking: bool | None = field(
        default=None, metadata={"help": "Handed to templates of models that think; not given is the template's own."}
    )
    val_size: float = field(
        default=0.0, metadata={"help": "Rows set aside for evaluation: a share below 1, or a number of rows."}
    )
    eval_on_each_dataset: bool = field(default=False, metadata={"help": "Evaluate on each data set by itself."})
    max_samples: int | None = field(default=None, metadata={"help": "Take only the first rows of each data set."})
    max_bad_rows: float = field(
        default=0.01, metadata={"help": "Stop when more rows cannot be used: a share below 1, or a number of rows."}
    )
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = field(
        default="concat",
        metadata={
            "help": "Several data sets: one after the other, or drawn in turns until the first (under) or the last "
            "(over) is used up."
        },
    )
    interleave_probs: list[float] | None = field(
        default=None, metadata={"help": "How often each data set is drawn from, separated by commas."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed; needs max_steps."})
    buffer_size: int = field(default=16384, metadata={"help": "streaming: rows among which order is shuffled."})
    tokenized_path: str | None = field(
        default=None,
        metadata={"help": "Folder to keep tokens in; else those of many rows are kept in ~/.cache/burnish/tokens."},
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Make tokens anew where an earlier run kept them."})


NOTHING_TO_CHANGE: dict[str, str] = {}

DO_NOT_TRAIN = {"overwrite_cache", "tokenized_path", "eval_on_each_dataset"}

OF_CONVERSATIONS = ("overlong", "train_on_prompt", "mask_history", "default_system", "enable_thinking")


def problems(settings: Settings) -> list[Problem]:
    found = settings.out_of_range(
        cutoff_len=(lambda v: v >= 2, "is not at least 2", "2048 is usual"),
        val_size=(
            lambda v: v >= 0 and (v < 1 or v == int(v)),
            "is neither a share below 1 nor a number of rows",
            "write a share such as 0.1",
        ),
        max_samples=(lambda v: v >= 1, "is not at least 1", "give a number of rows"),
        max_bad_rows=(lambda v: v >= 0, "is below 0", "0.01 is one row in a hundred"),
        buffer_size=(lambda v: v >= 1, "is not at least 1", "give a number of rows"),
    )
    found += _combinations(settings)
    for name in ("dataset", "eval_dataset"):
        found += _unknown_data_sets(settings, name)
    return found


def idle(settings: Settings) -> list[tuple[str, str, str]]:
    """What is said of conversations to a run that reads plain text: (setting, "", why nothing comes of it)."""
    if settings.value("stage") != "pt":
        return []
    named = [name for name in OF_CONVERSATIONS if settings.differs_from_default(name)]
    packing = (
        [("packing", "", "has no effect in stage pt: its rows are always full")] if settings.given("packing") else []
    )
    return packing + [(name, "", "is not used in stage pt: a text is learned as it stands") for name in named]


def _combinations(settings: Settings) -> list[Problem]:
    """Settings that exclude or need each other."""
    value, found = settings.value, []
    if value("do_train") and not value("dataset") and not settings.is_faulty("dataset"):
        found.append(settings.missing("dataset", "name one of dataset_info.json, or give a file"))
    if value("val_size") and value("eval_dataset"):
        found.append(settings.problem("val_size", "and eval_dataset exclude each other", "leave one of them out"))
    if value("val_size") and not value("dataset"):
        found.append(settings.problem("val_size", "has no dataset to take rows from", "give dataset"))
    if value("mask_history") and value("train_on_prompt"):
        found.append(settings.problem("mask_history", "and train_on_prompt exclude each other", "leave one out"))
    if value("eval_on_each_dataset") and not value("eval_dataset"):
        found.append(settings.problem("eval_on_each_dataset", "has no eval_dataset", "name the sets in eval_dataset"))
    if value("cross_document_attention") and value("stage") == "sft":
        message = "is for stage pt: conversations never see each other"
        found.append(settings.problem("cross_document_attention", message, "leave it out"))
    return found + _mixing(settings) + _streaming(settings) + _packing(settings)


def _mixing(settings: Settings) -> list[Problem]:
    probabilities, found = settings.value("interleave_probs"), []
    if not probabilities:
        return []
    names = settings.value("dataset") or []
    if settings.value("mix_strategy") == "concat" and not settings.is_faulty("mix_strategy"):
        found.append(
            settings.problem("interleave_probs", "does nothing with mix_strategy: concat", "interleave_under mixes")
        )
    if names and len(names) != len(probabilities):
        found.append(
            settings.problem(
                "interleave_probs", f"are {len(probabilities)} numbers for {len(names)} data sets", "give one for each"
            )
        )
    if min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6:
        found.append(settings.problem("interleave_probs", "do not add up to 1", "give shares such as 0.7,0.3"))
    return found


def _streaming(settings: Settings) -> list[Problem]:
    if not settings.value("streaming"):
        return []
    found = []
    if settings.value("do_train") and settings.value("max_steps") <= 0 and not settings.is_faulty("max_steps"):
        found.append(settings.problem("streaming", "does not know how many rows there are", "set max_steps"))
    if 0 < settings.value("val_size") < 1:
        found.append(settings.problem("val_size", "is a share, which streaming cannot know", "give a number of rows"))
    return found


def _packing(settings: Settings) -> list[Problem]:
    """What cannot go with rows of several samples. Whether the model can take them is seen when it is loaded."""
    value, found = settings.value, []
    if not value("packing") or value("stage") != "sft":
        return []
    if value("streaming"):
        found.append(settings.problem("packing", "needs all rows at hand, not a stream", "leave one of them out"))
    if value("train_sampling_strategy") == "group_by_length":
        message = "and train_sampling_strategy: group_by_length exclude each other"
        found.append(settings.problem("packing", message, "leave one out, packed rows have one length"))
    if value("flash_attn") not in ("auto", "fa2", "fa3"):
        message = "needs an attention that keeps samples apart, and flash_attn asks for the model's own"
        found.append(settings.problem("packing", message, "set flash_attn: auto"))
    if not value("ignore_pad_token_for_loss"):
        found.append(
            settings.problem("packing", "leaves no padding for ignore_pad_token_for_loss: false", "leave one out")
        )
    return found


def _unknown_data_sets(settings: Settings, name: str) -> list[Problem]:
    """What an entry of dataset_info.json says is data/catalog.py's to check; here is told what is no entry."""
    unknown, catalog = unknown_names(settings, name), _catalog(settings)
    if not unknown:
        return []
    if settings.value("dataset_dir").startswith("REMOTE:"):
        remedy = f"give a folder that holds {CATALOG}"
        return [settings.problem("dataset_dir", "names a catalog on a hub, which burnish does not read", remedy)]
    try:
        entries = _entries(catalog)
    except ValueError as error:
        return [_wrong_catalog(catalog, error)]
    return [_unknown_data_set(settings, name, item, catalog, entries) for item in unknown]


def _wrong_catalog(catalog: Path, error: ValueError) -> Problem:
    from burnish.errors import Problem

    if isinstance(error, json.JSONDecodeError):
        where = f"{catalog}:{error.lineno}"
        return Problem(where, "", None, f"is not valid JSON: {error.msg}, at column {error.colno}", "mend that line")
    if isinstance(error, UnicodeDecodeError):
        return Problem(str(catalog), "", None, "is not UTF-8", "save it as UTF-8")
    return Problem(str(catalog), "", None, str(error), 'write {"name": {"file_name": …}}')


def _unknown_data_set(settings: Settings, name: str, item: str, catalog: Path, entries: dict[str, Any]) -> Problem:
    """A name that is not in the catalog, or the path of a file that is not there."""
    is_path = len(Path(item).parts) > 1 or bool(Path(item).suffix)
    message = f"is not in {catalog}" if catalog.is_file() else f"is not a file, and {catalog} is not there"
    remedy = "set dataset_dir, or give the path of a file"
    if entries:
        listed = f"it has {', '.join(list(entries)[:8])}{' …' if len(entries) > 8 else ''}"
        message, remedy = ("is not there", f"{catalog} has other names") if is_path else (message, listed)
    near = (files_called_like(item) or _beside(catalog, item)) if is_path else []
    near = near or get_close_matches(item, entries, n=1)
    return settings.problem(name, message, f"did you mean {near[0]!r}?" if near else remedy, item)


def _beside(catalog: Path, item: str) -> list[str]:
    """Files of dataset_dir, which are found by their names alone."""
    return [Path(path).name for path in files_called_like(str(catalog.with_name(Path(item).name)))]


def unknown_names(settings: Settings, name: str) -> list[str]:
    """Data sets of `dataset` or `eval_dataset` that are neither files nor in dataset_info.json."""
    catalog = _catalog(settings)
    if settings.value("dataset_dir") == "ONLINE" or settings.is_faulty("dataset_dir"):
        return []
    wanted = settings.value(name) or []
    missing = [
        item
        for item in wanted
        if not any(os.path.lexists(path) for path in (os.path.expanduser(item), catalog.parent / item))
    ]
    try:
        return [item for item in missing if item not in _entries(catalog)]
    except ValueError:
        return missing


def is_in_catalog(settings: Settings, item: str) -> bool:
    """Whether `item` is looked up by its name, whatever file or folder is called so."""
    if settings.value("dataset_dir") == "ONLINE":
        return True
    try:
        return item in _entries(_catalog(settings))
    except ValueError:
        return False


def _catalog(settings: Settings) -> Path:
    return Path(os.path.expanduser(settings.value("dataset_dir"))) / CATALOG


def _entries(catalog: Path) -> dict[str, Any]:
    """Raises ValueError where the file is not JSON, or not an object."""
    if not catalog.is_file():
        return {}
    try:
        entries = json.loads(catalog.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError("is not an object of names")
    return entries
