"""Where an export goes: a folder, filled beside its place and given its name when it is proved; and a hub, if named.

OUT            whole and proved, or not there
.OUT.partial   being written; left by a kill, and removed by the next export
OUT.failed     written, and the proof found a fault: export_report.json in it says which

What can be wrong with either is asked before anything is read, so that an hour of merging does not end in a login.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from burnish.errors import Problem, RunStopped, UserError
from burnish.model.source import first_line

ANOTHER = "name a folder that is not there yet"
MAY_WRITE = "name a folder that you may write to"
LOGIN = "connect and log in (HF_TOKEN or hf_hub_token), or leave it out and upload the folder later"


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


def unfit(export_dir: str) -> tuple[str, str] | None:
    """Why a folder cannot become the model's, and what to do; None where nothing speaks against it."""
    folder = _resolved(export_dir)
    try:
        if folder.is_file():
            return "is a file", ANOTHER
        if folder.is_mount():  # nothing can be written beside it, on the same disk
            return "is a disk of its own", "name a folder on it"
        if folder.is_dir() and any(folder.iterdir()):
            return "is not empty", f"{ANOTHER}, or remove this one first"
    except OSError as error:
        return f"cannot be made ({error.strerror})", MAY_WRITE
    return None


def claim(export_dir: str, needed: int) -> Place:
    """An empty partial folder for `needed` bytes beside `export_dir`. Raises UserError."""
    if problem := unfit(export_dir):
        raise _wrong(export_dir, *problem)
    place = Place(_resolved(export_dir))
    try:
        place.clear()
        place.partial.mkdir(parents=True)
    except OSError as error:
        raise _wrong(export_dir, f"cannot be made ({error.strerror})", MAY_WRITE) from error
    free = shutil.disk_usage(place.partial).free
    if free < needed:
        place.partial.rmdir()
        message = f"needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free"
        raise _wrong(export_dir, message, "make room, or name a folder on another disk")
    return place


def _resolved(export_dir: str) -> Path:
    """Behind links: the folder that one leads to gets the model, on its own disk."""
    return Path(os.path.expanduser(export_dir)).resolve()


def _wrong(export_dir: str, message: str, remedy: str) -> UserError:
    return UserError(Problem("settings", "export_dir", export_dir, message, remedy))


# ---- the hub (export_hub_model_id) -----------------------------------------------------------------------------------


def check_login(name: str, token: str | None) -> None:
    """Whether the hub knows the user. Raises UserError."""
    from huggingface_hub import HfApi

    try:
        HfApi(token=token).whoami()
    except Exception as error:  # no token, a wrong one, no network, offline by HF_HUB_OFFLINE
        message = f"cannot be uploaded to the hub ({first_line(error)})"
        raise UserError(Problem("settings", "export_hub_model_id", name, message, LOGIN)) from error


def upload(folder: Path, name: str, token: str | None) -> str:
    """The address of the uploaded model. What goes wrong leaves the folder as it is."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Export by burnish")
    except Exception as error:  # the hub's errors and the network's share no class
        message = f"the model is whole in {folder}, but was not uploaded as {name} ({first_line(error)})"
        raise RunStopped(f"{message}; try again with: hf upload {name} {folder}", 1) from error
    return str(address)
