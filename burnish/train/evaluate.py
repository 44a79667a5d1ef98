"""Evaluation during and after training: the part of the Trainer that measures and changes nothing."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import SaveStrategy, speed_metrics

from burnish.errors import Problem, UserError
from burnish.train.base import TrainerFrame
from burnish.train.passes import stop_if_out_of_memory
from burnish.types import Batch


class Evaluation(TrainerFrame):
    """What `Trainer` inherits: `evaluate → evaluation_loop → prediction_step`, and which evaluation was the best."""

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure one set, or each set of a dict under its own prefix (`eval_<name>_loss`).

        `_loss` is the mean over all trained tokens of the set (transformers averages batch means, which depends on the
        batch size), `_perplexity` its exponential, `_accuracy` the share of tokens that are the model's first choice.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {key: value for part in parts for key, value in part.items()}
        started, loader = time.time(), self.get_eval_dataloader(dataset)
        metrics = self.evaluation_loop(loader, metric_key_prefix)
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(dataset), num_steps=len(loader))
        self.log(metrics)
        self.tell("on_evaluate", metrics=metrics)
        return metrics

    def evaluate_at_end(self) -> dict[str, float]:
        """The metrics of the final weights: those of the last step, where it ended with an evaluation."""
        step, metrics = self.measured
        return metrics if step == self.state.global_step else self.evaluate()

    @stop_if_out_of_memory("in the evaluation", "Lower --per_device_eval_batch_size: its batches are never cut.")
    def evaluation_loop(self, dataloader: Any, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sums on the device over all batches; nothing of a batch is kept, so memory does not grow with the set.

        Each process measures its share of every batch; what is given is of the whole set, in each of them.
        """
        self.callback_handler.eval_dataloader = dataloader
        training = self.objective.training
        self.objective.eval()
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device, dtype=torch.int64)
        num_trained = 0
        for batch in dataloader:
            batch_loss, batch_correct = self.prediction_step(batch)
            loss += batch_loss
            if batch_correct is not None:
                correct += batch_correct
            num_trained += batch.num_trained
            self.tell("on_prediction_step")
        if self.update is not None:
            self.update.settle()
        self.objective.train(training)
        (num_trained,) = self.peers.sums([num_trained])
        mean = self.peers.add(loss).item() / max(num_trained, 1)
        metrics = {f"{metric_key_prefix}_loss": mean, f"{metric_key_prefix}_perplexity": math.exp(min(mean, 700.0))}
        if self.count_correct:
            metrics[f"{metric_key_prefix}_accuracy"] = self.peers.add(correct).item() / max(num_trained, 1)
        return metrics

    @torch.no_grad()
    def prediction_step(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(summed loss, hits or None) of one batch, both on the device."""
        result = self.objective(batch.to(self.device), count_correct=self.count_correct)
        return result.loss, result.correct

    def metric_for_best(self, metrics: dict[str, float]) -> float:
        name = self.args.metric_for_best_model or "loss"
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key not in metrics:
            setting, there = "metric_for_best_model", "it can be one of " + ", ".join(metrics)
            raise UserError(Problem(f"--{setting}", setting, name, "was not measured", there))
        return metrics[key]

    def note_best(self, metrics: dict[str, float]) -> bool:
        """Is it the best so far? Asked after on_evaluate, since EarlyStoppingCallback compares with those before."""
        if self.args.metric_for_best_model is None:
            return False
        value, best = self.metric_for_best(metrics), self.state.best_metric
        better = best is None or (value > best if self.args.greater_is_better else value < best)
        if better:
            self.state.best_metric = value
            if self.args.save_strategy != SaveStrategy.NO:
                self.state.best_global_step = self.state.global_step
        return better
