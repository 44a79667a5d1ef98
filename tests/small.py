"""Small real parts that several tests build on: two architectures with random weights, samples, arguments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Seq2SeqTrainingArguments

from burnish.data.loader import collate
from burnish.model.arguments import ModelArguments
from burnish.model.attention import choose_kernel
from burnish.model.compile import compile_blocks
from burnish.model.head import CausalLoss, unwrap
from burnish.model.probe import choose_path, try_out
from burnish.train.trainer import Trainer
from burnish.tuning.adapter import init_adapter
from burnish.tuning.arguments import FinetuningArguments
from burnish.tuning.blocks import find_blocks
from burnish.tuning.fuse import fuse_lora, fuse_mlp, fuse_qkv
from burnish.types import IGNORE_INDEX, Sample

VOCABULARY = 211
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WHY_TORCH = ("", "full_determinism", "nvidia-cudnn-frontend is not installed (pip install 'burnish[cudnn]')")
CONFIGS = {"qwen3": Qwen3Config, "llama": LlamaConfig}


def small_model(kind: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](**(SHAPE | changes)), dtype=dtype)


def tuned(model: Any, method: str, **settings: Any) -> Any:
    """`model` with the weights of a `finetuning_type` trained. An adapter adds something from the start.

    `method` fp8: LoRA beside a base held in fp8.
    """
    base_dtype, method = ("fp8", "lora") if method == "fp8" else (None, method)
    args = FinetuningArguments(finetuning_type=method, **({"freeze_trainable_layers": 2} | settings))
    model_args = ModelArguments(model_name_or_path="small", base_dtype=base_dtype)
    model = init_adapter(model, args, model_args, trainable=True)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model.train()


def on_the_fast_path(model: Any, *, compiled: bool) -> Any:
    """As `burnish train` prepares a model: attention chosen, LoRA fused, on a GPU the MLP and q, k and v too, and its
    blocks compiled."""
    weight = unwrap(model).get_input_embeddings().weight
    keep = "full_determinism" if torch.are_deterministic_algorithms_enabled() else ""
    assert choose_kernel(unwrap(model).config, weight.device, weight.dtype, keep=keep) in WHY_TORCH
    path = choose_path(fuse_lora(model))
    assert path.padding_free and path.fused_head, str(path)
    if next(model.parameters()).is_cuda:
        fuse_mlp(model)
        fuse_qkv(model)
    if compiled:
        assert compile_blocks(find_blocks(unwrap(model)).values(), partial(try_out, model)) == ""
    return model


def samples(count: int, seed: int = 0, longest: int = 40) -> list[Sample]:
    """Rows of different lengths; about half the tokens are trained, in spans."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(rng.integers(4, longest))
        ids = rng.integers(3, VOCABULARY, length).astype(np.int32)
        labels = np.where(np.arange(length) >= length // 2, ids, IGNORE_INDEX).astype(np.int32)
        rows.append(Sample(ids, labels, f"rows.jsonl:{number + 1}"))
    return rows


class Stream:
    """Samples that can only be gone through; in epoch e it begins with the e-th."""

    def __init__(self, count: int):
        self.rows, self.epoch, self.given, self.begin = samples(count), 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.given, self.begin = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.given, self.begin = state["epoch"], state["given"], state["given"]

    def __iter__(self) -> Iterator[Sample]:
        turned = self.rows[self.epoch :] + self.rows[: self.epoch]
        for number, sample in enumerate(turned[self.begin :], self.begin + 1):
            self.given = number
            yield sample


def arguments(output_dir: Path, **changes: Any) -> Seq2SeqTrainingArguments:
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "num_train_epochs": 1,
    }
    return Seq2SeqTrainingArguments(**(settings | changes))


def trainer(model: Any, args: Any, rows: Any = None, **more: Any) -> Trainer:
    path = choose_path(model)
    assert path.padding_free and path.fused_head, str(path)
    objective = CausalLoss(model, fused=True, label_smoothing=args.label_smoothing_factor)
    return Trainer(objective, args, collate=collate, train_dataset=rows, **more)
