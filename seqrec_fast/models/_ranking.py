"""Ranking for models that can only give all their scores: in chunks of users, in the order of the catalogue operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ._checkpoint import SavedModule
from ._histories import IGNORE, check_histories, check_ids, items_to_hide

SCORES_AT_ONCE = 1 << 24  # 64 MiB of fp32 scores, a few times that while they are ordered


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


class evaluating:  # noqa: N801  (reads as a function: `with evaluating(model):`)
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
        exclude: [B, n] item ids, padded with −1.
    """
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    # the padding goes to a column of its own, which is cut off again
    column = torch.where(exclude < 0, scores.shape[1], exclude.long())
    hidden = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    hidden.scatter_(1, column, True)
    return scores.masked_fill_(hidden[:, :-1], -torch.inf)


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


def rank_of(scores: Tensor, target: Tensor, target_scores: Tensor) -> Tensor:
    """Places [B] of the targets among [B, I] scores, 0-based; ``target_scores`` [B] are theirs before any exclusion."""
    scores, place = scores.float(), target[:, None]
    scores = scores.scatter(1, place, target_scores.float()[:, None])  # the target is never excluded
    reachable = target_scores.float() > -torch.inf  # False for NaN
    threshold = scores.gather(1, place)
    ids = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > threshold) | ((scores == threshold) & (ids < place))
    return torch.where(reachable, before.sum(1), (scores > -torch.inf).sum(1))


class DenseRecommender(SavedModule):
    """Recommendation and ranking on top of :meth:`logits`, for models whose scores are no inner product.

    Users go through in chunks, so that never more than 2²⁴ scores (and their sort keys) are held; O(B·I).
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
        chunks = [top_k(scores, k) for _, scores in self._chunks(ids, lengths, exclude_seen, exclude)]
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
        for rows, (raw, scores) in zip(
            self._rows(len(ids)), self._chunks(ids, lengths, exclude_seen, exclude), strict=True
        ):
            wanted = target[rows].clamp(min=0)
            place = rank_of(scores, wanted, raw.gather(1, wanted[:, None])[:, 0])
            chunks.append(place.masked_fill(target[rows] == IGNORE, -1))
        return torch.cat(chunks)

    def _rows(self, batch: int) -> list[slice]:
        step = max(1, SCORES_AT_ONCE // max(1, self.num_items))
        return [slice(start, min(start + step, batch)) for start in range(0, batch, step)] or [slice(0, 0)]

    def _chunks(
        self, ids: Tensor, lengths: Tensor | None, exclude_seen: bool, exclude: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Per chunk of users: their scores as they are, and with what must not be ranked at −∞."""
        histories = check_histories(ids, lengths, self.num_items)
        hidden = items_to_hide(histories, exclude_seen, exclude, self.num_items)
        if hidden is None:
            hidden = histories.ids[:, :0]
        with evaluating(self):
            for rows in self._rows(len(ids)):
                raw = self.logits(histories.ids[rows], histories.lengths[rows])  # [b, I]
                yield raw, hide(raw, hidden[rows])
