"""The first Qwen (`model_type: qwen`: Qwen-1.8B, 7B, 14B and 72B of 2023), as a model of transformers.

Its checkpoints came with Python code of their own, which transformers 5 does not run right: it crashes, and where it
does not it replaces weights by random numbers without a word (`attn.c_proj`). Here is the model anew, with the same
names of weights and the same numbers. Nothing is kept beside the parameters: what the rotation needs is computed in
each pass, so a model may be made without memory (meta device, ZeRO-3). `register` makes it known to transformers.

Format: QwenLM's modeling_qwen.py; Bai et al., Qwen Technical Report, arXiv:2309.16609, section 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from burnish.model.qwen_block import FLOWS_BACK, QWenAttention, QWenBlock, RMSNorm
from burnish.model.qwen_config import QWenConfig
from burnish.model.qwen_rotary import Rotary, positions


def register() -> None:
    """Make `model_type: qwen` known to transformers' Auto classes. Calling it again changes nothing.

    A class that is registered goes before the code in a model's folder, whatever `trust_remote_code` says.
    """
    AutoConfig.register(QWenConfig.model_type, QWenConfig, exist_ok=True)
    AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
    AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": QWenBlock, "attentions": QWenAttention}  # noqa: RUF012
    # Buffers that checkpoints of 2023 hold and that are computed here.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$", r"rotary_emb\.inv_freq$"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What flows back into the residual stream starts smaller, as there are twice as many as layers (GPT-2)."""
        std = self.config.initializer_range
        if FLOWS_BACK in vars(module):
            std /= math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList([QWenBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.rotary = Rotary(config)
        self.gradient_checkpointing = False  # transformers switches it on in each module that has it
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] → hidden states [B, T, H]. `token_type_ids`, which its tokenizer gives, mean nothing."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedded = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.training and self.gradient_checkpointing)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = positions(attention_mask, embedded.shape[1], num_past, embedded.device)

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        sharpening = None
        if self.training:
            frequencies = self.rotary.frequencies(embedded.device)
        else:
            frequencies = self.rotary.frequencies_when_asked(position_ids, attention_mask, past_key_values)
            if self.config.use_logn_attn:
                sharpening = self.rotary.sharpening(position_ids)[:, None, :, None]  # [B, 1, T, 1]
        angles = position_ids[..., None].float() * frequencies  # [B, T, channels / 2]
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, T, channels]
        rotation = (angles.cos(), angles.sin())

        hidden = self.drop(embedded)
        for block in self.h:
            hidden = block(
                hidden,
                attention_mask=mask,
                rotation=rotation,
                sharpening=sharpening,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden), past_key_values=past_key_values if use_cache else None
        )


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012  # where config.json ties them

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # transformers reads it off names that end so
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T] → logits [B, T, V], and the mean loss where `labels` [B, T] are given."""
        outputs: Any = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
