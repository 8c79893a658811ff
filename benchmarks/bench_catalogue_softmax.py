"""``catalogue_cross_entropy`` and ``catalogue_attention`` beside their forms in stock torch.

``python -m benchmarks.bench_catalogue_softmax`` prints interleaved ratios: all sides at one and at two threads in every round, each
at its better setting. Peers: ``F.cross_entropy(q @ W.T)``, ``F.linear_cross_entropy`` where this torch has it, and
``F.scaled_dot_product_attention``.

Bound of a call: its multiply-adds (cross-entropy B·I·d forward, 4·B·I·d with gradients; attention 2·B·I·d and 7·B·I·d, the least
without a B×I array) at the rate of a large fp32 torch.mm, measured beside it, or the catalogue read once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import seqrec_fast as sf

from ._catalogue import Call, CatalogueCase, report


@dataclass(frozen=True)
class Case(CatalogueCase):
    seen: int = 0

    def tables(self) -> tuple[Tensor, Tensor, Tensor | None]:
        query, items = self.matrices()
        seen = torch.randint(0, self.items, (self.rows, self.seen)) if self.seen else None
        return query.requires_grad_(self.backward), (0.3 * items).requires_grad_(self.backward), seen

    def once(self, call: Callable[[], Tensor], *leaves: Tensor) -> Call:
        """The call, with its gradients where they are timed."""

        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            result = call()
            if self.backward:
                result.sum().backward()

        return run


@dataclass(frozen=True)
class CrossEntropy(Case):
    @property
    def multiply_adds(self) -> int:
        return super().multiply_adds * (4 if self.backward else 1)

    def calls(self) -> dict[str, Call]:
        query, items, seen = self.tables()
        target = torch.randint(0, self.items, (self.rows,))

        def stock() -> Tensor:
            scores = query @ items.T
            return F.cross_entropy(scores if seen is None else scores.scatter(1, seen, float("-inf")), target)

        calls: dict[str, Callable[[], Tensor]] = {
            "ours": partial(sf.catalogue_cross_entropy, query, items, target, exclude=seen)
        }
        if seen is None or not (seen == target[:, None]).any():
            calls["torch"] = stock
        return {name: self.once(call, query, items) for name, call in calls.items()}


@dataclass(frozen=True)
class Attention(Case):
    @property
    def multiply_adds(self) -> int:
        return super().multiply_adds * (7 if self.backward else 2)

    def calls(self) -> dict[str, Call]:
        query, items, seen = self.tables()
        mask = None
        if seen is not None:
            mask = torch.ones(self.rows, self.items, dtype=torch.bool).scatter_(1, seen, False)
        attend = F.scaled_dot_product_attention
        calls: dict[str, Callable[[], Tensor]] = {
            "ours": partial(sf.catalogue_attention, query, items, scale=0.125, exclude=seen),
            "torch": lambda: attend(query[None, None], items[None, None], items[None, None], mask, scale=0.125),
        }
        return {name: self.once(call, query, items) for name, call in calls.items()}


CASES = (
    *(CrossEntropy("cross-entropy", 512, 100_000, backward=backward) for backward in (False, True)),
    CrossEntropy("cross-entropy, 1,000 seen", 512, 100_000, backward=True, seen=1000),
    CrossEntropy("cross-entropy, bf16", 512, 100_000, backward=True, dtype=torch.bfloat16),
    CrossEntropy("cross-entropy, small", 64, 1000, backward=True),
    *(Attention("attention", 256, 200_000, backward=backward) for backward in (False, True)),
    Attention("attention, 1,000 seen", 256, 200_000, seen=1000),
    Attention("attention, one row", 1, 200_000),
    *(Attention("attention, bf16", 256, 200_000, backward=backward, dtype=torch.bfloat16) for backward in (False, True)),
)  # fmt: skip
SMALL = (CrossEntropy("cross-entropy", 64, 1000, backward=True), Attention("attention", 64, 1000, backward=True))


@pytest.mark.parametrize("side", ["ours", "torch"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_catalogue_softmax(benchmark: Any, case: Case, side: str) -> None:
    benchmark.group = case.name
    benchmark(case.calls()[side])


if __name__ == "__main__":
    report({"catalogue_softmax": CASES})
