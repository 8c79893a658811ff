"""What the rankings, ``catalogue_rank`` and ``catalogue_topk``, are given in the tests, and the scores that define both.

The definition is written out in numpy: fp64 products summed in ascending k, scaled, biased, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

# (B, I, d): tiles are 12 or 6 items by 2 or 1 vectors of 16, 8 or 4 rows; chunks 64 KiB of items; groups 512 KiB of queries;
# top-k of at most four rows takes dot products in place of tiles.
SHAPES = [
    (1, 1, 1),
    (3, 5, 0),
    (2, 13, 3),
    (16, 12, 16),
    (17, 251, 7),
    (33, 253, 64),
    (64, 601, 5),
    (5, 1009, 66),
    (1, 3001, 64),
    (519, 37, 256),
]


@dataclass(frozen=True)
class Ranking:
    query: Tensor  # [B, d]
    items: Tensor  # [I, d]
    scale: float = 1.0
    row_scale: Tensor | None = None
    bias: Tensor | None = None
    exclude: Tensor | None = None
    crow: Tensor | None = None

    def logits(self) -> tuple[Any, ...]:
        return self.scale, self.row_scale, self.bias, self.exclude, self.crow

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


Case = TypeVar("Case", bound=Ranking)


def random_matrices(batch: int, items: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Query and items. Every item appears twice, so that each row has ties."""
    table = torch.randn(items, width).to(dtype)
    table[(items + 1) // 2 :] = table[: items // 2].clone()
    return torch.randn(batch, width).to(dtype), table


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


# Data on which a product in fp32 gives wrong places.


def near_ties(table: Tensor, query: Tensor) -> Tensor:
    """Rows whose scores differ in the last places only: one row, with one element moved by a few ulp."""
    near = table[:1].repeat(len(table), 1)
    steps = torch.randint(-3, 4, (len(table),))
    column = torch.randint(0, table.shape[1], (len(table),))
    rows = torch.arange(len(table))
    near[rows, column] *= 1 + steps * 2.0**-23
    return near


def ascending(table: Tensor, query: Tensor) -> Tensor:
    order = (table @ query[0]).argsort()
    return table[order]


def non_finite(table: Tensor, query: Tensor) -> Tensor:
    odd = table.clone()
    odd[::7, 1] = float("inf")
    odd[1::11, 0] = float("-inf")
    odd[2::13, 2] = float("nan")
    odd[3::17, :2] = torch.tensor([float("inf"), float("-inf")])
    return odd


def outliers(table: Tensor, query: Tensor) -> Tensor:
    odd = table.clone()
    odd[::9] *= 1e4
    odd[4::31] *= 1e19
    odd[5::37] *= 1e-25
    return odd


CATALOGUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ordinary": lambda table, query: table,
    "one row repeated": lambda table, query: table[:1].expand(len(table), -1),
    "near ties": near_ties,
    "ascending": ascending,
    "descending": lambda table, query: ascending(table, query).flip(0),
    "huge": lambda table, query: table * 3e25,
    "overflowing": lambda table, query: table * 1e38,
    "tiny": lambda table, query: table * 1e-30,
    "denormal": lambda table, query: table * 1e-41,
    "zero": lambda table, query: table * -0.0,
    "not finite": non_finite,
    "outliers": outliers,
    "small whole numbers": lambda table, query: table.mul(2).round(),
}


def nasty(case: Case, name: str) -> list[Case]:
    """The catalogue of that name against ordinary and odd queries: bare, with all options, and with odd biases."""
    query = case.query.clone()
    query[3] = 0.0  # every pair is a tie
    query[4] = float("nan")
    query[5, 0] = float("inf")
    query[6] *= 1e-38
    query[7] *= 1e30
    query[8:12] = 0.0
    case = replace(case, query=query, items=CATALOGUES[name](case.items, case.query))
    with_options = options(case)
    odd = options(case)
    assert odd.bias is not None
    odd.bias[1::5] = 3e38  # absorbs every product: all scores of these items are equal
    odd.bias[2::5] = float("nan")
    odd.bias[3::50] = float("inf")
    return [case, with_options, odd]


def exclusion_lists(case: Case, length: int, id_dtype: torch.dtype) -> tuple[Case, Case]:
    """Padded lists with duplicates, full, empty and in part, and the same lists in CSR form."""
    batch, items = case.query.shape[0], case.items.shape[0]
    padded = torch.randint(0, items, (batch, length), dtype=id_dtype)
    padded[:, 20:30] = padded[:, :10]  # duplicates
    padded[torch.rand(batch, length) < 0.3] = -1
    padded[2, :40] = -1
    padded[5] = -1
    padded[6, ::2] = -1
    case = replace(case, exclude=padded)
    lists = [case.excluded(row) for row in range(batch)]
    columns = torch.tensor([id_ for ids in lists for id_ in ids], dtype=id_dtype)
    crow = torch.tensor([0, *np.cumsum([len(ids) for ids in lists])], dtype=id_dtype)
    return case, replace(case, exclude=columns, crow=crow)


def column(vector: Tensor) -> Tensor:
    """The same numbers, two elements apart."""
    return torch.stack([vector, vector], 1)[:, 0]
