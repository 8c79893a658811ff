"""Chronological leave-one-out: the last item of a user is the test target, the one before it the validation target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from .interactions import DataError, Histories, Int64Array, Interactions, offsets_of, slices_of

# One target for the test, one for the validation, and at least one item to predict from.
MIN_INTERACTIONS = 3


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """What a model is asked: given ``histories[r]``, where in the whole catalogue does it rank ``target[r]``?

    Args:
        users: int64 ``[R]``, the user number of each row.
        histories: ``[R]`` rows, everything the user did before the target.
        target: int64 ``[R]``, the held-out item.
    """

    users: Int64Array
    histories: Histories
    target: Int64Array

    @cached_property
    def seen(self) -> Histories:
        """The distinct items of each history without the row's target, ascending: what a seen filter leaves out."""
        rows, items = self.histories.rows, self.histories.items
        keep = items != self.target[rows]
        order = np.lexsort((items[keep], rows[keep]))
        rows, items = rows[keep][order], items[keep][order]
        first = np.ones(len(items), dtype=bool)
        first[1:] = (rows[1:] != rows[:-1]) | (items[1:] != items[:-1])
        lengths = np.bincount(rows[first], minlength=len(self.histories)).astype(np.int64)
        return Histories(items[first], offsets_of(lengths))

    def __len__(self) -> int:
        return len(self.users)

    def __repr__(self) -> str:
        return f"EvaluationSet({len(self):,} users)"


@dataclass(frozen=True, eq=False)
class Split:
    """A leave-one-out split.

    Args:
        train: one row per user of ``data``: what a model may learn from.
        validation: rows for users with enough interactions; the history is the training part.
        test: the same users; the history is the training part and the validation target.
        num_items: size of the catalogue (items that only occur as targets included).
        num_short_users: users with fewer than 3 interactions, who are in no evaluation set.
        source: the data's name and sha256, for reports.
    """

    train: Histories
    validation: EvaluationSet
    test: EvaluationSet
    num_items: int
    num_short_users: int
    source: str

    @property
    def num_users(self) -> int:
        return len(self.train)

    def evaluation(self, which: str) -> EvaluationSet:
        """``validation`` or ``test`` by name; ValueError otherwise."""
        if which == "validation":
            return self.validation
        if which == "test":
            return self.test
        raise ValueError(f'which must be "validation" or "test", got {which!r}')

    def summary(self) -> str:
        """One line for people."""
        short = f", {self.num_short_users:,} short users in training only" if self.num_short_users else ""
        return (
            f"{self.source}: {len(self.train.items):,} training interactions, {len(self.test):,} users evaluated "
            f"over {self.num_items:,} items{short}"
        )

    def __repr__(self) -> str:
        return f"Split({self.summary()})"


def leave_one_out(data: Interactions, *, short_users: Literal["train", "drop", "error"] = "train") -> Split:
    """Split every history chronologically: … → train, last but one → validation target, last → test target.

    A user with fewer than 3 interactions cannot give two targets and something to predict them from. Such a user
    stays in training with the whole history and is not evaluated (as in SASRec, Kang and McAuley 2018).

    Args:
        data: the interactions.
        short_users: "train" (above); "drop" empties their training rows; "error" refuses them.

    Returns:
        A ``Split``; rows of ``train`` keep the user numbers of ``data``.

    Raises:
        ValueError: ``short_users`` is none of the three, is "error" and there are such users, or nobody has 3
            interactions.

    Complexity: O(N) time and memory for N interactions.

    Example:
        >>> data = Interactions.from_arrays(users=[1, 1, 1, 1, 2], items=[5, 6, 7, 8, 5])
        >>> split = leave_one_out(data)
        >>> [row.tolist() for row in split.train], split.test.target.tolist(), split.test.histories[0].tolist()
        ([[0, 1], [0]], [3], [0, 1, 2])
    """
    if short_users not in ("train", "drop", "error"):
        raise ValueError(f'short_users must be "train", "drop" or "error", got {short_users!r}')
    histories = data.histories
    long = histories.lengths >= MIN_INTERACTIONS
    num_short = int((~long).sum())
    if num_short == len(histories):
        raise DataError(
            f"{data.source}: no user has {MIN_INTERACTIONS} interactions (the longest history has "
            f"{int(histories.lengths.max(initial=0))}), so there is nothing to hold out"
        )
    if num_short and short_users == "error":
        user = int(np.argmin(long))
        raise DataError(
            f"{data.source}: user {data.user_ids[user : user + 1].tolist()[0]!r} has {histories.lengths[user]} interaction"
            f"{'s' if histories.lengths[user] != 1 else ''}, leave-one-out needs {MIN_INTERACTIONS} "
            f"({num_short} such user{'s' if num_short != 1 else ''})"
        )
    kept = 0 if short_users == "drop" else histories.lengths
    train = _heads(histories, np.arange(len(histories)), np.where(long, histories.lengths - 2, kept))
    users = np.flatnonzero(long)
    return Split(
        train=train,
        validation=_evaluation(histories, users, 2),
        test=_evaluation(histories, users, 1),
        num_items=data.num_items,
        num_short_users=num_short,
        source=f"{data.source} (sha256 {data.sha256[:12]})",
    )


def _evaluation(histories: Histories, users: Int64Array, from_end: int) -> EvaluationSet:
    target = histories.items[histories.offsets[users + 1] - from_end]
    return EvaluationSet(users, _heads(histories, users, histories.lengths[users] - from_end), target)


def _heads(histories: Histories, rows: Int64Array, lengths: Int64Array) -> Histories:
    """The first ``lengths[r]`` items of each given row."""
    return Histories(histories.items[slices_of(histories.offsets[rows], lengths)], offsets_of(lengths))
