"""Floors: what a model that was trained must beat. Popularity, and first-order Markov transitions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._histories import at_last, check_histories
from ._ranking import DenseRecommender

IntArray = NDArray[np.integer[Any]]


class HistoryRows(Protocol):
    """One array of item ids a user: a list of them, or :class:`seqrec_fast.data.Histories`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[IntArray]: ...


# Added to every item's count: an item that was never bought keeps a finite score (and its place by id among its like).
UNSEEN_COUNT = 0.1


def _joined(histories: HistoryRows, num_items: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All histories behind one another, [n], and where each begins, [users + 1].

    Raises:
        TypeError: a history that holds something else than whole numbers.
        ValueError: no history, or one that is not one-dimensional.
        IndexError: an id outside 0…I−1; the message names the user.
    """
    if len(histories) == 0:
        raise ValueError("histories must hold at least one user, got none")
    arrays = [np.asarray(history) for history in histories]
    for user, array in enumerate(arrays):
        if array.ndim != 1:
            raise ValueError(f"histories[{user}] must be one-dimensional, got shape {array.shape}")
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"histories[{user}] must hold whole numbers, got {array.dtype}")
    starts = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)
    items = np.concatenate(arrays).astype(np.int64)
    wrong = np.flatnonzero((items < 0) | (items >= num_items))
    if len(wrong):
        user = int(np.searchsorted(starts, wrong[0], side="right")) - 1
        raise IndexError(f"histories[{user}] holds {items[wrong[0]]}, but the items are 0…{num_items - 1}")
    return items, starts


def _log_popularity(items: NDArray[np.int64], num_items: int) -> Tensor:
    counts = np.bincount(items, minlength=num_items) + UNSEEN_COUNT
    return torch.from_numpy(np.log(counts / counts.sum())).float()


class Popularity(DenseRecommender):
    """Every history is followed by the items that are frequent in all histories.

    Example:
        >>> import numpy as np, torch
        >>> model = Popularity(4).fit([np.array([0, 1]), np.array([1, 2, 1])])
        >>> model.recommend(torch.tensor([[1]]), k=2).items
        tensor([[0, 2]])
    """

    log_popularity: Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self._num_items = num_items
        self.register_buffer("log_popularity", torch.full((num_items,), -math.log(num_items)))

    @property
    def num_items(self) -> int:
        return self._num_items

    def fit(self, histories: HistoryRows) -> Popularity:
        """Count the items of all histories (one array of ids a user); returns the model.

        Raises:
            TypeError, ValueError, IndexError: for histories that are not arrays of ids 0…I−1.
        """
        items, _ = _joined(histories, self.num_items)
        self.log_popularity = _log_popularity(items, self.num_items).to(self.log_popularity.device)
        return self

    def logits(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """log P(item), the same for every history: [B, I]."""
        check_histories(ids, lengths, self.num_items)
        return self.log_popularity.expand(len(ids), -1)

    def config_dict(self) -> dict[str, Any]:
        return {"num_items": self.num_items}

    @classmethod
    def from_config_dict(cls, config: Mapping[str, Any]) -> Popularity:
        return cls(config["num_items"])


class Markov(DenseRecommender):
    """First-order transitions with a popularity back-off: P(j | i) = (n_ij + β·P(j)) / (n_i + β).

    i is the last item of the history, n_ij counts how often j came right after i, and P(j) is j's popularity. β is worth that
    many transitions (Dirichlet prior; MacKay & Peto 1995). An empty history gives P(j). Counts are kept sparse (CSR): fitting
    costs O(n log n) for n interactions.

    Args:
        num_items: I.
        backoff: β, above 0.

    Example:
        >>> import numpy as np, torch
        >>> model = Markov(4).fit([np.array([0, 1, 2]), np.array([3, 1, 2, 0])])
        >>> model.recommend(torch.tensor([[3, 1]]), k=1).items
        tensor([[2]])
    """

    log_popularity: Tensor
    row_starts: Tensor
    columns: Tensor
    counts: Tensor

    def __init__(self, num_items: int, backoff: float = 1.0, *, num_transitions: int = 0) -> None:
        super().__init__()
        if not backoff > 0:
            raise ValueError(f"backoff must be above 0, got {backoff}")
        self._num_items = num_items
        self.backoff = backoff
        self.register_buffer("log_popularity", torch.full((num_items,), -math.log(num_items)))
        self.register_buffer("row_starts", torch.zeros(num_items + 1, dtype=torch.int64))  # CSR, [I + 1]
        self.register_buffer("columns", torch.zeros(num_transitions, dtype=torch.int64))  # [nnz]
        self.register_buffer("counts", torch.zeros(num_transitions))  # [nnz]

    @property
    def num_items(self) -> int:
        return self._num_items

    def fit(self, histories: HistoryRows) -> Markov:
        """Count the transitions of all histories (one array of ids a user); returns the model.

        Raises:
            TypeError, ValueError, IndexError: for histories that are not arrays of ids 0…I−1.
        """
        items, starts = _joined(histories, self.num_items)
        follows = np.ones(max(0, len(items) - 1), dtype=bool)
        inner = starts[1:-1]
        follows[inner[(inner > 0) & (inner < len(items))] - 1] = False  # not from one user to the next
        pairs = (items[:-1] * self.num_items + items[1:])[follows]
        found, counts = np.unique(pairs, return_counts=True)
        rows = np.searchsorted(found, np.arange(self.num_items + 1) * self.num_items)
        device = self.row_starts.device
        self.log_popularity = _log_popularity(items, self.num_items).to(device)
        self.row_starts = torch.from_numpy(rows.astype(np.int64)).to(device)
        self.columns = torch.from_numpy(found % self.num_items).to(device)
        self.counts = torch.from_numpy(counts).float().to(device)
        return self

    def logits(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """log P(item | last item): [B, I]."""
        histories = check_histories(ids, lengths, self.num_items)
        last = at_last(histories.ids, histories.lengths).long()  # [B]
        begin = self.row_starts[last]
        number = torch.where(histories.lengths > 0, self.row_starts[last + 1] - begin, 0)  # [B] stored transitions
        row = torch.repeat_interleave(torch.arange(len(last), device=last.device), number)  # [nnz of the batch]
        place = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row] + begin[row]
        column, count = self.columns[place], self.counts[place]
        total = self.backoff + count.new_zeros(len(last)).index_add(0, row, count)  # n_i + β, [B]
        # without a stored transition only the prior is left, so the logarithm is taken of I numbers, not of B·I
        prior = self.log_popularity + math.log(self.backoff)  # [I]
        stored = torch.log(count + prior.exp()[column]) - total.log()[row]
        return (prior - total.log()[:, None]).index_put((row, column), stored)  # [B, I]

    def config_dict(self) -> dict[str, Any]:
        return {
            "num_items": self.num_items,
            "backoff": self.backoff,
            "num_transitions": len(self.columns),
        }

    @classmethod
    def from_config_dict(cls, config: Mapping[str, Any]) -> Markov:
        return cls(config["num_items"], config["backoff"], num_transitions=config["num_transitions"])
