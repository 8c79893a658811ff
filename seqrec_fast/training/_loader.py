"""A loader whose place in the epoch can be saved, and which several processes share batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable


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
    """

    def __init__(self, loader: BatchLoader, rank: int = 0, world_size: int = 1, *, even: bool) -> None:
        self.loader = loader
        self.rank = rank
        self.world_size = world_size
        self.even = even
        self.epoch = 0
        self._given = 0
        self._skip = 0

    @property
    def sampler(self) -> SharedLoader:
        """The object whose ``set_epoch`` Lightning calls at the start of each epoch: this one."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        batches = len(self.loader)
        return batches // self.world_size if self.even else len(range(self.rank, batches, self.world_size))

    def __iter__(self) -> Iterator[Any]:
        # a generator: nothing below runs before the first batch is asked for, by which time set_epoch has been called
        skip, self._skip = self._skip, 0
        self._given = skip
        set_epoch(self.loader, self.epoch)
        mine = islice(self.loader, self.rank, None, self.world_size)
        for batch in islice(mine, skip, len(self)):
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the running epoch were handed out; 0 at its end."""
        return {"batches": self._given if self._given < len(self) else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration start after the batches that ``state`` counts."""
        self._skip = state["batches"]


