"""What tokens were made of, in a dictionary that says it and a fingerprint that two runs can compare.

    {"rows": {"train": [{"path": "data/pairs.jsonl", "files": {"pairs.jsonl": "9f86d0…"}, …}], …},
     "settings": {"cutoff_len": 2048, …}, "tokenizer": "60303a…", "template": {"jinja": …}, …}   →   "2c26b46b68ffc68f…"

Files count by their contents, whose reading takes a second a gigabyte: a date and a size stay the same where a file is
written anew within the clock's resolution. What is not known to leave the tokens as they are counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.data.entry import DatasetAttr, files_of_data
from burnish.data.workers import RowEncoder
from burnish.environment import version_of
from burnish.errors import Problem, UserError

if TYPE_CHECKING:
    from burnish.data.arguments import DataArguments

ENCODING = 2  # to be raised with every change of burnish's that makes other tokens, or another report, of the same rows

# Settings that change no token, or that stand elsewhere in the description
_NOT_OF_TOKENS = {
    *("dataset", "eval_dataset", "dataset_dir", "split", "template"),  # see "rows" and "template"
    *("overwrite_cache", "tokenized_path", "max_bad_rows", "packing", "ignore_pad_token_for_loss"),
    *("streaming", "buffer_size"),  # what is streamed is not kept
}
_PIECE = 2**20  # bytes


def describe(
    encoder: RowEncoder, rows: Mapping[str, Sequence[DatasetAttr]], *, seed: int, files: Mapping[DatasetAttr, list[str]]
) -> dict[str, Any]:
    """`rows`: the data sets of training and evaluation; `files`: where those of a hub lie on this disk."""
    args, template = encoder.args, encoder.template
    return {
        "encoding": ENCODING,
        "libraries": {name: version_of(name) for name in ("tokenizers", "transformers")},
        "stage": encoder.stage,
        "rows": {part: [_of_set(attr, files.get(attr)) for attr in attrs] for part, attrs in rows.items()},
        "seed": seed if _is_drawn(args, [attr for attrs in rows.values() for attr in attrs]) else None,
        "settings": {name: value for name, value in sorted(asdict(args).items()) if name not in _NOT_OF_TOKENS},
        "tokenizer": _digest(_tokenizer_bytes(encoder.tokenizer)),
        "template": template.identity() if template else None,
        "frame": asdict(encoder.frame) if encoder.frame else None,
    }


def fingerprint(description: Mapping[str, Any]) -> str:
    return _digest([json.dumps(description, sort_keys=True, default=str).encode()])


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two descriptions do not agree about: `cutoff_len 1024, not 2048`, or only `rows` where it is long."""
    found = []
    for key in sorted({*one, *other}):
        mine, theirs = one.get(key), other.get(key)
        if mine == theirs:
            continue
        if key in ("settings", "libraries") and isinstance(mine, dict) and isinstance(theirs, dict):
            found += differences(mine, theirs)
        else:
            told = f"{key} {mine!r}, not {theirs!r}"
            found.append(told if len(told) < 80 else key)
    return found


def _is_drawn(args: DataArguments, attrs: Iterable[DatasetAttr]) -> bool:
    """Whether the seed decides which rows there are, or their order."""
    return bool(args.val_size) or args.mix_strategy != "concat" or any(attr.num_samples for attr in attrs)


def _of_set(attr: DatasetAttr, on_disk: list[str] | None) -> dict[str, Any]:
    """An entry and its files' contents. Its name is only a name, until a set is evaluated by it."""
    if on_disk is None:
        folder = os.path.isdir(attr.path)
        on_disk = [os.path.join(attr.path, name) for name in files_of_data(attr.path)] if folder else [attr.path]
    return {**asdict(attr), "files": {os.path.basename(path): _digest(_contents(path)) for path in on_disk}}


def _contents(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise UserError(Problem(path, "", None, f"cannot be read: {error.strerror or error}")) from error


def _tokenizer_bytes(tokenizer: Any) -> Iterator[bytes]:
    """All that a tokenizer is: of one in Rust its own text, of one in Python the files that it is saved as."""
    yield json.dumps([type(tokenizer).__name__, tokenizer.special_tokens_map], default=str).encode()
    if tokenizer.is_fast:
        yield tokenizer.backend_tokenizer.to_str().encode()
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            yield path.name.encode() + b"\0" + path.read_bytes()


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
