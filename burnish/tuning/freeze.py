"""`finetuning_type: freeze`: a few blocks are trained, all of them or some of their modules; the rest stands still.

Parameters are chosen as objects under an exact module path, not by looking for ".23." in names: layer 23 is never
expert 23, and a matrix that embedding and head share is freed under either name.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from burnish import console
from burnish.errors import Problem, UserError
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.blocks import block_of, embedding_and_head, find_blocks, matches, text_modules


def init_freeze(model: PreTrainedModel, args: FinetuningArguments) -> None:
    """Set `requires_grad` on every parameter of `model`."""
    place = model.name_or_path or type(model).__name__
    blocks = find_blocks(model)
    if not blocks:
        raise UserError(Problem(place, "", None, "has no list of blocks to freeze", "set finetuning_type: full"))
    chosen = _chosen_blocks(list(blocks), args.freeze_trainable_layers)
    inside, problems = _inside(blocks, chosen, args.freeze_trainable_modules, place)
    outside, more = _outside(model, blocks, args.freeze_extra_modules or [], place)
    if problems + more:
        raise UserError(problems + more)
    model.requires_grad_(False)
    for module in inside + outside:
        module.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        remedy = "raise freeze_trainable_layers or name freeze_extra_modules"
        raise UserError(Problem(place, "", None, "has nothing to train with these settings", remedy))
    names = [path.rpartition(".")[2] for path in chosen]
    console.say(f"trained blocks: {', '.join(names) or 'none'} of {len(blocks)}")


def _chosen_blocks(paths: list[str], count: int) -> list[str]:
    """The last `count`, or the first -`count`; more than there are is all of them."""
    if count >= 0:
        return paths[max(0, len(paths) - count) :]
    return paths[:-count]


def _inside(
    blocks: dict[str, nn.Module], chosen: list[str], names: list[str], place: str
) -> tuple[list[nn.Module], list[Problem]]:
    """The modules that `names` stand for in the chosen blocks. A name counts if any block has it, chosen or not."""
    if names == ["all"]:
        return [blocks[path] for path in chosen], []
    found: list[nn.Module] = []
    problems = []
    for name in names:
        holders = {
            path: [module for inner, module in block.named_modules() if inner and matches(inner, name)]
            for path, block in blocks.items()
        }
        if not any(holders.values()):
            there = ", ".join(dict.fromkeys(child for block in blocks.values() for child, _ in block.named_children()))
            problems.append(Problem(place, "freeze_trainable_modules", name, "is in no block", f"there are: {there}"))
        found += [module for path in chosen for module in holders[path]]
    return found, problems


def _outside(
    model: PreTrainedModel, blocks: dict[str, nn.Module], names: list[str], place: str
) -> tuple[list[nn.Module], list[Problem]]:
    """The modules that `names` stand for outside the blocks: embedding, last norm, head."""
    modules = {
        path: module
        for path, module in text_modules(model).items()
        if block_of(path, blocks) is None and any(True for _ in module.parameters(recurse=False))
    }
    found: list[nn.Module] = []
    problems = []
    for name in names:
        holders = [module for path, module in modules.items() if matches(path, name)]
        if not holders:
            there = ", ".join(path.rpartition(".")[2] for path in modules)
            message = "is not outside the blocks"
            problems.append(Problem(place, "freeze_extra_modules", name, message, f"there are: {there}"))
        found += holders
    embedding, head, tied = embedding_and_head(model)
    if tied and head is not None and any(module is modules.get(path) for module in found for path in (embedding, head)):
        console.say(f"{embedding} and {head} are one matrix in this model: both move")
    return found, problems
