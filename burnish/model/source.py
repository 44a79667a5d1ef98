"""Where a model comes from, as a folder: one that is here, or one fetched from the Hugging Face hub or ModelScope.

One idea: a model is a folder. A name on a hub is turned into the folder of its cached files once, so that everything
after it is local, what is wrong with a folder is told before anything is built, and a hub that cannot be reached gives
one sentence (transformers would ask again and again for most of a minute). HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are
huggingface_hub's own and hold; USE_MODELSCOPE_HUB=1 asks ModelScope instead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from burnish.errors import Problem, UserError
from burnish.model.arguments import ModelArguments, looks_like_a_path

ADAPTER_CONFIG = "adapter_config.json"
SMALL_FILES = (  # everything but the weights; an export's card and folder say the licence again
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md"),
)
WEIGHTS = ("*.safetensors", "*_model*.bin")  # the second only where the first is not there
COPIES = ("original/*", "consolidated*", "onnx/*", "openvino/*", "coreml/*")  # the same weights in other formats
NATIVE = frozenset({"qwen"})  # values of model_type that transformers does not know and burnish has code for (qwen.py)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # beside each may stand FILE.index.json, naming its shards


def find_model(args: ModelArguments, *, weights: bool) -> Path:
    """The folder of the model; `weights=False` fetches only its small files, which is what a tokenizer needs."""
    name = args.model_name_or_path
    if not name:
        raise UserError(Problem("arguments", "model_name_or_path", None, "is missing", "give a folder or a hub name"))
    from burnish.model import qwen

    qwen.register()  # here, as whatever is made of a model comes by
    return find_folder(name, args, revision=args.model_revision, weights=weights)


def find_folder(name: str, args: ModelArguments, *, revision: str | None, weights: bool) -> Path:
    """A folder as it stands, or the cached files of the repository `name` on a hub; UserError where neither is."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder.absolute()
    if folder.is_file():
        raise UserError(Problem(name, "", None, "is a file", "give the folder that holds it"))
    if looks_like_a_path(name):
        raise UserError(Problem(name, "", None, "is not there", f"looked for the folder {folder.absolute()}"))
    if os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "y", "yes"):
        return _from_modelscope(name, args, revision, weights)
    folder = _from_hub(name, args, revision, SMALL_FILES)
    if weights:
        _from_hub(name, args, revision, WEIGHTS[:1])
        if not any(folder.glob("*.safetensors")):
            _from_hub(name, args, revision, WEIGHTS[1:])
    return folder


def _from_hub(name: str, args: ModelArguments, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=args.cache_dir,
            token=args.hf_hub_token,
            allow_patterns=list(patterns),
            ignore_patterns=list(COPIES),
        )
    except errors.GatedRepoError as error:
        remedy = "accept its terms on its page, then set HF_TOKEN or hf_hub_token"
        raise UserError(Problem(name, "", None, "is gated on the hub", remedy)) from error
    except errors.RepositoryNotFoundError as error:
        remedy = "check the spelling; a private model needs HF_TOKEN or hf_hub_token"
        raise UserError(Problem(name, "", None, "is neither a folder here nor a model on the hub", remedy)) from error
    except errors.RevisionNotFoundError as error:
        problem = Problem(name, "model_revision", revision, "is no branch, tag or commit of it", "check it on the hub")
        raise UserError(problem) from error
    except errors.LocalEntryNotFoundError as error:
        message = "is neither a folder here nor in the hub's cache, and the hub cannot be reached"
        remedy = "give the path of a folder with the model, or connect (HF_ENDPOINT names a mirror)"
        raise UserError(Problem(name, "", None, message, remedy)) from error
    except Exception as error:  # a name that cannot be one, or whatever went wrong on the way
        remedy = "give the path of a folder with the model, or try again"
        raise UserError(Problem(name, "", None, f"did not come from the hub ({first_line(error)})", remedy)) from error
    return Path(folder)


def _from_modelscope(name: str, args: ModelArguments, revision: str | None, weights: bool) -> Path:
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        problem = Problem(
            "USE_MODELSCOPE_HUB", "", None, "needs the package modelscope", "pip install modelscope, or unset it"
        )
        raise UserError(problem) from error
    try:
        folder = snapshot_download(
            name,
            revision=None if revision == "main" else revision,  # its default branch has another name
            cache_dir=args.cache_dir,
            allow_patterns=[*SMALL_FILES, *(WEIGHTS if weights else ())],
            ignore_patterns=list(COPIES),
        )
    except Exception as error:  # its errors share no class
        remedy = "check the spelling, or give the path of a folder with the model"
        message = f"did not come from ModelScope ({first_line(error)})"
        raise UserError(Problem(name, "", None, message, remedy)) from error
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of a model's folder; UserError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = Problem(str(path), "", None, f"cannot be read ({first_line(error)})", "copy the model's files again")
        raise UserError(problem) from error
    if not isinstance(content, dict):
        raise UserError(Problem(str(path), "", None, "is not a JSON object", "copy the model's files again"))
    return content


def is_native(folder: Path) -> bool:
    """Is it a model that burnish has code for, and transformers has not?"""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") in NATIVE


def runs_own_code(folder: Path, args: ModelArguments) -> bool:
    """May Python files that came with the model run? Where burnish has code for it they never do."""
    return args.trust_remote_code and not is_native(folder)


def model_problems(folder: Path, args: ModelArguments) -> list[Problem]:
    """Everything that keeps the folder's weights from being trained or asked, found by reading its small files."""
    place = str(args.model_name_or_path)
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            return [_adapter_alone(folder, place)]
        return [Problem(place, "config.json", None, "is missing", "give the folder that holds the model's files")]
    config = read_json(folder / "config.json")
    found = [*_weight_problems(folder, place, config), *_type_problems(place, config, args)]
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would put it on the model without a word
        remedy = f"move {ADAPTER_CONFIG} away, or name the base and give this folder as adapter_name_or_path"
        found.append(Problem(place, "", None, "holds both a model and an adapter", remedy))
    return found


def _adapter_alone(folder: Path, place: str) -> Problem:
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "the model it was trained on"
    remedy = f"set model_name_or_path: {base} and adapter_name_or_path: {place}"
    return Problem(place, "", None, "holds an adapter, not a model", remedy)


def _weight_problems(folder: Path, place: str, config: dict[str, Any]) -> list[Problem]:
    if config.get("transformers_weights"):  # a name of its own
        return []
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return []
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if not absent:
                return []
            message = f"lacks {len(absent)} of {len(shards)} files of weights, {absent[0]} the first"
            return [Problem(place, "", None, message, "copy the model's files again")]
    names = " or ".join(WEIGHT_FILES)
    return [Problem(place, "", None, f"holds no weights ({names})", "give the folder that holds the model's files")]


def _type_problems(place: str, config: dict[str, Any], args: ModelArguments) -> list[Problem]:
    from transformers import CONFIG_MAPPING, __version__

    found = []
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        found.append(
            Problem(
                place,
                "",
                None,
                f"holds weights quantized by {method}",
                "give the model in bfloat16 or float32; quantization_bit: 4 then quantizes it as it is loaded",
            )
        )
    model_type = config.get("model_type")
    known = model_type in CONFIG_MAPPING or model_type in NATIVE
    if model_type is None and not config.get("auto_map"):
        found.append(Problem(place, "config.json", None, "has no model_type", "copy the model's files again"))
    elif not known and config.get("auto_map"):
        if not args.trust_remote_code:
            remedy = "read its .py files, then set trust_remote_code: true to run them"
            found.append(Problem(place, "", None, f"needs Python code of its own (model_type {model_type})", remedy))
    elif not known:
        message = f"is of model_type {model_type}, which transformers {__version__} does not know"
        found.append(Problem(place, "", None, message, "pip install --upgrade transformers"))
    return found


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
