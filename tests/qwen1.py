"""A folder as the first Qwen was published in 2023, with a small model of random weights in it."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from burnish.model.qwen import QWenLMHeadModel
from burnish.model.qwen_config import QWenConfig

PADDED_VOCABULARY = 151936
MUST_NOT_RUN = 'raise RuntimeError("code that came with the model was run")\n'
CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "initializer_range": 0.02,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "softmax_in_fp32": False,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_cache_kernel": False,
    "use_cache_quantization": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": PADDED_VOCABULARY,
}
TOKENIZER_CONFIG = {
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}
GENERATION_CONFIG = {
    "chat_format": "chatml",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
    "transformers_version": "4.31.0",
}


def make_qwen1(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    seed: int = 0,
    vocabulary: Literal["real", "small"] = "small",
    tiktoken: Path | None = None,
    **changes: Any,
) -> Path:
    """`vocabulary="real"` wants the path of the published qwen.tiktoken (the fixture `qwen-tiktoken`); "small" is made.

    Whatever the vocabulary, the model has a row for 151,936 tokens. `changes` go into config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // CONFIG["kv_channels"]}
    config = CONFIG | sizes | {"intermediate_size": 4 * hidden} | changes
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    for name in ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py"):
        (folder / name).write_text(MUST_NOT_RUN)
    if vocabulary == "real":
        assert tiktoken is not None, "the real vocabulary is read from its file"
        shutil.copyfile(tiktoken, folder / "qwen.tiktoken")
    else:
        (folder / "qwen.tiktoken").write_text(made_up_ranks())
    torch.manual_seed(seed)
    model = QWenLMHeadModel(QWenConfig(**{name: value for name, value in config.items() if name != "auto_map"}))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def made_up_ranks() -> str:
    """The 256 bytes, then what words are made of: lines of `base64 rank`, as in qwen.tiktoken."""
    words = ["th", "he", "in", "er", "an", "the", "and", "ing", "ion", "user", "assistant", "system", "你好", "通知"]
    tokens = [bytes([byte]) for byte in range(256)]
    for word in (*words, *(f" {word}" for word in words)):
        encoded = word.encode()
        tokens += [encoded[:end] for end in range(2, len(encoded) + 1) if encoded[:end] not in tokens]
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
