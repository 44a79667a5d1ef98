"""Data sets of a hub, as rows: through the `datasets` library, or through ModelScope's own package.

Whatever goes wrong there (a name, a token, the connection, a file) becomes one line with what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from burnish.data.columnar import without_nulls
from burnish.data.entry import DatasetAttr
from burnish.data.rows import Row
from burnish.errors import Problem, UserError

_REMEDIES = {  # a word in what datasets says → what to do
    "Dataset scripts": "datasets no longer runs scripts: save its rows as parquet or jsonl, and name that file",
    "doesn't exist on the Hub": "check its name; a private or gated one needs hf_hub_token or HF_TOKEN",
    "Couldn't reach": "it is not in the cache: connect (HF_ENDPOINT names a mirror), or name a folder with it",
}


@dataclass(frozen=True)
class Hub:
    """How to reach the hub: arguments of the model, which hold for data too. `model_revision` is the model's alone."""

    cache_dir: str | None = None
    token: str | None = None
    _loaded: dict[DatasetAttr, Any] = field(default_factory=dict, compare=False, repr=False)

    def load(self, attr: DatasetAttr, *, streaming: bool = False) -> Any:
        """What `datasets` makes of it. A set is asked for once."""
        if attr not in self._loaded:
            self._loaded[attr] = self._load(attr, streaming)
        return self._loaded[attr]

    def files(self, attr: DatasetAttr) -> list[str]:
        """Where `datasets` keeps its rows on this disk; nowhere, if it holds them in memory."""
        from datasets import Dataset

        loaded = self.load(attr)
        return [file["filename"] for file in loaded.cache_files] if isinstance(loaded, Dataset) else []

    def _load(self, attr: DatasetAttr, streaming: bool) -> Any:
        try:
            load = self._from_modelscope if attr.load_from == "ms_hub" else self._from_hub
            return load(attr, streaming)
        except Exception as error:  # of the hub, the connection or the files: they share no class
            raise _cannot_be_loaded(attr, error) from error

    def _from_hub(self, attr: DatasetAttr, streaming: bool) -> Any:
        from datasets import load_dataset

        return load_dataset(
            attr.path,
            name=attr.subset,
            data_dir=attr.folder,
            split=attr.split,
            cache_dir=self.cache_dir,
            token=self.token,
            streaming=streaming,
        )

    def _from_modelscope(self, attr: DatasetAttr, streaming: bool) -> Any:
        """ModelScope has branches and tokens of its own; the package knows them by `modelscope login`."""
        from modelscope import MsDataset  # pyright: ignore[reportMissingImports]

        loaded = MsDataset.load(
            attr.path,
            subset_name=attr.subset,
            data_dir=attr.folder,
            split=attr.split,
            cache_dir=self.cache_dir,
            use_streaming=streaming,
        )
        return loaded.to_hf_dataset() if isinstance(loaded, MsDataset) else loaded


def hub_rows(attr: DatasetAttr, loaded: Any) -> Iterator[Row]:
    rows = enumerate(loaded, 1)
    while True:
        try:  # a stream reads its files here
            number, row = next(rows, (0, None))
        except Exception as error:
            raise _cannot_be_loaded(attr, error) from error
        if row is None:
            return
        yield Row(without_nulls(dict(row)), f"{attr.path}:{number}")


def _cannot_be_loaded(attr: DatasetAttr, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    remedy = "check its name, subset and split, and the connection; or download it and name the folder"
    for word, better in _REMEDIES.items():
        if word in reason:
            remedy = better
    return UserError(Problem("data", attr.name, attr.path, f"cannot be loaded: {reason}", remedy))
