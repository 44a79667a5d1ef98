"""The same runs as sft.py's, by TRL with Liger's kernels: the same models, rows, rank, batch and learning rate.

    python benchmarks/gpu/peers.py --tokenizer FOLDER --run lora-0.5b-default

sft.py starts this in a process of its own after each of burnish's runs (`--peer trl`). Two settings:

- `default`: as a user starts it, padded; what is not named here is TRL's default (gradient checkpointing is on).
- `packed`: whole samples packed into rows of 8,192 tokens, no gradient checkpointing.

Both get Liger and the weights in bf16 with float32 adapters (full training: float32 weights under autocast). TRL asks
for FlashAttention-2 where rows are packed, which has no wheel; of what transformers itself brings, `flex_attention`
and `sdpa` both keep the documents of a row apart (a mask built from position_ids).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from sft import NOT_TIMED, RUNS, Clock, add_work, work_of
from transformers import AutoTokenizer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TAKEN_OVER = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "bf16", "packing")
ATTENTION = ("flex_attention", "sdpa", "eager", "flash_attention_2", "flash_attention_3")


class PeerClock(Clock):
    """Counts the tokens of each batch where it is put together: on the CPU, before the device hears of them."""

    def __init__(self, accumulation: int) -> None:
        super().__init__()
        self.accumulation, self.counts = accumulation, []

    def count(self, collate: Any) -> Any:
        def collate_and_count(examples: list[dict[str, Any]]) -> Any:
            self.counts.append(sum(len(example["input_ids"]) for example in examples))
            return collate(examples)

        return collate_and_count

    def on_step_end(self, args, state, control, **more):
        super().on_step_end(args, state, control, **more)
        self.tokens[-1] = sum(self.counts[: state.global_step * self.accumulation])  # batches are fetched ahead


def settings_of(name: str, attention: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What SFTConfig is given, and what the model is loaded with."""
    settings = RUNS[name][1]
    config = {key: settings[key] for key in TAKEN_OVER if key in settings}
    config |= {"max_length": settings["cutoff_len"], "use_liger_kernel": True}
    if settings.get("packing"):
        config["gradient_checkpointing"] = False
        if attention == "flex_attention":
            config["pad_to_multiple_of"] = settings["cutoff_len"]  # one shape: it is compiled for shapes
    dtype = "bfloat16" if settings["finetuning_type"] == "lora" else "float32"
    return config, {"dtype": dtype, "attn_implementation": attention}


def rows_of(file: Path) -> Any:
    from datasets import Dataset

    rows = json.loads(file.read_text(encoding="utf-8"))
    return Dataset.from_list([{"text": f"{row['instruction']} {row['output']}"} for row in rows])


def adapter_of(settings: dict[str, Any]) -> Any:
    from peft import LoraConfig

    if settings["finetuning_type"] != "lora":
        return None
    rank = settings["lora_rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, task_type="CAUSAL_LM")


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    model, rows = work_of(name, args)
    config, loading = settings_of(name, args.attention)
    config |= {key: json.loads(value) for key, _, value in (word.partition("=") for word in args.set)}
    clock = PeerClock(config["gradient_accumulation_steps"])
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=str(model),
            args=SFTConfig(
                output_dir=output, max_steps=args.steps + NOT_TIMED, logging_steps=5, save_strategy="no",
                report_to="none", disable_tqdm=True, model_init_kwargs=loading, **config,
            ),
            train_dataset=rows_of(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=adapter_of(RUNS[name][1]),
            callbacks=[clock],
        )  # fmt: skip
        trainer.data_collator = clock.count(trainer.data_collator)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    said = " ".join(f"{key}={value}" for key, value in (config | loading).items())
    return {"name": f"trl-{name}", **clock.result(), "losses": losses, "command": f"SFTTrainer {said}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=RUNS, required=True)
    add_work(parser)
    parser.add_argument("--attention", choices=ATTENTION, default="sdpa")
    parser.add_argument("--set", action="append", default=[], help="a setting of SFTConfig more, as key=JSON")
    args = parser.parse_args()
    print("RESULT " + json.dumps(run(args.run, args)))


if __name__ == "__main__":
    main()
