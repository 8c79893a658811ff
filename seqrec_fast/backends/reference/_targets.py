"""The linear part of cross-entropy: target scores, and the mean score that label smoothing compares with.

    loss[r] = A[r]·lse[r] − L[r]
    L[r] = (1 − ε)·Σ_p w[r, p]·s[r, t_p] + ε·m[r]            m[r] = Σᵢ u[r, i]·s[r, i],  u[r, i] = prior[i]/Z[r] on ranked items
    A[r] = (1 − ε)·Σ_p w[r, p] + ε·[Z[r] > 0]                Z[r] = Σ prior over the row's ranked items

L is linear in the items: the mean score of a row is q_r·Σᵢ uᵢvᵢ, one sum for all rows over the items that no row's own list
names, and B×E weights, in chunks, for the E items that some list names. Without lists smoothing needs O(I·d).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._logits import LogitSpec, take_csr_rows
from . import _scan
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

    Only what a row keeps is ever summed: "all less the excluded" would leave rounding errors of the excluded items' size behind.

    Args:
        prior: [I] or None.
        logits: the options; which items are excluded.
        targets: never excluded from their own rows.
        num_rows, num_items: B, I.

    Attributes:
        full: [I] fp64, what an item weighs where no list excludes it.
        share: [I] fp64, that of the items that weigh the same in every row, and 0 for the others.
        rows, items, extra: [N] pairs that weigh more than ``share`` says, and by how much (fp64).
        listed: the items that some row's own list names.
        mass: [B] fp64, Z; 1 where ``ranked`` is false.
        ranked: bool [B], rows in which some item has a prior.
        sure: bool [B], rows in which only the target remains: its probability is 1, so the loss is 0 whatever it is made of.
    """

    def __init__(
        self, prior: Tensor | None, logits: LogitSpec, targets: Targets, num_rows: int, num_items: int
    ) -> None:
        device = targets.rows.device
        alive = torch.ones(num_items, dtype=torch.bool, device=device)
        if logits.bias is not None:
            alive = logits.bias != float("-inf")
        full = torch.ones(num_items, dtype=torch.float64, device=device) if prior is None else prior.double()
        self.full = self.share = full = torch.where(alive, full, 0.0)
        self.rows = self.items = targets.rows[:0]
        self.extra = full[:0]
        self.listed: _Listed | None = None
        ids, crow = logits.exclude, logits.exclude_crow
        inside = targets.inside(num_items)
        target_items = torch.where(inside, targets.items, -1)
        # Counted in integers: the mass of a row with everything excluded must not be 1e-17.
        remaining = alive.sum().expand(num_rows)  # [B] items with a score
        weighing = (full > 0).sum().expand(num_rows)  # [B] of them, those with a prior
        if ids is not None and ids.numel() and ids.dim() == 1 and crow is None:
            shared = shared_items(ids, num_items)
            self.share = torch.where(shared, 0.0, full)
            # A row's own targets come back, each once.
            self.rows, self.items, first = _distinct(targets.rows, target_items, num_items)
            back = first & shared[self.items]
            self.extra = torch.where(back, full[self.items], 0.0)
            remaining = (alive & ~shared).sum() + _count(self.rows, back & alive[self.items], num_rows)
            weighing = (self.share > 0).sum() + _count(self.rows, self.extra > 0, num_rows)
        elif ids is not None and ids.numel():
            rows, items = listed_pairs(ids, crow, num_rows)
            items = torch.where((items >= 0) & (items < num_items), items, -1)
            # Targets come first among equals, so that an excluded pair that names one is not the first of its kind.
            rows, items, first = _distinct(
                torch.cat([targets.rows, rows]),
                torch.cat([target_items, items]),
                num_items,
                first_kept=len(target_items),
            )
            self.listed = _Listed(rows, torch.where(first, items, -1), full, num_rows)
            self.share = self.listed.share
            remaining = remaining - _count(rows, first & alive[items], num_rows)
            weighing = weighing - _count(rows, first & (full[items] > 0), num_rows)
        self.ranked = weighing > 0
        live = inside & alive[target_items.clamp_min(0)] if num_items else inside
        lost = _count(targets.rows, ~live & (targets.items != -1), num_rows)
        self.sure = targets.valid & (remaining == 1) & (lost == 0)
        mass = torch.zeros(num_rows, dtype=torch.float64, device=device).index_add(0, self.rows, self.extra)
        mass += self.share.sum()
        if self.listed is not None:
            self.listed.add_mass(mass)
        self.mass = torch.where(self.ranked, mass, 1.0)

    def mean_vectors(self, items: Tensor) -> Tensor:
        """Σᵢ u[r, i]·v[i], [B, d] fp64. Rounded in fp64, since most of the sum may cancel."""
        total = self._total_vector(items)
        out = total.expand(len(self.mass), -1).contiguous()
        for start in range(0, len(self.rows), PAIRS):
            part = slice(start, start + PAIRS)
            extra = self.extra[part, None]
            vectors = items[self.items[part]].double()
            out.index_add_(0, self.rows[part], torch.where(extra == 0, 0.0, extra * vectors))
        if self.listed is not None:
            self.listed.add_vectors(out, items)
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
        share = self.share[:, None].to(d_items.dtype)
        d_items.sub_(torch.where(share == 0, 0.0, share * by_row.sum(0).to(d_items.dtype)))
        for start in range(0, len(self.rows), PAIRS):
            part = slice(start, start + PAIRS)
            extra = self.extra[part, None]
            rows = torch.where(extra == 0, 0.0, by_row[self.rows[part]] * extra)
            d_items.index_add_(0, self.items[part], rows.to(d_items.dtype), alpha=-1)
        if self.listed is not None:
            self.listed.subtract_gradient(d_items, by_row)


class _Listed:
    """The weights [B, E] of the E items that some row's own list names, a block of rows and a chunk of items at a time.

    Args:
        rows, items: [N] excluded pairs, each once; items −1 are no pairs.
        full: [I] fp64, what an item weighs in the rows that do not exclude it.
        num_rows: B.
        drop: as :class:`_scan.Pairs`: whether the E items may be picked out; otherwise they are all I.

    Attributes:
        share: [I] fp64, ``full`` of the items that are not among the E.
    """

    def __init__(self, rows: Tensor, items: Tensor, full: Tensor, num_rows: int, *, drop: bool | None = None) -> None:
        if (rows.device.type == "cpu") if drop is None else drop:
            named = torch.zeros(len(full), dtype=torch.bool).index_fill_(0, items[items >= 0], True)
            self.ids = named.nonzero()[:, 0]  # [E]
            place = torch.where(items >= 0, named.cumsum(0)[items.clamp_min(0)] - 1, -1)
            self.share = torch.where(named, 0.0, full)
        else:  # how many are named would be a synchronisation
            self.ids, place, self.share = torch.arange(len(full), device=rows.device), items, torch.zeros_like(full)
        self.weight = full[self.ids]  # [E]
        # As many vectors are gathered for a chunk as elsewhere for pairs.
        self.plan = _scan.Plan(num_rows, len(self.ids), _scan.CHUNK_NUMBERS // PAIRS)
        self.pairs = _scan.Pairs(rows, place, self.plan, drop=drop)
        self._buffer = self.weight.new_empty(self.plan.block_rows * self.plan.chunk_items + 1)

    def _weights(self, block: _scan.Block, chunk: int) -> Tensor:
        """[R, C], valid until the next call."""
        weight = self.weight[self.plan.items_of(chunk)]
        flat = self._buffer[: block.size * len(weight) + 1]
        weights = flat[:-1].view(block.size, len(weight))
        weights.copy_(weight.expand_as(weights))
        flat.index_fill_(0, self.pairs.at(block, chunk, transposed=False)[0], 0.0)
        return weights

    def add_mass(self, mass: Tensor) -> None:
        """Adds each row's sum of weights, [B]."""
        for chunk in range(self.plan.num_chunks):
            for block in self.plan.blocks:
                mass[block.rows] += self._weights(block, chunk).sum(1)

    def add_vectors(self, out: Tensor, items: Tensor) -> None:
        """Adds each row's weighted sum of ``items`` [I, d], [B, d]."""
        for chunk in range(self.plan.num_chunks):
            vectors = items[self.ids[self.plan.items_of(chunk)]].double()  # [C, d]
            finite = _scan.all_finite(vectors)
            for block in self.plan.blocks:
                _scan.add_product(out[block.rows], self._weights(block, chunk), vectors, finite)

    def subtract_gradient(self, d_items: Tensor, by_row: Tensor) -> None:
        """d_items[i] −= Σ_r weight[r, i]·by_row[r]."""
        finite = _scan.all_finite(by_row)
        for chunk in range(self.plan.num_chunks):
            ids = self.ids[self.plan.items_of(chunk)]
            part = by_row.new_zeros((len(ids), by_row.shape[1]))
            for block in self.plan.blocks:
                _scan.add_product(part, self._weights(block, chunk).t(), by_row[block.rows], finite)
            d_items.index_add_(0, ids, part.to(d_items.dtype), alpha=-1)


def _count(rows: Tensor, which: Tensor, num_rows: int) -> Tensor:
    """int64 [B]: how many of a row's pairs [N] count."""
    return torch.zeros(num_rows, dtype=torch.int64, device=rows.device).index_add(0, rows, which.long())


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


def linear_part(query: Tensor, items: Tensor, logits: LogitSpec, targets: Targets, label_smoothing: float) -> Tensor:
    """The targets' part of L [B] in differentiable PyTorch, for derivatives only: a target whose score is −∞ contributes 0.

    Differentiable in query, items, ``logits.row_scale`` and ``logits.bias``. Memory: the targets' vectors.
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
    return zero.index_add(0, targets.rows, weight * score) * (1 - label_smoothing)
