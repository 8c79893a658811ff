"""``catalogue_rank`` beside torch's matmul, compare, sum.

``python -m benchmarks.bench_catalogue_rank`` prints interleaved ratios: both sides at one and at two threads in every round, each
at its better setting. torch is given every form it is fast in: scores in a buffer that is used again, for all items at once or
chunk by chunk, rows or columns counted. (It answers in fp32 and without ties: its ranks may be off. Ours are exact.)

Bound of a call: the larger of its multiply-adds (B·I·d) at the rate of a large fp32 torch.mm and the catalogue read once (I·d
values) at the rate of torch.sum over an array beyond the caches. Both rates are measured beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast._files import write_json
from seqrec_fast._measure import extra_peak_bytes, interleaved, medians, on_threads
from seqrec_fast.info import info

Call = Callable[[], object]
THREADS = (1, 2)
WHOLE = 300_000_000  # scores that torch may hold at once: 1.2 GB in fp32


@dataclass(frozen=True)
class Case:
    """Targets in the middle of the ranking: the most undecided pairs."""

    name: str
    rows: int
    items: int
    width: int = 64
    seen: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def multiply_adds(self) -> int:
        return self.rows * self.items * self.width

    @property
    def catalogue_bytes(self) -> int:
        return self.items * self.width * self.dtype.itemsize

    def calls(self) -> dict[str, Call]:
        torch.manual_seed(0)
        query, items = torch.randn(self.rows, self.width), torch.randn(self.items, self.width)
        target = torch.randint(0, self.items, (self.rows,))
        seen = torch.randint(0, self.items, (self.rows, self.seen)) if self.seen else None
        query, items = query.to(self.dtype), items.to(self.dtype)
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


def _rates() -> tuple[float, float]:
    """Multiply-adds and bytes from memory per second, as torch itself reaches them here at its better thread count."""
    a, large = torch.randn(1536, 1536), torch.randn(1 << 26)
    calls = {f"multiply/{n}": on_threads(n, lambda: a @ a) for n in THREADS}
    calls |= {f"read/{n}": on_threads(n, large.sum) for n in THREADS}
    best = {key: min(times) for key, times in interleaved(calls, rounds=9).items()}
    multiply, read = (min(best[f"{name}/{n}"] for n in THREADS) for name in ("multiply", "read"))
    return 1536**3 / multiply, 4 * large.numel() / read


def measure(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    facts, before = info(), torch.get_num_threads()
    flop, read = _rates()
    rows = []
    for case in cases:
        calls = case.calls()
        calls["ours"]()
        peak = extra_peak_bytes(calls["ours"])
        functions = {f"{name}/{n}": on_threads(n, call) for name, call in calls.items() for n in THREADS}
        seconds = interleaved(functions, rounds=rounds)
        middle = {key: 1e3 * value for key, value in medians(seconds).items()}
        least = {key: 1e3 * min(value) for key, value in seconds.items()}

        def best(times: dict[str, float], side: str) -> tuple[float, str]:
            return min((value, key) for key, value in times.items() if key.startswith(side))

        ours, theirs = best(middle, "ours"), best(middle, "torch")
        rows.append(
            {
                "operator": "catalogue_rank",
                "backend": "native",
                "pass": "forward",
                "dtype": str(case.dtype).removeprefix("torch."),
                "shape": f"{case.name}: B={case.rows} I={case.items} d={case.width}",
                "all_ms": {key: round(value, 3) for key, value in middle.items()},
                "ms": ours[0],
                "min_ms": best(least, "ours")[0],
                "bound_ms": 1e3 * max(case.multiply_adds / flop, case.catalogue_bytes / read),
                "peak_bytes": peak,
                "peer": theirs[1],
                "peer_ms": theirs[0],
                "ratio_of_medians": theirs[0] / ours[0],
                "ratio_of_minima": best(least, "torch")[0] / best(least, "ours")[0],
                "two_threads": middle["ours/1"] / middle["ours/2"],
                "hardware": f"{facts['cpu']}, at most {max(THREADS)} threads, tier {facts['cpu_tier']}",
                "versions": {"torch": str(facts["torch"])},
            }
        )
    torch.set_num_threads(before)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    found = Table(title=rows[0]["hardware"], title_justify="left")
    for name in ("shape", "dtype"):
        found.add_column(name)
    for name in ("ms", "torch ms", "bound ms", "torch / ours", "of minima", "2 threads / 1"):
        found.add_column(name, justify="right")
    for row in rows:
        times = (f"{row[key]:.1f}" for key in ("ms", "peer_ms", "bound_ms"))
        ratios = (f"{row[key]:.2f}×" for key in ("ratio_of_medians", "ratio_of_minima", "two_threads"))
        found.add_row(row["shape"], row["dtype"], *times, *ratios)
    return found


SMALL = (Case("one row", 1, 50_000), Case("ml-1m", 6040, 3416))


@pytest.mark.parametrize("side", ["ours", "torch rows", "torch columns"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_catalogue_rank(benchmark: Any, case: Case, side: str) -> None:
    benchmark.group = case.name
    benchmark(case.calls()[side if side == "ours" else f"{side} {case.items}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="catalogue_rank beside torch, interleaved in one process")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--out", help="also write the rows to this JSON file")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only is None or options.only in case.name]
    rows = measure(cases, options.rounds)
    Console(width=140).print(table(rows))
    if options.out:
        write_json(options.out, rows)


if __name__ == "__main__":
    main()
