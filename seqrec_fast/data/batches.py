"""Length-bucketed ragged batches for ``torch.utils.data.DataLoader`` (and so for Lightning).

A whole batch is built by one vectorised gather, so a loader "sample" is a batch: the sampler yields lists of row
numbers and the dataset turns such a list into tensors. No worker process is needed to keep a model busy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .interactions import Histories, Int64Array, slices_of
from .split import EvaluationSet, Split

IGNORE_INDEX = -100  # what torch's and this package's cross-entropy leave out
NO_ITEM = -1  # padding of `exclude`


class Batch(NamedTuple):
    """One training batch.

    ids: int64 ``[B, T]``, the items so far, oldest first, padded on the right with 0 (which is also an item: use
        ``lengths``). lengths: int64 ``[B]``, 1…T. target: int64 ``[B, T]``, the next item after each position,
        −100 on padding.
    """

    ids: Tensor
    lengths: Tensor
    target: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class EvaluationBatch(NamedTuple):
    """One evaluation batch.

    ids: int64 ``[B, T]``, lengths: int64 ``[B]`` as in ``Batch``. target: int64 ``[B]``. exclude: int64 ``[B, n]``,
    the items seen before and not the target, padded with −1; None without a seen filter. users: int64 ``[B]``.
    """

    ids: Tensor
    lengths: Tensor
    target: Tensor
    exclude: Tensor | None
    users: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EvaluationBatch:
        """The same batch on a device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        exclude = None if self.exclude is None else moved(self.exclude)
        return EvaluationBatch(moved(self.ids), moved(self.lengths), moved(self.target), exclude, moved(self.users))


class TrainingSequences(Dataset[Batch]):
    """Next-item training sequences; indexed by a list of sequence numbers, gives their ``Batch``.

    Args:
        histories: training rows; rows of fewer than 2 items have nothing to predict and give no sequence.
        max_length: the longest input; only the newest items are kept (see ``windows``).
        windows: "last": one sequence per row, its newest ``max_length`` steps. "all": a longer row is cut, from its
            end backwards, into as many sequences as it takes, so that every step is a target once.

    Raises:
        ValueError: max_length < 1, an unknown ``windows``, or no row with 2 items.
    """

    def __init__(self, histories: Histories, max_length: int = 200, windows: Literal["last", "all"] = "last") -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if windows not in ("last", "all"):
            raise ValueError(f'windows must be "last" or "all", got {windows!r}')
        self.items = histories.items
        steps = np.maximum(histories.lengths - 1, 0)  # targets in each row
        last = histories.offsets[1:] - 1  # input positions end before the last item
        counts = np.minimum(-(-steps // max_length), 1 if windows == "last" else steps)
        if counts.sum() == 0:
            raise ValueError("no training history has 2 items, so there is no next item to learn")
        window = slices_of(np.zeros_like(counts), counts)  # 0 = the newest window of its row
        stop = np.repeat(last, counts) - window * max_length
        self.starts: Int64Array = np.maximum(stop - max_length, np.repeat(histories.offsets[:-1], counts))
        self.lengths: Int64Array = stop - self.starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        index = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        starts, lengths = self.starts[index], self.lengths[index]
        flat = slices_of(starts, lengths)
        ids = _padded(self.items[flat], lengths, 0)
        target = _padded(self.items[flat + 1], lengths, IGNORE_INDEX)
        return Batch(ids, torch.from_numpy(lengths), target)


class EvaluationSequences(Dataset[EvaluationBatch]):
    """Evaluation rows; indexed by a list of row numbers, gives their ``EvaluationBatch``."""

    def __init__(self, rows: EvaluationSet, max_length: int = 200, exclude_seen: bool = True) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.rows = rows
        self.lengths: Int64Array = np.minimum(rows.histories.lengths, max_length)
        self.seen = rows.seen if exclude_seen else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Sequence[int]) -> EvaluationBatch:
        index = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        histories, lengths = self.rows.histories, self.lengths[index]
        ids = _padded(histories.items[slices_of(histories.offsets[index + 1] - lengths, lengths)], lengths, 0)
        exclude = None
        if self.seen is not None:
            counts = self.seen.lengths[index]
            exclude = _padded(self.seen.items[slices_of(self.seen.offsets[index], counts)], counts, NO_ITEM)
        target = torch.from_numpy(self.rows.target[index])
        return EvaluationBatch(
            ids, torch.from_numpy(lengths), target, exclude, torch.from_numpy(self.rows.users[index])
        )


class BucketSampler(Sampler[list[int]]):
    """Batches of rows of similar length, in an order that follows from (seed, epoch) alone.

    Every epoch the rows are permuted, cut into pools of ``pool`` batches, sorted by length inside each pool, cut into
    batches, and the batches permuted. Rows of equal length meet in new company each epoch, and padding is small.

    Each pass moves on to the next epoch; ``set_epoch`` (which Lightning calls) sets it.

    Args:
        lengths: int64 ``[R]``.
        batch_size: rows per batch; the last one may be smaller.
        seed: of the order.
        shuffle: False gives the rows sorted by length, longest first, the same in every epoch.
        pool: batches sorted together; 1 is a plain shuffle.

    Example:
        >>> import numpy as np
        >>> sampler = BucketSampler(np.array([3, 1, 2]), batch_size=2, shuffle=False)
        >>> list(sampler), len(sampler)
        ([[0, 2], [1]], 2)
    """

    def __init__(
        self, lengths: Int64Array, batch_size: int, *, seed: int = 0, shuffle: bool = True, pool: int = 16
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if pool < 1:
            raise ValueError(f"pool must be at least 1, got {pool}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.pool = pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next pass is in the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: the epoch moves on when the first batch is taken. A DataLoader with workers makes two iterators
        # an epoch and uses one.
        epoch, self.epoch = self.epoch, self.epoch + 1
        if not self.shuffle:
            yield from self._cut(np.argsort(-self.lengths, kind="stable"))
            return
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))
        pool = np.arange(len(order)) // (self.batch_size * self.pool)
        batches = self._cut(order[np.lexsort((self.lengths[order], pool))])
        for number in random.permutation(len(batches)):
            yield batches[number]

    def _cut(self, order: Int64Array) -> list[list[int]]:
        return [order[start : start + self.batch_size].tolist() for start in range(0, len(order), self.batch_size)]


def train_loader(
    split: Split | Histories,
    *,
    batch_size: int = 128,
    max_length: int = 200,
    seed: int = 0,
    num_workers: int = 0,
    windows: Literal["last", "all"] = "last",
    pool: int = 16,
) -> DataLoader[Batch]:
    """A loader of ``Batch`` over the training histories, shuffled reproducibly by (seed, epoch).

    Args:
        split: a ``Split``, or training ``Histories``.
        batch_size: sequences per batch.
        max_length: longest input; the newest items of a longer history are kept.
        seed: of the order; two loaders of one seed give the same batches.
        num_workers: as in DataLoader; 0 is usually fastest, a batch takes well under a millisecond.
        windows: see ``TrainingSequences``.
        pool: see ``BucketSampler``.

    Returns:
        A DataLoader; ``len()`` is the number of batches. Its sampler advances one epoch each time it is iterated.

    Raises:
        ValueError: an argument out of range, or nothing to learn.
    """
    sequences = TrainingSequences(split.train if isinstance(split, Split) else split, max_length, windows)
    sampler = BucketSampler(sequences.lengths, batch_size, seed=seed, pool=pool)
    return DataLoader(sequences, batch_size=None, sampler=sampler, num_workers=num_workers)


def evaluation_loader(
    split: Split | EvaluationSet,
    which: Literal["validation", "test"] = "validation",
    *,
    batch_size: int = 256,
    max_length: int = 200,
    exclude_seen: bool = True,
    num_workers: int = 0,
) -> DataLoader[EvaluationBatch]:
    """A loader of ``EvaluationBatch``: every row once, longest histories first (``users`` says whose they are).

    Args:
        split: a ``Split``, or an ``EvaluationSet`` (then ``which`` is not used).
        which: "validation" or "test".
        batch_size: rows per batch.
        max_length: longest input; ``exclude`` always covers the whole history.
        exclude_seen: False gives ``exclude=None``.
        num_workers: as in DataLoader.

    Raises:
        ValueError: an argument out of range.
    """
    rows = split.evaluation(which) if isinstance(split, Split) else split
    sequences = EvaluationSequences(rows, max_length, exclude_seen)
    sampler = BucketSampler(sequences.lengths, batch_size, shuffle=False)
    return DataLoader(sequences, batch_size=None, sampler=sampler, num_workers=num_workers)


def _padded(values: Int64Array, lengths: Int64Array, fill: int) -> Tensor:
    """Rows laid end to end ``[lengths.sum()]`` → ``[B, longest]``, padded on the right."""
    width = int(lengths.max(initial=0))
    padded = np.full((len(lengths), width), fill, dtype=np.int64)
    padded[np.arange(width) < lengths[:, None]] = values
    return torch.from_numpy(padded)
