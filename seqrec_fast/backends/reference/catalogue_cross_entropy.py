"""Cross-entropy over the catalogue, chunk by chunk, with the backward written out.

    loss[r] = A[r]·lse[r] − L[r]            A and L: the targets' and the smoothing's part, linear in the items (_targets.py)

    a[r] = dloss[r]·A[r] + dlse[r]          p[r, i] = exp(s[r, i] − lse[r])
    dq[r] = scale_r·(a[r]·Σᵢ p[r, i]·v[i] − dloss[r]·∂L[r]/∂(scale_r·q[r]))
    dv[i] = Σ_r a[r]·p[r, i]·scale_r·q[r] − (the targets and the smoothing)

The query's gradient is what attention with K = V = items computes, so the forward keeps Σ p·v and the backward scans the
catalogue once, for the items alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..._logits import LogitSpec, check_crow, check_exclusion, check_ids, wide_dtype
from ._scan import Exclusion, Pairs, Plan, Scan, add_product, all_finite, plain_arithmetic, scaled_query
from ._softmax import Softmax, softmax_scan
from ._targets import PAIRS, Smoothing, Targets, live_weight, mean_target_vectors, take_rows

OPERATOR = "catalogue_cross_entropy"


@dataclass(frozen=True)
class Problem:
    """The inputs, less the ignored rows where dropping them needs no synchronisation (on the CPU).

    Attributes:
        query: [B', d].
        kept: int64 [B'], which rows these are of the B given, or None for all.
        lists: the targets as they are given: [B'] or [B', P], or ids and row pointers [B' + 1].
    """

    query: Tensor
    items: Tensor
    logits: LogitSpec
    targets: Targets
    smoothing: Smoothing | None
    label_smoothing: float
    kept: Tensor | None
    lists: tuple[Tensor, Tensor | None]

    def of_rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.kept is None else tensor[self.kept]

    def to_rows(self, tensor: Tensor, num_rows: int) -> Tensor:
        """Back to the B rows given; 0 for the ignored ones."""
        if self.kept is None:
            valid = self.targets.valid if tensor.dim() == 1 else self.targets.valid[:, None]
            return torch.where(valid, tensor, 0.0)
        out = tensor.new_zeros((num_rows, *tensor.shape[1:]))
        return out.index_copy_(0, self.kept, tensor)

    @property
    def lse_weight(self) -> Tensor:
        """A, [B']."""
        total = self.targets.total * (1 - self.label_smoothing)
        if self.smoothing is None:
            return total
        return total + self.label_smoothing * self.smoothing.ranked.to(total.dtype)

    def scaled_query(self) -> Tensor:
        """[B', d] wide."""
        return scaled_query(self.query.to(wide_dtype(self.query.dtype)), self.logits)

    def scan(self, precision: int) -> tuple[Scan, Pairs]:
        plan = Plan(self.query.shape[0], self.items.shape[0], self.query.shape[1])
        targets = self.targets
        inside = targets.inside(self.items.shape[0])
        pairs = Pairs(targets.rows, torch.where(inside, targets.items, -1), plan, targets.weight)
        exclusion = Exclusion(self.logits, plan, pairs)
        return Scan(self.query, self.items, self.logits, plan, exclusion, precision=precision), pairs


def check_targets(operator: str, target: Tensor, crow: Tensor | None, ignore_index: int, num_items: int) -> None:
    """Every target names an item, or is ignored (one a row) or padding (a padded list).

    Raises:
        IndexError: one does not.
        ValueError: the row pointers of a sparse matrix do not cut its ids into rows.
    """
    if target.device.type != "cpu":
        return
    check_crow(operator, "target", target, crow)
    if target.dim() == 1 and crow is None:
        target = target[target != ignore_index]
    check_ids(operator, "target", target, num_items, padding=target.dim() == 2)


def check_prior(operator: str, prior: Tensor | None) -> None:
    """Weights of a mean.

    Raises:
        ValueError: one is negative or NaN.
    """
    if prior is not None and prior.device.type == "cpu" and not bool((prior >= 0).all()):
        raise ValueError(f"{operator}: smoothing_prior must not be negative, got {float(prior.min())}")


@dataclass(frozen=True)
class Arguments:
    """The raw arguments between ``items`` and ``precision``, grouped."""

    target: Tensor
    target_weights: Tensor | None
    target_crow: Tensor | None
    logits: LogitSpec
    ignore_index: int
    label_smoothing: float
    smoothing_prior: Tensor | None

    def check(self, num_items: int) -> None:
        """Looks at the values, on the CPU.

        Raises:
            IndexError: an id out of range.
            ValueError: a negative or NaN prior.
        """
        check_exclusion(OPERATOR, self.logits, num_items)
        check_targets(OPERATOR, self.target, self.target_crow, self.ignore_index, num_items)
        check_prior(OPERATOR, self.smoothing_prior)

    def targets(self, num_rows: int, dtype: torch.dtype) -> Targets:
        return Targets.build(self.target, self.target_weights, self.target_crow, self.ignore_index, num_rows, dtype)

    def smoothing(self, targets: Targets, num_rows: int, num_items: int) -> Smoothing | None:
        if self.label_smoothing == 0 or num_items == 0:
            return None
        return Smoothing(self.smoothing_prior, self.logits, targets, num_rows, num_items)

    def take_rows(self, rows: Tensor) -> Arguments:
        target, weights, crow = take_rows(rows, self.target, self.target_weights, self.target_crow)
        logits = self.logits.take_rows(rows)
        return replace(self, target=target, target_weights=weights, target_crow=crow, logits=logits)

    def problem(self, query: Tensor, items: Tensor) -> Problem:
        wide = wide_dtype(query.dtype)
        arguments, kept = self, None
        targets = self.targets(query.shape[0], wide)
        if query.device.type == "cpu" and not bool(targets.valid.all()):
            kept = targets.valid.nonzero()[:, 0]
            query, arguments = query[kept], self.take_rows(kept)
            targets = arguments.targets(len(kept), wide)
        smoothing = arguments.smoothing(targets, query.shape[0], items.shape[0])
        lists = (arguments.target, arguments.target_crow)
        return Problem(query, items, arguments.logits, targets, smoothing, self.label_smoothing, kept, lists)


class Engine(Protocol):
    """The two scans of a catalogue that the loss is made of: all that a backend must do."""

    def softmax(self, problem: Problem, precision: int, *, context: bool) -> tuple[Softmax, Tensor, Tensor]:
        """The softmax of every row, with the scores of the targets; and the targets' rows [N] and weights [N] in their order."""

    def item_gradients(
        self,
        problem: Problem,
        weight: Tensor,
        grad_loss: Tensor,
        lse: Tensor,
        wanted: tuple[bool, bool],
        skip_mass: float,
        precision: int,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Gradients of items [I, d] and bias [I] as ``wanted``, less the smoothing's part, and the mass skipped [B'].

        Of Σ_r weight·lse − grad_loss·(1 − ε)·Σ_p w·s. Wide, or the items' in their own dtype where there is no smoothing.
        """


class ScanEngine:
    """Chunk by chunk in PyTorch."""

    def softmax(self, problem: Problem, precision: int, *, context: bool) -> tuple[Softmax, Tensor, Tensor]:
        scan, pairs = problem.scan(precision)
        assert pairs.weight is not None
        return softmax_scan(scan, targets=pairs, context=context), pairs.rows, pairs.weight

    def item_gradients(
        self,
        problem: Problem,
        weight: Tensor,
        grad_loss: Tensor,
        lse: Tensor,
        wanted: tuple[bool, bool],
        skip_mass: float,
        precision: int,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        items = problem.items
        d_items, d_bias = (
            torch.zeros(shape, dtype=weight.dtype, device=items.device) if asked else None
            for shape, asked in zip((items.shape, items.shape[:1]), wanted, strict=True)
        )
        skipped = torch.zeros_like(weight)
        scan, _ = problem.scan(precision)
        scan.set_shift(torch.where(lse == float("-inf"), 0.0, lse))
        _add_softmax_part(scan, weight, d_items, d_bias, skip_mass, skipped)
        _subtract_targets(problem, scan.query, grad_loss, d_items, d_bias)
        return d_items, d_bias, skipped


SCAN = ScanEngine()


def forward(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    target_weights: Tensor | None,
    target_crow: Tensor | None,
    scale: float,
    row_scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
    exclude_crow: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    smoothing_prior: Tensor | None,
    skip_mass: float,
    skipped: Tensor | None,
    sparse_grad: bool,
    save_context: bool,
    precision: int,
    engine: Engine = SCAN,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``catalogue_cross_entropy``.

    Returns:
        loss and lse [B] in the wide dtype; with ``save_context`` Σ p·v [B, d], and with smoothing Σ u·v [B, d], else [0]. Ignored
        rows have loss and lse 0.
    """
    logits = LogitSpec(scale, row_scale, bias, exclude, exclude_crow)
    arguments = Arguments(target, target_weights, target_crow, logits, ignore_index, label_smoothing, smoothing_prior)
    arguments.check(items.shape[0])
    problem = arguments.problem(query, items)
    with plain_arithmetic(query.device, precision):
        result, rows, weight = engine.softmax(problem, precision, context=save_context)
        means = None if problem.smoothing is None else problem.smoothing.mean_vectors(items)
        loss = _loss(problem, rows, weight, result, means)
    num_rows = query.shape[0]
    lse = result.lse
    context, mean_vectors = (query.new_empty(0, dtype=lse.dtype) for _ in range(2))
    if result.context is not None:
        context = problem.to_rows(result.context, num_rows)
        if means is not None:
            mean_vectors = problem.to_rows(means.to(lse.dtype), num_rows)
    return (
        problem.to_rows(loss, num_rows),
        problem.to_rows(lse, num_rows),
        context,
        mean_vectors,
    )


def _loss(problem: Problem, rows: Tensor, weight: Tensor, result: Softmax, means: Tensor | None) -> Tensor:
    """A·log Σ exp(s − c) − (L − A·c), [B']: the shift c cancels before anything is rounded."""
    assert result.targets is not None
    weight = weight * (1 - problem.label_smoothing)
    linear = torch.zeros_like(result.shift)
    linear.index_add_(0, rows, torch.where(weight == 0, 0.0, weight * result.targets))
    if problem.smoothing is not None and means is not None:
        smoothing = problem.smoothing
        mean = (problem.scaled_query().double() * means).sum(1)
        mean = (mean + smoothing.mean_bias(problem.logits.bias) - result.shift.double()).to(linear.dtype)
        mean = torch.where(smoothing.sure, result.log_total, mean)  # the same score, in fp32: nothing is left of it
        linear += problem.label_smoothing * torch.where(smoothing.ranked, mean, 0.0)
    # A target whose score is −∞ costs +∞, also where nothing else has a probability.
    log_total = torch.where(result.log_total == float("-inf"), 0.0, result.log_total)
    loss = problem.lse_weight * log_total - linear
    if loss.device.type != "cpu":
        targets = problem.targets
        wrong = (targets.items != -1) & ~targets.inside(problem.items.shape[0])
        loss = torch.where(
            torch.zeros_like(loss).index_add(0, targets.rows, wrong.to(loss.dtype)) > 0, float("nan"), loss
        )
    return loss


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor,
    lse: Tensor,
    context: Tensor,
    mean_vectors: Tensor,
    query: Tensor,
    items: Tensor,
    target: Tensor,
    target_weights: Tensor | None,
    target_crow: Tensor | None,
    scale: float,
    row_scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
    exclude_crow: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    smoothing_prior: Tensor | None,
    skip_mass: float,
    output_mask: Sequence[bool],
    precision: int,
    engine: Engine = SCAN,
) -> tuple[Tensor, ...]:
    """The operator ``catalogue_cross_entropy_backward``: gradients of query, items, row_scale and bias, and the mass skipped.

    Gradients are [0] where ``output_mask`` is false. The mass skipped is [B]: probability that the gradients of items and bias
    leave out, at most ``skip_mass`` a row; whole tiles of items only, so usually less.
    """
    logits = LogitSpec(scale, row_scale, bias, exclude, exclude_crow)
    arguments = Arguments(target, target_weights, target_crow, logits, ignore_index, label_smoothing, smoothing_prior)
    problem = arguments.problem(query, items)
    wide, num_rows = lse.dtype, query.shape[0]
    valid = problem.targets.valid
    grad_loss, grad_lse, lse = (problem.of_rows(t.to(wide)) for t in (grad_loss, grad_lse, lse))
    if problem.kept is None:
        # Ignored rows that are still here: nothing they hold, NaN included, may reach the items.
        grad_loss, grad_lse = (torch.where(valid, g, 0.0) for g in (grad_loss, grad_lse))
        lse = torch.where(valid, lse, float("inf"))
        problem = replace(problem, query=torch.where(valid[:, None], problem.query, 0.0))
    if problem.smoothing is not None:
        grad_loss = torch.where(problem.smoothing.sure, 0.0, grad_loss)
    weight = grad_loss * problem.lse_weight + grad_lse  # [B'], a
    dtypes = (query.dtype, items.dtype, *(wide if v is None else v.dtype for v in (row_scale, bias)))
    results = [query.new_empty(0, dtype=dtype) for dtype in dtypes]
    skipped = torch.zeros_like(weight)
    with plain_arithmetic(query.device, precision):
        if output_mask[0] or output_mask[2]:
            saved = [problem.of_rows(t) if t.numel() else None for t in (context, mean_vectors)]
            direction = _query_direction(problem, grad_loss, weight, saved[0], saved[1], precision, engine)  # [B', d]
            if output_mask[0]:
                d_query = scaled_query(direction, problem.logits)
                results[0] = problem.to_rows(d_query, num_rows).to(query.dtype)
            if output_mask[2] and row_scale is not None:
                d_scale = (direction * problem.query.to(wide)).sum(1) * scale
                results[2] = problem.to_rows(d_scale, num_rows).to(row_scale.dtype)
        if output_mask[1] or output_mask[3]:
            wanted = (output_mask[1], output_mask[3])
            d_items, d_bias, skipped = engine.item_gradients(
                problem, weight, grad_loss, lse, wanted, skip_mass, precision
            )
            _subtract_smoothing(problem, grad_loss, d_items, d_bias)
            if d_items is not None:
                results[1] = d_items.to(items.dtype)
            if d_bias is not None and bias is not None:
                results[3] = d_bias.to(bias.dtype)
    return *results, problem.to_rows(skipped, num_rows)


def _query_direction(
    problem: Problem,
    grad_loss: Tensor,
    weight: Tensor,
    context: Tensor | None,
    mean_vectors: Tensor | None,
    precision: int,
    engine: Engine,
) -> Tensor:
    """∂/∂(scaled query), [B', d] wide: a·Σ p·v − dloss·∂L."""
    if context is None:
        context = engine.softmax(problem, precision, context=True)[0].context
        assert context is not None
    bias = problem.logits.bias
    direction = weight[:, None] * context
    targets = mean_target_vectors(problem.targets, problem.items, bias, direction.dtype)
    direction -= ((1 - problem.label_smoothing) * grad_loss)[:, None] * targets
    if problem.smoothing is not None:
        if mean_vectors is None:
            mean_vectors = problem.smoothing.mean_vectors(problem.items).to(direction.dtype)
        direction -= (problem.label_smoothing * grad_loss)[:, None] * mean_vectors
    return direction


def _add_softmax_part(
    scan: Scan, weight: Tensor, d_items: Tensor | None, d_bias: Tensor | None, skip_mass: float, skipped: Tensor
) -> None:
    """Adds Σ_r a·p·scale·q to ``d_items`` and Σ_r a·p to ``d_bias``; ``scan`` is shifted by lse."""
    weighted = weight[:, None] * scan.query  # [B', d]
    finite = all_finite(weighted)
    for chunk in scan.chunks():
        for block in scan.plan.blocks:
            p = scan.transposed(block, chunk).exp_()  # [C, R]
            if skip_mass > 0 and p.device.type == "cpu":
                mass = p.sum(0) + skipped[block.rows]  # [R]
                if bool((mass <= skip_mass).all()):
                    skipped[block.rows] = mass
                    continue
            if d_items is not None:
                add_product(d_items[chunk.span], p, weighted[block.rows], finite)
            if d_bias is not None:
                d_bias[chunk.span] += p @ weight[block.rows]


def target_share(problem: Problem, grad_loss: Tensor) -> Tensor:
    """[N], dloss·∂L/∂s of the targets' pairs."""
    targets = problem.targets
    weight = live_weight(targets, problem.logits.bias, problem.items.shape[0])
    return grad_loss[targets.rows] * weight * (1 - problem.label_smoothing)


def _subtract_targets(
    problem: Problem, scaled: Tensor, grad_loss: Tensor, d_items: Tensor | None, d_bias: Tensor | None
) -> None:
    """Takes the targets' part of dloss·∂L off the gradients of the items and of the bias."""
    targets, num_items = problem.targets, problem.items.shape[0]
    if num_items == 0:
        return
    share = target_share(problem, grad_loss)
    named = targets.items.clamp(0, num_items - 1)
    for gradient, vectors in _with_vectors(scaled, d_items, d_bias):
        for start in range(0, len(share), PAIRS):
            part = slice(start, start + PAIRS)
            coefficient = share[part, None]
            rows = torch.where(coefficient == 0, 0.0, coefficient * vectors[targets.rows[part]])
            gradient.index_add_(0, named[part], rows, alpha=-1)


def _subtract_smoothing(problem: Problem, grad_loss: Tensor, d_items: Tensor | None, d_bias: Tensor | None) -> None:
    """Takes the smoothing's part of dloss·∂L off the gradients of the items and of the bias."""
    if problem.smoothing is None:
        return
    for gradient, vectors in _with_vectors(problem.scaled_query(), d_items, d_bias):
        problem.smoothing.subtract_gradient(gradient, problem.label_smoothing * grad_loss, vectors)


def _with_vectors(scaled: Tensor, d_items: Tensor | None, d_bias: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """The gradients that are wanted as matrices, each with the rows' vectors that make it: the bias is an item of width 1."""
    found = [] if d_items is None else [(d_items, scaled)]
    return found if d_bias is None else [*found, (d_bias[:, None], scaled.new_ones((len(scaled), 1)))]
