"""What a model is made of, found by its structure and never by its name: blocks, linear layers, experts, routers.

    block    one of the model's layers: a member of its decoder's longest list of modules
    linear   nn.Linear, or GPT-2's Conv1D, which is one with its weight transposed
    experts  several matrices in one parameter [experts, out, in], as transformers 5 keeps them
    router   the linear layer beside experts that chooses among them

A path is exact (`model.layers.23.mlp`), and a name matches whole words at its end: `mlp` and `layers.23.mlp` name it,
`3.mlp` does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from burnish.model.patch import shape_of

LISTS = (nn.ModuleList, nn.ModuleDict)
LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # their weights have three dimensions too


def matches(path: str, name: str) -> bool:
    """
    >>> [matches("model.layers.0.mlp", name) for name in ("mlp", "layers.0.mlp", "lp", "model")]
    [True, True, False, False]
    """
    return path == name or path.endswith(f".{name}")


def text_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path → module: all of a text model, and of a model that sees or hears what stands in no sense's tower.

    That is what lies inside the base model but not inside its decoder.
    """
    base, decoder = model.base_model, model.get_decoder()
    towers = {id(module) for module in base.modules() if module is not base} - {id(each) for each in decoder.modules()}
    towers.discard(id(model.get_output_embeddings()))
    return {path: module for path, module in model.named_modules() if path and id(module) not in towers}


def find_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path → block, in order. {} where the decoder is no list of blocks."""
    lists = {path: each for path, each in text_modules(model).items() if isinstance(each, LISTS) and len(each)}
    lists = {path: each for path, each in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    if not lists:
        return {}
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    path = max(lists, key=lambda path: (len(lists[path]) == count, len(lists[path])))
    return {f"{path}.{name}": block for name, block in lists[path].named_children()}


def block_of(path: str, blocks: Iterable[str]) -> str | None:
    """The path of the block that `path` lies in."""
    return next((block for block in blocks if path == block or path.startswith(f"{block}.")), None)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path → linear layer inside the blocks, routers left out: what `lora_target: all` takes."""
    found = {}
    for block_path, block in find_blocks(model).items():
        routers = _routers(block)
        for name, module in block.named_modules():
            if isinstance(module, LINEAR) and name not in routers:
                found[f"{block_path}.{name}"] = module
    return found


def expert_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Path → parameter [experts, ., .] inside the blocks."""
    return {
        f"{block_path}.{name}": parameter
        for block_path, block in find_blocks(model).items()
        for name, parameter in _fused_experts(block).items()
    }


def _fused_experts(block: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in block.named_modules()
        if not isinstance(module, CONVOLUTIONS)
        for name, parameter in module.named_parameters(recurse=False)
        if len(shape_of(parameter)) == 3 and min(shape_of(parameter)) > 1 and parameter.is_floating_point()
    }


def _routers(block: nn.Module) -> set[str]:
    """Linear layers with one output an expert (or one for the shared expert) that stand where the experts stand."""
    counts = {path.rpartition(".")[0]: shape_of(parameter)[0] for path, parameter in _fused_experts(block).items()}
    counts |= {path: len(module) for path, module in block.named_modules() if isinstance(module, LISTS)}
    found = set()
    for experts, count in counts.items():
        parent = experts.rpartition(".")[0]
        for path, module in block.named_modules(prefix=""):
            if not isinstance(module, nn.Linear) or not path.startswith(f"{parent}." if parent else ""):
                continue
            below = path.removeprefix(f"{parent}.").split(".")
            beside = len(below) == 1 or "router" in below[0] or below[0] == "gate"
            if beside and module.out_features in (1, count):
                found.add(path)
    return found


def embedding_and_head(model: PreTrainedModel) -> tuple[str, str | None, bool]:
    """Their paths, and whether they are one matrix. No head's path where the model has none."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    tied = head is not None and head.weight is embedding.weight
    return paths[id(embedding)], paths.get(id(head)), tied


def last_names(paths: Iterable[str]) -> list[str]:
    """The names to offer in a message: the last word of each path, once."""
    return sorted({path.rpartition(".")[2] for path in paths})
