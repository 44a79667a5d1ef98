"""What tests of the export share: a base folder, adapters beside it, an order, and what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import make, save_tokenizer, shake

from burnish.export.listing import main_dtype, read_listing
from burnish.export.run import Order, export_model
from burnish.model.arguments import ModelArguments
from burnish.model.loader import load_model
from burnish.model.tokenizer import load_tokenizer
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments


def make_base(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    make(family, dtype=dtype).save_pretrained(folder)
    return save_tokenizer(folder)


def make_adapter(base: str, folder: Path, *, seed: int = 1, trained: bool = True, **settings: Any) -> str:
    """An adapter in the base's dtype, every weight of it moved."""
    of_model = {name: settings.pop(name) for name in ("resize_vocab", "add_special_tokens") if name in settings}
    args = ModelArguments(model_name_or_path=base, **of_model)
    model: Any = load_model(args, dtype=dtype_of(base), trainable=True, tokenizer=load_tokenizer(args))
    torch.manual_seed(seed)
    model = init_adapter(model, FinetuningArguments(**settings), args, trainable=True)
    if trained:
        shake(model, seed)
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def dtype_of(base: str) -> torch.dtype:
    return main_dtype(read_listing(Path(base)))


def out_of(folder: Path) -> list[str]:
    """What exports to `folder`/out left there, under any of their names."""
    return sorted(path.name for path in folder.iterdir() if path.name.strip(".").startswith("out"))


def export(base: str, out: Path, *adapters: str, shard_bytes: int | None = None, **settings: Any) -> dict[str, Any]:
    args = ModelArguments(
        model_name_or_path=base, adapter_name_or_path=list(adapters) or None, export_dir=str(out), **settings
    )
    return export_model(Order(args, load_tokenizer(args), None, shard_bytes=shard_bytes))
