"""Cross-entropy over the target and sampled negatives, with the logQ correction (Bengio & Senécal 2008; Yi et al. 2019).

    candidates of row r: its targets, and the negatives that are none of them, not excluded and not −1
    s[r, t] = scale_r·(q_r·v_t) + bias[t]          s[r, n] = scale_r·(q_r·v_n) + bias[n] − log_q[n]
    loss = A·lse − (1 − ε)·Σ w·s[r, t] − ε·m       as in _targets.py, over the candidates

A block of rows is one formula in differentiable PyTorch, which is also what every transform differentiates. Its memory is that
of the candidates' scores, and of their vectors where each row has negatives of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..._logits import LogitSpec, check_exclusion, check_ids, wide_dtype
from ._scan import CHUNK_NUMBERS, SCORES, listed_pairs, plain_arithmetic, scaled_query, shared_items
from .catalogue_cross_entropy import check_targets

OPERATOR = "catalogue_cross_entropy"


@dataclass(frozen=True)
class Sampled:
    """The inputs that have no gradient, as padded lists. B rows, P targets a row, n negatives, I items.

    Attributes:
        targets: int64 [B, P], −1 is padding.
        weights: [B, P] wide, 0 in the padding.
        valid: bool [B].
        negatives: int64 [n] or [B, n], −1 is padding.
        log_q: of the same shape, wide, or None.
        logits: scale, exclude and exclude_crow; row_scale and bias are passed with the differentiable inputs.
    """

    targets: Tensor
    weights: Tensor
    valid: Tensor
    negatives: Tensor
    log_q: Tensor | None
    logits: LogitSpec
    label_smoothing: float
    prior: Tensor | None
    num_items: int

    @staticmethod
    def build(
        target: Tensor,
        target_weights: Tensor | None,
        target_crow: Tensor | None,
        negatives: Tensor,
        log_q: Tensor | None,
        logits: LogitSpec,
        ignore_index: int,
        label_smoothing: float,
        prior: Tensor | None,
        num_items: int,
        dtype: torch.dtype,
    ) -> Sampled:
        """From the raw arguments."""
        if target_crow is not None:
            target, target_weights = _padded(target, target_weights, target_crow)
        elif target.dim() == 1:
            target = torch.where(target == ignore_index, -1, target)[:, None]
        listed = target != -1
        count = listed.sum(1, keepdim=True)
        each = (1 / count).to(dtype) if target_weights is None else target_weights.to(dtype)
        return Sampled(
            target,
            torch.where(listed, each, 0.0),
            count[:, 0] > 0,
            negatives,
            None if log_q is None else log_q.to(dtype),
            replace(logits, row_scale=None, bias=None),
            label_smoothing,
            None if prior is None else prior.to(dtype),
            num_items,
        )

    def rows(self, block: slice) -> Sampled:
        """A block of rows."""
        own = self.negatives.dim() == 2
        logits = self.logits
        if logits.exclude is not None and (logits.exclude_crow is not None or logits.exclude.dim() == 2):
            device = self.targets.device
            logits = logits.take_rows(torch.arange(block.start, block.stop, device=device))
        return replace(
            self,
            targets=self.targets[block],
            weights=self.weights[block],
            valid=self.valid[block],
            negatives=self.negatives[block] if own else self.negatives,
            log_q=self.log_q[block] if own and self.log_q is not None else self.log_q,
            logits=logits,
        )

    def blocks(self, width: int) -> Iterator[slice]:
        """Blocks of rows that keep scores, and gathered vectors, within the bounds of a scan."""
        num_rows, candidates = self.targets.shape[0], self.targets.shape[1] + self.negatives.shape[-1]
        gathered = candidates if self.negatives.dim() == 2 else self.targets.shape[1]
        step = min(SCORES // max(candidates, 1), CHUNK_NUMBERS // max(gathered * width, 1))
        step = max(step, 1)
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))

    def hidden(self, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """(bool [B, P], bool [B, n]): targets and negatives that are no candidates."""
        targets = self.targets
        inside = (targets >= 0) & (targets < self.num_items)
        # A target that is listed twice is one candidate.
        twice = (targets[:, :, None] == targets[:, None, :]).tril(-1).any(-1)
        no_target = ~inside | twice
        ids = self.negatives  # [n] or [B, n]
        no_negative = (ids < 0) | (ids >= self.num_items)
        if ids.dim() == 1:
            no_negative, ids = no_negative.expand(targets.shape[0], -1), ids.expand(targets.shape[0], -1)
        no_negative = no_negative | self._is_target(ids) | self._is_excluded(ids)
        if bias is not None and self.num_items:
            dead = bias == float("-inf")
            no_target = no_target | dead[targets.clamp(0, self.num_items - 1)]
            no_negative = no_negative | dead[ids.clamp(0, self.num_items - 1)]
        return no_target, no_negative

    def _is_target(self, ids: Tensor) -> Tensor:
        """bool [B, n]: accidental hits."""
        if self.targets.shape[1] == 1:
            return ids == self.targets
        found = torch.zeros_like(ids, dtype=torch.bool)
        for target in self.targets.unbind(1):
            found = found | (ids == target[:, None])
        return found

    def _is_excluded(self, ids: Tensor) -> Tensor:
        excluded, crow = self.logits.exclude, self.logits.exclude_crow
        if excluded is None or excluded.numel() == 0 or self.num_items == 0:
            return torch.zeros_like(ids, dtype=torch.bool)
        if excluded.dim() == 1 and crow is None:
            return shared_items(excluded, self.num_items)[ids.clamp(0, self.num_items - 1)]
        if crow is None:
            return _in_rows(ids, excluded)
        rows, items = listed_pairs(excluded, crow, ids.shape[0])
        keys = torch.where(items < self.num_items, rows * self.num_items + items, -1).sort().values
        wanted = torch.arange(ids.shape[0], device=ids.device)[:, None] * self.num_items + ids
        place = torch.searchsorted(keys, wanted.contiguous()).clamp_max(keys.shape[0] - 1)
        return (keys[place] == wanted) & (ids >= 0)


def _in_rows(ids: Tensor, listed: Tensor) -> Tensor:
    """bool [B, n]: which of ``ids`` [B, n] are in their row of ``listed`` [B, m]."""
    if torch._C._are_functorch_transforms_active():  # the batching rule of searchsorted warns about its own layout
        found = torch.zeros_like(ids, dtype=torch.bool)
        for column in listed.unbind(1):
            found = found | (ids == column[:, None])
        return found
    ordered = listed.to(ids.dtype).sort(dim=1).values
    place = torch.searchsorted(ordered, ids.contiguous()).clamp_max(listed.shape[1] - 1)
    return ordered.gather(1, place) == ids


def _padded(ids: Tensor, weights: Tensor | None, crow: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compressed sparse rows as a padded list. Looks at the longest row: a synchronisation on CUDA."""
    num_rows = len(crow) - 1
    longest = int(crow.diff().max()) if num_rows else 0
    rows, items = listed_pairs(ids, crow, num_rows)
    slot = _slots(crow, rows)
    target = torch.full((num_rows, longest), -1, dtype=torch.int64, device=ids.device)
    target[rows, slot] = items
    if weights is None:
        return target, None
    padded = torch.zeros((num_rows, longest), dtype=weights.dtype, device=ids.device)
    padded[rows, slot] = weights
    return target, padded


def _slots(crow: Tensor, rows: Tensor) -> Tensor:
    """Where an entry of compressed sparse rows lies in its row."""
    return torch.arange(len(rows), device=rows.device) - crow[rows].long()


@dataclass
class _Scored:
    query: Tensor  # [B, d] scaled
    target_vectors: Tensor  # [B, P, d]
    negative_vectors: Tensor  # [n, d] or [B, n, d]
    scores: Tensor  # [B, P + n], −∞ where no candidate
    target_scores: Tensor  # [B, P], repeated targets too
    hidden: Tensor  # bool [B, P + n]


def _score(query: Tensor, items: Tensor, row_scale: Tensor | None, bias: Tensor | None, sampled: Sampled) -> _Scored:
    scaled = scaled_query(query, replace(sampled.logits, row_scale=row_scale))
    last = max(sampled.num_items - 1, 0)
    t, n = sampled.targets.clamp(0, last), sampled.negatives.clamp(0, last)
    if sampled.num_items == 0:
        items = torch.cat([items, items.new_zeros((1, items.shape[1]))])  # every id is padding
        bias = None if bias is None else torch.cat([bias, bias.new_zeros(1)])
    no_target, no_negative = sampled.hidden(bias)
    target_vectors, negative_vectors = items[t].to(scaled.dtype), items[n].to(scaled.dtype)
    target_scores = torch.einsum("bd,bpd->bp", scaled, target_vectors)
    negative_scores = torch.einsum("bd,nd->bn" if n.dim() == 1 else "bd,bnd->bn", scaled, negative_vectors)
    if bias is not None:
        alive = torch.where(bias == float("-inf"), 0.0, bias)  # −∞ is in the masks; here it would spoil gradients
        target_scores, negative_scores = target_scores + alive[t], negative_scores + alive[n]
    if sampled.log_q is not None:
        negative_scores = negative_scores - sampled.log_q
    hidden = torch.cat([no_target, no_negative], 1)
    scores = torch.cat([target_scores, negative_scores], 1)
    return _Scored(
        scaled, target_vectors, negative_vectors, torch.where(hidden, float("-inf"), scores), target_scores, hidden
    )


def _mixture(sampled: Sampled, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(u [B, P + n] that smoothing mixes in, whether there is one [B])."""
    last = max(sampled.num_items - 1, 0)
    negatives = sampled.negatives.expand(len(sampled.targets), -1)
    ids = torch.cat([sampled.targets, negatives], 1).clamp(0, last)
    share = torch.ones_like(ids, dtype=sampled.weights.dtype) if sampled.prior is None else sampled.prior[ids]
    share = torch.where(hidden, 0.0, share)
    mass = share.sum(1)
    return share / torch.where(mass > 0, mass, 1.0)[:, None], mass > 0


def _live(sampled: Sampled, scored: _Scored, bias: Tensor | None) -> Tensor:
    """bool [B, P]: targets whose score is not −∞ (repeated ones included)."""
    t = sampled.targets
    inside = (t >= 0) & (t < sampled.num_items)
    if bias is None or sampled.num_items == 0:
        return inside
    return inside & (bias[t.clamp(0, sampled.num_items - 1)] != float("-inf"))


def loss_and_lse(
    query: Tensor, items: Tensor, row_scale: Tensor | None, bias: Tensor | None, sampled: Sampled
) -> tuple[Tensor, Tensor]:
    """(loss, lse) [B] in differentiable PyTorch; lse 0 in ignored rows."""
    scored = _score(query, items, row_scale, bias, sampled)
    eps, weights = sampled.label_smoothing, sampled.weights
    nothing = scored.hidden.all(1)
    safe = torch.where(nothing[:, None], 0.0, scored.scores)
    lse = torch.where(nothing, float("-inf"), torch.logsumexp(safe, 1) if safe.shape[1] else float("-inf"))
    live = _live(sampled, scored, bias)
    # Relative to lse, so that a target far above the rest costs exactly nothing.
    level = torch.where(nothing, 0.0, lse)[:, None]
    nll = level - scored.target_scores
    nll = torch.where(live, nll, float("inf"))
    loss = (1 - eps) * torch.where(weights == 0, 0.0, weights * nll).sum(1)
    if eps:
        mixture, some = _mixture(sampled, scored.hidden)
        distance = torch.where(scored.hidden, 0.0, level - torch.where(scored.hidden, 0.0, scored.scores))
        loss = loss + eps * torch.where(some, (mixture * distance).sum(1), 0.0)
    named = (sampled.targets == -1) | ((sampled.targets >= 0) & (sampled.targets < sampled.num_items))
    loss = torch.where(named.all(1), loss, float("nan"))  # an IndexError on the CPU
    return torch.where(sampled.valid, loss, 0.0), torch.where(sampled.valid, lse, 0.0)


def gradients(
    grad_loss: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    items: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    sampled: Sampled,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Directions ∂/∂(scaled query) [B, d], the scaled query, and ds of the targets [B, P] and negatives [B, n]. Differentiable."""
    scored = _score(query, items, row_scale, bias, sampled)
    eps, weights = sampled.label_smoothing, sampled.weights
    nothing = scored.hidden.all(1, keepdim=True)
    p = torch.softmax(torch.where(nothing, 0.0, scored.scores), 1)
    p = torch.where(scored.hidden, 0.0, p)
    total = (1 - eps) * weights.sum(1)
    share: Tensor | float = 0.0
    if eps:
        mixture, some = _mixture(sampled, scored.hidden)
        total, share = total + eps * some, eps * mixture
    grad_loss, grad_lse = (torch.where(sampled.valid, g, 0.0)[:, None] for g in (grad_loss, grad_lse))
    ds = (grad_loss * total[:, None] + grad_lse) * p - grad_loss * share  # [B, P + n]
    num_targets = sampled.targets.shape[1]
    live = torch.where(_live(sampled, scored, bias), weights, 0.0)
    d_targets = ds[:, :num_targets] - (1 - eps) * grad_loss * live
    d_negatives = ds[:, num_targets:]
    direction = torch.einsum("bp,bpd->bd", d_targets, scored.target_vectors) + torch.einsum(
        "bn,nd->bd" if scored.negative_vectors.dim() == 2 else "bn,bnd->bd", d_negatives, scored.negative_vectors
    )
    return direction, scored.query, d_targets, d_negatives


def forward(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    target_weights: Tensor | None,
    target_crow: Tensor | None,
    negatives: Tensor,
    negatives_log_q: Tensor | None,
    scale: float,
    row_scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
    exclude_crow: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    smoothing_prior: Tensor | None,
    sparse_grad: bool,
    precision: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``catalogue_sampled_cross_entropy``: loss and lse [B] in the wide dtype."""
    wide, num_items = wide_dtype(query.dtype), items.shape[0]
    logits = LogitSpec(scale, row_scale, bias, exclude, exclude_crow)
    check_exclusion(OPERATOR, logits, num_items)
    check_targets(OPERATOR, target, target_crow, ignore_index, num_items)
    if negatives.device.type == "cpu":
        check_ids(OPERATOR, "negatives", negatives, num_items, padding=True)
    sampled = Sampled.build(
        target, target_weights, target_crow, negatives, negatives_log_q, logits, ignore_index, label_smoothing,
        smoothing_prior, num_items, wide,
    )  # fmt: skip
    loss = query.new_empty(query.shape[0], dtype=wide)
    lse = torch.empty_like(loss)
    with plain_arithmetic(query.device, precision):
        inputs = _Wide(query, items, row_scale, bias, sampled)
        for block in sampled.blocks(query.shape[1]):
            loss[block], lse[block] = loss_and_lse(*inputs.rows(block))
    return loss, lse


class _Wide:
    """The tensors a block needs, in the wide dtype: only the touched items are converted."""

    def __init__(
        self, query: Tensor, items: Tensor, row_scale: Tensor | None, bias: Tensor | None, sampled: Sampled
    ) -> None:
        self.wide = wide_dtype(query.dtype)
        self.query, self.items, self.row_scale, self.bias, self.sampled = query, items, row_scale, bias, sampled

    def rows(self, block: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Sampled]:
        row_scale = None if self.row_scale is None else self.row_scale[block].to(self.wide)
        bias = None if self.bias is None else self.bias.to(self.wide)
        return self.query[block].to(self.wide), self.items, row_scale, bias, self.sampled.rows(block)


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    items: Tensor,
    target: Tensor,
    target_weights: Tensor | None,
    target_crow: Tensor | None,
    negatives: Tensor,
    negatives_log_q: Tensor | None,
    scale: float,
    row_scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
    exclude_crow: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    smoothing_prior: Tensor | None,
    output_mask: Sequence[bool],
    precision: int,
) -> tuple[Tensor, ...]:
    """The operator ``catalogue_sampled_cross_entropy_backward``.

    Returns:
        d_query [B, d]; ids [m], d_rows [m, d] of the touched items (targets first, then negatives; repeated ids add up);
        d_row_scale [B]; d_coefficients [m], the gradient of the touched items' bias. [0] where ``output_mask`` is false.
    """
    wide, num_items = wide_dtype(query.dtype), items.shape[0]
    logits = LogitSpec(scale, row_scale, bias, exclude, exclude_crow)
    sampled = Sampled.build(
        target, target_weights, target_crow, negatives, negatives_log_q, logits, ignore_index, label_smoothing,
        smoothing_prior, num_items, wide,
    )  # fmt: skip
    (num_rows, width), (_, num_targets) = query.shape, sampled.targets.shape
    own = negatives.dim() == 2
    new = partial(torch.zeros, dtype=wide, device=query.device)
    direction = new((num_rows, width))
    rows_of_targets = new((num_rows, num_targets, width if output_mask[1] else 0))
    rows_of_negatives = new((*negatives.shape, width if output_mask[1] else 0))
    of_targets, of_negatives = new((num_rows, num_targets)), new(negatives.shape)
    with plain_arithmetic(query.device, precision):
        inputs = _Wide(query, items, row_scale, bias, sampled)
        for block in sampled.blocks(width):
            direction[block], scaled, d_targets, d_negatives = gradients(
                grad_loss[block].to(wide), grad_lse[block].to(wide), *inputs.rows(block)
            )
            of_targets[block] = d_targets
            if own:
                of_negatives[block] = d_negatives
            else:
                of_negatives += d_negatives.sum(0)
            if output_mask[1]:
                rows_of_targets[block] = d_targets[:, :, None] * scaled[:, None]
                if own:
                    rows_of_negatives[block] = d_negatives[:, :, None] * scaled[:, None]
                else:
                    rows_of_negatives += d_negatives.t() @ scaled
        d_scale = query.new_empty(0, dtype=wide if row_scale is None else row_scale.dtype)
        if output_mask[2] and row_scale is not None:
            d_scale = ((direction * query.to(wide)).sum(1) * scale).to(row_scale.dtype)
        d_query = scaled_query(direction, logits).to(query.dtype) if output_mask[0] else query.new_empty(0)
    if target_crow is None:
        target_ids, target_rows, target_share = (
            sampled.targets.flatten(),
            rows_of_targets.flatten(0, 1),
            of_targets.flatten(),
        )
    else:
        rows, target_ids = listed_pairs(target, target_crow, num_rows)
        slot = _slots(target_crow, rows)
        target_rows, target_share = rows_of_targets[rows, slot], of_targets[rows, slot]
    negative_rows = rows_of_negatives.reshape(negatives.numel(), rows_of_negatives.shape[-1])
    touched = output_mask[1] or output_mask[3]
    ids = torch.cat([target_ids, negatives.flatten().long()])
    ids = torch.where((ids >= 0) & (ids < num_items), ids, -1)
    d_rows = torch.cat([target_rows, negative_rows]) if output_mask[1] else items.new_empty(0)
    share = torch.cat([target_share, of_negatives.flatten()]) if output_mask[3] else query.new_empty(0)
    bias_dtype = wide if bias is None else bias.dtype
    return d_query, ids if touched else ids[:0], d_rows.to(items.dtype), d_scale, share.to(bias_dtype)
