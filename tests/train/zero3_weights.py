"""How much ZeRO-3 still holds of a model while it goes backward; test_distributed.py runs it in a process of its own.

`zero3_weights.py FILE` writes JSON: for each step the gathered weights, counted at the backward pass of each MLP.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from small import small_model

from burnish.train.deepspeed import take_over
from burnish.tuning.fuse import fuse_lora


def main(file: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}.meet", rank=0, world_size=1)
    take_over("gloo", on_cuda=False)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = fuse_lora(get_peft_model(small_model("llama"), config, autocast_adapter_dtype=False))
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    stage |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    how = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "zero_optimization": stage}
    how |= {"zero_force_ds_cpu_optimizer": False}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, dist_init_required=False, config=how)
    steps: list[list[int]] = []

    def note(*_: object) -> None:
        held = [weight for weight in model.parameters() if weight.ds_status.name == "AVAILABLE"]
        steps[-1].append(sum(weight.ds_numel for weight in held))

    for block in model.base_model.model.model.layers:
        block.mlp.register_full_backward_pre_hook(note)
    ids = torch.randint(0, 200, (2, 16))
    for _ in range(2):
        steps.append([])
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    file.write_text(json.dumps(steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
