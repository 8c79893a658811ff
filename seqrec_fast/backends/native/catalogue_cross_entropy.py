"""Cross-entropy over the catalogue by the compiled scans; the targets' and the smoothing's small parts as the reference has them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..reference import catalogue_cross_entropy as reference
from ..reference._softmax import Softmax
from ..reference.catalogue_cross_entropy import Problem


class NativeEngine:
    """``csrc/catalogue/cpu_cross_entropy.cpp``."""

    def softmax(self, problem: Problem, precision: int, *, context: bool) -> tuple[Softmax, Tensor, Tensor]:
        shift, log_total, weighted, scores = torch.ops.seqrec_fast_native.catalogue_softmax.default(
            problem.query, problem.items, *problem.logits.args(), *problem.lists, context
        )
        targets = problem.targets
        # Both are scores of one scan, so a target that is the only item has exactly the shift.
        relative = scores - shift[targets.rows]
        return Softmax(shift, log_total, weighted if context else None, relative), targets.rows, targets.weight

    def item_gradients(
        self,
        problem: Problem,
        weight: Tensor,
        grad_loss: Tensor,
        lse: Tensor,
        wanted: tuple[bool, bool],
        skip_mass: float,
        precision: int,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        share = reference.target_share(problem, grad_loss)
        d_items, d_bias, skipped = torch.ops.seqrec_fast_native.catalogue_softmax_backward.default(
            weight, lse, problem.query, problem.items, *problem.logits.args(), *problem.lists, share, *wanted,
            skip_mass, problem.smoothing is not None,
        )  # fmt: skip
        if skip_mass == 0:
            skipped = torch.zeros_like(weight)
        return d_items if wanted[0] else None, d_bias if wanted[1] else None, skipped


ENGINE = NativeEngine()
forward = partial(reference.forward, engine=ENGINE)
backward = partial(reference.backward, engine=ENGINE)
