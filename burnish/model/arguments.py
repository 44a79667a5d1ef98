"""ModelArguments: which weights and which tokenizer, and how they are read. The names are LLaMA-Factory's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings
    from burnish.errors import Problem

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass
class ModelArguments:
    """Which model is tuned or asked."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model: a folder of weights, or its name on a hub."}
    )
    adapter_name_or_path: list[str] | None = field(
        default=None,
        metadata={"help": "Adapters on top of the model: folders or names on a hub, several separated by commas."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where files from a hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on its hub."})
    hf_hub_token: str | None = field(
        default=None, metadata={"help": "Token for private models on the Hugging Face hub; never written to a file."}
    )
    use_fast_tokenizer: bool = field(
        default=True, metadata={"help": "Has no effect: the fast tokenizer is used wherever one exists."}
    )
    split_special_tokens: bool = field(
        default=False,
        metadata={"help": "Read what looks like a special token inside a message as plain text."},
    )
    add_tokens: list[str] | None = field(
        default=None, metadata={"help": "Plain tokens to add to the tokenizer, separated by commas."}
    )
    add_special_tokens: list[str] | None = field(
        default=None, metadata={"help": "Special tokens to add to the tokenizer, separated by commas."}
    )
    resize_vocab: bool = field(
        default=False, metadata={"help": "Grow the embeddings when the tokenizer has more tokens than the model."}
    )
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = field(
        default=None, metadata={"help": "How positions beyond the model's own length are scaled."}
    )
    flash_attn: Literal["auto", "fa2", "fa3", "sdpa", "disabled", "off"] = field(
        default="auto",
        metadata={
            "help": "Attention: auto and fa3 are variable-length attention, by cuDNN on a Hopper chip, else by torch; "
            "fa2 is torch's everywhere, sdpa is torch's over padded rows, disabled (off) is the model's own plain code."
        },
    )
    quantization_bit: int | None = field(
        default=None,
        metadata={"help": "Hold the blocks' frozen weights in 4 or 8 bits, through bitsandbytes (lora, chat)."},
    )
    quantization_method: Literal["bnb"] = field(
        default="bnb", metadata={"help": "The library that quantizes: bnb is bitsandbytes, the only one."}
    )
    quantization_type: Literal["nf4", "fp4"] = field(
        default="nf4", metadata={"help": "quantization_bit 4: the sixteen numbers that a weight can be."}
    )
    double_quantization: bool = field(
        default=True, metadata={"help": "quantization_bit 4: hold the scales in 8 bits too."}
    )
    base_dtype: Literal["fp8"] | None = field(
        default=None,
        metadata={"help": "fp8: hold and multiply the blocks' frozen weights in 8-bit floats (lora, chat)."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})
    use_kv_cache: bool = field(default=True, metadata={"help": "Keep keys and values between generated tokens."})
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = field(
        default="auto", metadata={"help": "Number format of the weights when the model is asked or exported."}
    )
    export_dir: str | None = field(default=None, metadata={"help": "export: the new folder for the whole model."})
    export_size: int = field(default=5, metadata={"help": "export: most gigabytes of one file of weights."})
    export_device: Literal["cpu", "auto"] = field(
        default="cpu", metadata={"help": "export: where the weights are merged; auto is the GPU when there is one."}
    )
    export_hub_model_id: str | None = field(
        default=None, metadata={"help": "export: the name under which the model is uploaded to the hub as well."}
    )


# Accepted, and nothing changes: column "nothing to change" of docs/arguments.md.
NOTHING_TO_CHANGE = {"use_fast_tokenizer": "transformers 5 has a fast tokenizer or none"}

OF_EXPORT = frozenset({"export_dir", "export_size", "export_device", "export_hub_model_id"})

# For A5's comparison.
DO_NOT_TRAIN = {"cache_dir", "hf_hub_token", "use_fast_tokenizer", "use_kv_cache", "infer_dtype"} | OF_EXPORT


def problems(settings: Settings) -> list[Problem]:
    found = _export_problems(settings) if settings.command == "export" else []
    if settings.command not in ("export", "preview"):
        found += _quantization_problems(settings)
    if settings.command not in ("train", "preview") and _asks_a_whole_model(settings):
        return found
    model = settings.value("model_name_or_path")
    if model is None and not settings.is_faulty("model_name_or_path"):
        found.append(settings.missing("model_name_or_path", "give a folder of weights or a name on a hub"))
    if model is not None:
        found += _folder_problems(settings, "model_name_or_path", model, "config.json")
    for adapter in settings.value("adapter_name_or_path") or ():
        found += _folder_problems(settings, "adapter_name_or_path", adapter, "adapter_config.json")
    return found


def _export_problems(settings: Settings) -> list[Problem]:
    """What export needs; which folders export_dir may be is known to export/place.py."""
    found = settings.out_of_range(export_size=(lambda v: v >= 1, "is not at least 1", "5 is usual, in gigabytes"))
    if not settings.value("export_dir") and not settings.is_faulty("export_dir"):
        found.append(settings.missing("export_dir", "give the folder for the exported model"))
    return found


def _quantization_problems(settings: Settings) -> Iterator[Problem]:
    bits = settings.value("quantization_bit")
    if bits not in (None, 4, 8):
        yield settings.problem("quantization_bit", "is not 4 or 8", "4 takes the least memory, 8 rounds less")
        return
    for name in ("quantization_type", "double_quantization"):
        if bits != 4 and settings.differs_from_default(name) and not settings.is_faulty("quantization_bit"):
            message = f"does nothing with{'' if bits else 'out'} quantization_bit: {bits or 4}"
            yield settings.problem(name, message, "leave it out, or set quantization_bit: 4")
    fp8 = settings.value("base_dtype")
    if bits is None and fp8 is None:
        return
    name = "quantization_bit" if bits else "base_dtype"
    if bits and fp8:
        yield settings.problem("base_dtype", "is another way than quantization_bit to hold weights", "choose one")
    if bits and find_spec("bitsandbytes") is None:
        message = "needs bitsandbytes, which is not here"
        yield settings.problem("quantization_bit", message, "pip install 'burnish[quant]'")
    if settings.command == "train" and not settings.is_faulty("finetuning_type"):
        method = settings.value("finetuning_type")
        if method != "lora":
            message = f"is of frozen weights, and finetuning_type: {method} trains them"
            yield settings.problem(name, message, "set finetuning_type: lora, or leave it out")
        if settings.value("pissa_init"):
            message = "takes the weights apart, which quantized ones are not exact enough for"
            yield settings.problem("pissa_init", message, f"leave it out, or leave {name} out")
        if fp8 and settings.value("use_dora"):
            message = "scales whole weights, which a base in fp8 does not have"
            yield settings.problem("use_dora", message, "leave it out, or leave base_dtype out")
        if settings.value("create_new_adapter"):
            message = "merges adapters into weights that are quantized"
            remedy = "export base and adapters into one model with burnish export, and give that as the model"
            yield settings.problem("create_new_adapter", message, remedy)


def _asks_a_whole_model(settings: Settings) -> bool:
    """The file of a full or freeze run, given to chat: the base it was tuned from is not read again."""
    return (
        bool(settings.value("output_dir"))
        and settings.value("finetuning_type") != "lora"
        and not settings.on_command_line("model_name_or_path")
    )


def _folder_problems(settings: Settings, name: str, value: str, must_hold: str) -> list[Problem]:
    """A path that is not there, or a folder without the file that makes it a model. Names on a hub pass."""
    folder = Path(os.path.expanduser(value))  # Path's own raises where there is no such user
    if folder.is_dir():
        if (folder / must_hold).is_file():
            return []
        return [settings.problem(name, f"holds no {must_hold}", "give the folder that does", value=value)]
    if folder.exists():
        return [settings.problem(name, "is a file", f"give the folder that holds {must_hold}", value=value)]
    if looks_like_a_path(value):
        return [settings.problem(name, "is not there", f"looked for the folder {folder.absolute()}", value=value)]
    return []


def looks_like_a_path(value: str) -> bool:
    """
    >>> [looks_like_a_path(v) for v in ("gpt2", "Qwen/Qwen3-0.6B", "./model", "a/b/c", "~/model")]
    [False, False, True, True, True]
    """
    if not HUB_NAME.fullmatch(value):
        return True
    first, slash, _ = value.partition("/")
    return bool(slash) and Path(first).is_dir()  # `saves/run1` where `saves` is a folder here
