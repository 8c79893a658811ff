"""The linear part of cross-entropy: target scores, and the mean score that label smoothing compares with.

    loss[r] = A[r]·lse[r] − L[r]
    L[r] = (1 − ε)·Σ_p w[r, p]·s[r, t_p] + ε·m[r]            m[r] = Σᵢ u[r, i]·s[r, i],  u[r, i] = prior[i]/Z[r] on ranked items
    A[r] = (1 − ε)·Σ_p w[r, p] + ε·[Z[r] > 0]                Z[r] = Σ prior over the row's ranked items

L is linear in the items: the mean score of a row is q_r·Σᵢ uᵢvᵢ, one vector for the whole catalogue less the row's excluded
items. Smoothing so needs O(I·d) and no work per score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._logits import LogitSpec, take_csr_rows
from ._scan import listed_pairs, scaled_query, shared_items

PAIRS = 1 << 16  # (row, item) pairs whose vectors are gathered at a time


@dataclass(frozen=True)
class Targets:
    """Pairs (row, target), in a form that needs no look at values.

    Attributes:
        rows, items: int64 [N]; −1 where there is no target.
        weight: [N] wide, 0 where there is no target.
        valid: bool [B], rows with at least one target.
        total: [B] wide, Σ weight.
    """

    rows: Tensor
    items: Tensor
    weight: Tensor
    valid: Tensor
    total: Tensor

    @staticmethod
    def build(
        target: Tensor,
        weights: Tensor | None,
        crow: Tensor | None,
        ignore_index: int,
        num_rows: int,
        dtype: torch.dtype,
    ) -> Targets:
        """From the raw arguments: target [B], [B, P] with weights, or compressed sparse rows."""
        if target.dim() == 1 and crow is None:
            valid = target != ignore_index  # [B]
            one = valid.to(dtype)
            return Targets(
                torch.arange(num_rows, device=target.device), torch.where(valid, target, -1), one, valid, one
            )
        rows, items = listed_pairs(target, crow, num_rows)
        listed = items != -1
        count = torch.zeros(num_rows, dtype=dtype, device=target.device).index_add(0, rows, listed.to(dtype))  # [B]
        each = 1 / count[rows] if weights is None else weights.reshape(-1).to(dtype)
        weight = torch.where(listed, each, 0.0)
        total = torch.zeros_like(count).index_add(0, rows, weight)
        return Targets(rows, items, weight, count > 0, total)

    def inside(self, num_items: int) -> Tensor:
        """bool [N]: pairs that name an item. (Out of range is an error on the CPU and NaN elsewhere.)"""
        return (self.items >= 0) & (self.items < num_items)

    def sum_by_row(self, values: Tensor) -> Tensor:
        """[N] or [N, d] → [B] or [B, d], weighted; a weight of 0 hides its value."""
        weight = self.weight if values.dim() == 1 else self.weight[:, None]
        weighted = torch.where(weight == 0, 0.0, weight * values)
        return torch.zeros((len(self.valid), *values.shape[1:]), dtype=values.dtype, device=values.device).index_add(
            0, self.rows, weighted
        )


def take_rows(
    rows: Tensor, target: Tensor, weights: Tensor | None, crow: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The raw targets of ``rows`` alone."""
    if crow is None:
        return target[rows], None if weights is None else weights[rows], None
    if weights is None:
        ids, crow = take_csr_rows(crow, rows, target)
        return ids, None, crow
    ids, weights, crow = take_csr_rows(crow, rows, target, weights)
    return ids, weights, crow


def mean_target_vectors(targets: Targets, items: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ_p w·v_t over each row's targets that have a probability, [B, d]."""
    weight = live_weight(targets, bias, items.shape[0])
    out = torch.zeros((len(targets.valid), items.shape[1]), dtype=dtype, device=items.device)
    for start in range(0, len(weight) if items.shape[0] else 0, PAIRS):
        part = slice(start, start + PAIRS)
        vectors = items[targets.items[part].clamp(0, items.shape[0] - 1)].to(dtype)
        out.index_add_(0, targets.rows[part], torch.where(weight[part, None] == 0, 0.0, weight[part, None] * vectors))
    return out


def live_weight(targets: Targets, bias: Tensor | None, num_items: int) -> Tensor:
    """[N] wide: the targets' weights, 0 where the score is −∞ by its bias: such a pair has no gradient."""
    inside = targets.inside(num_items)
    if bias is not None and num_items:
        inside = inside & (bias[torch.where(inside, targets.items, 0)] != float("-inf"))
    return torch.where(inside, targets.weight, 0.0)


class Smoothing:
    """The distribution u that label smoothing mixes in: ``prior``, uniform by default, over each row's ranked items.

    Args:
        prior: [I] or None.
        logits: the options; which items are excluded.
        targets: never excluded from their own rows.
        num_rows, num_items: B, I.

    Attributes:
        share: [I] fp64, the prior of items that are ranked unless a row's own list says otherwise.
        rows, items, change: [N] pairs whose share differs from that, and by how much (fp64).
        mass: [B] fp64, Z; 1 where ``ranked`` is false.
        ranked: bool [B], rows in which some item has a prior.
    """

    def __init__(
        self, prior: Tensor | None, logits: LogitSpec, targets: Targets, num_rows: int, num_items: int
    ) -> None:
        device = targets.rows.device
        alive = torch.ones(num_items, dtype=torch.bool, device=device)
        if logits.bias is not None:
            alive = logits.bias != float("-inf")
        full = torch.ones(num_items, dtype=torch.float64, device=device) if prior is None else prior.double()
        full = torch.where(alive, full, 0.0)  # what an item weighs where no list excludes it
        self.share = full
        ids, crow = logits.exclude, logits.exclude_crow
        target_items = torch.where(targets.inside(num_items), targets.items, -1)
        if ids is None or ids.numel() == 0:
            self.rows = self.items = targets.rows[:0]
            self.change = full[:0]
        elif ids.dim() == 1 and crow is None:
            shared = shared_items(ids, num_items)
            self.share = torch.where(shared, 0.0, full)
            # A row's own targets come back, each once.
            self.rows, self.items, first = _distinct(targets.rows, target_items, num_items)
            back = first & shared[self.items]
            self.change = torch.where(back, full[self.items], 0.0)
        else:
            rows, items = listed_pairs(ids, crow, num_rows)
            items = torch.where((items >= 0) & (items < num_items), items, -1)
            # Targets come first among equals, so that an excluded pair that names one is not the first of its kind.
            self.rows, self.items, first = _distinct(
                torch.cat([targets.rows, rows]),
                torch.cat([target_items, items]),
                num_items,
                first_kept=len(target_items),
            )
            self.change = torch.where(first, -full[self.items], 0.0)
        nonzero = torch.zeros(num_rows, dtype=torch.int64, device=device)
        nonzero = nonzero.index_add(0, self.rows, self.change.sign().long()) + (self.share > 0).sum()
        self.ranked = nonzero > 0  # counted in integers: the mass of a row with everything excluded must not be 1e-17
        mass = torch.zeros(num_rows, dtype=torch.float64, device=device).index_add(0, self.rows, self.change)
        self.mass = torch.where(self.ranked, mass + self.share.sum(), 1.0)

    def mean_vectors(self, items: Tensor) -> Tensor:
        """Σᵢ u[r, i]·v[i], [B, d] fp64. Rounded in fp64, since most of the sum may cancel."""
        total = self._total_vector(items)
        out = total.expand(len(self.mass), -1).contiguous()
        for start in range(0, len(self.rows), PAIRS):
            part = slice(start, start + PAIRS)
            change = self.change[part, None]
            vectors = items[self.items[part]].double()
            out.index_add_(0, self.rows[part], torch.where(change == 0, 0.0, change * vectors))
        return torch.where(self.ranked[:, None], out / self.mass[:, None], 0.0)

    def mean_bias(self, bias: Tensor | None) -> Tensor:
        """Σᵢ u[r, i]·bias[i], [B] fp64."""
        if bias is None:
            return torch.zeros_like(self.mass)
        return self.mean_vectors(bias[:, None])[:, 0]

    def _total_vector(self, items: Tensor) -> Tensor:
        total = torch.zeros(items.shape[1], dtype=torch.float64, device=items.device)
        for start in range(0, items.shape[0], PAIRS):
            share = self.share[start : start + PAIRS, None]
            total += torch.where(share == 0, 0.0, share * items[start : start + PAIRS].double()).sum(0)
        return total

    def subtract_gradient(self, d_items: Tensor, coefficient: Tensor, vectors: Tensor) -> None:
        """d_items[i] −= Σ_r u[r, i]·coefficient[r]·vectors[r].

        Args:
            d_items: [I, d] wide, changed.
            coefficient: [B].
            vectors: [B, d], the scaled queries.
        """
        by_row = torch.where(self.ranked, coefficient.double() / self.mass, 0.0)[:, None] * vectors.double()  # [B, d]
        d_items.sub_(self.share[:, None].to(d_items.dtype) * by_row.sum(0).to(d_items.dtype))
        for start in range(0, len(self.rows), PAIRS):
            part = slice(start, start + PAIRS)
            rows = by_row[self.rows[part]] * self.change[part, None]
            d_items.index_add_(0, self.items[part], rows.to(d_items.dtype), alpha=-1)


def _distinct(
    rows: Tensor, items: Tensor, num_items: int, first_kept: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted by (row, item), and which of them count: the first of its kind, naming an item (items −1 do not).

    With ``first_kept`` = n, the first n pairs given take precedence over equal ones and do not count themselves.
    """
    key = rows * (num_items + 1) + (items + 1)
    key, order = key.sort(stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    rows, items = rows[order], items[order]
    counts = first & (items >= 0)
    if first_kept is not None:
        counts = counts & (order >= first_kept)
    return rows, items.clamp_min(0), counts


def linear_part(
    query: Tensor,
    items: Tensor,
    logits: LogitSpec,
    targets: Targets,
    smoothing: Smoothing | None,
    label_smoothing: float,
) -> Tensor:
    """L [B] in differentiable PyTorch, for derivatives only: a target whose score is −∞ contributes 0.

    Differentiable in query, items, ``logits.row_scale`` and ``logits.bias``. Memory: the targets' (and with smoothing the
    excluded pairs') vectors.
    """
    num_items = items.shape[0]
    scaled = scaled_query(query, logits)
    bias = None if logits.bias is None else torch.where(logits.bias == float("-inf"), 0.0, logits.bias)
    weight = live_weight(targets, logits.bias, num_items)
    if num_items == 0:
        return scaled.sum(1) * 0.0
    named = targets.items.clamp(0, num_items - 1)
    score = (scaled[targets.rows] * items[named]).sum(1)  # [N]
    if bias is not None:
        score = score + bias[named]
    # Where the weight is 0 the vectors may hold anything; a gradient of 0 would spoil NaN all the same, so they are not used.
    score = torch.where(weight == 0, 0.0, score)
    zero = torch.zeros_like(scaled[:, 0])
    result = zero.index_add(0, targets.rows, weight * score) * (1 - label_smoothing)
    if smoothing is None:
        return result
    dtype = scaled.dtype
    share, change = smoothing.share.to(dtype), smoothing.change.to(dtype)
    mean = scaled @ (share @ items)  # [B], not yet divided by the mass
    mean = mean.index_add(0, smoothing.rows, change * (scaled[smoothing.rows] * items[smoothing.items]).sum(1))
    if bias is not None:
        mean = mean + share @ bias
        mean = mean.index_add(0, smoothing.rows, change * bias[smoothing.items])
    mean = torch.where(smoothing.ranked, mean / smoothing.mass.to(dtype), 0.0)
    return result + label_smoothing * mean
