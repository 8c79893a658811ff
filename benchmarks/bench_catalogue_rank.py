"""``catalogue_rank`` beside torch's matmul, compare, sum.

``python -m benchmarks.bench_catalogue_rank`` prints interleaved ratios: both sides at one and at two threads in every round, each
at its better setting. torch is given every form it is fast in: scores in a buffer that is used again, for all items at once or
chunk by chunk, rows or columns counted. (It answers in fp32 and without ties: its ranks may be off. Ours are exact.)

Bound of a call: the larger of its multiply-adds (B·I·d) at the rate of a large fp32 torch.mm and the catalogue read once (I·d
values) at the rate of torch.sum over an array beyond the caches. Both rates are measured beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf

from ._catalogue import Call, CatalogueCase, report

WHOLE = 300_000_000  # scores that torch may hold at once: 1.2 GB in fp32


@dataclass(frozen=True)
class Case(CatalogueCase):
    """Targets in the middle of the ranking: the most undecided pairs."""

    seen: int = 0

    def calls(self) -> dict[str, Call]:
        query, items = self.matrices()
        target = torch.randint(0, self.items, (self.rows,))
        seen = torch.randint(0, self.items, (self.rows, self.seen)) if self.seen else None
        calls: dict[str, Call] = {"ours": partial(sf.catalogue_rank, query, items, target, exclude=seen)}
        chunks = [chunk for chunk in (4096, 32_768) if chunk < self.items]
        if self.rows * self.items <= WHOLE:
            chunks.append(self.items)
        size = self.rows * max(chunks)
        buffers = Buffers(torch.empty(size, dtype=self.dtype), torch.empty(size, dtype=torch.bool))
        for chunk in chunks:
            for name, form in (("rows", _by_rows), ("columns", _by_columns)):
                calls[f"torch {name} {chunk}"] = partial(form, query, items, target, seen, buffers, chunk)
        return calls


class Buffers(NamedTuple):
    scores: Tensor
    above: Tensor


def _goal(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
    return (query * items[target]).sum(1)


def _by_rows(query: Tensor, items: Tensor, target: Tensor, seen: Tensor | None, buffers: Buffers, chunk: int) -> Tensor:
    rows = len(query)
    goal, rank = _goal(query, items, target)[:, None], torch.zeros(rows, dtype=torch.int64)
    for part in items.split(chunk):
        scores, above = (buffer[: rows * len(part)].view(rows, len(part)) for buffer in buffers)
        torch.mm(query, part.T, out=scores)
        rank += torch.gt(scores, goal, out=above).sum(1)
    return _without_seen(rank, query, items, goal, seen)


def _by_columns(
    query: Tensor, items: Tensor, target: Tensor, seen: Tensor | None, buffers: Buffers, chunk: int
) -> Tensor:
    rows = len(query)
    goal, rank = _goal(query, items, target)[:, None], torch.zeros(rows, dtype=torch.int64)
    for part in items.split(chunk):
        scores, above = (buffer[: rows * len(part)].view(len(part), rows) for buffer in buffers)
        torch.mm(part, query.T, out=scores)
        rank += torch.gt(scores, goal.T, out=above).sum(0)
    return _without_seen(rank, query, items, goal, seen)


def _without_seen(rank: Tensor, query: Tensor, items: Tensor, goal: Tensor, seen: Tensor | None) -> Tensor:
    """The best torch can do: score the seen items alone and take them off (duplicates taken off twice)."""
    return rank if seen is None else rank - (torch.einsum("bnd,bd->bn", items[seen], query) > goal).sum(1)


CASES = (
    Case("million", 256, 1_000_000),
    Case("million, 1,000 seen", 256, 1_000_000, seen=1000),
    Case("million, one row", 1, 1_000_000),
    Case("ml-1m", 6040, 3416),
    Case("ml-1m, 165 seen", 6040, 3416, seen=165),
    Case("Beauty", 4096, 54_542),
    Case("wide", 256, 100_000, width=256),
    Case("bf16", 256, 100_000, dtype=torch.bfloat16),
)


SMALL = (Case("one row", 1, 50_000), Case("ml-1m", 6040, 3416))


@pytest.mark.parametrize("side", ["ours", "torch rows", "torch columns"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_catalogue_rank(benchmark: Any, case: Case, side: str) -> None:
    benchmark.group = case.name
    benchmark(case.calls()[side if side == "ours" else f"{side} {case.items}"])


if __name__ == "__main__":
    report({"catalogue_rank": CASES})
