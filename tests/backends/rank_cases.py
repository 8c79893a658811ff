"""Calls of ``catalogue_rank`` and what they must answer: the definition, written out in numpy.

Scores as in ``ranking_cases``, compared by (score descending, id ascending). Ranks are whole numbers: every comparison is for
equality.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from ranking_cases import Ranking, random_matrices
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Case(Ranking):
    target: Tensor = field(kw_only=True)  # [B]
    ignore_index: int = IGNORE

    def native(self) -> Tensor:
        result: Tensor = torch.ops.seqrec_fast_native.catalogue_rank.default(
            self.query, self.items, self.target, *self.logits(), self.ignore_index
        )
        return result

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
    query, table = random_matrices(batch, items, width, dtype)
    return Case(query, table, target=torch.randint(0, items, (batch,)))
