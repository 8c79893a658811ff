"""A loader whose place in the epoch can be saved, and which several processes share batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class BatchLoader(Protocol):
    """What training needs of a loader: it can be iterated again and again, and knows its number of batches."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


def set_epoch(loader: object, epoch: int) -> None:
    """Tell the loader, or whichever of its samplers listens, the number of the epoch (it seeds the shuffling)."""
    for part in (loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)):
        listener = getattr(part, "set_epoch", None)
        if callable(listener):
            listener(epoch)


class SharedLoader:
    """Every ``world_size``-th batch of a loader, from ``rank`` on; for training, resumable inside an epoch.

    Whole batches are dealt out, so that ragged batches stay as they were bucketed. In training every process must
    take the same number of steps: the last batches that do not go round are left out. In evaluation all are kept,
    and every user counts exactly once.

    Args:
        loader: what to share.
        rank: this process.
        world_size: number of processes.
        even: leave out the batches that do not go round.
        epoch: gives the number of the running epoch, which seeds the shuffling; None: the loader counts for itself.
    """

    def __init__(
        self,
        loader: BatchLoader,
        rank: int = 0,
        world_size: int = 1,
        *,
        even: bool,
        epoch: Callable[[], int] | None = None,
    ) -> None:
        self.loader = loader
        self.rank = rank
        self.world_size = world_size
        self.even = even
        self.epoch = epoch
        self._given = 0
        self._skip = 0

    def __len__(self) -> int:
        batches = len(self.loader)
        return batches // self.world_size if self.even else len(range(self.rank, batches, self.world_size))

    def __iter__(self) -> Iterator[Any]:
        # a generator: nothing below runs before the first batch is asked for, when the epoch's number is known
        skip, self._skip = self._skip, 0
        self._given = skip
        if self.epoch is not None:
            set_epoch(self.loader, self.epoch())
        batches = _iterator(self.loader)
        for batch in islice(islice(batches, self.rank, None, self.world_size), skip, len(self)):
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the running epoch were handed out; 0 at its end."""
        return {"batches": self._given if self._given < len(self) else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration start after the batches that ``state`` counts."""
        self._skip = state["batches"]


def _iterator(loader: BatchLoader) -> Iterator[Any]:
    """``iter(loader)`` without moving the random generator.

    A DataLoader draws a seed for its workers from torch's generator whenever it is iterated. A resumed run iterates
    once more than one that was not interrupted, and would then draw other dropout masks.
    """
    state = torch.get_rng_state()
    try:
        return iter(loader)
    finally:
        torch.set_rng_state(state)
