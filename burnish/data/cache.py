"""Tokens kept in a folder: made once, by one process, and mapped into the memory of all that need them.

    ~/.cache/burnish/tokens/2c26b46b…/lock     held by the process that makes them
                                      part/    what it has made so far, and journal.json: how much of it is good
                                      whole/   part, renamed in the end; index.json: what it is, and the report

Whoever needs tokens takes the lock and looks. Are they there, they are mapped; else this process makes them, while the
others (ranks of the run, other runs) wait at the lock, in no collective. A process that is killed loses its lock, and
the next one goes on from its journal. Nothing is ever changed in `whole`, which somebody may have mapped: it is
removed, and its bytes live on as long as they are mapped.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from burnish import console
from burnish.data.fingerprint import differences, fingerprint
from burnish.data.report import DataReport
from burnish.data.store import Extent, SampleStore, StoreWriter, open_store
from burnish.data.workers import Item, RowEncoder, encode_items
from burnish.errors import Problem, UserError

SECONDS_BETWEEN_ENTRIES = 5.0  # of the journal: what a process that is killed has made in vain
_INDEX, _JOURNAL, _HASHES = "index.json", "journal.json", "hashes.uint64"
_OF_DATASETS = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
_ROWS_AT_ONCE = 1024

Items = Callable[[], Iterator[Item]]  # begins anew at each call


@dataclass(frozen=True)
class Kept:
    """What a folder of tokens gives."""

    parts: dict[str, SampleStore]  # train, eval, …
    report: DataReport


@dataclass(frozen=True)
class TokenFolder:
    """A place for the tokens that one description fits. `is_named`: the user chose it, and may have chosen wrong."""

    path: Path
    description: Mapping[str, Any]
    is_named: bool = False

    def get(
        self, parts: Mapping[str, Items], encoder: RowEncoder, report: DataReport, *, overwrite: bool = False
    ) -> Kept:
        """The tokens that are there, else those of `parts`. `overwrite`: only what was made from now on is there.

        `report` is the one that `parts` tell their notes; it is filled where tokens are made.
        """
        since = time.time() if overwrite else 0.0
        try:
            if self.is_named:
                self._refuse_others(overwrite)
            kept = self._find(since)
            if kept is None:
                with _locked(self.path):
                    kept = self._find(since)
                    if kept is None:
                        if self.is_named:  # whoever held the lock may have made others
                            self._refuse_others(overwrite)
                        _Making(self.path, self.description, encoder, report).make(parts)
                        kept = self._find(0.0)
        except OSError as error:
            raise UserError(self._cannot_be_written(error)) from error
        assert kept is not None
        return kept

    def _find(self, since: float) -> Kept | None:
        """None where there is nothing, or it is of something else, or not whole."""
        index = _read_json(self.path / "whole" / _INDEX)
        if not index or index.get("fingerprint") != fingerprint(self.description) or index["made"] < since:
            return None
        try:
            folder = self.path / "whole"
            parts = {name: open_store(folder / name, Extent.from_json(e)) for name, e in index["parts"].items()}
        except OSError:  # a file is missing or was cut: it is made anew
            return None
        return Kept(parts, DataReport.from_json(index["report"]))

    def _refuse_others(self, overwrite: bool) -> None:
        """What the user may not want to lose: other tokens, and files that are none."""
        there = set(os.listdir(self.path)) if self.path.exists() else set()
        if there & set(_OF_DATASETS):
            message = "holds tokens that LLaMA-Factory kept, which burnish does not read"
            raise UserError(self._problem(message, "name another folder: tokens are made there"))
        if there - {"lock", "part", "whole"}:
            raise UserError(self._problem("is a folder with files that are no tokens", "name a new or an empty one"))
        index = _read_json(self.path / "whole" / _INDEX)
        if index and index.get("fingerprint") != fingerprint(self.description) and not overwrite:
            others = "; ".join(differences(index.get("made_of", {}), _as_json(self.description)))
            remedy = "set overwrite_cache: true to make them anew, or name another folder"
            raise UserError(self._problem(f"holds other tokens ({others})", remedy))

    def _cannot_be_written(self, error: OSError) -> Problem:
        remedy = "free some space there, or name another folder"
        if not self.is_named:
            remedy += ": set tokenized_path, or BURNISH_CACHE in the environment"
        return self._problem(f"cannot be written: {error.strerror or error}", remedy)

    def _problem(self, message: str, remedy: str) -> Problem:
        return Problem("data", "tokenized_path" if self.is_named else "tokens", str(self.path), message, remedy)


def token_cache() -> Path:
    return Path(os.environ.get("BURNISH_CACHE") or Path.home() / ".cache" / "burnish") / "tokens"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in the folder. The system gives the lock back when its holder ends, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+b", 0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            console.warn(f"process {file.read().decode()} makes the tokens of this data; waiting for it ({folder})")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        yield


@dataclass
class _Progress:
    """How far one part has come: rows that were read, and how far its files are filled."""

    rows: int = 0
    extent: Extent = field(default_factory=Extent)
    is_done: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "extent": self.extent.to_json(), "is_done": self.is_done}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> _Progress:
        return cls(value["rows"], Extent.from_json(value["extent"]), value["is_done"])


class _Making:
    """The work of the process that holds the lock: `part` is filled, and becomes `whole`."""

    def __init__(self, place: Path, description: Mapping[str, Any], encoder: RowEncoder, report: DataReport):
        self.place, self.folder = place, place / "part"
        self.description, self.encoder = description, encoder
        self.fingerprint = fingerprint(description)
        self.report = report
        self.progress: dict[str, _Progress] = {}  # of parts, and in stage pt of their documents
        self._written = time.monotonic()

    def make(self, parts: Mapping[str, Items]) -> None:
        self._go_on()
        try:
            for name, items in parts.items():
                self._encode(name, items)
        except UserError:  # the data will have changed when it is read again
            shutil.rmtree(self.folder)
            raise
        self.report.count_duplicates()
        extents = {name: self.progress[name].extent for name in parts}
        for name, extent in extents.items():
            self.report.add_part(name, open_store(self.folder / name, extent))
        self._finish(extents)

    def _encode(self, name: str, items: Items) -> None:
        if not self.encoder.frame:
            self._write_samples(name, items)
            return
        documents = f"{name}.documents"
        if not self._of(name).is_done:
            self._write_samples(documents, items)
            self._write_rows(name, documents)
        shutil.rmtree(self.folder / documents, ignore_errors=True)

    def _write_samples(self, name: str, items: Items) -> None:
        progress = self._of(name)
        if progress.is_done:
            return
        before = self.report.rows - progress.rows  # rows of earlier parts
        with self._writer(name) as writer:
            with closing(encode_items(islice(items(), progress.rows, None), self.encoder, self.report)) as stores:
                for store in stores:
                    writer.append(store)
                    if time.monotonic() - self._written > SECONDS_BETWEEN_ENTRIES:
                        self._note(name, writer, self.report.rows - before)
            self._note(name, writer, self.report.rows - before, is_done=True)

    def _write_rows(self, name: str, documents: str) -> None:
        """Documents → rows of cutoff_len. It is copying, and begins anew in a process that goes on."""
        self.progress.pop(name, None)
        source = open_store(self.folder / documents, self._of(documents).extent)
        rows = self.encoder.joined(source, self.report)
        with self._writer(name) as writer:
            while batch := list(islice(rows, _ROWS_AT_ONCE)):
                writer.append(SampleStore.from_samples(batch))
            self._note(name, writer, 0, is_done=True)

    @contextmanager
    def _writer(self, name: str) -> Iterator[StoreWriter]:
        with closing(StoreWriter(self.folder / name, self._of(name).extent)) as writer:
            yield writer

    def _of(self, name: str) -> _Progress:
        return self.progress.setdefault(name, _Progress())

    # ---- the journal ----

    def _go_on(self) -> None:
        """From the journal of a process that did not finish, where it made just these tokens; else from nothing."""
        journal = _read_json(self.folder / _JOURNAL)
        if not journal or journal["fingerprint"] != self.fingerprint:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
            return
        counted = DataReport.from_json(journal["report"])
        os.truncate(self.folder / _HASHES, 8 * journal["hashes"])
        counted.hashes = array("Q", (self.folder / _HASHES).read_bytes())
        self.report.merge(counted)
        self.progress = {name: _Progress.from_json(value) for name, value in journal["progress"].items()}
        done = sum(each.rows for each in self.progress.values())
        console.warn(f"going on with tokens that an earlier run began: {done:,} rows are done ({self.place})")

    def _note(self, name: str, writer: StoreWriter, rows: int, *, is_done: bool = False) -> None:
        """An entry: what is on the disk now is good."""
        writer.sync()
        self.progress[name] = _Progress(rows, writer.extent, is_done)
        hashes = self.report.hashes or array("Q")
        with open(self.folder / _HASHES, "ab") as file:
            file.write(hashes[file.tell() // 8 :].tobytes())
            os.fsync(file.fileno())
        journal = {
            "fingerprint": self.fingerprint,
            "report": self.report.to_json(),
            "hashes": len(hashes),
            "progress": {name: progress.to_json() for name, progress in self.progress.items()},
        }
        _write_json(self.folder / _JOURNAL, journal)
        self._written = time.monotonic()

    def _finish(self, extents: Mapping[str, Extent]) -> None:
        index = {
            "fingerprint": self.fingerprint,
            "made": time.time(),
            "made_of": self.description,
            "parts": {name: extent.to_json() for name, extent in extents.items()},
            "report": self.report.to_json(),
        }
        _write_json(self.folder / _INDEX, index)
        for name in (_JOURNAL, _HASHES):
            (self.folder / name).unlink()
        if (self.place / "whole").exists():
            shutil.rmtree(self.place / "whole")
        os.rename(self.folder, self.place / "whole")


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value, default=str))


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where it is not there, or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".new")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(value, file, default=str)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
