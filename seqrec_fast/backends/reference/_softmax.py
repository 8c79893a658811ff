"""Log-sum-exp and weighted sum over the catalogue, chunk by chunk.

Every row keeps a shift c, the sum Σ exp(s − c) and, where asked for, Σ exp(s − c)·v. The first chunk's largest score is a shift
that is nearly always good for the rest of the catalogue: exp overflows only where a later score is 88 (fp32) above it. So the
later chunks are summed without looking for their maximum, and a scan whose sums are not finite, or whose first chunk left a row
without any score, is done again with a running maximum (Milakov & Gimelshein 2018, "Online normalizer calculation").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._scan import Block, Chunk, Pairs, Scan, add_product, all_finite


@dataclass
class Softmax:
    """What a scan leaves behind. B rows.

    Attributes:
        shift: [B].
        log_total: [B], log Σ exp(s − shift); −∞ where nothing has a probability.
        context: [B, d_v], Σ p·v, or None; 0 where nothing has a probability.
        targets: [N], score − shift of the targets' pairs, or None.
    """

    shift: Tensor
    log_total: Tensor
    context: Tensor | None
    targets: Tensor | None

    @property
    def lse(self) -> Tensor:
        return self.shift + self.log_total


class _Sums:
    def __init__(self, scan: Scan, width: int, targets: Pairs | None) -> None:
        num_rows, new = scan.plan.num_rows, scan.query.new_zeros
        self.scan = scan
        self.targets = targets
        self.shift = new(num_rows)  # [B]
        self.total = new(num_rows)  # [B]
        self.context = new((num_rows, width))  # [B, d_v], d_v = 0 where not asked for
        self.target = new(0 if targets is None else len(targets))  # [N] score − shift at its time
        self.target_shift = torch.zeros_like(self.target)  # [N]

    def raise_shift(self, scores: Tensor, block: Block, *, first: bool) -> None:
        """Makes the largest score of this buffer the shift of the rows where it is larger, or where there was none."""
        rows = block.rows
        top = scores.amax(dim=1)  # [R], relative to the shift so far
        step = top if first else torch.where(self.total[rows] > 0, top.clamp_min(0), top)
        step = torch.where(torch.isfinite(step), step, 0)
        scores.sub_(step[:, None])
        if not first:
            decay = torch.exp(-step.clamp_min(0))  # a row without a sum so far may step down: nothing to scale
            self.total[rows] *= decay
            self.context[rows] *= decay[:, None]
        self.shift[rows] += step

    def keep_targets(self, scores: Tensor, block: Block, chunk: Chunk) -> None:
        if self.targets is None:
            return
        place, which, inside = self.targets.at(block, chunk.index, transposed=False)
        rows = self.targets.rows[which]
        found, shift = scores.new_empty(0), self.shift[rows]
        if inside is None:
            found = scores.view(-1)[place]
        else:
            found = torch.where(inside, scores.view(-1)[place.clamp_max(scores.numel() - 1)], self.target[which])
            shift = torch.where(inside, shift, self.target_shift[which])
        self.target[which] = found
        self.target_shift[which] = shift

    def add(self, scores: Tensor, block: Block, values: Tensor | None, finite: bool) -> None:
        weights = scores.exp_()
        self.total[block.rows] += weights.sum(dim=1)
        if values is not None:
            add_product(self.context[block.rows], weights, values, finite)

    def finite(self) -> bool:
        return all_finite(self.total) and all_finite(self.context)


def softmax_scan(scan: Scan, values: Tensor | None = None, targets: Pairs | None = None, *, context: bool) -> Softmax:
    """Softmax of every row of ``scan`` over the catalogue.

    Args:
        values: [I, d_v], default the items.
        targets: pairs whose scores are wanted.
        context: whether Σ p·v is wanted.
    """
    careful = scan.query.device.type != "cpu"  # where looking at the sums would be a synchronisation
    sums = _run(scan, values, targets, context, careful)
    if sums is None or not (careful or sums.finite()):
        sums = _run(scan, values, targets, context, True)
    assert sums is not None
    total = sums.total
    relative = sums.target + (sums.target_shift - sums.shift[targets.rows]) if targets is not None else None
    divisor = torch.where(total == 0, 1.0, total)[:, None]
    return Softmax(sums.shift, total.log(), sums.context.div_(divisor) if context else None, relative)


def _run(scan: Scan, values: Tensor | None, targets: Pairs | None, context: bool, careful: bool) -> _Sums | None:
    """One pass; None where it turns out that it must be a careful one."""
    table = scan.items if values is None else values
    sums = _Sums(scan, table.shape[1] if context else 0, targets)
    scan.set_shift(None)
    for chunk in scan.chunks():
        first = chunk.index == 0
        weighed = None
        if context:
            weighed = chunk.vectors if values is None else values[chunk.span].to(scan.dtype)  # [C, d_v]
        finite = weighed is None or (chunk.finite if values is None else all_finite(weighed))
        for block in scan.plan.blocks:
            scores = scan.scores(block, chunk)  # [R, C]
            if first or careful:
                sums.raise_shift(scores, block, first=first)
            sums.keep_targets(scores, block, chunk)
            sums.add(scores, block, weighed, finite)
        if first or careful:
            scan.set_shift(sums.shift)
        if first and not careful and scan.plan.num_chunks > 1 and bool((sums.total == 0).any()):
            return None  # rows without a score so far have no shift that later scores could be measured by
    return sums
