"""What goes into the folder beside the weights: the base's own files where nothing changed, else new ones.

transformers 5 writes config.json and tokenizer_config.json in a form that programs built on transformers 4 misread
without a word (`rope_parameters` in place of `rope_theta`, and a tokenizer class that they do not have). The base's own
files say the same and are read by all, so they are kept wherever what they say still holds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from burnish.chat.template import ChatTemplate
from burnish.export.verify import dtype_name
from burnish.generate.config import as_list
from burnish.model.arguments import ModelArguments
from burnish.model.source import SMALL_FILES, read_json, runs_own_code

LEGAL = ("licen[sc]e*", "notice*", "copying*", "*use_policy*", "*.md")
MADE_HERE = {"config.json", "generation_config.json", "README.md", "Modelfile", "export_report.json"}
OF_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "*.tiktoken", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
OF_A_RUN = ("trainer_state.json", "*_results.json", "adapter_config.json", "*.index.json")
NOT_CONFIG = ("transformers_version", "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype")


def write_weights(model: PreTrainedModel, folder: Path, most_bytes: int, *, own_names: bool) -> None:
    """model*.safetensors of at most `most_bytes` each, config.json, generation_config.json (and the code of a remote
    model). A single matrix that is larger has a file of its own.

    `own_names`: as the model calls its weights, else as models of its kind are published.
    """
    model.save_pretrained(folder, max_shard_size=most_bytes, save_original_format=not own_names)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors >= 0.8 makes them readable by their owner alone


def set_stop_tokens(model: PreTrainedModel, stop_ids: list[int]) -> None:
    """Every id at which an answer ends into the generation config: the template's, then the model's own."""
    generation: Any = model.generation_config
    if generation is None:
        return
    ids = list(dict.fromkeys([*stop_ids, *as_list(generation.eos_token_id)]))
    generation.eos_token_id = (ids if len(ids) > 1 else ids[0]) if ids else None
    generation._from_model_config = False  # else transformers 4 may make it again, out of config.json


def carry_files(base: Path, folder: Path, args: ModelArguments) -> None:
    """Copy the base's other small files: licence, processors, what no list knows. Code only if it may run."""
    own_code = runs_own_code(base, args)
    for file in (path for path in base.iterdir() if path.is_file()):
        known = [pattern for pattern in (*SMALL_FILES, *LEGAL) if Path(file.name.lower()).match(pattern)]
        left = file.name in MADE_HERE or any(file.match(pattern) for pattern in (*OF_TOKENIZER, *OF_A_RUN))
        if known and not left and (file.suffix != ".py" or own_code):
            shutil.copyfile(file, folder / file.name)


def keep_config(base: Path, folder: Path, args: ModelArguments, dtype: torch.dtype) -> None:
    """The base's config.json in place of the new one, if they say the same of the model; its dtype is set."""
    own_code = runs_own_code(base, args)
    own, new = (AutoConfig.from_pretrained(str(each), trust_remote_code=own_code).to_dict() for each in (base, folder))
    path = folder / "config.json"
    same = _without(own, NOT_CONFIG) == _without(new, NOT_CONFIG)
    config = read_json(base / "config.json" if same else path)
    if not own_code:
        config.pop("auto_map", None)  # names .py files that are not carried
    for name in ("dtype", "torch_dtype"):
        if name in config:
            config[name] = dtype_name(dtype)
    _write_json(path, config)


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Without these names, at every depth: models that see hold several configs."""
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in names
    }


def write_tokenizer(
    base: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    args: ModelArguments,
) -> None:
    """The base's tokenizer files with the chat template of this model; new files where tokens were added."""
    path = base / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    code = config.get("auto_map") and not runs_own_code(base, args)
    added = args.add_tokens or args.add_special_tokens
    if not (base / "tokenizer.json").is_file() or not config or code or added:
        tokenizer.save_pretrained(folder)
        return
    for file in (path for path in base.iterdir() if any(path.match(pattern) for pattern in OF_TOKENIZER)):
        if template is None or not file.name.startswith("chat_template"):
            shutil.copyfile(file, folder / file.name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template.jinja, encoding="utf-8")
        if "chat_template" in config:  # where older programs look first
            _write_json(folder / "tokenizer_config.json", config | {"chat_template": template.jinja})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
