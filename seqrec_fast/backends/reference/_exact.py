"""Scores as rankings define them, the same bits on every machine.

The score of a pair is its fp64 dot product summed in ascending order of k, times the scale, plus the bias, without contraction,
rounded once to fp32 (fp64 input: not rounded). A matrix product sums in another order; but it is fp64 too, so it decides all
pairs whose score is not within its error of the value they are compared with, and only the few others are summed in order.

Error of the product. Any order of summation, fused or not, of d products errs by at most γ_d·Σ|q_k·v_k| ≤ γ_d·‖q‖·‖v‖ with
γ_d = d·u/(1 − d·u), u = 2⁻⁵³ (Higham 2002, section 3.1), and so do the scale and the bias that the scan folds into the product
with a few u more. Both this product and the sum in order err, hence 2·(d + 8)·u·(|scale|·‖q‖·‖v‖ + |bias|). Numbers of fp32 and
smaller formats cannot overflow in fp64, but a scale folded into them can; then every score is summed in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._logits import LogitSpec, wide_dtype
from ._scan import Block, Chunk, Exclusion, Plan, Scan, dead_items

# Pairs that are summed in order at a time: their vectors are gathered.
GATHERED_NUMBERS = 1 << 22
# |q|, |v| < 2^128 and d < 2^60: up to this scale a folded product stays finite.
LARGEST_FOLDED_SCALE = 2.0**600
# Above this share of a buffer, summing the whole of it in order is cheaper than gathering.
DENSE_SHARE = 1 / 16


class Exact:
    """Scores of pairs, and of whole buffers, in order.

    Args:
        query: [B, d].
        items: [I, d].
        logits: scale, row_scale, bias. Exclusion is the caller's.
    """

    def __init__(self, query: Tensor, items: Tensor, logits: LogitSpec) -> None:
        self.query = query.double()  # [B, d]
        self.items = items
        self.scale = logits.scale
        self.row_scale = None if logits.row_scale is None else logits.row_scale.double()  # [B]
        self.bias = None if logits.bias is None else logits.bias.double()  # [I]
        self.dead = dead_items(logits.bias)  # bool [I]
        self.dtype = wide_dtype(query.dtype)  # what a score is rounded to

    def pairs(self, rows: Tensor, items: Tensor) -> Tensor:
        """[N] rounded scores; rows and items int64 [N], in range."""
        width = max(self.query.shape[1], 1)
        step = max(GATHERED_NUMBERS // width, 1)
        parts = [
            self._pairs(rows[start : start + step], items[start : start + step]) for start in range(0, len(rows), step)
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype, device=rows.device)

    def _pairs(self, rows: Tensor, items: Tensor) -> Tensor:
        left, right = self.query[rows].t().contiguous(), self.items[items].double().t().contiguous()  # [d, N]
        sums = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for product in left.mul_(right):
            sums += product
        sums *= self.scale
        if self.row_scale is not None:
            sums *= self.row_scale[rows]
        if self.bias is not None:
            sums += self.bias[items]
        if self.dead is not None:
            sums.masked_fill_(self.dead[items], float("-inf"))
        return sums.to(self.dtype)

    def fill(self, scores: Tensor, block: Block, chunk: Chunk) -> None:
        """Writes the scores [R, C] of a block and chunk in fp64, not rounded, without exclusion."""
        query, vectors = self.query[block.rows], self.items[chunk.span].double()
        product = torch.empty_like(scores)
        scores.zero_()
        for q, v in zip(query.t(), vectors.t().contiguous(), strict=True):
            scores += torch.mul(q[:, None], v, out=product)
        scores *= self.scale
        if self.row_scale is not None:
            scores *= self.row_scale[block.rows, None]
        if self.bias is not None:
            scores += self.bias[chunk.span]


class RankingScan:
    """fp64 scores of the catalogue with a bound on how far they are from the scores in order.

    Args:
        query, items, logits: of the call.
        plan: how the scan is cut.
        in_order: sum every score in order, so that the bound is 0. Needed for fp64 input, where nothing is rounded; and where
            picking out the undecided pairs would be a synchronisation.
    """

    def __init__(
        self, query: Tensor, items: Tensor, logits: LogitSpec, plan: Plan, in_order: bool | None = None
    ) -> None:
        self.plan = plan
        self.exact = Exact(query, items, logits)
        if in_order is None:
            in_order = query.dtype == torch.float64 or query.device.type != "cpu" or _scale_overflows(logits)
        self.in_order = in_order
        self.scan = Scan(query, items, logits, plan, Exclusion(logits, plan), dtype=torch.float64)
        norms: Tensor = self.scan.query.norm(dim=1)  # [B]
        self._norms = torch.where(torch.isfinite(norms), norms, 0.0)
        self._bias: Tensor | None = None
        if self.scan.bias is not None:
            self._bias = torch.where(torch.isfinite(self.scan.bias), self.scan.bias.abs(), 0.0)  # [I]

    def scores(self, block: Block, chunk: Chunk) -> Tensor:
        """[R, C] fp64, −∞ where excluded, valid until the next call."""
        return self.ordered(block, chunk) if self.in_order else self.scan.scores(block, chunk)

    def ordered(self, block: Block, chunk: Chunk) -> Tensor:
        """As :meth:`scores`, summed in order."""
        scores, flat = self.scan.buffer(block, chunk)
        self.exact.fill(scores, block, chunk)
        self.scan.exclusion.apply(scores, flat, block, chunk.index, transposed=False)
        return scores

    def error(self, block: Block, chunk: Chunk) -> Tensor:
        """[R] bound on |scores − scores in order|."""
        rows = self._norms[block.rows]
        if self.in_order:
            return torch.zeros_like(rows)
        of_items = chunk.vectors.norm(dim=1)
        # A vector that is not finite gives a score that is not, by any order of summation: it needs no margin.
        size = rows * torch.where(torch.isfinite(of_items), of_items, 0.0).amax()
        if self._bias is not None:
            size = size + self._bias[chunk.span].amax()
        return size * (2 * (self.scan.width + 8) * 2.0**-53)

    def rounded(
        self, block: Block, chunk: Chunk, scores: Tensor, rows: Tensor, places: Tensor, error: Tensor
    ) -> Tensor:
        """[N] rounded scores of pairs of a buffer: rows within the block, places within the chunk, not excluded."""
        dtype = self.exact.dtype
        near = scores[rows, places]
        if self.in_order:
            return near.to(dtype)
        margin = error[rows]
        value = (near - margin).to(dtype)
        unsure = (value != (near + margin).to(dtype)).nonzero()[:, 0]  # NaN is unsure
        if len(unsure) > DENSE_SHARE * scores.numel():
            return self.ordered(block, chunk)[rows, places].to(dtype)
        if len(unsure):
            value[unsure] = self.exact.pairs(rows[unsure] + block.start, places[unsure] + chunk.span.start)
        return value


def _scale_overflows(logits: LogitSpec) -> bool:
    """Whether a sum of scaled products may differ from the scaled sum by ±∞ or NaN. CPU only: it looks at values."""
    largest = abs(logits.scale)
    if logits.row_scale is not None and logits.row_scale.numel():
        of_rows = float(logits.row_scale.double().abs().nan_to_num(nan=float("inf"), posinf=float("inf")).max())
        largest = max(largest, of_rows, largest * of_rows)
    return not largest <= LARGEST_FOLDED_SCALE


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 bounds: whatever rounds to at least (at most) ``values`` is at least (at most) the first (second)."""
    infinity = torch.full_like(values, float("inf"))
    return torch.nextafter(values, -infinity).double(), torch.nextafter(values, infinity).double()
