"""How the rows of one optimizer step are cut into passes forward and backward.

    batch size 2, accumulation 2      [a b] [c d]        what a step is: callbacks and counts follow it
    passes of at most T tokens        [a b c] [d]        how it is computed: the gradient is the same sum

A pass costs as much time to begin as some thousand tokens to compute, so there are as few as memory allows. Documents
are never cut. Only samples laid end to end can be cut anew: padded batches stay as they are.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from burnish import console
from burnish.errors import RunStopped
from burnish.model.graphs import PassGraphs
from burnish.model.recompute import Recompute
from burnish.train.generators import restore_rng, rng_state
from burnish.types import Batch

# A block of 7B's shape takes 2 % longer for a token in passes of 4,096 than of 8,192 (docs/performance.md): larger
# passes gain little more than memory costs, and far below 4,096 to compute blocks again costs less than smaller ones.
AUTO = 16_384
EFFICIENT = 4_096

NEED_LESS = (
    "`burnish plan` says what a run needs. finetuning_type: lora needs less, and so does pure_bf16: true; --deepspeed "
    "divides it among several GPUs."
)


class Passes:
    """Runs the passes of each step, and remembers how many tokens one may hold."""

    def __init__(
        self,
        asked: str,
        device: torch.device,
        *,
        why_whole: str = "",
        recompute: Recompute | None = None,
        graphs: PassGraphs | None = None,
    ):
        """`asked`: micro_batch_tokens, a number or auto. `why_whole`: the reason, if batches cannot be cut.
        `recompute`: the blocks that may be computed again. `graphs`: what has been recorded of passes, which takes
        memory too."""
        self._recompute, self._graphs = recompute, graphs
        self._is_auto, self._on_gpu, self._can_be_cut = asked == "auto", device.type == "cuda", not why_whole
        self.most_tokens: int | None = None  # None: the batches are the passes
        if self._is_auto:
            self.most_tokens = AUTO if self._on_gpu and self._can_be_cut else None
        elif self._can_be_cut:
            self.most_tokens = int(asked)
        else:
            console.warn(f"micro_batch_tokens is not used, batches stay whole: {why_whole}")

    def run(
        self,
        batches: list[Batch],
        one_pass: Callable[..., Tensor],
        *,
        end_batch: Callable[[], bool],
        forget: Callable[[], None],
    ) -> Tensor | None:
        """`one_pass(batch, last=…)` for each pass of a step; → the sum of what it gives.

        `end_batch` is called once for each batch but the last, when all of its rows are done: True leaves the step, and
        None is given. Where a GPU's memory does not suffice, `forget` undoes the passes and the whole step is run
        again, from the same state of the generators, in smaller ones or with blocks that are computed again.
        """
        generators = rng_state() if self._on_gpu else {}
        ends = _Ends(batches, end_batch)
        while True:
            try:
                return self._run(cut(batches, self.most_tokens), one_pass, ends)
            except torch.OutOfMemoryError as error:
                instead = self._need_less(batches)
                if instead is None:
                    raise RunStopped(_too_large(error), 1) from None
            # Here, and not above: while the error is handled it holds the tensors of the pass that failed.
            forget()
            gc.collect()
            torch.cuda.empty_cache()
            restore_rng(generators)
            console.warn(f"out of memory: from here on {instead}, with the same gradients")

    def _run(self, passes: list[Batch], one_pass: Callable[..., Tensor], ends: _Ends) -> Tensor | None:
        total: Tensor | None = None
        done = 0
        for number, each in enumerate(passes, start=1):
            loss = one_pass(each, last=number == len(passes))
            total = loss if total is None else total + loss
            done += each.labels.numel()
            if ends.left_after(done):
                return None
        return total

    def _need_less(self, batches: list[Batch]) -> str | None:
        """Nothing recorded, passes of half the tokens, or more blocks computed again; → which, or None where nothing is
        left to do."""
        if self._graphs and self._graphs.stop():
            return "passes are not recorded as CUDA graphs"
        smaller = self._smaller(batches)
        if smaller is None or smaller < EFFICIENT:
            if self._recompute and self._recompute.more():
                self._record_no_more()
                return f"{self._recompute} are computed again in the backward pass"
            if smaller is None:
                return None
        self.most_tokens = smaller
        return f"passes of at most {smaller:,} tokens"

    def _smaller(self, batches: list[Batch]) -> int | None:
        """Half the tokens of the largest pass; None where documents cannot be parted further."""
        if not (self._can_be_cut and _are_end_to_end(batches)):
            return None
        largest = max(each.labels.numel() for each in cut(batches, self.most_tokens))
        longest = max(int(batch.inputs["max_length_q"]) for batch in batches)
        return max(largest // 2, longest) if largest > longest else None

    def state(self) -> dict[str, int | None]:
        """What fits into memory, for a run that goes on from here."""
        return {"most_tokens": self.most_tokens, "recomputed": self._recompute.count if self._recompute else 0}

    def remember(self, state: dict[str, int | None]) -> None:
        most_tokens, recomputed = state["most_tokens"], state["recomputed"]
        if self._is_auto and self.most_tokens and most_tokens:
            self.most_tokens = min(self.most_tokens, most_tokens)
        if self._recompute and recomputed:
            self._recompute.set(recomputed)
            self._record_no_more()

    def _record_no_more(self) -> None:
        """What is computed again in the backward pass looks at the state of the generators, which waits for the GPU."""
        if self._graphs:
            self._graphs.stop()


class _Ends:
    """Tells, once, of each batch but the last that all of its tokens are done."""

    def __init__(self, batches: Sequence[Batch], end_batch: Callable[[], bool]):
        self._waiting = list(accumulate(batch.labels.numel() for batch in batches))[:-1]
        self._end_batch = end_batch

    def left_after(self, tokens: int) -> bool:
        while self._waiting and self._waiting[0] <= tokens:
            del self._waiting[0]
            if self._end_batch():
                return True
        return False


@contextmanager
def stop_if_out_of_memory(where: str, remedy: str = NEED_LESS) -> Iterator[None]:
    """What does not fit and is no pass cannot be made smaller: the run ends, and one message says where."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # whoever keeps the RunStopped would keep their tensors
        raise RunStopped(f"{_reason(error)} {where}.\n{remedy}", 1) from None


def _reason(error: torch.OutOfMemoryError) -> str:
    return str(error).split(". ")[0] or "out of memory"


def _too_large(error: torch.OutOfMemoryError) -> str:
    return (
        f"{_reason(error)}.\nThe rows of a pass cannot be parted further. Lower --cutoff_len "
        "(--per_device_train_batch_size where batches are padded or DeepSpeed divides the model), or set "
        "--gradient_checkpointing true if it is false."
    )


def _are_end_to_end(batches: Sequence[Batch]) -> bool:
    return all("cu_seq_lens_q" in batch.inputs for batch in batches)


def cut(batches: Sequence[Batch], most_tokens: int | None) -> list[Batch]:
    """The documents of `batches`, in their order, in passes of at most `most_tokens`; a longer document is alone.

    None, or padding in the batches: they are the passes.
    """
    if most_tokens is None or not _are_end_to_end(batches):
        return list(batches)
    whole = batches[0] if len(batches) == 1 else join(batches)
    borders = whole.inputs["cu_seq_lens_q"].tolist()
    if borders[-1] <= most_tokens:
        return [whole]
    passes, first = [], 0
    for last in range(1, len(borders)):
        if last + 1 == len(borders) or borders[last + 1] - borders[first] > most_tokens:
            passes.append(_documents(whole, first, last))
            first = last
    return passes


def join(batches: Sequence[Batch]) -> Batch:
    """Batches laid end to end as one."""
    lengths = [batch.labels.shape[1] for batch in batches]
    starts = [sum(lengths[:number]) for number in range(len(batches))]
    borders = [batch.inputs["cu_seq_lens_q"][1:] + start for batch, start in zip(batches, starts, strict=True)]
    cu_seq_lens = torch.cat([torch.zeros(1, dtype=torch.int32), *borders])
    longest = max(batch.inputs["max_length_q"] for batch in batches)
    return Batch(
        inputs=_inputs(
            torch.cat([batch.inputs["input_ids"] for batch in batches], dim=1),
            torch.cat([batch.inputs["position_ids"] for batch in batches], dim=1),
            cu_seq_lens.to(torch.int32),
            longest,
        ),
        labels=torch.cat([batch.labels for batch in batches], dim=1),
        trained_at=torch.cat([batch.trained_at + start for batch, start in zip(batches, starts, strict=True)]),
        targets=torch.cat([batch.targets for batch in batches]),
        num_trained=sum(batch.num_trained for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        places=tuple(place for batch in batches for place in batch.places),
    )


def _documents(whole: Batch, first: int, last: int) -> Batch:
    """Documents `first` up to `last` of a batch, as a batch."""
    cu_seq_lens = whole.inputs["cu_seq_lens_q"][first : last + 1]
    start, end = int(cu_seq_lens[0]), int(cu_seq_lens[-1])
    tokens = slice(start, end)
    trained = slice(*torch.searchsorted(whole.trained_at, torch.tensor([start, end])).tolist())
    has_place_of_each = len(whole.places) == len(whole.inputs["cu_seq_lens_q"]) - 1
    return Batch(
        inputs=_inputs(
            whole.inputs["input_ids"][:, tokens],
            whole.inputs["position_ids"][:, tokens],
            cu_seq_lens - start,
            int(cu_seq_lens.diff().max()),
        ),
        labels=whole.labels[:, tokens],
        trained_at=whole.trained_at[trained] - start,
        targets=whole.targets[trained],
        num_trained=trained.stop - trained.start,
        num_tokens=end - start,
        places=whole.places[first:last] if has_place_of_each else whole.places,
    )


def _inputs(input_ids: Tensor, position_ids: Tensor, cu_seq_lens: Tensor, longest: int) -> dict[str, Tensor | int]:
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
