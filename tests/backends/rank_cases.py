"""Calls of ``catalogue_rank`` and what they must answer: the definition, written out in numpy.

fp64 products summed in ascending k, scaled, biased, rounded once, compared by (score descending, id ascending). Ranks are whole
numbers: every comparison is for equality.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Case:
    query: Tensor  # [B, d]
    items: Tensor  # [I, d]
    target: Tensor  # [B]
    scale: float = 1.0
    row_scale: Tensor | None = None
    bias: Tensor | None = None
    exclude: Tensor | None = None
    crow: Tensor | None = None
    ignore_index: int = IGNORE

    def native(self) -> Tensor:
        result: Tensor = torch.ops.seqrec_fast_native.catalogue_rank.default(
            self.query,
            self.items,
            self.target,
            self.scale,
            self.row_scale,
            self.bias,
            self.exclude,
            self.crow,
            self.ignore_index,
        )
        return result

    def excluded(self, row: int) -> list[int]:
        if self.exclude is None:
            return []
        if self.crow is not None:
            return self.exclude[int(self.crow[row]) : int(self.crow[row + 1])].tolist()
        ids = self.exclude if self.exclude.dim() == 1 else self.exclude[row]
        return [id_ for id_ in ids.tolist() if id_ != -1]

    def scores(self) -> np.ndarray:
        """[B, I] fp64, holding fp32 values unless the input is fp64."""
        query, items = self.query.double().numpy(), self.items.double().numpy()
        scores = np.zeros((query.shape[0], items.shape[0]))
        with np.errstate(all="ignore"):
            for k in range(query.shape[1]):
                scores += query[:, k, None] * items[:, k]
            scores *= self.scale
            if self.row_scale is not None:
                scores *= self.row_scale.double().numpy()[:, None]
            if self.bias is not None:
                scores += self.bias.double().numpy()
            if self.query.dtype != torch.float64:
                scores = scores.astype(np.float32).astype(np.float64)
        return scores

    def truth(self) -> Tensor:
        ids = np.arange(self.items.shape[0])
        ranks = []
        for row, score in enumerate(self.scores()):
            target = int(self.target[row])
            if target == self.ignore_index:
                ranks.append(-1)
                continue
            ranked = ~np.isnan(score) & (score != -np.inf)
            ranked[self.excluded(row)] = False
            ranked[target] = False
            goal = score[target]
            if not np.isnan(goal) and goal != -np.inf:
                ranked &= (score > goal) | ((score == goal) & (ids < target))
            ranks.append(int(ranked.sum()))
        return torch.tensor(ranks, dtype=torch.int64)


def check(case: Case) -> None:
    assert torch.equal(case.native(), case.truth())


def random_case(batch: int, items: int, width: int, dtype: torch.dtype = torch.float32) -> Case:
    """Every item appears twice, so that each row has ties with its target."""
    table = torch.randn(items, width).to(dtype)
    table[(items + 1) // 2 :] = table[: items // 2].clone()
    return Case(torch.randn(batch, width).to(dtype), table, torch.randint(0, items, (batch,)))


def options(case: Case) -> Case:
    """All of them at once."""
    batch, items = case.query.shape[0], case.items.shape[0]
    bias = torch.randn(items).to(case.query.dtype)
    bias[::5] = float("-inf")
    return replace(
        case,
        scale=-0.7,
        row_scale=torch.randn(batch).to(case.query.dtype),
        bias=bias,
        exclude=torch.randint(-1, items, (batch, 9)),
    )
