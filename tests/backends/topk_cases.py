"""Calls of ``catalogue_topk`` and what they must answer: the definition, written out in numpy.

Scores as in ``ranking_cases``, sorted by (score descending, id ascending). Every comparison is for equality, of the values too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ranking_cases import Ranking, random_matrices
from torch import Tensor


@dataclass(frozen=True)
class Case(Ranking):
    k: int = 1

    def native(self) -> tuple[Tensor, Tensor]:
        values, ids = torch.ops.seqrec_fast_native.catalogue_topk.default(
            self.query, self.items, self.k, *self.logits()
        )
        return values, ids

    def truth(self) -> tuple[Tensor, Tensor]:
        batch, items = self.query.shape[0], self.items.shape[0]
        values, ids = np.full((batch, self.k), -np.inf), np.full((batch, self.k), -1)
        for row, score in enumerate(self.scores()):
            ranked = ~np.isnan(score) & (score != -np.inf)
            ranked[self.excluded(row)] = False
            (left,) = ranked.nonzero()
            best = left[np.lexsort((left, -score[left]))][: self.k]
            values[row, : len(best)], ids[row, : len(best)] = score[best], best
        dtype = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        assert items > 0 or (ids == -1).all()
        return torch.from_numpy(values).to(dtype), torch.from_numpy(ids)


def same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    (values, ids), (true_values, true_ids) = got, wanted
    assert (values.dtype, ids.dtype) == (true_values.dtype, true_ids.dtype)
    assert not (values.signbit() & (values == 0)).any()  # −0 is returned as +0
    return torch.equal(ids, true_ids) and torch.equal(values, true_values)


def check(case: Case) -> None:
    assert same(case.native(), case.truth())


def random_case(batch: int, items: int, width: int, k: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case(*random_matrices(batch, items, width, dtype), k=k)
