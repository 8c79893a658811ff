"""Cross-entropy over the target and sampled negatives, with the logQ correction (Bengio & Senécal 2008; Yi et al. 2019).

    candidates of row r: its targets, and the negatives that are none of them, not excluded and not −1
    s[r, t] = scale_r·(q_r·v_t) + bias[t]          s[r, n] = scale_r·(q_r·v_n) + bias[n] − log_q[n]
    loss = A·lse − (1 − ε)·Σ w·s[r, t] − ε·m       as in _targets.py, over the candidates

A block of rows is one formula in differentiable PyTorch, which is also what every transform differentiates. Its memory is that
of the candidates' scores, and of their vectors where each row has negatives of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..._logits import LogitSpec, check_exclusion, check_ids, wide_dtype
from ._sampled import Sampled, slots_of
from ._scan import add_product, all_finite, listed_pairs, plain_arithmetic, scaled_query
from .catalogue_cross_entropy import check_prior, check_targets

OPERATOR = "catalogue_cross_entropy"


@dataclass
class _Scored:
    query: Tensor  # [B, d] scaled
    target_vectors: Tensor  # [B, P, d]
    negative_vectors: Tensor  # [n, d] or [B, n, d]
    scores: Tensor  # [B, P + n], −∞ where no candidate
    target_scores: Tensor  # [B, P], repeated targets too
    hidden: Tensor  # bool [B, P + n]


def _score(query: Tensor, items: Tensor, row_scale: Tensor | None, bias: Tensor | None, sampled: Sampled) -> _Scored:
    # Ignored rows may hold anything.
    query = torch.where(sampled.valid[:, None], query, 0.0)
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
) -> tuple[Tensor, _Scored, Tensor, Tensor]:
    """Directions ∂/∂(scaled query) [B, d], what was scored, and ds of the targets [B, P] and negatives [B, n]. Differentiable."""
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
    return direction, scored, d_targets, d_negatives


def _careful_direction(scored: _Scored, d_targets: Tensor, d_negatives: Tensor) -> Tensor:
    """The direction of :func:`gradients` where 0 meets NaN or ±∞ in a vector that is no candidate."""

    def listed(ds: Tensor, vectors: Tensor) -> Tensor:
        return torch.where(ds[:, :, None] == 0, 0.0, ds[:, :, None] * vectors).sum(1)

    direction = listed(d_targets, scored.target_vectors)
    if scored.negative_vectors.dim() == 3:
        return direction + listed(d_negatives, scored.negative_vectors)
    add_product(direction, d_negatives, scored.negative_vectors, finite=False)
    return direction


def _outer(ds: Tensor, scaled: Tensor, finite: bool) -> Tensor:
    """[B, n, d] gradient of vectors of each row's own."""
    product = ds[:, :, None] * scaled[:, None]
    return product if finite else torch.where(ds[:, :, None] == 0, 0.0, product)


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
    check_prior(OPERATOR, smoothing_prior)
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
            of_block, scored, d_targets, d_negatives = gradients(
                grad_loss[block].to(wide), grad_lse[block].to(wide), *inputs.rows(block)
            )
            scaled, finite = scored.query, all_finite(scored.query)
            direction[block] = of_block if all_finite(of_block) else _careful_direction(scored, d_targets, d_negatives)
            of_targets[block] = d_targets
            if own:
                of_negatives[block] = d_negatives
            else:
                of_negatives += d_negatives.sum(0)
            if output_mask[1]:
                rows_of_targets[block] = _outer(d_targets, scaled, finite)
                if own:
                    rows_of_negatives[block] = _outer(d_negatives, scaled, finite)
                else:
                    add_product(rows_of_negatives, d_negatives.t(), scaled, finite)
        d_scale = query.new_empty(0, dtype=wide if row_scale is None else row_scale.dtype)
        if output_mask[2] and row_scale is not None:
            valid_query = torch.where(sampled.valid[:, None], query.to(wide), 0.0)
            d_scale = ((direction * valid_query).sum(1) * scale).to(row_scale.dtype)
        d_query = scaled_query(direction, logits).to(query.dtype) if output_mask[0] else query.new_empty(0)
    if target_crow is None:
        target_ids, target_rows, target_share = (
            sampled.targets.flatten(),
            rows_of_targets.flatten(0, 1),
            of_targets.flatten(),
        )
    else:
        rows, target_ids = listed_pairs(target, target_crow, num_rows)
        slot = slots_of(target_crow, rows)
        target_rows, target_share = rows_of_targets[rows, slot], of_targets[rows, slot]
    negative_rows = rows_of_negatives.reshape(negatives.numel(), rows_of_negatives.shape[-1])
    touched = output_mask[1] or output_mask[3]
    ids = torch.cat([target_ids, negatives.flatten().long()])
    ids = torch.where((ids >= 0) & (ids < num_items), ids, -1)
    d_rows = torch.cat([target_rows, negative_rows]) if output_mask[1] else items.new_empty(0)
    share = torch.cat([target_share, of_negatives.flatten()]) if output_mask[3] else query.new_empty(0)
    bias_dtype = wide if bias is None else bias.dtype
    return d_query, ids if touched else ids[:0], d_rows.to(items.dtype), d_scale, share.to(bias_dtype)
