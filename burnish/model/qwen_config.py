"""config.json of a first Qwen (`model_type: qwen`, 2023), under both of the namings that were published."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class QWenConfig(PreTrainedConfig):
    """Reads the final names and those of August 2023 (`n_embd`, `ffn_hidden_size` ...); saves the final ones.

    `intermediate_size` counts both halves of the MLP, w1's and w2's. What chose the format of numbers and the attention
    in its own code (`bf16`, `fp16`, `fp32`, `use_flash_attn` ...) is kept for that code and not read.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012  # other names of 2023, and those that transformers asks for
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "attn_pdrop": "attn_dropout_prob",
        "embd_pdrop": "emb_dropout_prob",
        "padded_vocab_size": "vocab_size",
        "num_key_value_heads": "num_attention_heads",
        "head_dim": "kv_channels",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int = 22016
    kv_channels: int = 128
    max_position_embeddings: int = 8192
    seq_length: int | None = None  # tokens it was trained on at once; max_position_embeddings where it is not there
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    attn_dropout_prob: float = 0.0
    emb_dropout_prob: float = 0.0
    scale_attn_weights: bool = True
    rotary_pct: float = 1.0
    rotary_emb_base: float = 10000
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in [name for name in self.attribute_map if name in kwargs]:
            setattr(self, name, kwargs.pop(name))
        if self.seq_length is None:
            self.seq_length = self.max_position_embeddings
        super().__post_init__(**kwargs)
