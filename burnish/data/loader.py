"""The order of samples, and samples → `Batch`.

The order of epoch e is a permutation drawn from (seed, e) alone, so any position can be found again without replaying
what came before: that is what makes a resumed run see the same rows. Of several processes each takes its share of the
same order. `collate` lays samples end to end; `collate_padded` makes the padded batches of models that need them. A
torch `DataLoader` puts both together, so its workers, pinning and prefetching are at the user's disposal
(`dataloader_*`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from burnish.data.packing import Packing, pack
from burnish.errors import Problem, UserError
from burnish.types import IGNORE_INDEX, Batch, Sample

Collate = Callable[[Sequence[Sample]], Batch]

BATCHES_SORTED_TOGETHER = 50  # with group_by_length; more would make batches of one length follow each other
# What a process computes whose share of a batch is empty: as many passes as its peers, and nothing to learn.
NOTHING = Sample(np.zeros(2, dtype=np.int32), np.full(2, IGNORE_INDEX, dtype=np.int32))


class Share(NamedTuple):
    """Which part of every batch a process takes: of `of` processes the `rank`th."""

    rank: int = 0
    of: int = 1


WHOLE = Share()


class EpochOrder(Sampler[list[int]]):
    """Batches of indices: epoch e is shuffled by (seed, e), the batches before `skip` are left out.

    A batch is `batch_size` samples for each process, and what is given is one process's share of it. The last batch of
    an epoch may be smaller, and the share of some processes then empty: their `collate([])` makes a batch of nothing.

    >>> order = EpochOrder(5, batch_size=2, seed=42, strategy="sequential"); order.set_epoch(0); list(order)
    [[0, 1], [2, 3], [4]]
    >>> list(EpochOrder(5, batch_size=2, seed=42, strategy="sequential", share=Share(1, of=2)))
    [[1, 3], []]

    `strategy`: random, sequential, or group_by_length (random, but a batch holds samples of about one length, which
    padding gains from), for which `lengths` are needed.

    With `pack_to` a batch is rows of up to so many tokens (data/packing.py) in the place of samples, and what is given
    are the samples of its rows. Every epoch has other rows, and as many of them.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        strategy: str = "random",
        drop_last: bool = False,
        share: Share = WHOLE,
        lengths: np.ndarray | None = None,
        pack_to: int | None = None,
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size * share.of, seed
        self.strategy, self.drop_last, self.share = strategy, drop_last, share
        self.lengths, self.pack_to = lengths, pack_to
        self.num_rows = num_samples if pack_to is None else len(pack(self._known_lengths(), pack_to))
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever is skipped."""
        whole, rest = divmod(self.num_rows, self.batch_size)
        return whole + (0 if self.drop_last or not rest else 1)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        packing = None if self.pack_to is None else self._packing(rng)
        order = self._order(rng) if packing is None else self._order_of_rows(packing, rng)
        for batch in range(self.skip, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            mine = rows[self.share.rank :: self.share.of].tolist()
            yield mine if packing is None else [sample for row in mine for sample in packing[row]]

    def _packing(self, rng: np.random.Generator) -> Packing:
        assert self.pack_to is not None
        return pack(self._known_lengths(), self.pack_to, None if self.strategy == "sequential" else rng)

    def _order_of_rows(self, packing: Packing, rng: np.random.Generator) -> np.ndarray:
        if self.strategy == "sequential":  # as nearly as packing can: by the first sample of each row
            return np.argsort(packing.first_samples)
        return rng.permutation(len(packing))

    def _known_lengths(self) -> np.ndarray:
        assert self.lengths is not None
        return self.lengths

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        if self.strategy == "sequential":
            return np.arange(self.num_samples)
        order = rng.permutation(self.num_samples)
        if self.strategy != "group_by_length":
            return order
        lengths = self._known_lengths()
        size = BATCHES_SORTED_TOGETHER * self.batch_size
        groups = [order[start : start + size] for start in range(0, self.num_samples, size)]
        longest_first = np.concatenate([group[np.argsort(-lengths[group], kind="stable")] for group in groups])
        longest = int(np.argmax(lengths[longest_first]))  # its batch first: what does not fit shows at once
        first = longest - longest % self.batch_size
        return np.concatenate(
            [
                longest_first[first : first + self.batch_size],
                np.delete(longest_first, slice(first, first + self.batch_size)),
            ]
        )


class StreamOrder(IterableDataset):
    """A stream of samples in the place of `EpochOrder`: endless, one pass after the other, each in another order.

    Where it is after a batch is the same in every process, and is what a resumed run begins at.
    """

    def __init__(self, stream: Any, share: Share = WHOLE):
        self.stream, self.share = stream, share

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Begin anew; with `skip`, where `load_state_dict` said, which is after so many batches."""
        if not skip:
            self.stream.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def __iter__(self) -> Iterator[Sample]:
        samples = self._endless()
        while taken := list(islice(samples, self.share.of)):  # one for each process
            yield taken[self.share.rank]

    def _endless(self) -> Iterator[Sample]:
        passes_without_any = 0
        while passes_without_any < 2:  # one that was resumed at its end gives none either
            passes_without_any += 1
            for sample in self.stream:
                passes_without_any = 0
                yield sample
            self.stream.set_epoch(self.stream.epoch + 1)


def make_loader(
    samples: Any,
    batch_size: int,
    collate: Collate,
    *,
    seed: int,
    strategy: str = "random",
    drop_last: bool = False,
    share: Share = WHOLE,
    pack_to: int | None = None,
    options: dict[str, Any] | None = None,
) -> DataLoader:
    """A DataLoader of `Batch`es over a store or a stream. `options` are torch's (num_workers, pin_memory, ...).

    With `pack_to` a batch of a store is `batch_size` rows of up to so many tokens, each of several samples.

    Its own generator keeps the global rng out of it: an epoch's beginning must not move the dropout of a resumed run.
    """
    options = dict(options or {})
    generator = torch.Generator()
    if not hasattr(samples, "__getitem__"):
        assert pack_to is None, "a stream is not packed"  # data/arguments.py refuses it by name
        options |= {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False}  # one reader, one order
        order = StreamOrder(samples, share)
        return DataLoader(
            order, batch_size=batch_size, collate_fn=collate, drop_last=drop_last, generator=generator, **options
        )
    order = EpochOrder(
        len(samples),
        batch_size,
        seed=seed,
        strategy=strategy,
        drop_last=drop_last,
        share=share,
        lengths=_lengths(samples) if pack_to or strategy == "group_by_length" else None,
        pack_to=pack_to,
    )
    return DataLoader(samples, batch_sampler=order, collate_fn=collate, generator=generator, **options)


def _lengths(samples: Any) -> np.ndarray:
    return samples.lengths if hasattr(samples, "lengths") else np.array([len(sample) for sample in samples])


def order_of(loader: DataLoader) -> EpochOrder | StreamOrder:
    """Where the epoch and the place to begin at are set."""
    return loader.dataset if isinstance(loader.dataset, StreamOrder) else loader.batch_sampler  # type: ignore[return-value]


def position_of(loader: DataLoader) -> dict[str, Any] | None:
    """Where a stream is after the last batch. For the order of an epoch a number of batches tells it."""
    order = order_of(loader)
    return order.state_dict() if isinstance(order, StreamOrder) else None


def go_on_from(loader: DataLoader, position: dict[str, Any] | None) -> None:
    """What `position_of` told a run before this one. Raises UserError for a stream where that run had none."""
    order = order_of(loader)
    if not isinstance(order, StreamOrder):
        return
    if position is None:
        message = "cannot go on in a run that was not streamed: nobody knows which rows it had"
        raise UserError(Problem("data", "streaming", None, message, "leave it out, or begin a new run"))
    order.load_state_dict(position)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples laid end to end, with no padding.

    [[a b c], [d e]]  →  input_ids    [[a b c d e]]      cu_seq_lens_q [0 3 5]
                         position_ids [[0 1 2 0 1]]      labels of a and d are ignored: nothing predicts them
    A sample that itself holds several documents (`Sample.documents`) has a border at each.
    """
    real = samples
    samples = samples or [NOTHING]
    ids = torch.from_numpy(np.concatenate([s.input_ids for s in samples]).astype(np.int64))  # [T]
    labels = torch.from_numpy(np.concatenate([s.labels for s in samples]).astype(np.int64))  # [T]
    lengths = [n for s in samples for n in (s.documents or (len(s),))]
    borders = np.concatenate([[0], np.cumsum(lengths)])
    labels[borders[:-1]] = IGNORE_INDEX
    trained_at, targets = _trained(labels[None])
    cu_seq_lens = torch.from_numpy(borders.astype(np.int32))  # [D+1]
    positions = torch.from_numpy(np.arange(len(ids)) - np.repeat(borders[:-1], lengths))  # [T]
    return Batch(
        inputs={
            "input_ids": ids[None],
            "position_ids": positions[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        },
        labels=labels[None],
        trained_at=trained_at,
        targets=targets,
        num_trained=len(targets),
        num_tokens=sum(len(s) for s in real),
        places=tuple(s.place for s in real),
    )


def collate_padded(
    samples: Sequence[Sample], *, collator: DataCollatorForSeq2Seq, takes_token_type_ids: bool = False
) -> Batch:
    """Samples padded to the longest, rounded up by transformers' DataCollatorForSeq2Seq. Ids become [B, S].

    A sample that holds several documents becomes a row for each: in one row they would see each other.
    A `token_type_ids` of zeros is added only for a model whose forward takes it.
    """
    real = samples
    samples = [document for s in samples or [NOTHING] for document in _documents(s)]
    features = [
        {"input_ids": s.input_ids.tolist(), "attention_mask": s.attention_mask.tolist(), "labels": s.labels.tolist()}
        for s in samples
    ]
    batch = collator(features)
    labels = batch.pop("labels")  # [B, S]
    labels[:, 0] = IGNORE_INDEX
    if not real:  # where padding is trained, that of an empty share is not
        labels[:] = IGNORE_INDEX
    if takes_token_type_ids:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    trained_at, targets = _trained(labels)
    return Batch(
        inputs=dict(batch),
        labels=labels,
        trained_at=trained_at,
        targets=targets,
        num_trained=len(targets),
        num_tokens=sum(len(s) for s in real),
        places=tuple(s.place for s in real),
    )


def _documents(sample: Sample) -> list[Sample]:
    if not sample.documents:
        return [sample]
    borders = np.cumsum(sample.documents)[:-1]
    parts = zip(np.split(sample.input_ids, borders), np.split(sample.labels, borders), strict=True)
    return [Sample(ids, labels, sample.place) for ids, labels in parts]


def make_collate(
    tokenizer: PreTrainedTokenizerBase,
    *,
    padding_free: bool,
    ignore_pad_token_for_loss: bool = True,
    takes_token_type_ids: bool = False,
) -> Collate:
    """The collate function for a model's path. Training on padding exists only where there is padding."""
    if padding_free and ignore_pad_token_for_loss:
        return collate
    label_pad: Any = IGNORE_INDEX if ignore_pad_token_for_loss else tokenizer.pad_token_id
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, label_pad_token_id=label_pad)
    return partial(collate_padded, collator=collator, takes_token_type_ids=takes_token_type_ids)


def _trained(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """labels [B, S] → (flat positions whose next token is trained [M], those tokens [M])."""
    nexts = torch.full_like(labels, IGNORE_INDEX)
    nexts[:, :-1] = labels[:, 1:]
    nexts = nexts.flatten()
    trained_at = (nexts != IGNORE_INDEX).nonzero()[:, 0]
    return trained_at, nexts[trained_at]
