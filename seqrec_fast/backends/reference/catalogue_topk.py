"""The k best items of every row, in the order (score descending, id ascending).

A buffer of scores is compared with each row's k-th best so far; the few items that pass are scored in order, and merged by a
stable sort: the ids of a later chunk are larger, so equal scores stay in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._logits import LogitSpec, check_exclusion, wide_dtype
from ._exact import RankingScan, neighbours
from ._scan import Block, Chunk, Plan, plain_arithmetic, scaled_query
from ._targets import PAIRS

OPERATOR = "catalogue_topk"
CROWDED = 4  # passing items per place; with more, it pays to find the buffer's own k-th best first


def forward(
    query: Tensor,
    items: Tensor,
    k: int,
    scale: float,
    row_scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
    exclude_crow: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operator ``catalogue_topk``: values [B, k] (fp32, or fp64) and ids int64 [B, k]; −∞ and −1 where items run out."""
    logits = LogitSpec(scale, row_scale, bias, exclude, exclude_crow)
    check_exclusion(OPERATOR, logits, items.shape[0])
    kept = min(k, items.shape[0])
    plan = Plan(query.shape[0], items.shape[0], query.shape[1], least_items=2 * kept)
    with plain_arithmetic(query.device):
        best = _Best(RankingScan(query, items, logits, plan), kept)
        for chunk in best.scan.scan.chunks():
            for block in plan.blocks:
                best.add(block, chunk)
    ranked = best.values != float("-inf")
    values, ids = best.values + 0.0, torch.where(ranked, best.ids, -1)  # −0 → +0
    if kept < k:
        values = torch.nn.functional.pad(values, (0, k - kept), value=float("-inf"))
        ids = torch.nn.functional.pad(ids, (0, k - kept), value=-1)
    return values, ids


class _Best:
    """The k best of every row so far, sorted."""

    def __init__(self, scan: RankingScan, k: int) -> None:
        self.scan = scan
        self.k = k
        shape, device = (scan.plan.num_rows, k), scan.scan.query.device
        self.values = torch.full(shape, float("-inf"), dtype=scan.exact.dtype, device=device)
        self.ids = torch.full(shape, -1, dtype=torch.int64, device=device)

    def add(self, block: Block, chunk: Chunk) -> None:
        scores = self.scan.scores(block, chunk)  # [R, C]
        if self.scan.in_order and scores.device.type != "cpu":
            # Without a look at how many pass: all of them are sorted.
            values = scores.to(self.values.dtype)
            ids = torch.arange(chunk.span.start, chunk.span.stop, device=values.device)
            self._merge(block, torch.where(torch.isnan(values), float("-inf"), values), ids.expand_as(values))
            return
        error = self.scan.error(block, chunk)  # [R]
        least = self.values[block.rows, -1]  # [R], what an item must reach
        rows, places = torch.empty(0), torch.empty(0)
        crowded = bool((least == float("-inf")).any())  # at first everything passes
        if not crowded:
            rows, places = self._passing(scores, least, error)
            crowded = len(rows) > CROWDED * self.k * block.size
        if crowded:
            if scores.shape[1] > self.k:
                comparable = torch.where(torch.isnan(scores), float("-inf"), scores)
                kth = comparable.topk(self.k, dim=1, sorted=False).values.amin(1)
                least = torch.maximum(least, (kth - error).to(least.dtype))
            rows, places = self._passing(scores, least, error)
        if len(rows) == 0:
            return
        values = self.scan.rounded(block, chunk, scores, rows, places, error)
        count = torch.bincount(rows, minlength=block.size)
        slot = torch.arange(len(rows)) - (count.cumsum(0) - count)[rows]
        shape = (block.size, int(count.max()))
        new_values = torch.full(shape, float("-inf"), dtype=values.dtype)
        new_ids = torch.full(shape, -1, dtype=torch.int64)
        new_values[rows, slot] = torch.where(torch.isnan(values), float("-inf"), values)
        new_ids[rows, slot] = places + chunk.span.start
        self._merge(block, new_values, new_ids)

    @staticmethod
    def _passing(scores: Tensor, least: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and places, by row and then by id, of what may round to at least ``least``. NaN and −∞ never do."""
        below, _ = neighbours(least)
        bound = (below - error).clamp_min(-torch.finfo(scores.dtype).max)
        rows, places = (scores >= bound[:, None]).nonzero().unbind(1)
        return rows, places

    def _merge(self, block: Block, values: Tensor, ids: Tensor) -> None:
        values = torch.cat([self.values[block.rows], values], dim=1)
        ids = torch.cat([self.ids[block.rows], ids], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        self.values[block.rows] = values[:, : self.k]
        self.ids[block.rows] = ids.gather(1, order[:, : self.k])


def gathered_scores(query: Tensor, items: Tensor, logits: LogitSpec, ids: Tensor) -> Tensor:
    """Scores [B, k] of the listed items in differentiable PyTorch; 0 for id −1. For derivatives. Memory: B·k·d."""
    listed = ids >= 0
    places = ids.clamp_min(0)
    if items.shape[0] == 0:
        return scaled_query(query, logits).sum(1, keepdim=True) * torch.zeros(
            ids.shape, dtype=query.dtype, device=ids.device
        )
    scores = torch.einsum("bd,bkd->bk", scaled_query(query, logits), items[places])
    if logits.bias is not None:
        scores = scores + logits.bias[places]
    return torch.where(listed, scores, 0.0)


def backward(
    grad_values: Tensor,
    ids: Tensor,
    query: Tensor,
    items: Tensor,
    scale: float,
    row_scale: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The operator ``catalogue_topk_backward``: gradients of query, items, row_scale and bias; [0] where the mask is false."""
    wide = wide_dtype(query.dtype)
    logits = LogitSpec(scale, row_scale)
    d_query = torch.zeros(query.shape, dtype=wide, device=query.device)  # without its scale
    d_items = torch.zeros(items.shape if output_mask[1] else (0,), dtype=wide, device=query.device)
    d_bias = torch.zeros(items.shape[:1] if output_mask[3] else (0,), dtype=wide, device=query.device)
    step = max(PAIRS // max(ids.shape[1], 1), 1)
    with plain_arithmetic(query.device):
        scaled = scaled_query(query.to(wide), logits)
        for start in range(0, len(ids) if items.shape[0] else 0, step):
            rows = slice(start, start + step)
            places = ids[rows].clamp_min(0)  # [R, k]
            grad = torch.where(ids[rows] >= 0, grad_values[rows].to(wide), 0.0)
            if output_mask[0] or output_mask[2]:
                d_query[rows] = torch.bmm(grad[:, None], items[places].to(wide))[:, 0]
            if output_mask[1]:
                d_items.index_add_(0, places.reshape(-1), (grad[:, :, None] * scaled[rows, None]).flatten(0, 1))
            if output_mask[3]:
                d_bias.index_add_(0, places.reshape(-1), grad.reshape(-1))
        d_scale = query.new_empty(0, dtype=wide if row_scale is None else row_scale.dtype)
        if output_mask[2] and row_scale is not None:
            d_scale = ((d_query * query.to(wide)).sum(1) * scale).to(row_scale.dtype)
        d_query = scaled_query(d_query, logits).to(query.dtype) if output_mask[0] else query.new_empty(0)
    return d_query, d_items.to(items.dtype), d_scale, d_bias.to(wide if bias is None else bias.dtype)
