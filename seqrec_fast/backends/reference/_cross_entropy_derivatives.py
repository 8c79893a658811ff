"""Derivatives of cross-entropy over the catalogue beyond the first, and its tangent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..._logits import LogitSpec, wide_dtype
from ._derivatives import Formula, Results, Tensors, hidden_pairs, probabilities, tangent_of, vjp
from ._scan import scaled_query
from ._targets import Smoothing, Targets, linear_part


@dataclass
class CrossEntropyGradient(Formula):
    """The first derivative of :mod:`catalogue_cross_entropy`, in the wide dtype.

    by_row: query [B, d], grad_loss, grad_lse, lse [B], row_scale [B] or absent
    by_item: items, bias (or absent)
    results by row: query, row_scale; by item: items, bias
    """

    by_row: Tensors
    by_item: Tensors
    logits: LogitSpec
    targets: Targets
    smoothing: Smoothing | None
    label_smoothing: float
    has_linear = True

    def _logits(self, by_row: Tensors, by_item: Tensors) -> LogitSpec:
        return replace(self.logits, row_scale=by_row.get("row_scale"), bias=by_item.get("bias"))

    def scores(self, by_row: Tensors, by_item: Tensors) -> tuple[Tensor, Tensor]:
        """(scaled query [B, d], scores [B, C])."""
        query = scaled_query(by_row["query"], self._logits(by_row, by_item))
        scores = query @ by_item["items"].t()
        if "bias" in by_item:
            scores = scores + torch.where(by_item["bias"] == float("-inf"), 0.0, by_item["bias"])
        return query, scores

    def hidden(self, span: slice) -> Tensor | None:
        num_rows, num_items = self.by_row["query"].shape[0], self.by_item["items"].shape[0]
        return hidden_pairs(self.logits, self.targets, num_rows, num_items, span)

    @property
    def lse_weight(self) -> Tensor:
        """A, [B]."""
        total = self.targets.total * (1 - self.label_smoothing)
        if self.smoothing is None:
            return total
        return total + self.label_smoothing * self.smoothing.ranked.to(total.dtype)

    def moving(self, by_row: Tensor) -> Tensor:
        """0 in the rows whose loss is a constant: those ignored, and those in which only the target remains."""
        fixed = ~self.targets.valid
        if self.smoothing is not None:
            fixed = fixed | self.smoothing.sure
        return torch.where(fixed, 0.0, by_row)

    def mixture(self, span: slice, dtype: torch.dtype) -> Tensor:
        """u [B, C], what smoothing mixes in."""
        assert self.smoothing is not None
        share = torch.where(self.smoothing.ranked, 1 / self.smoothing.mass, 0.0)[:, None] * self.smoothing.full[span]
        hidden = self.hidden(span)
        return (share if hidden is None else torch.where(hidden, 0.0, share)).to(dtype)

    def chunk(self, by_row: Tensors, by_item: Tensors, span: slice) -> Results:
        query, scores = self.scores(by_row, by_item)
        p = probabilities(scores, by_row["lse"], self.hidden(span))  # [B, C]
        grad_loss = self.moving(by_row["grad_loss"])
        weight = grad_loss * self.lse_weight + by_row["grad_lse"]
        ds = torch.where(self.targets.valid, weight, 0.0)[:, None] * p  # [B, C]
        if self.smoothing is not None:
            ds = ds - (self.label_smoothing * grad_loss)[:, None] * self.mixture(span, p.dtype)
        direction = ds @ by_item["items"]  # [B, d]
        rows = {"query": scaled_query(direction, self._logits(by_row, by_item))}
        if "row_scale" in by_row:
            rows["row_scale"] = (direction * by_row["query"]).sum(1) * self.logits.scale
        items = {"items": ds.t() @ query}
        if "bias" in by_item:
            items["bias"] = ds.sum(0)
        return rows, items

    def linear(self, by_row: Tensors, by_item: Tensors) -> Results:
        names = [name for name in ("query", "row_scale") if name in by_row]
        inputs = ({name: by_row[name] for name in names}, by_item)
        _, pull = vjp(self.linear_scores, *inputs)
        rows, items = pull(-self.moving(by_row["grad_loss"]))
        return rows, items

    def linear_scores(self, by_row: Tensors, by_item: Tensors) -> Tensor:
        """The targets' part of L, [B]."""
        # The bias decides which targets have a score: by the value given, not by one that is being differentiated.
        logits = self._logits(by_row, by_item)
        return linear_part(by_row["query"], by_item["items"], logits, self.targets, self.label_smoothing)


def tangent(formula: CrossEntropyGradient, by_row: Tensors, by_item: Tensors) -> tuple[Tensor, Tensor]:
    """Tangents of loss and lse [B], given those of query, row_scale, items and bias: dlse = Σᵢ pᵢ·dsᵢ, dloss = A·dlse − dL."""
    rows = {name: formula.by_row[name] for name in by_row}
    lse = formula.by_row["lse"]
    d_lse, d_mean = torch.zeros_like(lse), torch.zeros_like(lse)
    for span in formula.spans():
        items = {name: tensor[span] for name, tensor in formula.by_item.items()}
        d_items = {name: tensor[span] for name, tensor in by_item.items()}
        scores = formula.scores(rows, items)[1]
        d_scores = tangent_of(lambda r, i: formula.scores(r, i)[1], (rows, items), (by_row, d_items))
        d_lse = d_lse + (probabilities(scores, lse, formula.hidden(span)) * d_scores).sum(1)
        if formula.smoothing is not None:
            d_mean = d_mean + (formula.mixture(span, lse.dtype) * d_scores).sum(1)
    d_lse = torch.where(formula.targets.valid, d_lse, 0.0)
    d_linear = tangent_of(formula.linear_scores, (rows, formula.by_item), (by_row, by_item))
    d_linear = d_linear + formula.label_smoothing * d_mean
    return formula.moving(formula.lse_weight * d_lse - d_linear), d_lse


def make(
    query: Tensor,
    items: Tensor,
    logits: LogitSpec,
    targets: Targets,
    smoothing: Smoothing | None,
    label_smoothing: float,
    **by_row: Tensor,
) -> CrossEntropyGradient:
    """The formula with everything in the wide dtype; ``by_row``: lse, and for the derivative the incoming gradients."""
    wide = wide_dtype(query.dtype)
    by_row["lse"] = torch.where(targets.valid, by_row["lse"], float("inf"))  # no probabilities in ignored rows
    rows = {"query": torch.where(targets.valid[:, None], query, 0.0), **by_row}  # ignored rows may hold anything
    if logits.row_scale is not None:
        rows["row_scale"] = logits.row_scale
    of_items = {"items": items}
    if logits.bias is not None:
        of_items["bias"] = logits.bias
    return CrossEntropyGradient(
        {name: tensor.to(wide) for name, tensor in rows.items()},
        {name: tensor.to(wide) for name, tensor in of_items.items()},
        logits,
        targets,
        smoothing,
        label_smoothing,
    )
