"""Cross-entropy over the catalogue: compiled as a whole, but for label smoothing, whose part is added as the reference has it."""

from __future__ import annotations

from functools import partial
from typing import Any

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
_smoothed_forward = partial(reference.forward, engine=ENGINE)
_smoothed_backward = partial(reference.backward, engine=ENGINE)
_native = torch.ops.seqrec_fast_native


def forward(*args: Any) -> tuple[Tensor, ...]:
    """As :func:`reference.forward`."""
    query, label_smoothing, prior, save_context = args[0], args[11], args[12], args[16]
    if label_smoothing > 0:
        return _smoothed_forward(*args)
    reference.check_prior(reference.OPERATOR, prior)
    loss, lse, context = _native.catalogue_cross_entropy_plain.default(*args[:11], save_context)
    return loss, lse, context if save_context else context.reshape(0), query.new_empty(0, dtype=lse.dtype)


def backward(*args: Any) -> tuple[Tensor, ...]:
    """As :func:`reference.backward`."""
    context, query, label_smoothing, mask = args[3], args[5], args[16], args[19]
    kept = context.shape == query.shape or not (mask[0] or mask[2])
    if label_smoothing > 0 or not kept:
        return _smoothed_backward(*args)
    found: tuple[Tensor, ...] = _native.catalogue_cross_entropy_plain_backward.default(
        *args[:4], *args[5:16], args[18], mask
    )
    return found
