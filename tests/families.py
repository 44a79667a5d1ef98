"""Small random models of families that differ in what matters to loading and tuning: tied, shared, fused, nested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = (
    {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 4}
)
EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
} | {"image_size": 28, "patch_size": 14}


def _config(family: str) -> Any:
    makers = {
        "qwen3": lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True),
        "llama": lambda: LlamaConfig(**SHAPE),
        "gemma3": lambda: Gemma3TextConfig(**SHAPE),
        "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4),
        "qwen3_moe": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS),
        "qwen2_moe": lambda: Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=24),
        "deepseek_v3": lambda: DeepseekV3Config(**(SHAPE | LATENT)),  # dense first block, shared experts
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
        "gemma3_with_eyes": lambda: Gemma3Config(text_config=SHAPE, vision_config=EYES, mm_tokens_per_image=4),
    }
    return makers[family]()


def make(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The same weights for the same seed, in eval mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(_config(family), dtype=dtype).eval()


def save(family: str, folder: Path, **how: Any) -> str:
    make(family, **how).save_pretrained(folder)
    return str(folder)


def ids(length: int = 12) -> torch.Tensor:
    return torch.arange(3, 3 + length)[None] % VOCABULARY  # [1, length]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids()).logits


def shake(model: Any, seed: int = 1) -> None:
    """Move every trained weight, so that what was trained shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))


def save_tokenizer(folder: Path, size: int = VOCABULARY, **special: str) -> str:
    """A tokenizer of `size` words: <unk>, <s>, </s>, then a, b, c ... word1, word2 ..."""
    words = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", *(f"word{n}" for n in range(size))][:size]
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | special
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)
