"""Ranking for models that can only give all their scores: in chunks of users, in the order of the catalogue operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ._checkpoint import SavedModule
from ._histories import IGNORE, check_histories, check_ids, items_to_hide

# 4 MiB of fp32 scores: what is done with them stays in the cache (54,542 items, one thread: twice as fast as 64 MiB)
SCORES_AT_ONCE = 1 << 20


class Recommendations(NamedTuple):
    """The best items per user, best first: ``items`` [B, k] int64 and ``scores`` [B, k].

    Where fewer than k items are left: item −1, score −∞.
    """

    items: Tensor
    scores: Tensor


@runtime_checkable
class LogitModel(Protocol):
    """What :class:`Blend` takes: a model that scores the whole catalogue."""

    def logits(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores of every item after each history: [B, T] ids, [B] lengths → [B, I]."""
        ...


class evaluating:
    """Put a module in evaluation mode for a block, and every part of it back as it was afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.training = [part for part in module.modules() if part.training]
        self.module = module

    def __enter__(self) -> None:
        if self.training:
            self.module.eval()

    def __exit__(self, *_: object) -> None:
        for part in self.training:
            part.training = True


def hide(scores: Tensor, exclude: Tensor) -> Tensor:
    """−∞ at the excluded pairs, and where a score is NaN: neither has a place in a ranking.

    Args:
        scores: [B, I].
        exclude: [B, n] item ids, padded with −1; duplicates count once.
    """
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    row, place = (exclude >= 0).nonzero(as_tuple=True)
    scores[row, exclude[row, place].long()] = -torch.inf
    return scores


def _order_key(scores: Tensor) -> Tensor:
    """int64 keys [B, I], unique in a row, that sort like (score descending, id ascending)."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0 turns −0 into +0
    # two's complement orders the bits of positive floats; those of negative ones are mirrored
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(scores.shape[1], device=scores.device)
    return (ordered << 32) | (0xFFFFFFFF - ids)


def top_k(scores: Tensor, k: int) -> Recommendations:
    """The k best of [B, I] scores (fp32 order, ties by smaller id), padded when fewer are not −∞."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    num_items = scores.shape[1]
    keys = _order_key(scores).topk(min(k, num_items), sorted=True).values
    items = 0xFFFFFFFF - (keys & 0xFFFFFFFF)  # [B, min(k, I)]
    values = scores.gather(1, items)
    items = items.masked_fill(values == -torch.inf, -1)
    missing = k - items.shape[1]
    if missing > 0:
        items = torch.nn.functional.pad(items, (0, missing), value=-1)
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    return Recommendations(items, values)


def rank_of(scores: Tensor, target: Tensor, exclude: Tensor) -> Tensor:
    """Places [B] of the targets among [B, I] scores, 0-based, in the order of :func:`top_k`.

    Args:
        scores: [B, I]; −∞ and NaN have no place.
        target: [B] int64; it is never excluded. One whose score is −∞ or NaN comes after every ranked item.
        exclude: [B, n] item ids, padded with −1; duplicates count once.
    """
    scores, target = scores.float(), target[:, None]
    threshold = scores.gather(1, target)  # [B, 1]
    # a target without a place: every ranked item is above −∞, and none is level with it
    nowhere = ~(threshold > -torch.inf)
    above = threshold.masked_fill(nowhere, -torch.inf)
    level = threshold.masked_fill(nowhere, torch.nan)

    def before(values: Tensor, ids: Tensor) -> Tensor:
        return (values > above).logical_or_((values == level).logical_and_(ids < target))

    place = before(scores, torch.arange(scores.shape[1], device=scores.device)).sum(1)
    # no copy of the scores is needed to leave items out: count the excluded ones that came before, each once
    exclude = exclude.long().sort(1).values
    first = torch.ones_like(exclude, dtype=torch.bool)
    first[:, 1:] = exclude[:, 1:] != exclude[:, :-1]
    counted = first & (exclude >= 0) & (exclude != target)
    gone = before(scores.gather(1, exclude.clamp(min=0)), exclude) & counted
    return place - gone.sum(1)


class DenseRecommender(SavedModule):
    """Recommendation and ranking on top of :meth:`logits`, for models whose scores are no inner product.

    Users go through in chunks, so that never more than 2²⁰ scores (and their sort keys) are held; O(B·I).
    """

    @property
    def num_items(self) -> int:
        """Items in the catalogue, I."""
        raise NotImplementedError(f"{type(self).__name__} does not say how many items it scores")

    def logits(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores of every item after each history: [B, T] ids, [B] lengths → [B, I]."""
        raise NotImplementedError(f"{type(self).__name__} gives no scores")

    @torch.no_grad()
    def recommend(
        self,
        ids: Tensor,
        lengths: Tensor | None = None,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        exclude: Tensor | None = None,
    ) -> Recommendations:
        """The k best items after each history, best first.

        Args:
            ids: [B, T] item ids.
            lengths: [B]; None: every history is T long.
            k: how many, at least 1.
            exclude_seen: leave out the items of the history.
            exclude: more items to leave out, [B, n] padded with −1.

        Raises:
            TypeError, ValueError, IndexError: for histories as in :meth:`SequenceRecommender.forward`, k < 1, or an
                ``exclude`` that is not [B, n] of ids and −1.
        """
        chunks = [
            top_k(hide(scores, hidden), k) for _, scores, hidden in self._chunks(ids, lengths, exclude_seen, exclude)
        ]
        return Recommendations(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))

    @torch.no_grad()
    def rank(
        self,
        ids: Tensor,
        lengths: Tensor | None,
        target: Tensor,
        *,
        exclude_seen: bool = True,
        exclude: Tensor | None = None,
    ) -> Tensor:
        """The target's 0-based place in the full ranking, as :func:`seqrec_fast.catalogue_rank`: int64 [B].

        ``target`` [B] int64; −100 gives −1.
        """
        if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != ids.shape[:1]:
            raise ValueError(f"target must be an int64 tensor of shape [B] = {tuple(ids.shape[:1])}")
        check_ids("target", target, target != IGNORE, self.num_items)
        chunks = []
        for rows, scores, hidden in self._chunks(ids, lengths, exclude_seen, exclude):
            place = rank_of(scores, target[rows].clamp(min=0), hidden)
            chunks.append(place.masked_fill(target[rows] == IGNORE, -1))
        return torch.cat(chunks)

    def _rows(self, batch: int) -> list[slice]:
        step = max(1, SCORES_AT_ONCE // max(1, self.num_items))
        return [slice(start, min(start + step, batch)) for start in range(0, batch, step)] or [slice(0, 0)]

    def _chunks(
        self, ids: Tensor, lengths: Tensor | None, exclude_seen: bool, exclude: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Per chunk of users: which they are, their scores [b, I], and the items that must not be ranked [b, n]."""
        histories = check_histories(ids, lengths, self.num_items)
        hidden = items_to_hide(histories, exclude_seen, exclude, self.num_items)
        if hidden is None:
            hidden = histories.ids[:, :0]
        with evaluating(self):
            for rows in self._rows(len(ids)):
                yield rows, self.logits(histories.ids[rows], histories.lengths[rows]), hidden[rows]
