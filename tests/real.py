"""The real small model, and rows of data/ in its tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from burnish.types import IGNORE_INDEX, Sample

ROOT = Path(__file__).parents[1]
# Its layers that an adapter goes beside.
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def smollm2(fixture_path) -> Path:
    given = os.environ.get("SMOLLM2")
    found = Path(given) if given else ROOT / "models" / "SmolLM2-135M-Instruct"
    if (found / "model.safetensors").is_file():
        return found
    assert not given, f"SMOLLM2={given} holds no model.safetensors"
    return fixture_path("smollm2")


def real_rows(tokenizer, count: int) -> list[Sample]:
    """The rows of data/: who the assistant is, then pinyin to write as characters. The answers are trained."""
    texts = json.loads((ROOT / "data" / "identity.json").read_text(encoding="utf-8"))
    with (ROOT / "data" / "pinyin_hanzi.jsonl").open(encoding="utf-8") as file:
        texts += [json.loads(line) for line in file]
    assert len(texts) >= count
    rows = []
    for number, text in enumerate(texts[:count]):
        asked = {"role": "user", "content": "\n".join(filter(None, (text["instruction"], text["input"])))}
        prompt = tokenizer.apply_chat_template([asked], add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(text["output"] + tokenizer.eos_token)
        ids = np.array(prompt + answer, dtype=np.int32)
        labels = np.where(np.arange(len(ids)) < len(prompt), IGNORE_INDEX, ids).astype(np.int32)
        rows.append(Sample(ids, labels, f"data:{number + 1}"))
    return rows
