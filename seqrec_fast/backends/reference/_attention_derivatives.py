"""Derivatives of catalogue attention beyond the first, and its tangent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..._logits import LogitSpec, wide_dtype
from ._derivatives import Formula, Results, Tensors, hidden_pairs, probabilities, tangent_of
from ._scan import plain_arithmetic, scaled_query


def _heads(tensor: Tensor, num_heads: int) -> Tensor:
    """[N, H·d] → [H, N, d]."""
    parts: Tensor = tensor.unflatten(1, (num_heads, tensor.shape[1] // num_heads))
    return parts.transpose(0, 1)


def _join(tensor: Tensor) -> Tensor:
    """[H, N, d] → [N, H·d]."""
    return tensor.transpose(0, 1).flatten(1)


@dataclass
class AttentionGradient(Formula):
    """The first derivative of :mod:`catalogue_attention`, in the wide dtype.

    by_row: query, grad_context, context [B, ·], grad_lse, lse [B, H], row_scale [B] or absent
    by_item: keys, values (or absent), bias (or absent)
    results by row: query, row_scale; by item: keys, values, bias
    """

    by_row: Tensors
    by_item: Tensors
    logits: LogitSpec
    num_heads: int

    def _scores(self, by_row: Tensors, by_item: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """(scaled query [H, B, d], keys [H, C, d], scores [H, B, C])."""
        logits = replace(self.logits, row_scale=by_row.get("row_scale"))
        query = _heads(scaled_query(by_row["query"], logits), self.num_heads)
        keys = _heads(by_item["keys"], self.num_heads)
        scores = query @ keys.transpose(1, 2)
        if "bias" in by_item:
            scores = scores + torch.where(by_item["bias"] == float("-inf"), 0.0, by_item["bias"])
        return query, keys, scores

    def _hidden(self, span: slice) -> Tensor | None:
        num_rows, num_items = self.by_row["query"].shape[0], self.by_item["keys"].shape[0]
        return hidden_pairs(self.logits, None, num_rows, num_items, span)

    def chunk(self, by_row: Tensors, by_item: Tensors, span: slice) -> Results:
        query, keys, scores = self._scores(by_row, by_item)
        p = probabilities(scores, by_row["lse"].t(), self._hidden(span))  # [H, B, C]
        grad_context = _heads(by_row["grad_context"], self.num_heads)  # [H, B, d_v]
        offset = (grad_context * _heads(by_row["context"], self.num_heads)).sum(-1) - by_row["grad_lse"].t()  # [H, B]
        values = _heads(by_item.get("values", by_item["keys"]), self.num_heads)  # [H, C, d_v]
        ds = p * (grad_context @ values.transpose(1, 2) - offset[..., None])  # [H, B, C]
        direction = _join(ds @ keys)  # [B, d]
        logits = replace(self.logits, row_scale=by_row.get("row_scale"))
        rows = {"query": scaled_query(direction, logits)}
        if "row_scale" in by_row:
            rows["row_scale"] = (direction * by_row["query"]).sum(1) * self.logits.scale
        d_values = _join(p.transpose(1, 2) @ grad_context)
        d_keys = _join(ds.transpose(1, 2) @ query)
        items = {"keys": d_keys, "values": d_values} if "values" in by_item else {"keys": d_keys + d_values}
        if "bias" in by_item:
            items["bias"] = ds.sum((0, 1))
        return rows, items


def tangent(formula: AttentionGradient, by_row: Tensors, by_item: Tensors) -> tuple[Tensor, Tensor]:
    """Tangents of context [B, d_v] and lse [B, H], given those of query, row_scale, keys, values and bias.

    dlse = Σᵢ pᵢ·dsᵢ        dg = Σᵢ pᵢ·(dsᵢ·vᵢ + dvᵢ) − dlse·g
    """
    context, lse = formula.by_row["context"], formula.by_row["lse"]
    heads = formula.num_heads
    d_context = torch.zeros_like(_heads(context, heads))  # [H, B, d_v]
    d_lse = torch.zeros_like(lse.t())  # [H, B]
    rows = {name: formula.by_row[name] for name in by_row}
    for span in formula.spans():
        items = {name: tensor[span] for name, tensor in formula.by_item.items()}
        d_items = {name: tensor[span] for name, tensor in by_item.items()}
        scored = {name: tensor for name, tensor in items.items() if name != "values"}
        moved = {name: tensor for name, tensor in d_items.items() if name != "values"}
        scores = formula._scores(rows, items)[2]
        d_scores = tangent_of(lambda r, i: formula._scores(r, i)[2], (rows, scored), (by_row, moved))
        p = probabilities(scores, lse.t(), formula._hidden(span))
        weight = p * d_scores
        values = _heads(items.get("values", items["keys"]), heads)
        d_values = _heads(d_items.get("values", d_items["keys"]), heads)
        d_lse = d_lse + weight.sum(-1)
        d_context = d_context + weight @ values + p @ d_values
    return _join(d_context - d_lse[..., None] * _heads(context, heads)), d_lse.t()


def make(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    num_heads: int,
    logits: LogitSpec,
    **by_row: Tensor,
) -> AttentionGradient:
    """The formula with everything in the wide dtype; ``by_row``: context, lse, and for the derivative the incoming gradients."""
    wide = wide_dtype(query.dtype)
    rows = {"query": query, **by_row}
    if logits.row_scale is not None:
        rows["row_scale"] = logits.row_scale
    items = {"keys": keys}
    if values is not None:
        items["values"] = values
    if logits.bias is not None:
        items["bias"] = logits.bias
    return AttentionGradient(
        {name: tensor.to(wide) for name, tensor in rows.items()},
        {name: tensor.to(wide) for name, tensor in items.items()},
        logits,
        num_heads,
    )


__all__ = ["AttentionGradient", "make", "plain_arithmetic", "tangent"]
