"""Where a run begins: anew, at a checkpoint of its own, or not at all because it would mix with another run (T6)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from burnish import console
from burnish.errors import Problem, UserError
from burnish.train import checkpoint

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings

SETTINGS_FILE = "burnish.yaml"


def decide_start(settings: Settings) -> Path | None:
    """The checkpoint to go on from, or None to begin anew. Raises UserError where output_dir holds another run."""
    output_dir = Path(os.path.expanduser(settings.value("output_dir")))
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".can-write").touch()
        (output_dir / ".can-write").unlink()
    except OSError as error:
        remedy = "give a folder that you may write to"
        raise UserError(settings.problem("output_dir", f"cannot be written to ({error.strerror})", remedy)) from None
    checkpoint.clear_partial(output_dir)
    asked = settings.value("resume_from_checkpoint")
    if asked:
        return _named_checkpoint(settings, str(asked), output_dir)
    if settings.value("overwrite_output_dir"):
        return None
    last = checkpoint.last_checkpoint(output_dir)
    if (output_dir / "train_results.json").is_file():
        remedy = "give another output_dir, or overwrite_output_dir: true to train anew"
        raise UserError(settings.problem("output_dir", "holds a finished run", remedy))
    if last is None:
        return None
    _refuse_another_run(settings, last)
    console.say(f"{output_dir} holds an unfinished run with these arguments: going on from {last.name}")
    return last


def _named_checkpoint(settings: Settings, asked: str, output_dir: Path) -> Path:
    if asked.lower() in ("true", "yes", "1"):
        last = checkpoint.last_checkpoint(output_dir)
        if last is None:
            remedy = "leave resume_from_checkpoint out to begin anew"
            raise UserError(settings.problem("resume_from_checkpoint", f"finds no checkpoint in {output_dir}", remedy))
        return last
    path = Path(os.path.expanduser(asked))
    if not checkpoint.has_name(path) or not (path / checkpoint.STATE_FILE).is_file():
        remedy = "give a folder named checkpoint-N that holds trainer_state.json"
        raise UserError(settings.problem("resume_from_checkpoint", "is no checkpoint", remedy))
    return path


def _refuse_another_run(settings: Settings, last: Path) -> None:
    """A checkpoint is gone on from only with the arguments that it was trained with."""
    from burnish.arguments.parse import read_settings

    remedy = "give another output_dir, or overwrite_output_dir: true to train anew"
    if not (last / SETTINGS_FILE).is_file():
        raise UserError(settings.problem("output_dir", f"holds {last.name} of a run that is not burnish's", remedy))
    before = read_settings(last / SETTINGS_FILE)
    changed = settings.changes_that_matter(before)
    if changed:
        raise UserError(
            [
                Problem(
                    str(last / SETTINGS_FILE),
                    name,
                    settings.value(name),
                    f"is not what the run in output_dir was trained with ({before.value(name)!r})",
                    remedy,
                )
                for name in changed
            ]
        )
