"""Wiring of ``catalogue_cross_entropy`` over sampled negatives: raw operators, fakes and gradients."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from .. import _dispatch
from .._dispatch import Spec
from .._logits import LogitSpec, wide_dtype
from .._operator import Operator, transforms_active
from ..backends.reference import catalogue_sampled_cross_entropy as reference
from ..backends.reference._sampled import Sampled
from ..backends.reference._scan import plain_arithmetic, scaled_query
from . import _catalogue

NAME = "catalogue_sampled_cross_entropy"

# Raw arguments: query, items, target, target_weights, target_crow, negatives, negatives_log_q, 5 of the LogitSpec, ignore_index,
# label_smoothing, smoothing_prior, sparse_grad, precision. The backward operator: grad_loss, grad_lse, then as above up to
# smoothing_prior, then output_mask and precision.
_NUM_ARGS = 17


def _describe(query: Tensor, *rest: Any) -> Spec:
    return _spec(NAME, query, *rest)


def _describe_backward(grad_loss: Tensor, grad_lse: Tensor, query: Tensor, *rest: Any) -> Spec:
    return _spec(f"{NAME}_backward", query, *rest)


def _spec(operator: str, query: Tensor, items: Tensor, target: Tensor, *rest: Any) -> Spec:
    _, crow, negatives, log_q, *logits = rest
    flags = {"targets": target.dim() == 2, "target_csr": crow is not None, "own_negatives": negatives.dim() == 2}
    return _catalogue.describe(operator, query, tuple(logits[:5]), negatives_log_q=log_q is not None, **flags)


def _fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(query.dtype)
    return query.new_empty(query.shape[0], dtype=wide), query.new_empty(query.shape[0], dtype=wide)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    query, items, target, _, _, negatives, _, _, row_scale, bias, *_, mask, _ = args[2:]
    named = {"query": query, "rows": None, "row_scale": row_scale, "bias": None}
    dq, _, ds, _ = _catalogue.fake_gradients(named, (mask[0], False, mask[2], False), query)
    touched = target.numel() + negatives.numel()
    ids = target.new_empty(touched if mask[1] or mask[3] else 0)
    rows = items.new_empty((touched, items.shape[1]) if mask[1] else 0)
    share = query.new_empty(touched if mask[3] else 0, dtype=wide_dtype(query.dtype) if bias is None else bias.dtype)
    return dq, ids, rows, ds, share


CATALOGUE_SAMPLED_CROSS_ENTROPY = Operator(NAME, reference=reference.forward, fake=_fake, describe=_describe)
CATALOGUE_SAMPLED_CROSS_ENTROPY_BACKWARD = Operator(
    f"{NAME}_backward", reference=reference.backward, fake=_fake_backward, describe=_describe_backward
)


def add_by_id(ids: Tensor, rows: Tensor, num_items: int) -> Tensor:
    """Gradient of a table [I, ...] from that of touched rows; id −1 is dropped. Sums repeated ids wide."""
    wide = wide_dtype(rows.dtype)
    listed = (ids >= 0).reshape(-1, *(1,) * (rows.dim() - 1))
    out = torch.zeros((num_items, *rows.shape[1:]), dtype=wide, device=rows.device)
    if num_items:
        out = out.index_add(0, ids.clamp_min(0), torch.where(listed, rows.to(wide), 0.0))
    return out.to(rows.dtype)


def sparse_by_id(ids: Tensor, rows: Tensor, num_items: int) -> Tensor:
    """As :func:`add_by_id`, as a coalesced sparse tensor over the touched rows."""
    listed = (ids >= 0).nonzero()[:, 0]
    touched, place = torch.unique(ids[listed], return_inverse=True)
    wide = wide_dtype(rows.dtype)
    sums = torch.zeros((len(touched), *rows.shape[1:]), dtype=wide, device=rows.device)
    sums.index_add_(0, place, rows[listed].to(wide))
    shape = (num_items, *rows.shape[1:])
    return torch.sparse_coo_tensor(touched[None], sums.to(rows.dtype), shape, check_invariants=False, is_coalesced=True)


@CATALOGUE_SAMPLED_CROSS_ENTROPY.register_function
class CatalogueSampledCrossEntropyFunction(torch.autograd.Function):
    """The gradient of ``catalogue_cross_entropy`` over sampled negatives."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = CATALOGUE_SAMPLED_CROSS_ENTROPY.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, items, *targets_and_negatives, scale, row_scale, bias, exclude, crow = inputs[:12]
        ignore_index, label_smoothing, prior, sparse_grad, precision = inputs[12:]
        ctx.set_materialize_grads(True)
        ctx.save_for_backward(query, items, *targets_and_negatives, row_scale, bias, exclude, crow, prior)
        ctx.scale, ctx.ignore_index, ctx.label_smoothing = scale, ignore_index, label_smoothing
        ctx.sparse_grad, ctx.precision = sparse_grad, precision
        ctx.forced = _dispatch.forced_backend()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, items, *lists, row_scale, bias, exclude, crow, prior = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = [needs[0], needs[1], needs[8], needs[9]]
        logits = LogitSpec(ctx.scale, row_scale, bias, exclude, crow)
        options = (ctx.ignore_index, ctx.label_smoothing, prior)
        # A forward-mode level turns gradients of gradients off, and still differentiates what runs here.
        if (torch.is_grad_enabled() or transforms_active()) and not torch.compiler.is_compiling():
            dq, di, ds, db = _differentiable(
                grad_loss, grad_lse, query, items, cast(Lists, tuple(lists)), logits, options, ctx.precision
            )
        else:
            args = (grad_loss, grad_lse, query, items, *lists, *logits.args(), *options, mask, ctx.precision)
            dq, ids, rows, ds, share = CATALOGUE_SAMPLED_CROSS_ENTROPY_BACKWARD.below_autograd(*args, forced=ctx.forced)
            to_table = sparse_by_id if ctx.sparse_grad else add_by_id
            di = to_table(ids, rows, items.shape[0]) if mask[1] else None
            db = add_by_id(ids, share, items.shape[0]) if mask[3] else None
        dq, di, ds, db = (g if wanted else None for g, wanted in zip((dq, di, ds, db), mask, strict=True))
        return dq, di, *(None,) * 6, ds, db, *(None,) * (_NUM_ARGS - 10)


# target, target_weights, target_crow, negatives, negatives_log_q
Lists: TypeAlias = "tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]"


def _differentiable(
    grad_loss: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    items: Tensor,
    lists: Lists,
    logits: LogitSpec,
    options: tuple[int, float, Tensor | None],
    precision: int,
) -> tuple[Tensor | None, ...]:
    """The first derivative on tensors that are connected to the graph: somebody differentiates this backward."""
    wide, num_items = wide_dtype(query.dtype), items.shape[0]
    sampled = Sampled.build(*lists, logits, *options, num_items, wide)
    row_scale, bias = (None if v is None else v.to(wide) for v in (logits.row_scale, logits.bias))
    with plain_arithmetic(query.device, precision):
        direction, scored, d_targets, d_negatives = reference.gradients(
            grad_loss.to(wide), grad_lse.to(wide), query.to(wide), items, row_scale, bias, sampled
        )
        scaled = scored.query
        negatives = sampled.negatives
        if negatives.dim() == 2:
            of_negatives, negative_rows = (
                d_negatives.flatten(),
                (d_negatives[:, :, None] * scaled[:, None]).flatten(0, 1),
            )
        else:
            of_negatives, negative_rows = d_negatives.sum(0), d_negatives.t() @ scaled
        target_rows = (d_targets[:, :, None] * scaled[:, None]).flatten(0, 1)
        ids = torch.cat([sampled.targets.flatten(), negatives.flatten()])
        di = add_by_id(ids, torch.cat([target_rows, negative_rows]), num_items).to(items.dtype)
        ds = db = None
        if logits.row_scale is not None:
            valid_query = torch.where(sampled.valid[:, None], query.to(wide), 0.0)
            ds = ((direction * valid_query).sum(1) * logits.scale).to(logits.row_scale.dtype)
        if logits.bias is not None:
            db = add_by_id(ids, torch.cat([d_targets.flatten(), of_negatives]), num_items).to(logits.bias.dtype)
        dq = scaled_query(direction, LogitSpec(logits.scale, row_scale)).to(query.dtype)
    return dq, di, ds, db
