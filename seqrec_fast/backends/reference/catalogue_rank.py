"""Place of the target in the full ranking: the number of items that score more, or as much with a smaller id."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._logits import LogitSpec, check_exclusion
from ._exact import RankingScan, neighbours
from ._scan import Block, Chunk, Plan, plain_arithmetic
from .catalogue_cross_entropy import check_targets

OPERATOR = "catalogue_rank"


def forward(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    scale: float,
    row_scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
    exclude_crow: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """The operator ``catalogue_rank``: int64 [B], −1 for ignored rows."""
    logits = LogitSpec(scale, row_scale, bias, exclude, exclude_crow)
    num_items = items.shape[0]
    check_exclusion(OPERATOR, logits, num_items)
    check_targets(OPERATOR, target, None, ignore_index, num_items)
    none = torch.full_like(target, -1)
    valid = (target != ignore_index) & (target >= 0) & (target < num_items)  # out of range on CUDA: −1
    if query.device.type == "cpu" and not bool(valid.all()):
        kept = valid.nonzero()[:, 0]
        return none.index_copy_(0, kept, _rank(query[kept], items, target[kept], logits.take_rows(kept)))
    if num_items == 0:
        return none
    return torch.where(valid, _rank(query, items, target.clamp(0, num_items - 1), logits), none)


def _rank(query: Tensor, items: Tensor, target: Tensor, logits: LogitSpec) -> Tensor:
    plan = Plan(query.shape[0], items.shape[0], query.shape[1])
    with plain_arithmetic(query.device):
        scan = RankingScan(query, items, logits, plan)
        goal = scan.exact.pairs(torch.arange(len(target), device=target.device), target)  # [B]
        goal = torch.where(torch.isnan(goal), float("-inf"), goal)
        counter = _Counter(scan, goal, target)
        for chunk in scan.scan.chunks():
            for block in plan.blocks:
                counter.add(block, chunk)
    return counter.rank


class _Counter:
    def __init__(self, scan: RankingScan, goal: Tensor, target: Tensor) -> None:
        self.scan = scan
        self.goal = goal  # [B], −∞ for a target that comes after every ranked item
        self.target = target  # [B]
        self.below, self.above = neighbours(goal)
        self.rank = torch.zeros_like(target)

    def add(self, block: Block, chunk: Chunk) -> None:
        """Counts the items of a chunk that rank above the targets of a block."""
        scores = self.scan.scores(block, chunk)  # [R, C]
        if self.scan.in_order:
            self.rank[block.rows] += self._ranks_above(scores.to(self.goal.dtype), block, chunk).sum(1)
            return
        error = self.scan.error(block, chunk)  # [R]
        certain = scores > (self.above[block.rows] + error)[:, None]
        possible = scores >= (self.below[block.rows] - error)[:, None]
        count = certain.sum(1)  # [R]
        self.rank[block.rows] += count
        if torch.equal(count, possible.sum(1)):
            return
        rows, places = possible.logical_xor_(certain).nonzero().unbind(1)
        value = self.scan.rounded(block, chunk, scores, rows, places, error)
        mine = rows + block.start
        better = (value > self.goal[mine]) | (
            (value == self.goal[mine]) & (places + chunk.span.start < self.target[mine]) & (value != float("-inf"))
        )
        self.rank.index_add_(0, mine, better.to(self.rank.dtype))

    def _ranks_above(self, values: Tensor, block: Block, chunk: Chunk) -> Tensor:
        ids = torch.arange(chunk.span.start, chunk.span.stop, device=values.device)
        goal, target = self.goal[block.rows, None], self.target[block.rows, None]
        return (values > goal) | ((values == goal) & (ids < target) & (values != float("-inf")))
