"""Attention of query rows over the catalogue, chunk by chunk, with the backward written out.

    p[r, i] = exp(s[r, i] − lse[r])        g[r] = Σᵢ p[r, i]·v[i]

    ds[r, i] = p[r, i]·(dg[r]·v[i] − dg[r]·g[r] + dlse[r])
    dq[r] = scale_r·Σᵢ ds[r, i]·k[i]   dk[i] = Σ_r ds[r, i]·scale_r·q[r]   dv[i] = Σ_r p[r, i]·dg[r]   dbias[i] = Σ_r ds[r, i]

Heads are independent problems on slices of the widths that share scale, bias and exclusion. Source: Vaswani et al. (2017); the
backward is that of Dao et al. (2022), "FlashAttention", appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._logits import LogitSpec, check_exclusion, wide_dtype
from ._scan import Exclusion, Plan, Scan, add_product, all_finite, plain_arithmetic
from ._softmax import softmax_scan

OPERATOR = "catalogue_attention"


def _heads(tensor: Tensor, num_heads: int) -> list[Tensor]:
    """[N, H·d] → H views [N, d]."""
    return list(tensor.unflatten(1, (num_heads, tensor.shape[1] // num_heads)).unbind(1))


def _plan(query: Tensor, keys: Tensor, num_heads: int) -> Plan:
    return Plan(query.shape[0], keys.shape[0], query.shape[1] // num_heads)


def forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    num_heads: int,
    scale: float,
    row_scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
    exclude_crow: Tensor | None,
    precision: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``catalogue_attention``: context [B, d_v] in the query's dtype and lse [B, heads] in the wide one."""
    logits = LogitSpec(scale, row_scale, bias, exclude, exclude_crow)
    check_exclusion(OPERATOR, logits, keys.shape[0])
    table = keys if values is None else values
    context = query.new_empty((query.shape[0], table.shape[1]))
    lse = query.new_empty((query.shape[0], num_heads), dtype=wide_dtype(query.dtype))
    plan = _plan(query, keys, num_heads)
    exclusion = Exclusion(logits, plan)
    with plain_arithmetic(query.device, precision):
        for h, (q, k, v, g) in enumerate(
            zip(*(_heads(t, num_heads) for t in (query, keys, table, context)), strict=True)
        ):
            scan = Scan(q, k, logits, plan, exclusion, precision=precision)
            result = softmax_scan(scan, None if values is None else v, context=True)
            assert result.context is not None
            g.copy_(result.context)
            lse[:, h] = result.lse
    return context, lse


def backward(
    grad_context: Tensor,
    grad_lse: Tensor,
    context: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    num_heads: int,
    scale: float,
    row_scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
    exclude_crow: Tensor | None,
    output_mask: Sequence[bool],
    precision: int,
) -> tuple[Tensor, ...]:
    """The operator ``catalogue_attention_backward``: gradients of query, keys, values, row_scale and bias.

    [0] where ``output_mask`` is false. Without ``values`` the gradient of the keys holds both of their roles.
    """
    logits = LogitSpec(scale, row_scale, bias, exclude, exclude_crow)
    wide = lse.dtype
    table = keys if values is None else values
    needs_query = output_mask[0] or output_mask[3]
    d_query, d_keys, d_values, d_bias = (
        torch.zeros(shape, dtype=wide, device=query.device) if wanted else None
        for shape, wanted in (
            (query.shape, needs_query),
            (keys.shape, output_mask[1]),
            (table.shape, output_mask[2] and values is not None),
            (keys.shape[:1], output_mask[4]),
        )
    )
    if values is None:
        d_values = d_keys
    plan = _plan(query, keys, num_heads)
    exclusion = Exclusion(logits, plan)
    gradients = [d_query, d_keys, d_values]
    slices = [[None] * num_heads if g is None else _heads(g, num_heads) for g in gradients]
    per_head = zip(*(_heads(t, num_heads) for t in (query, keys, table, grad_context, context)), *slices, strict=True)
    with plain_arithmetic(query.device, precision):
        for h, (q, k, v, dg, g, dq, dk, dv) in enumerate(per_head):
            scan = Scan(q, k, logits, plan, exclusion, precision=precision)
            dg = dg.to(wide)
            offset = (dg * g.to(wide)).sum(1) - grad_lse[:, h].to(wide)  # [B]
            _backward_head(scan, None if values is None else v, dg, offset, lse[:, h], dq, dk, dv, d_bias)
        d_row_scale = None
        if needs_query and d_query is not None:
            if row_scale is not None and output_mask[3]:
                d_row_scale = (d_query * query.to(wide)).sum(1).mul_(scale).to(row_scale.dtype)
            if output_mask[0]:
                factor = scale if row_scale is None else scale * row_scale.to(wide)[:, None]
                d_query.mul_(factor)

    def of(gradient: Tensor | None, dtype: torch.dtype, wanted: bool) -> Tensor:
        # Not one empty tensor for all: the results of an operator do not share memory.
        return gradient.to(dtype) if wanted and gradient is not None else query.new_empty(0, dtype=dtype)

    return (
        of(d_query, query.dtype, output_mask[0]),
        of(d_keys, keys.dtype, output_mask[1]),
        of(d_values, table.dtype, output_mask[2] and values is not None),
        of(d_row_scale, wide if row_scale is None else row_scale.dtype, output_mask[3]),
        of(d_bias, wide if bias is None else bias.dtype, output_mask[4]),
    )


def _backward_head(
    scan: Scan,
    values: Tensor | None,
    grad_context: Tensor,
    offset: Tensor,
    lse: Tensor,
    d_query: Tensor | None,
    d_keys: Tensor | None,
    d_values: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Adds to the gradients of one head; ``d_query`` is left without its scale. ``offset`` [B] = dg·g − dlse."""
    # A row in which nothing has a probability: its scores are all −∞, and so stay under any finite shift.
    scan.set_shift(torch.where(lse == float("-inf"), 0.0, lse))
    blocks = scan.plan.blocks
    needs_scores = d_query is not None or d_keys is not None or d_bias is not None
    product = scan.query.new_empty(scan.plan.block_rows * scan.plan.chunk_items if needs_scores else 0)
    rows_finite = all_finite(scan.query) and all_finite(grad_context)
    for chunk in scan.chunks():
        vectors = chunk.vectors if values is None else values[chunk.span].to(scan.dtype)  # [C, d_v]
        items_finite = chunk.finite and (values is None or all_finite(vectors))
        for block in blocks:
            p = scan.transposed(block, chunk).exp_()  # [C, R]
            dg = grad_context[block.rows]  # [R, d_v]
            if d_values is not None:
                add_product(d_values[chunk.span], p, dg, rows_finite)
            if not needs_scores:
                continue
            ds = product[: p.numel()].view(p.shape)  # [C, R]
            torch.mm(vectors, dg.t(), out=ds)
            ds.sub_(offset[block.rows]).mul_(p)
            if not (items_finite and rows_finite):
                ds.masked_fill_(p == 0, 0.0)  # 0 · NaN: a pair of no probability has no gradient
            if d_keys is not None:
                add_product(d_keys[chunk.span], ds, scan.query[block.rows], rows_finite)
            if d_query is not None:
                add_product(d_query[block.rows], ds.t(), chunk.vectors, items_finite)
            if d_bias is not None:
                d_bias[chunk.span] += ds.sum(1)
