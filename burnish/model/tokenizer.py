"""`load_tokenizer`: the model's own tokenizer, made ready for training.

One idea: what is saved beside the tuned model is what it was trained with, so nothing changes here without a word. The
padding side is right, a pad token is chosen among the tokens that are there, tokens are added only when asked for.
`split_special_tokens` is not set on the tokenizer: saved with it, it would take the chat template's markers apart for
everyone who loads it later. Whoever tokenizes what a user wrote passes it in the call.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from burnish import console
from burnish.errors import Problem, UserError
from burnish.model import tiktoken
from burnish.model.arguments import ModelArguments
from burnish.model.source import find_model, first_line, is_native, read_json

# A token that ends a text, for tokenizers that name none (the first Qwen's). The first that is there is taken.
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
# A token made for padding, for tokenizers that have one and do not name it; else the end token pads.
PAD_TOKENS = (
    *("<pad>", "<PAD>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>"),
    "<|endoftext|>",
)
# Digits, runs of spaces, line ends, accents, other scripts: where ways of splitting a text differ.
SAMPLE_TEXT = "Price: 1,234.50 €\n\n1. naïve  café's — 中文 😀\n\tdef f(x):\n        return x**2  # It's done"


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's folder or hub repository. No other file of the model is needed."""
    place = str(args.model_name_or_path)
    folder = find_model(args, weights=False)
    tokenizer = _read(folder, args, place)
    _refuse_empty(tokenizer, place)
    tokenizer = _as_published(tokenizer, folder)
    tokenizer.padding_side = "right"
    _use_own_pad(tokenizer)
    _add_tokens(tokenizer, args)
    _choose_end_and_pad(tokenizer, place)
    return tokenizer


def _read(folder: Path, args: ModelArguments, place: str) -> PreTrainedTokenizerBase:
    settings = folder / "tokenizer_config.json"
    published = read_json(settings) if settings.is_file() else {}
    first_qwen = is_native(folder) or published.get("tokenizer_class") == "QWenTokenizer"
    try:
        if first_qwen:
            return _first_qwen(folder, place)
        # trust_remote_code is always said: left unset, transformers would ask on the terminal.
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=args.trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # whatever the files, or code that came with them, make it raise
        if published.get("auto_map") and not (args.trust_remote_code or first_qwen):
            remedy = "read its .py files, then set trust_remote_code: true to run them"
            raise UserError(Problem(place, "", None, "has a tokenizer with Python code of its own", remedy)) from error
        message = f"cannot be loaded ({first_line(error)})"
        remedy = "the folder needs tokenizer.json, or the vocabulary files of its kind, beside tokenizer_config.json"
        raise UserError(Problem(place, "the tokenizer", None, message, remedy)) from error


def _first_qwen(folder: Path, place: str) -> PreTrainedTokenizerBase:
    """From the tokenizer.json that a run left, else from qwen.tiktoken; never through Python code in the folder."""
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    if (folder / tiktoken.FILE).is_file():
        return tiktoken.qwen_tokenizer(folder)
    message = f"is not there (neither {tiktoken.FILE} nor tokenizer.json)"
    raise UserError(Problem(place, "the tokenizer", None, message, "copy the model's files again"))


def _refuse_empty(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """transformers builds a tokenizer of one token, without an error, where it does not find the vocabulary's file."""
    if len(tokenizer) > 1 and tokenizer.encode("a", add_special_tokens=False):
        return
    message = f"has a vocabulary of {len(tokenizer)}: its files are not there or not of its kind"
    raise UserError(Problem(place, "the tokenizer", None, message, "put tokenizer.json into the folder"))


def _as_published(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer.json`, where transformers made another one of it.

    For some `tokenizer_class` names transformers 5 builds the splitting of text anew instead of reading it from the
    file: SmolLM2's digits (GPT2Tokenizer) and DeepSeek-V3's spaces (LlamaTokenizerFast, 5.17) get lost without a word,
    and a model would be trained on ids that no other program gives it.
    """
    file = folder / "tokenizer.json"
    backend = getattr(tokenizer, "backend_tokenizer", None)  # only fast tokenizers have one
    if backend is None or not file.is_file():
        return tokenizer
    written = read_json(file)
    if all(_part(backend, name) == written.get(name) for name in ("normalizer", "pre_tokenizer")):
        return tokenizer  # the usual case, told without loading the file a second time
    published = Tokenizer.from_file(str(file))
    published.no_truncation()
    expected = published.encode(SAMPLE_TEXT, add_special_tokens=False).ids
    if tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False) == expected:
        return tokenizer
    name = type(tokenizer).__name__
    own = PreTrainedTokenizerFast.from_pretrained(str(folder))
    if own.encode(SAMPLE_TEXT, add_special_tokens=False) != expected:
        console.warn(f"{name} does not split text as tokenizer.json says: check the model's tokenizer files")
        return tokenizer
    console.warn(f"{name} would not split text as tokenizer.json says: the file's own way is used")
    return own


def _part(backend: Tokenizer, name: str) -> Any:
    part = getattr(backend, name)
    return None if part is None else json.loads(part.__getstate__())


def _use_own_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenizers with code of their own override `_pad` in forms that today's `pad` cannot call, or pad on the left."""
    if type(tokenizer)._pad is not PreTrainedTokenizerBase._pad:
        tokenizer._pad = MethodType(PreTrainedTokenizerBase._pad, tokenizer)


def _add_tokens(tokenizer: PreTrainedTokenizerBase, args: ModelArguments) -> None:
    """Tokens that are already there are left as they are, so that the same settings serve a tuned model again."""
    before = len(tokenizer)
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in args.add_tokens or () if token not in vocabulary])
    if args.add_special_tokens:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": list(args.add_special_tokens)}, replace_extra_special_tokens=False
        )
    if len(tokenizer) > before:
        console.say(f"tokens added to the tokenizer: {len(tokenizer) - before}, now {len(tokenizer)}")


def _choose_end_and_pad(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = next((token for token in END_TOKENS if token in vocabulary), None)
        if tokenizer.eos_token is not None:
            console.warn(f"the tokenizer names no end token: {tokenizer.eos_token} is taken")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = next((token for token in PAD_TOKENS if token in vocabulary), tokenizer.eos_token)
    if tokenizer.pad_token_id is None:
        remedy = "name one: add_special_tokens: <pad> and resize_vocab: true"
        raise UserError(Problem(place, "the tokenizer", None, "has neither a pad token nor an end token", remedy))
