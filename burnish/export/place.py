"""The folder of an export: filled beside its place under another name, and given its name when it is proved.

OUT            whole and proved, or not there
.OUT.partial   being written; left by a kill, and removed by the next export
OUT.failed     written, and the proof found a fault: export_report.json in it says which
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from burnish.errors import Problem, UserError


@dataclass(frozen=True)
class Place:
    final: Path

    @property
    def partial(self) -> Path:
        return self.final.with_name(f".{self.final.name}.partial")

    @property
    def failed(self) -> Path:
        return self.final.with_name(f"{self.final.name}.failed")

    def give_name(self) -> None:
        if self.final.is_dir():
            self.final.rmdir()  # empty, or it would have been refused
        os.rename(self.partial, self.final)

    def give_up(self) -> None:
        """Keep what was written where its name says that it is not to be used."""
        shutil.rmtree(self.failed, ignore_errors=True)
        os.rename(self.partial, self.failed)

    def clear(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


def claim(export_dir: str, needed: int) -> Place:
    """An empty partial folder for `needed` bytes beside `export_dir`, which must be empty. Raises UserError."""
    place = Place(Path(export_dir).expanduser().absolute())
    if place.final.is_file():
        raise _wrong(export_dir, "is a file", "name a folder that is not there yet")
    if place.final.is_dir() and any(place.final.iterdir()):
        raise _wrong(export_dir, "is not empty", "name a folder that is not there yet, or remove this one first")
    try:
        place.clear()
        place.partial.mkdir(parents=True)
    except OSError as error:
        raise _wrong(export_dir, f"cannot be made ({error.strerror})", "name a folder that you may write to") from error
    free = shutil.disk_usage(place.partial).free
    if free < needed:
        place.partial.rmdir()
        message = f"needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free"
        raise _wrong(export_dir, message, "make room, or name a folder on another disk")
    return place


def _wrong(export_dir: str, message: str, remedy: str) -> UserError:
    return UserError(Problem("settings", "export_dir", export_dir, message, remedy))
