"""The same work for every contestant: models of public shapes with random weights, and rows of real lengths.

Rows have lengths as real instruction data have them (lognormal, mean 257 tokens, 32 to 2,048), or are long ones (mean
6,000, 512 to 16,384), and are made of words that are one token each. Weights are random: how long a matrix product
takes does not depend on what is learned.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config


class Lengths(NamedTuple):
    """Of so many rows: the mean of their tokens, the spread of its logarithm, the least and the most."""

    rows: int
    mean: float
    spread: float
    shortest: int
    longest: int


USUAL, LONG = Lengths(4000, 257.0, 0.9, 32, 2048), Lengths(400, 6000.0, 0.6, 512, 16384)
_ROPE = {"rope_theta": 1e6, "rope_type": "default"}
SHAPES = {  # of Qwen2.5
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
}  # fmt: skip


def make_model(shape: str, tokenizer: Path, folder: Path) -> Path:
    """A folder that any trainer loads: bf16 weights, and the tokenizer in the folder `tokenizer`."""
    place = folder / shape
    if (place / "config.json").exists():
        return place
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=32768, rope_parameters=_ROPE)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(place)
    for file in tokenizer.iterdir():
        if file.name.startswith("tokenizer") and file.suffix == ".json":
            shutil.copyfile(file, place / file.name)
    return place


def draw_lengths(rng: np.random.Generator, of: Lengths = USUAL) -> np.ndarray:
    """Tokens of each row."""
    drawn = rng.lognormal(np.log(of.mean) - of.spread**2 / 2, of.spread, of.rows)
    return drawn.clip(of.shortest, of.longest).astype(int)


def make_rows(tokenizer: Path, file: Path, of: Lengths = USUAL) -> Path:
    rng = np.random.default_rng(0)
    lengths = draw_lengths(rng, of)
    words = _words(PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json")))
    rows = []
    for length in lengths:
        text = rng.choice(words, length)
        asked = min(20, length // 2)
        rows.append({"instruction": "".join(text[:asked]).strip(), "output": "".join(text[asked:]).strip()})
    file.write_text(json.dumps(rows))
    return file


def _words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    texts = (tokenizer.decode([token]) for token in range(1000, 20000))
    return [text for text in texts if text[0] == " " and text[1:].isalpha() and text.isascii() and text.islower()]


def flops_per_token(model: torch.nn.Module) -> float:
    """6 for each weight that multiplies and is trained (forward, the gradient to activations, its own), 4 for a frozen
    one, and 2 for one below every block that is trained, where no gradient goes.

    All matrices count but the embedding, which only looks up; tied to the head it counts once. Attention's own products
    and anything computed twice do not.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = dict(inner.named_parameters())
    tied = inner.config.tie_word_embeddings
    first = min(_depth(name) for name, p in parameters.items() if p.requires_grad)
    total = 0
    for name, p in parameters.items():
        if p.dim() < 2 or "lora_" in name or ("embed_tokens" in name and not tied):
            continue
        below = "embed_tokens" not in name and _depth(name) < first
        total += p.numel() * (6 if p.requires_grad else 2 if below else 4)
    return total


def _depth(name: str) -> float:
    """Of a parameter: its block's number, and what stands before and behind all blocks."""
    block = re.search(r"\.layers\.(\d+)\.", name)
    return int(block[1]) if block else -1 if "embed_tokens" in name else math.inf
