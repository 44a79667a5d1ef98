"""Checkpoints: written beside their place and renamed, found again, loaded, thrown away.

`checkpoint-N/` has transformers' layout, so its tools read it:
    model*.safetensors | adapter_model.safetensors + adapter_config.json, tokenizer, chat template
    optimizer.pt  scheduler.pt  rng_state.pth  trainer_state.json  training_args.bin  burnish.yaml
    masters.safetensors   the float32 masters, where the model itself is bf16 or float16 (train/optimizer.py)
    scaler.pt             the scale of the loss, where the model is float16 (train/scale.py)
    rng_state_R.pth       in the place of rng_state.pth, of process R of several
    zero/                 in the place of optimizer.pt, every process's part under DeepSpeed
A folder with that name is whole by construction: a run that is killed in the middle of writing or of deleting one
leaves a name with a dot in front, which the next run removes.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState

from burnish import ranks
from burnish.data.loader import go_on_from
from burnish.errors import Problem, UserError
from burnish.train.generators import restore_rng, rng_state
from burnish.train.peers import Peers

if TYPE_CHECKING:
    from burnish.train.trainer import Trainer

STATE_FILE = "trainer_state.json"
SCHEDULER_FILE = "scheduler.pt"  # there only where the checkpoint can be resumed
_NAME = re.compile(r"checkpoint-(\d+)$")


def write_whole(output_dir: Path, step: int, write: Callable[[Path], None], peers: Peers | None = None) -> Path:
    """Let `write` fill a folder, put it on disk for good, and only then give it its name.

    Every process writes its part; the main one makes the folder and names it.
    """
    place = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".checkpoint-{step}.partial"
    peers = peers or Peers()
    peers.from_main(lambda: _make_anew(partial))
    write(partial)
    peers.wait()
    peers.from_main(lambda: _name(partial, place))
    return place


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _name(partial: Path, place: Path) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            _flush_to_disk(file)
    _flush_to_disk(partial)
    remove(place)  # the same step again, after a resume: the old one goes only now
    os.rename(partial, place)
    _flush_to_disk(place.parent)


def remove(place: Path) -> None:
    """Take a checkpoint away, if it is there: its name first, for what has the name is whole."""
    if place.exists():
        unnamed = place.with_name(f".{place.name}.old.partial")
        shutil.rmtree(unnamed, ignore_errors=True)
        os.rename(place, unnamed)
        shutil.rmtree(unnamed, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(output_dir: Path) -> list[Path]:
    """All whole checkpoints, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if _NAME.match(path.name) and (path / STATE_FILE).is_file()]
    return sorted(found, key=step_of)


def last_checkpoint(output_dir: Path) -> Path | None:
    return (checkpoints(output_dir) or [None])[-1]


def has_name(folder: Path) -> bool:
    """Whether its name tells the step."""
    return _NAME.match(folder.name) is not None


def step_of(checkpoint: Path) -> int:
    match = _NAME.match(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest `limit` checkpoints; the best one counts and stays even if it is old, and so does the newest."""
    if not limit:
        return
    found = checkpoints(output_dir)
    keep = {found[-1]} if found else set()
    if best is not None:
        keep.add(output_dir / Path(best).name)
    for path in reversed(found):
        if len(keep) >= limit:
            break
        keep.add(path)
    for path in found:
        if path not in keep:
            remove(path)


# What a run leaves in output_dir itself; patterns.
LEFT_BY_A_RUN = (
    *("trainer_log.jsonl", STATE_FILE, "*_results.json", "training_*.png", "README.md", "burnish.yaml"),
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json"),
)


def clear_run(output_dir: Path) -> None:
    """Take away what an earlier run left and this one would mix with: checkpoints, logs, its model. Other files stay.

    Only where there was a run: a folder that holds no log of one is not touched.
    """
    if not (output_dir / "trainer_log.jsonl").exists() and not checkpoints(output_dir):
        return
    for path in checkpoints(output_dir):
        remove(path)
    for pattern in LEFT_BY_A_RUN:
        for path in output_dir.glob(pattern):
            path.unlink()


def clear_later(output_dir: Path, start: Path) -> None:
    """A run that goes on from one of its own checkpoints leaves those after it behind: they are of another history."""
    for path in checkpoints(output_dir):
        if start.resolve().parent == output_dir.resolve() and step_of(path) > step_of(start):
            remove(path)


def clear_partial(output_dir: Path) -> None:
    for path in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def save(trainer: Trainer, *, to_go_on: bool = False) -> Path:
    """Write `checkpoint-N` for the step that was just done (once), and rotate the old ones.

    `to_go_on`: with everything that resuming needs, whatever `save_only_model` says.
    """
    step = trainer.state.global_step
    place = trainer.output_dir / f"checkpoint-{step}"
    if trainer.last_saved_step == step and (not to_go_on or (place / SCHEDULER_FILE).is_file()):
        return place
    if trainer.state.best_global_step:
        best = trainer.output_dir / f"checkpoint-{trainer.state.best_global_step}"
        if best == place or best.exists():
            trainer.state.best_model_checkpoint = str(best)
    trainer.state.stateful_callbacks = TrainerState(stateful_callbacks=trainer.exportable()).stateful_callbacks
    write_whole(trainer.output_dir, step, lambda folder: _write(trainer, folder, to_go_on), trainer.peers)
    trainer.last_saved_step = step
    if ranks.is_main():
        rotate(trainer.output_dir, trainer.args.save_total_limit, trainer.state.best_model_checkpoint)
    return place


def _write(trainer: Trainer, folder: Path, to_go_on: bool) -> None:
    trainer.save_model(folder)
    to_resume = to_go_on or not trainer.args.save_only_model
    if ranks.is_main():
        torch.save(trainer.args, folder / "training_args.bin")
        trainer.state.save_to_json(str(folder / STATE_FILE))
        if to_resume:
            torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
    if not to_resume:
        return
    if ranks.is_main() or trainer.is_divided:
        trainer.update.save(folder)
    loop = {
        "loss_since_log": trainer.loss_since_log.item(),
        "total_loss": trainer.total_loss,
        "lost_since_log": int(trainer.lost_since_log.item()),
        "total_lost": trainer.total_lost,
        "last_logged_step": trainer.last_logged_step,
        "epochs_ended": trainer.epochs_ended,
        "passes": trainer.passes.state(),
        "stream": trainer.stream_at,
    }
    torch.save({**rng_state(), "loop": loop}, folder / _rng_file(trainer.peers))


def _rng_file(peers: Peers) -> str:
    return "rng_state.pth" if peers.count == 1 else f"rng_state_{peers.rank}.pth"


def load_state(trainer: Trainer, folder: Path) -> None:
    """Everything but the weights, which `load_weights` has put into the model before the optimizer was made."""
    if not (folder / SCHEDULER_FILE).is_file():
        remedy = "it cannot be resumed; start from it with --model_name_or_path or --adapter_name_or_path"
        raise UserError(Problem(str(folder), "", None, "holds weights only (save_only_model)", remedy))
    processes = len(list(folder.glob("rng_state*.pth")))
    if processes != trainer.peers.count:
        message = f"was written by {processes} processes and cannot be resumed by {trainer.peers.count}"
        raise UserError(Problem(str(folder), "", None, message, "start as many, or begin anew from it as a model"))
    rng = _read_position(folder / _rng_file(trainer.peers))
    trainer.state = trainer.mine(TrainerState.load_from_json(str(folder / STATE_FILE)))
    best = trainer.state.best_model_checkpoint
    if best is not None and not Path(best).is_dir():
        trainer.state.best_model_checkpoint = None
    _load_optimizer(trainer, folder)
    trainer.overflows_told = trainer.overflows()
    restore_rng(rng)
    trainer.loss_since_log.fill_(rng["loop"]["loss_since_log"])
    trainer.total_loss = rng["loop"]["total_loss"]
    trainer.lost_since_log.fill_(rng["loop"].get("lost_since_log", 0))
    trainer.total_lost = rng["loop"].get("total_lost", 0)
    trainer.last_logged_step = rng["loop"]["last_logged_step"]
    trainer.epochs_ended = rng["loop"]["epochs_ended"]
    go_on_from(trainer.train_dataloader, rng["loop"].get("stream"))
    trainer.passes.remember(rng["loop"]["passes"])
    trainer.last_saved_step = trainer.state.global_step
    _restore_callbacks(trainer)


def _read_position(file: Path) -> dict[str, Any]:
    """The generators and the counts of the loop. Another program orders rows otherwise: its run cannot go on here."""
    try:
        position = torch.load(file, map_location="cpu")
    except pickle.UnpicklingError:
        position = {}
    if "loop" not in position:
        remedy = "start from it with --model_name_or_path or --adapter_name_or_path"
        raise UserError(Problem(str(file.parent), "", None, "is not burnish's and cannot be resumed", remedy))
    return position


def _load_optimizer(trainer: Trainer, folder: Path) -> None:
    """Moments and position of the schedule as they were; rate and decay as this run's arguments say.

    A run that is simply resumed has the same, bit for bit. One that resumes with another learning rate gets it.
    """
    asked = [(group["initial_lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups]
    trainer.update.load(folder)
    for group, (rate, _) in zip(trainer.optimizer.param_groups, asked, strict=True):
        group.setdefault("initial_lr", rate)  # not in checkpoints of older versions whose schedule goes by a metric
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, map_location="cpu"))
    for number, (group, (rate, decay)) in enumerate(zip(trainer.optimizer.param_groups, asked, strict=True)):
        group["weight_decay"] = decay
        if group["initial_lr"] != rate:
            group["lr"] *= rate / group["initial_lr"]
            group["initial_lr"] = rate
            if hasattr(trainer.lr_scheduler, "base_lrs"):
                trainer.lr_scheduler.base_lrs[number] = rate


def _restore_callbacks(trainer: Trainer) -> None:
    """Give each callback back what it had counted. What it was built with stays as this run's arguments say, unless
    `restore_callback_states_from_checkpoint` asks for that too."""
    by_name: dict[str, Any] = trainer.state.stateful_callbacks  # type: ignore[assignment]  # a dict once it is read
    for callback in trainer.exportable():
        saved = by_name.get(type(callback).__name__)
        if isinstance(saved, list):
            saved = saved.pop(0) if saved else None
        if saved is None or callback is trainer.control:
            continue
        values = dict(saved.get("attributes", {}))
        if trainer.args.restore_callback_states_from_checkpoint:
            values |= saved.get("args", {})
        for name, value in values.items():
            setattr(callback, name, value)
