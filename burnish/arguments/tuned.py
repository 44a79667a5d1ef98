"""What a training file's own run left behind: the model or adapter that `burnish chat run.yaml` asks (A6)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from burnish.arguments.settings import Settings
from burnish.errors import UserError
from burnish.model.arguments import ModelArguments


def for_inference(settings: Settings) -> tuple[ModelArguments, list[str]]:
    """Which model and adapters a training file's own result is, and notes about it.

    A file with an output_dir speaks of a run: its adapter (lora) or its model (full, freeze) is what is asked. A model
    or an adapter that the command line names is taken as it is. Raises UserError when the run left nothing yet.
    """
    output_dir, is_lora = settings.value("output_dir"), settings.value("finetuning_type") == "lora"
    decided = settings.on_command_line("adapter_name_or_path" if is_lora else "model_name_or_path")
    if not output_dir or decided:
        return settings.model, []
    folder, notes = _tuned(settings, Path(os.path.expanduser(output_dir)), is_lora)
    if not is_lora:
        return replace(settings.model, model_name_or_path=str(folder)), notes
    earlier = settings.model.adapter_name_or_path or []
    merged = earlier if settings.value("create_new_adapter") else earlier[:-1]  # the last one went on being trained
    return replace(settings.model, adapter_name_or_path=[*merged, str(folder)]), notes


def _tuned(settings: Settings, output_dir: Path, is_lora: bool) -> tuple[Path, list[str]]:
    """The final model or adapter in output_dir, else its newest checkpoint."""
    if _holds_tuned(output_dir, is_lora):
        return output_dir, []
    numbered = [(p, p.name.removeprefix("checkpoint-")) for p in output_dir.glob("checkpoint-*")]
    whole = [(int(n), p) for p, n in numbered if n.isdigit() and _holds_tuned(p, is_lora)]
    if whole:
        newest = max(whole)[1]
        return newest, [f"{output_dir} holds no finished run; asking its newest checkpoint, {newest.name}"]
    what = "adapter" if is_lora else "model"
    remedy = f"train first: burnish train {settings.config or 'CONFIG.yaml'}; or leave output_dir out to ask the base"
    raise UserError(settings.problem("output_dir", f"holds no tuned {what} yet", remedy))


def _holds_tuned(folder: Path, is_lora: bool) -> bool:
    if is_lora:
        return (folder / "adapter_config.json").is_file()
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
