"""Ranking quality over the full catalogue: HR@k, NDCG@k and MRR@k from the target's place.

One 0-based place in the full ranking, as :func:`seqrec_fast.catalogue_rank` gives it, holds everything: with one relevant
item a row, and r its place,

    HR@k = [r < k]        NDCG@k = [r < k] / log2(r + 2)        MRR@k = [r < k] / (r + 1)

(Järvelin & Kekäläinen 2002 for the discount; the ideal DCG of one relevant item is 1.) Nothing is sampled, and ties are
broken by id as in :func:`seqrec_fast.catalogue_topk`, so a model that scores every item alike gains nothing by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = ("HR", "NDCG", "MRR")


@dataclass(frozen=True)
class Quality(Mapping[str, float]):
    """Mean metrics of one evaluation, with what is needed to compare them: users, items, seen filter.

    Behaves as a mapping ``{"HR@10": …, "NDCG@10": …, "MRR@10": …}``.
    """

    values_by_name: dict[str, float]
    num_users: int
    num_items: int
    seen_filter: bool

    def __getitem__(self, name: str) -> float:
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    @property
    def protocol(self) -> str:
        """How the numbers were taken, in words to print beside them."""
        filtered = "seen items filtered" if self.seen_filter else "seen items not filtered"
        return f"full ranking over {self.num_items:,} items, {filtered}, {self.num_users:,} users"

    def __str__(self) -> str:
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in self.values_by_name.items())
        return f"{numbers}  ({self.protocol})"


class RankMetrics:
    """Gathers ranks batch by batch; the sums are fp64, so the result does not depend on the batches.

    Args:
        num_items: size of the catalogue that was ranked.
        ks: the cut-offs, each ≥ 1.
        seen_filter: whether the ranks were taken with the items of the history left out.

    Raises:
        ValueError: for a cut-off below 1, or none.

    Example:
        >>> metrics = RankMetrics(num_items=100, ks=(1, 10), seen_filter=True)
        >>> metrics.update(torch.tensor([0, 2, 50, -1]))    # −1: a row without a target
        >>> quality = metrics.compute()
        >>> round(quality["HR@10"], 4), quality["NDCG@10"], round(quality["MRR@10"], 4)
        (0.6667, 0.5, 0.4444)
        >>> quality.protocol
        'full ranking over 100 items, seen items filtered, 3 users'
    """

    def __init__(self, num_items: int, ks: Sequence[int] = (10,), *, seen_filter: bool) -> None:
        if not ks or any(k < 1 for k in ks):
            raise ValueError(f"ks must hold cut-offs of at least 1, got {tuple(ks)}")
        self.num_items = num_items
        self.ks = tuple(ks)
        self.seen_filter = seen_filter
        self.reset()

    def reset(self) -> None:
        """Forget every rank."""
        # users, then HR, NDCG and MRR for each k: one vector, so that processes can add theirs up in one reduction
        self.sums = torch.zeros(1 + len(METRICS) * len(self.ks), dtype=torch.float64)

    def update(self, ranks: Tensor) -> None:
        """Add ranks of any shape; a negative rank is a row without a target and is left out.

        Raises:
            TypeError: when ``ranks`` are not integers.
        """
        if ranks.is_floating_point() or ranks.dtype == torch.bool:
            raise TypeError(f"ranks must be integers, got {ranks.dtype}")
        place = ranks.detach().reshape(-1).to("cpu", torch.float64)  # [R]
        place = place[place >= 0]
        discount, reciprocal = 1.0 / torch.log2(place + 2.0), 1.0 / (place + 1.0)
        parts = [torch.tensor([float(place.numel())], dtype=torch.float64)]
        for k in self.ks:
            hit = (place < k).double()
            parts.append(torch.stack([hit.sum(), (hit * discount).sum(), (hit * reciprocal).sum()]))
        self.sums += torch.cat(parts)

    def compute(self) -> Quality:
        """The means over all rows so far; NaN when there were none."""
        users = self.sums[0]
        means = (self.sums[1:] / users).tolist() if users > 0 else [float("nan")] * (len(METRICS) * len(self.ks))
        names = [f"{metric}@{k}" for k in self.ks for metric in METRICS]
        return Quality(dict(zip(names, means, strict=True)), int(users), self.num_items, self.seen_filter)


def rank_from_scores(scores: Tensor, target: Tensor, exclude: Tensor | None = None) -> Tensor:
    """The target's place among explicit scores, in the order of :func:`seqrec_fast.catalogue_rank`.

    For models that are not a product of a query with a table (popularity, Markov chains, blends). It reads a whole
    [B, I] array, O(B·I).

    Args:
        scores: [B, I] floating point. NaN and −∞ never rank.
        target: [B] int64, −100 for a row without a target.
        exclude: [B, n] integers padded with −1: items that take no place. The target itself always does.

    Returns:
        int64 [B]: number of items before the target, −1 for rows without one.

    Raises:
        ValueError: when the shapes do not fit.
        IndexError: when a target is outside the catalogue.

    Example:
        >>> scores = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
        >>> rank_from_scores(scores, torch.tensor([3]))                             # item 2 ties and has the smaller id
        tensor([2])
        >>> rank_from_scores(scores, torch.tensor([3]), torch.tensor([[0, -1]]))    # item 0 was seen
        tensor([1])
    """
    if scores.dim() != 2 or target.shape != scores.shape[:1]:
        raise ValueError(f"scores must be [B, I] and target [B], got {tuple(scores.shape)} and {tuple(target.shape)}")
    num_items = scores.shape[1]
    ignored = target == -100
    position = target.masked_fill(ignored, 0)
    if bool(((position < 0) | (position >= num_items)).any()):
        raise IndexError(f"target must lie in 0…{num_items - 1} (or be −100), got {target.tolist()}")
    if num_items == 0:
        return torch.full_like(target, -1)
    own = scores.gather(1, position[:, None])  # [B, 1]
    ranked = scores > float("-inf")  # false for NaN and −∞  [B, I]
    if exclude is not None:
        # one column more than there are items takes the padding, and is cut off again
        seen = torch.zeros(scores.shape[0], num_items + 1, dtype=torch.bool, device=scores.device)
        column = torch.where(exclude < 0, num_items, exclude.long())
        ranked &= ~seen.scatter_(1, column, True)[:, :num_items]
    earlier = torch.arange(num_items, device=scores.device) < position[:, None]  # smaller id  [B, I]
    unranked_target = ~(own > float("-inf"))  # it comes after everything that ranks
    before = ranked & ((scores > own) | ((scores == own) & earlier) | unranked_target)
    before.scatter_(1, position[:, None], False)
    return before.sum(1).masked_fill(ignored, -1)
