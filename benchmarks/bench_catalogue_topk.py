"""``catalogue_topk`` beside torch's matmul, mask of seen items, topk, and beside the search libraries that are installed.

``python -m benchmarks.bench_catalogue_topk`` prints interleaved ratios: both sides at one and at two threads in every round, each
at its better setting. torch is given every form it is fast in: scores in a buffer that is used again, for all items at once or
chunk by chunk with a merge of the chunks' best. (It answers in fp32: its ids may be off at near ties. Ours are exact.) "index" is
``CatalogueIndex`` with a packed int8 copy of the items: a ratio below one says that its first pass saves time.

Bound of a call: the larger of its multiply-adds (B·I·d) at the rate of a large fp32 torch.mm and the catalogue read once (I·d
values) at the rate of torch.sum over an array beyond the caches. Both rates are measured beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf

from ._catalogue import Call, CatalogueCase, report
from ._peers import searches

WHOLE = 300_000_000  # scores that torch may hold at once: 1.2 GB in fp32


@dataclass(frozen=True)
class Case(CatalogueCase):
    k: int = 100
    seen: int = 50

    def calls(self) -> dict[str, Call]:
        query, items = self.matrices()
        seen = torch.randint(0, self.items, (self.rows, self.seen)) if self.seen else None
        calls: dict[str, Call] = {"ours": partial(sf.catalogue_topk, query, items, self.k, exclude=seen)}
        chunks = [chunk for chunk in (4096, 32_768) if self.k < chunk < self.items]
        if self.rows * self.items <= WHOLE:
            chunks.append(self.items)
        scores = torch.empty(self.rows * max(chunks), dtype=self.dtype)
        if self.dtype != torch.float64:
            index = sf.CatalogueIndex(items, first_pass="int8")
            calls["index"] = partial(index.topk, query, self.k, exclude=seen)
        for chunk in chunks:
            calls[f"torch {chunk}"] = partial(_torch, query, items, self.k, seen, scores, chunk)
        return calls | searches(query, items, self.k, seen)


def _torch(
    query: Tensor, items: Tensor, k: int, seen: Tensor | None, buffer: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    rows = len(query)
    values, ids = [], []
    for first in range(0, len(items), chunk):
        part = items[first : first + chunk]
        scores = buffer[: rows * len(part)].view(rows, len(part))
        torch.mm(query, part.T, out=scores)
        if seen is not None:
            _mask(scores, seen, first)
        best = scores.topk(min(k, len(part)))
        values.append(best.values)
        ids.append(best.indices + first)
    if len(values) == 1:
        return values[0], ids[0]
    last = torch.cat(values, 1).topk(k)
    return last.values, torch.cat(ids, 1).gather(1, last.indices)


def _mask(scores: Tensor, seen: Tensor, first: int) -> None:
    """−inf for the seen items of this chunk."""
    if scores.shape[1] > int(seen.max()):
        scores.scatter_(1, seen, float("-inf"))
        return
    rows, places = ((seen >= first) & (seen < first + scores.shape[1])).nonzero(as_tuple=True)
    scores[rows, seen[rows, places] - first] = float("-inf")


CASES = (
    Case("million", 256, 1_000_000),
    Case("million, none seen", 256, 1_000_000, seen=0),
    Case("million, 1,000 seen", 256, 1_000_000, seen=1000),
    Case("million, k = 10", 256, 1_000_000, k=10),
    Case("million, k = 1,000", 256, 1_000_000, k=1000),
    Case("million, one row", 1, 1_000_000),
    Case("million, four rows", 4, 1_000_000),
    Case("ml-1m, 165 seen", 6040, 3416, seen=165),
    Case("Beauty", 4096, 54_542),
    Case("wide", 256, 100_000, width=256),
    Case("bf16", 256, 100_000, dtype=torch.bfloat16),
)
SMALL = (Case("one row", 1, 50_000), Case("ml-1m", 6040, 3416, k=10))


@pytest.mark.parametrize("side", ["ours", "index", "torch"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_catalogue_topk(benchmark: Any, case: Case, side: str) -> None:
    benchmark.group = case.name
    benchmark(case.calls()[f"{side} {case.items}" if side == "torch" else side])


if __name__ == "__main__":
    report({"catalogue_topk": CASES})
