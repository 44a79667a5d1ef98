"""What a folder's files of weights hold, read from their headers: name → dtype and shape. No weight is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish.errors import Problem, UserError
from burnish.model.source import WEIGHT_FILES, first_line, read_json

SHOWN = 3  # names in a message
DTYPES = {  # safetensors' names
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


Listing = dict[str, Entry]


def read_listing(folder: Path) -> Listing:
    """
    >>> read_listing(Path("SmolLM2-135M-Instruct"))["model.norm.weight"]
    Entry(dtype=torch.bfloat16, shape=(576,))
    """
    found: Listing = {}
    for file in weight_files(folder):
        try:
            found |= _header(file) if file.suffix == ".safetensors" else _of_pickle(file)
        except Exception as error:  # a torn file, a pickle that is none, a number format that DTYPES has not
            message = f"cannot be read ({first_line(error)})"
            raise UserError(Problem(str(file), "", None, message, "copy the model's files again")) from error
    if not any(entry.dtype.is_floating_point for entry in found.values()):
        raise UserError(Problem(str(folder), "", None, "holds files of weights with no weights in them"))
    return found


def weight_files(folder: Path) -> list[Path]:
    own_name = read_json(folder / "config.json").get("transformers_weights")
    for name in [own_name] if own_name else WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]
    return []


def _header(file: Path) -> Listing:
    """The format is one length (8 bytes, little-endian), then JSON of that length, then numbers."""
    with file.open("rb") as content:
        header: dict[str, Any] = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: Entry(DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}


def _of_pickle(file: Path) -> Listing:
    weights = torch.load(file, map_location="meta", weights_only=True)
    return {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}


def main_dtype(listing: Listing) -> torch.dtype:
    """The number format that most of the weights have."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in listing.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.size
    return sizes.most_common(1)[0][0]


def is_mixed(listing: Listing) -> bool:
    return len({entry.dtype for entry in listing.values() if entry.dtype.is_floating_point}) > 1


@dataclass(frozen=True)
class Written:
    """How the written files differ from the base's: what is meant to, and what is wrong with them."""

    left_out: list[str] = field(default_factory=list)  # that the model does not use, or holds under another name
    grown: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def compare(base: Listing, written: Listing, model: ModelNames, dtypes: dict[str, torch.dtype]) -> Written:
    """`dtypes`: what each weight of the base was to be written in. Both by the names of `ModelNames.today`."""
    absent = [name for name in base if name not in written]
    lost = [name for name in absent if name in model.names and not model.aliases(name) & written.keys()]
    new = [name for name in written if name not in base]
    untied = [name for name in new if name in model.head and not model.tied]
    reshaped = [name for name in base if name in written and written[name].shape != base[name].shape]
    grown = [name for name in reshaped if name in model.embedding | model.head and model.may_grow]
    retyped = [name for name in base if name in written and written[name].dtype != dtypes[name]]
    faults = [
        *_fault("were not written", lost),
        *_fault("are not in the base", [name for name in new if name not in untied]),
        *_fault("have another shape than in the base", [name for name in reshaped if name not in grown]),
        *_fault("have another number format than they were to have", retyped),
    ]
    return Written([name for name in absent if name not in lost], grown, untied, faults)


def _fault(message: str, names: list[str]) -> list[str]:
    return [f"{len(names)} weights {message}: {some(names)}"] if names else []


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@dataclass(frozen=True)
class ModelNames:
    """What the merged model calls its weights, kept when the model itself is gone."""

    names: dict[str, int]  # name → where it lies in memory; tied ones lie at one place
    prefix: str  # "transformer."
    embedding: frozenset[str]
    head: frozenset[str]
    tied: bool
    may_grow: bool  # resize_vocab

    def aliases(self, name: str) -> set[str]:
        return {other for other, place in self.names.items() if place == self.names[name]}

    def are_those_of(self, base: Listing) -> bool:
        """Whether the base's files call every weight as the model does; published experts are often one by one."""
        listing = self.today(base, self.names)
        return all(name in listing or self.aliases(name) & listing.keys() for name in self.names)

    def today(self, base: Listing, names: Collection[str]) -> Listing:
        """The base's weights by the names in `names`: GPT-2's files of 2019 lack the `transformer.` before them."""
        return {self._today(name, names): entry for name, entry in base.items()}

    def _today(self, name: str, names: Collection[str]) -> str:
        return self.prefix + name if name not in names and self.prefix + name in names else name


def names_of(model: Any, *, may_grow: bool) -> ModelNames:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return ModelNames(
        names={name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
        prefix=f"{model.base_model_prefix}.",
        embedding=frozenset(_paths(model, embedding)),
        head=frozenset(_paths(model, head)) if head is not None else frozenset(),
        tied=head is None or head.weight is embedding.weight,
        may_grow=may_grow,
    )


def _paths(model: nn.Module, module: nn.Module) -> Iterable[str]:
    path = next(path for path, each in model.named_modules() if each is module)
    return [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
