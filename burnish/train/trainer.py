"""The training loop. One optimizer step reads top to bottom in `_optimizer_step`.

It speaks transformers' language (`TrainingArguments`, `TrainerState`, `TrainerControl`, `TrainerCallback`, the names of
the methods, `checkpoint-N/`), so callbacks and integrations written for transformers' Trainer run here unchanged and in
the same order. What differs is the arithmetic: the loss of a step is the sum over its trained tokens divided once by
their number, known before the first forward, so cutting a step into passes cannot change it.

Several processes run the same loop over their shares of the rows; what they tell each other goes through `self.peers`
(peers.py). How weights move, here or divided by DeepSpeed, is `self.update` (optimizer.py, deepspeed.py).
Left out: the making of data sets.
"""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy, TrainOutput, speed_metrics

from burnish import console, ranks
from burnish.data.loader import order_of, position_of
from burnish.errors import Problem, RunStopped, UserError
from burnish.model.graphs import PassGraphs, fill
from burnish.model.head import unwrap
from burnish.model.patch import size_of
from burnish.train import checkpoint
from burnish.train.base import NOT_MEASURED
from burnish.train.evaluate import Evaluation
from burnish.train.interrupt import STOPPING, Interrupt
from burnish.train.noise import EmbeddingNoise
from burnish.train.nonfinite import NOT_AGAIN, FiniteGuard, StepRecord, diagnose
from burnish.train.optimizer import LocalUpdate, create_scheduler, current_learning_rate, steps_on_metric
from burnish.train.passes import Passes, stop_if_out_of_memory
from burnish.train.steps import Steps, count_steps
from burnish.train.weights import load_weights, save_weights
from burnish.types import Batch

CONTROLS = ("should_log", "should_evaluate", "should_save", "should_epoch_stop", "should_training_stop")


class Trainer(Evaluation):
    """Trains `objective.model` on `train_dataset` as `args` say; see `TrainerFrame` for what it is made of."""

    # ---- the run ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Path | None = None) -> TrainOutput:
        """Train to the end, or from a checkpoint on. Afterwards the model holds the final (or the best) weights."""
        self._prepare(resume_from_checkpoint)
        started, first_step, first_tokens = time.time(), self.state.global_step, self.state.num_input_tokens_seen
        self.tell("on_train_begin")
        if self.args.eval_on_start and resume_from_checkpoint is None:
            self.evaluate()
        first_epoch, steps_done = self.steps.position(self.state.global_step)
        if not steps_done and self.epochs_ended < first_epoch:  # resumed between an epoch's last step and its end
            first_epoch, steps_done = first_epoch - 1, self.steps.per_epoch
        with Interrupt() as self.interrupt:
            for epoch in range(first_epoch, self.steps.epochs):
                if self.state.global_step >= self.steps.total and (not steps_done or self.epochs_ended > epoch):
                    break  # resumed at the very end
                self._run_epoch(epoch, steps_done)
                steps_done = 0
                if self.control.should_training_stop:
                    break
        return self._finish(started, first_step, first_tokens)

    def _prepare(self, resume: Path | None) -> None:
        """Weights, optimizer, schedule and state: new, or as they were at the checkpoint."""
        for part in (self.graphs, self.update, self.noise):  # of a training before this one
            if part is not None:
                part.release()
        set_seed(self.args.seed)
        self.train_dataloader = self.get_train_dataloader()
        streamed = not hasattr(self.train_dataset, "__len__")
        self.steps: Steps = count_steps(self.args, None if streamed else len(self.train_dataloader))
        if resume is not None and not self.is_divided:
            load_weights(self.model, resume)
        self.update = self._make_update()
        alpha = self.args.neftune_noise_alpha
        self.noise = EmbeddingNoise(self.objective, alpha) if alpha else None
        self.graphs = None if self.recorder is None else PassGraphs(self.objective, self.update, self.recorder)
        self.optimizer = self.update.optimizer
        self.lr_scheduler = create_scheduler(self.args, self.optimizer, self.steps.total)
        self.guard = FiniteGuard(self.device)
        self.loss_since_log = torch.zeros((), device=self.device)  # mean losses of the steps since then, added up
        self.total_loss = 0.0  # the same over all steps that were logged
        self.lost_since_log = torch.zeros((), dtype=torch.int64, device=self.device)  # steps whose loss overflowed
        self.total_lost = 0
        self.overflows_told = 0
        self.last_logged_step = 0
        self.measured = NOT_MEASURED
        self.last_saved_step = -1
        how: dict[str, Any] = {"recompute": self.recompute, "graphs": self.graphs}
        self.passes = Passes(self.micro_batch_tokens, self.device, why_whole=self._why_whole(), **how)
        self.epochs_ended = 0  # those of which callbacks have heard the end
        self._grad_norm: Tensor | None = None
        self._learning_rate = current_learning_rate(self.optimizer)
        self._flops_per_token = 6 * _count_non_embedding(self.model)
        self.state = self.new_state()
        self.stream_at: dict[str, Any] | None = None  # after the last step
        if resume is not None:
            checkpoint.load_state(self, resume)
            self.peers.from_main(lambda: checkpoint.clear_later(self.output_dir, resume))  # nothing refuses it now
        self.state.train_batch_size = self.args.per_device_train_batch_size
        self.state.max_steps, self.state.num_train_epochs = self.steps.total, self.steps.epochs
        self.state.compute_steps(self.args, self.steps.total)
        for name in ("model", "optimizer", "lr_scheduler", "train_dataloader"):
            setattr(self.callback_handler, name, getattr(self, name))

    def _why_whole(self) -> str:
        """Why batches cannot be cut into passes, if they cannot."""
        if self.is_divided:
            return "DeepSpeed divides the model"
        if self.why_padded:
            return f"they are padded ({self.why_padded})"
        return "" if self.objective.fused else "the model's own loss is a mean over each"

    @stop_if_out_of_memory("where the optimizer and its float32 masters are made")
    def _make_update(self) -> Any:
        if not self.is_divided:
            how: dict[str, Any] = {"loraplus_lr_ratio": self.loraplus_lr_ratio, "pure_bf16": self.pure_bf16}
            return LocalUpdate(self.objective, self.args, self.peers, recorded=self.recorder is not None, **how)
        from burnish.train.deepspeed import ZeroUpdate

        return ZeroUpdate(
            self.objective, self.args, max_steps=self.steps.total, loraplus_lr_ratio=self.loraplus_lr_ratio
        )

    def _run_epoch(self, epoch: int, steps_done: int) -> None:
        self.tell("on_epoch_begin")
        skip = 0 if self.args.ignore_data_skip else steps_done * self.steps.accumulation
        order_of(self.train_dataloader).set_epoch(epoch, skip=skip)
        self.stream_at = position_of(self.train_dataloader)
        self.objective.train()
        batches = iter(self.train_dataloader)
        for step_of_epoch in range(steps_done, self.steps.per_epoch):
            if self.state.global_step >= self.steps.total:  # resumed there, in the middle of an epoch
                break
            self._optimizer_step(list(islice(batches, self.steps.batches_in(step_of_epoch))), epoch, step_of_epoch)
            if self.control.should_epoch_stop or self.control.should_training_stop:
                break
        self.tell("on_epoch_end")
        self._agree()
        self._stop_if_not_finite()  # again: what the strategy `epoch` asks for is asked for only now
        self.epochs_ended += 1
        self._maybe_log_save_evaluate()
        self._stop_if_asked_to()

    def _optimizer_step(self, batches: list[Batch], epoch: int, step_of_epoch: int) -> None:
        """Passes forward and backward over `batches`, then one update of the weights."""
        if not batches:
            raise UserError(Problem("--dataset", "dataset", None, "gave no sample that can be trained"))
        # 1. The whole step's count first: every pass, in every process, is divided by the same number.
        counts = [sum(batch.num_trained for batch in batches), *(batch.num_tokens for batch in batches)]
        num_trained, *num_tokens = self.peers.sums(counts)
        scheduler = self.lr_scheduler.state_dict()
        before = StepRecord(self.state.global_step + 1, self.state.epoch, scheduler, batches, self.stream_at)
        self.stream_at = position_of(self.train_dataloader)

        # 2. Passes: gradients add up.
        self.tell("on_step_begin")
        one_pass = partial(self.training_step, num_trained=max(num_trained, 1))
        step_loss = self.passes.run(batches, one_pass, end_batch=self._end_substep, forget=self._forget_passes)
        if step_loss is None:  # a callback left the step
            self._forget_passes()
            self.stream_at = before.stream
            return
        self.state.num_input_tokens_seen += sum(num_tokens)
        self.state.total_flos += self._flops_per_token * sum(num_tokens)

        # 3. The update, left out where something is not finite.
        self.peers.add(step_loss)
        with stop_if_out_of_memory("in the optimizer's step"):  # AdamW makes its moments in the first
            self.update.gather_gradients(self.args.max_grad_norm)
            self.tell("on_pre_optimizer_step")
            updated, must_not, self._grad_norm = self.update.step(partial(self.guard.check, before), step_loss)
        self.tell("on_optimizer_step")
        self._learning_rate = current_learning_rate(self.optimizer)
        if updated and not steps_on_metric(self.lr_scheduler):
            self.lr_scheduler.step()
        self.update.zero_grad()

        # 4. What callbacks, logs and people see.
        finite = torch.isfinite(step_loss)
        # A checkpoint of before a bad step keeps this sum.
        self.loss_since_log += step_loss.masked_fill(must_not | ~finite, 0.0)
        self.lost_since_log += ~(must_not | finite)
        self.state.global_step += 1
        batches_done = step_of_epoch * self.steps.accumulation + len(batches)
        self.state.epoch = epoch + batches_done / self.steps.batches_per_epoch
        self.tell("on_step_end")
        self._agree()
        self._stop_if_not_finite()
        self._maybe_log_save_evaluate()
        self._stop_if_asked_to()

    def _forget_passes(self) -> None:
        """As if none of the step's passes had been."""
        self.update.zero_grad()
        self.model.zero_grad(set_to_none=True)

    def _end_substep(self) -> bool:
        """After each batch of a step but its last; → whether a callback leaves the step."""
        self.tell("on_substep_end")
        # Of several processes one alone cannot leave a step: there it is heeded after it.
        return self.peers.count == 1 and (self.control.should_epoch_stop or self.control.should_training_stop)

    def training_step(self, batch: Batch, num_trained: int, *, last: bool = True) -> Tensor:
        """Forward and backward of one pass; → its share of the step's mean loss, a scalar on the device."""
        if self.graphs is not None:
            batch = fill(batch)
            if self.device.type == "cuda":
                batch = batch.pin_memory()  # the CPU is far ahead, and would wait here for the GPU to have time
        loss = self.update.forward(batch.to(self.device)) / num_trained
        self.update.backward(loss, last=last)
        return loss.detach()

    # ---- log, evaluate, save, stop ---------------------------------------------------------------------------------

    def _agree(self) -> None:
        """What callbacks ask for in one process happens in all: their clocks and files may tell them different things,
        and processes that part ways would wait for each other for ever."""
        asked = self.peers.sums([getattr(self.control, name) for name in CONTROLS])
        for name, count in zip(CONTROLS, asked, strict=True):
            setattr(self.control, name, count > 0)

    def _maybe_log_save_evaluate(self) -> None:
        if self.control.should_log and self.state.global_step > self.last_logged_step:
            self._log_steps()
        if self.control.should_evaluate:
            metrics = self.evaluate()
            self.measured = (self.state.global_step, metrics)
            if steps_on_metric(self.lr_scheduler):
                self.lr_scheduler.step(self.metric_for_best(metrics))
            is_best = self.note_best(metrics)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
        if self.control.should_save:
            checkpoint.save(self)
            self.tell("on_save")

    def _log_steps(self) -> None:
        """What has happened since the last log, or since the run began."""
        loss, steps = self.loss_since_log.item(), self.state.global_step - self.last_logged_step
        lost = int(self.lost_since_log.item())
        logs = {"loss": loss / (steps - lost)} if steps > lost else {}
        logs["learning_rate"] = self._learning_rate
        if self._grad_norm is not None and math.isfinite(norm := self._grad_norm.item()):
            logs["grad_norm"] = norm
        if self.update.scale is not None:
            logs |= {"loss_scale": self.update.scale.value.item(), "overflows": self._tell_overflows()}
        self.total_loss += loss
        self.total_lost += lost
        self.loss_since_log.zero_()
        self.lost_since_log.zero_()
        self.last_logged_step = self.state.global_step
        self.log(logs)

    def overflows(self) -> int:
        """How many steps have overflowed since the run began, over all that it was resumed from."""
        return 0 if self.update.scale is None else int(self.update.scale.overflows.item())

    def _tell_overflows(self) -> int:
        overflows = self.overflows()
        if new := overflows - self.overflows_told:
            steps = "step overflowed and was" if new == 1 else "steps overflowed and were"
            scale = self.update.scale.value.item()
            console.warn(f"step {self.state.global_step}: {new} {steps} left out; the loss is scaled by {scale:g} now")
        self.overflows_told = overflows
        return overflows

    def _stop_if_not_finite(self, *, now: bool = False) -> None:
        """`now`: a checkpoint follows, whatever callbacks ask for."""
        control = self.control
        waits_anyway = now or control.should_log or control.should_save or control.should_evaluate
        if not (waits_anyway or control.should_training_stop or self.device.type == "cpu"):
            return
        record = self.guard.first_bad()
        if record is None:
            return
        details = "\n".join(filter(None, self.peers.gather(self._describe_fault(record)))) or NOT_AGAIN
        self.state.global_step, self.state.epoch, self.stream_at = record.step - 1, record.epoch, record.stream
        self.epochs_ended = min(self.epochs_ended, self.steps.position(self.state.global_step)[0])
        self.lr_scheduler.load_state_dict(record.scheduler)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        saved = f"; the weights from before it are in {checkpoint.save(self)}" if self.state.global_step else ""
        what, instead = "the loss or its gradient is not finite", "without --bf16"
        if self.update.scale is not None:
            what, instead = f"{what}, however little the loss is scaled", "with --bf16 in the place of --fp16"
        raise RunStopped(
            f"step {record.step}: {what}. The step was not applied{saved}.\n{details}\n"
            f"Look at these rows, lower --learning_rate or --max_grad_norm, or train {instead}.",
            status=1,
        )

    def _describe_fault(self, record: StepRecord) -> str:
        if self.is_divided:  # a module's hooks would wait for peers that have other rows
            return f"  one of rows {', '.join(place for batch in record.batches for place in batch.places)}"
        if self.graphs is not None:
            self.graphs.release()  # what is replayed calls no module's hook
        return diagnose(self.model, record, lambda batch: self.objective(batch).loss, self.device)

    def _stop_if_asked_to(self) -> None:
        """A signal that any of the processes got stops all of them after the same step."""
        self._agree()
        got = self.peers.sums([self.interrupt.signal == each for each in STOPPING])
        name = next((each for each, count in zip(STOPPING, got, strict=True) if count), None)
        if name is None:
            return
        self._stop_if_not_finite(now=True)
        place = checkpoint.save(self, to_go_on=True)
        raise RunStopped(
            f"stopped by {name.name} after step {self.state.global_step} of {self.state.max_steps}. "
            f"{place} is whole: the same command goes on from there (one that has overwrite_output_dir or "
            f"resume_from_checkpoint in it needs resume_from_checkpoint={place}).",
            status=128 + name.value,
        )

    def _finish(self, started: float, first_step: int, first_tokens: int) -> TrainOutput:
        steps = self.state.global_step - first_step
        batch = self.args.per_device_train_batch_size * self.peers.count
        samples = steps * batch * self.args.gradient_accumulation_steps
        tokens = self.state.num_input_tokens_seen - first_tokens
        metrics = speed_metrics("train", started, num_samples=samples, num_steps=steps, num_tokens=tokens)
        self.total_loss += self.loss_since_log.item()
        self.total_lost += int(self.lost_since_log.item())
        train_loss = self.total_loss / max(self.state.global_step - self.total_lost, 1)
        metrics |= {"total_flos": self.state.total_flos, "train_loss": train_loss}
        if self.update.scale is not None:
            metrics["overflows"] = self._tell_overflows()
        self.log(metrics)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            load_weights(self.model, Path(self.state.best_model_checkpoint))
            if self.state.best_global_step != self.state.global_step:
                self.measured = NOT_MEASURED
        for part in (self.noise, self.graphs):
            if part is not None:
                part.release()
        self.peers.wait()
        self.tell("on_train_end")
        return TrainOutput(self.state.global_step, train_loss, metrics)

    def save_model(self, folder: Path | None = None) -> None:
        """The model as it would be published (or its adapter alone), with its tokenizer. Every process calls it."""
        folder = folder or self.output_dir
        save_weights(self.model, self.processing_class, folder)
        if self.beside_weights is not None and ranks.is_main():
            self.beside_weights(folder)
        self.peers.wait()


def _count_non_embedding(model: nn.Module) -> int:
    """Weights that multiply every token: all but the embedding (which also serves as the head where they are tied)."""
    embedding = unwrap(model).get_input_embeddings().weight
    return sum(size_of(weight) for weight in model.parameters() if weight is not embedding)
