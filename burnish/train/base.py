"""What a Trainer is made of before anything runs: its parts, its callbacks, its data loaders, its log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from burnish import ranks
from burnish.data.loader import Collate, Share, make_loader
from burnish.model.graphs import PassGraphs, Recorder
from burnish.model.head import CausalLoss
from burnish.model.recompute import Recompute
from burnish.train.distributed import stage_of
from burnish.train.noise import EmbeddingNoise
from burnish.train.peers import Peers

NOT_MEASURED: tuple[int, dict[str, float]] = (-1, {})


class TrainerFrame:
    """The parts of a run.

    `objective` gives the summed loss of a Batch, `collate` makes a Batch of Samples, `train_dataset` is a store or a
    stream of Samples, `eval_dataset` a store or a dict of stores. With `pack_to` a batch is rows of up to so many
    tokens in the place of samples. `beside_weights(folder)` may add files to every checkpoint (`burnish.yaml`).
    `micro_batch_tokens` and `recompute` say what a pass may hold (passes.py), `why_padded` why `collate` pads, if it
    does. With a `recorder` passes are recorded and replayed (model/graphs.py).
    """

    def __init__(
        self,
        objective: CausalLoss,
        args: Any,
        *,
        collate: Collate,
        train_dataset: Any = None,
        pack_to: int | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = (),
        loraplus_lr_ratio: float | None = None,
        pure_bf16: bool = False,
        count_correct: bool = False,
        micro_batch_tokens: str = "auto",
        why_padded: str = "",
        recompute: Recompute | None = None,
        recorder: Recorder | None = None,
        beside_weights: Callable[[Path], None] | None = None,
    ):
        self.objective, self.args, self.collate = objective, args, collate
        self.model: nn.Module = objective.model
        self.train_dataset, self.pack_to, self.eval_dataset = train_dataset, pack_to, eval_dataset
        self.processing_class, self.beside_weights = processing_class, beside_weights
        self.loraplus_lr_ratio, self.count_correct = loraplus_lr_ratio, count_correct
        self.micro_batch_tokens, self.recompute, self.recorder = micro_batch_tokens, recompute, recorder
        self.pure_bf16, self.why_padded = pure_bf16, why_padded
        self.device: torch.device = args.device
        self.output_dir = Path(args.output_dir)
        reporters = get_reporting_integration_callbacks(args.report_to)
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *reporters, *callbacks], self.model, processing_class, None, None
        )
        self.measured = NOT_MEASURED  # the step of the latest evaluation while training, and its metrics
        self.peers = Peers()
        self.is_divided = stage_of(args) > 0  # among the processes, by DeepSpeed
        self.update: Any = None  # how weights move, while they do: LocalUpdate or ZeroUpdate
        self.graphs: PassGraphs | None = None  # while it trains with a recorder
        self.noise: EmbeddingNoise | None = None  # while it trains, where neftune_noise_alpha asks for it
        self.control = TrainerControl()
        self.state = self.new_state()
        self.tell("on_init_end")

    def new_state(self) -> TrainerState:
        return self.mine(TrainerState(stateful_callbacks=self.exportable()))

    def mine(self, state: TrainerState) -> TrainerState:
        """`state` as this process's own: callbacks ask it who writes and prints."""
        state.is_world_process_zero = ranks.is_main()
        state.is_local_process_zero = ranks.is_local_main()
        return state

    def tell(self, event: str, **details: Any) -> None:
        """Let every callback know; what they answer is obeyed from here on."""
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, **details)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        self.callback_handler.remove_callback(callback)

    def get_train_dataloader(self) -> Any:
        args = self.args
        return make_loader(
            self.train_dataset,
            args.per_device_train_batch_size,
            self.collate,
            seed=args.seed if args.data_seed is None else args.data_seed,
            strategy=args.train_sampling_strategy,
            drop_last=args.dataloader_drop_last,
            share=self.share,
            pack_to=self.pack_to,
            options=self.loader_options(),
        )

    @property
    def share(self) -> Share:
        """Which rows of a batch are this process's."""
        return Share(self.peers.rank, self.peers.count)

    def loader_options(self) -> dict[str, Any]:
        args = self.args
        return {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and self.device.type == "cuda",
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }

    def get_eval_dataloader(self, eval_dataset: Any) -> Any:
        size, options = self.args.per_device_eval_batch_size, self.loader_options()
        return make_loader(
            eval_dataset, size, self.collate, seed=0, strategy="sequential", share=self.share, options=options
        )

    def log(self, logs: dict[str, float]) -> None:
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.tell("on_log", logs=logs)

    def exportable(self) -> list[Any]:
        """Callbacks (and the control) whose state goes into trainer_state.json."""
        return [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]
