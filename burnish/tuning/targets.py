"""Names a user gives → exact paths in this model, for adapters: what gets two small matrices, what is trained whole.

One idea: everything is resolved, and everything peft cannot do is told, before peft sees the model.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from burnish.errors import Problem
from burnish.model.quantized import is_quantized
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.blocks import (
    LINEAR,
    block_of,
    embedding_and_head,
    expert_parameters,
    find_blocks,
    last_names,
    linear_layers,
    matches,
    text_modules,
)

# One matrix an expert, as it was called before transformers 5 fused them → the parameter that holds them all now.
FUSED = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "w2": "down_proj",
}


class Targets(NamedTuple):
    """Exact paths of what gets two small matrices: layers, and parameters adapted by themselves (fused experts)."""

    modules: list[str]
    parameters: list[str]


def find_targets(model: PreTrainedModel, names: list[str], place: str) -> tuple[Targets, list[Problem]]:
    """`["all"]`, or names that each hit every layer whose path ends with them (`c_proj` hits attention and mlp)."""
    experts = expert_parameters(model)
    if names == ["all"]:
        layers = list(linear_layers(model))
        problem = Problem(place, "lora_target", "all", "finds no linear layer in blocks", "name layers")
        return Targets(layers, list(experts)), [] if layers or experts else [problem]
    layers = [path for path, each in text_modules(model).items() if isinstance(each, (*LINEAR, nn.Embedding))]
    modules: list[str] = []
    parameters: list[str] = []
    problems = []
    for name in names:
        found = [path for path in layers if matches(path, name)]
        fused = [path for path in experts if matches(path, name) or matches(path, FUSED.get(name, name))]
        if not found and not fused:
            there = ", ".join(last_names([*layers, *experts]))
            problems.append(Problem(place, "lora_target", name, "is no layer of this model", f"there are: {there}"))
        modules += [path for path in found if path not in modules]
        parameters += [path for path in fused if path not in parameters]
    return Targets(modules, parameters), problems


def find_additional(model: PreTrainedModel, names: list[str], place: str) -> tuple[list[str], list[Problem]]:
    """Exact paths of modules trained whole. Where embedding and head are one matrix, either name takes both, tied."""
    modules = {path: each for path, each in text_modules(model).items() if any(True for _ in each.parameters())}
    found: list[str] = []
    problems = []
    for name in names:
        paths = [path for path in modules if matches(path, name)]
        if not paths:
            there = ", ".join(_outside_blocks(model, modules))
            problems.append(
                Problem(place, "additional_target", name, "is no module of this model", f"such as: {there}")
            )
        found += [path for path in paths if path not in found]
    embedding, head, tied = embedding_and_head(model)
    if tied and head is not None and {embedding, head} & set(found):
        if embedding.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
            message = f"cannot be trained whole: peft does not keep {embedding} and {head} one matrix"
            remedy = "leave it out, or set finetuning_type: freeze with freeze_extra_modules"
            problems.append(Problem(place, "additional_target", ",".join(names), message, remedy))
        found += [path for path in (embedding, head) if path not in found]
    return found, problems


def _outside_blocks(model: PreTrainedModel, modules: dict[str, nn.Module]) -> list[str]:
    blocks = find_blocks(model)
    own = (path for path, each in modules.items() if any(True for _ in each.parameters(recurse=False)))
    return last_names(path for path in own if block_of(path, blocks) is None)


def conflicts(
    model: PreTrainedModel, targets: Targets, whole: list[str], args: FinetuningArguments, place: str
) -> list[Problem]:
    """What peft cannot do, or would do wrong."""
    found = []
    embedding, head, tied = embedding_and_head(model)
    shared = [path for path in (embedding, head) if tied and path in targets.modules]
    if shared:
        message = "is embedding and head at once in this model: what is added to one could not be merged"
        remedy = "leave it out, or train it whole with additional_target"
        found.append(Problem(place, "lora_target", shared[0].rpartition(".")[2], message, remedy))
    twice = [path for path in targets.modules if block_of(path, whole) is not None]
    if twice:
        remedy = "leave it out of one of the two"
        found.append(Problem(place, "lora_target", twice[0], "is trained whole by additional_target too", remedy))
    held = [path for path in (*whole, *targets.parameters) if is_quantized(_holder(model, path))]
    if held:
        message = "is held quantized, and cannot be trained whole or as a parameter"
        found.append(Problem(place, "", held[0], message, "leave it out, or leave quantization_bit and base_dtype out"))
    asked: dict[str, Any] = {
        "lora_dropout": args.lora_dropout,
        "use_dora": args.use_dora,
        "pissa_init": args.pissa_init,
    }
    for name, value in asked.items():
        if value and targets.parameters:
            fused = ", ".join(_block_names(model, targets.parameters))
            remedy = "leave it out, or name in lora_target only what stands outside the experts (q_proj,v_proj)"
            found.append(Problem(place, name, value, f"does not work with fused experts ({fused})", remedy))
    return found


def _holder(model: PreTrainedModel, path: str) -> nn.Module:
    """The module at a path, or the one whose parameter it is."""
    modules = dict(model.named_modules())
    return modules[path] if path in modules else nn.ParameterList([model.get_parameter(path)])


def safe_from_renaming(model: PreTrainedModel, targets: Targets) -> Targets:
    """Layers whose names peft would take for fused experts are adapted through their weight, which is a parameter.

    For models whose experts transformers 5 fused, peft rewrites target names of before (`gate_proj` → the parameter
    `gate_up_proj`), also when it loads an adapter. A shared expert or a dense layer of that name would be lost.
    """
    renamed = [name for name in last_names(targets.modules) if _is_renamed(model, name)]
    moved = [path for path in targets.modules if path.rpartition(".")[2] in renamed]
    return Targets(
        [path for path in targets.modules if path not in moved],
        [*targets.parameters, *(f"{path}.weight" for path in moved)],
    )


def _is_renamed(model: PreTrainedModel, name: str) -> bool:
    config = LoraConfig(target_modules=[name])
    before = deepcopy(config.target_modules)
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # one half of a fused pair, of which peft would want the other too
        return True
    return config.target_modules != before


def shortest(model: PreTrainedModel, paths: list[str], among: list[str]) -> list[str]:
    """The fewest words that hit `paths` and nothing else in `among`: adapter_config.json stays readable.

    `q_proj` where every q_proj is meant, else `mlp.experts.down_proj` as every block has it, else exact paths.
    """
    for names in (last_names(paths), _block_names(model, paths)):
        hit = {path for path in among if any(matches(path, name) for name in names)}
        if hit == set(paths):
            return names
    return list(paths)


def _block_names(model: PreTrainedModel, paths: list[str]) -> list[str]:
    """Paths as they are inside their blocks, once each."""
    blocks = find_blocks(model)
    return sorted({path.removeprefix(f"{block_of(path, blocks) or ''}.") for path in paths})
