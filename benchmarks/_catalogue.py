"""What the benchmarks of the catalogue operators share: a case, the bound of a call, interleaved times of all sides, a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from seqrec_fast._files import write_json
from seqrec_fast._measure import extra_peak_bytes, interleaved, medians, on_threads
from seqrec_fast.info import info

Call = Callable[[], object]
THREADS = (1, 2)


@dataclass(frozen=True)
class CatalogueCase:
    name: str
    rows: int
    items: int
    width: int = 64
    dtype: torch.dtype = torch.float32
    backward: bool = False  # timed with the gradients

    @property
    def multiply_adds(self) -> int:
        """The least that a call needs."""
        return self.rows * self.items * self.width

    @property
    def catalogue_bytes(self) -> int:
        return self.items * self.width * self.dtype.itemsize

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Query and items; the same for every run."""
        torch.manual_seed(0)
        query, items = torch.randn(self.rows, self.width), torch.randn(self.items, self.width)
        return query.to(self.dtype), items.to(self.dtype)

    def calls(self) -> dict[str, Call]:
        """ "ours", and the peers' forms under names that begin with the peer's and a space."""
        raise NotImplementedError


def _rates() -> tuple[float, float]:
    """Multiply-adds and bytes from memory per second, as torch itself reaches them here at its better thread count."""
    a, large = torch.randn(1536, 1536), torch.randn(1 << 26)
    calls = {f"multiply/{n}": on_threads(n, lambda: a @ a) for n in THREADS}
    calls |= {f"read/{n}": on_threads(n, large.sum) for n in THREADS}
    best = {key: min(times) for key, times in interleaved(calls, rounds=9).items()}
    multiply, read = (min(best[f"{name}/{n}"] for n in THREADS) for name in ("multiply", "read"))
    return 1536**3 / multiply, 4 * large.numel() / read


def measure(operator: str, cases: Sequence[CatalogueCase], rounds: int) -> list[dict[str, Any]]:
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

        ours = best(middle, "ours")
        for peer in dict.fromkeys(name.split(" ")[0].split("/")[0] for name in calls if name != "ours"):
            theirs = best(middle, peer)
            rows.append(
                {
                    "operator": operator,
                    "backend": "native",
                    "pass": "forward + backward" if case.backward else "forward",
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
                    "ratio_of_minima": best(least, peer)[0] / best(least, "ours")[0],
                    "two_threads": middle["ours/1"] / middle["ours/2"],
                    "hardware": f"{facts['cpu']}, at most {max(THREADS)} threads, tier {facts['cpu_tier']}",
                    "versions": {"torch": str(facts["torch"])},
                }
            )
    torch.set_num_threads(before)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    found = Table(title=rows[0]["hardware"], title_justify="left")
    for name in ("shape", "dtype", "pass", "peer"):
        found.add_column(name)
    for name in ("ms", "peer's ms", "bound ms", "peer / ours", "of minima", "2 threads / 1", "extra MiB"):
        found.add_column(name, justify="right")
    for row in rows:
        times = (f"{row[key]:.1f}" for key in ("ms", "peer_ms", "bound_ms"))
        ratios = (f"{row[key]:.2f}×" for key in ("ratio_of_medians", "ratio_of_minima", "two_threads"))
        extra = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        short = "fwd+bwd" if "backward" in row["pass"] else "fwd"
        found.add_row(row["shape"], row["dtype"], short, row["peer"], *times, *ratios, extra)
    return found


def report(all_cases: Mapping[str, Sequence[CatalogueCase]]) -> None:
    """The program of a benchmark: the cases of each operator, a table each."""
    parser = argparse.ArgumentParser(description=f"{', '.join(all_cases)} beside the peers, interleaved in one process")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--operators", nargs="+", choices=list(all_cases), default=list(all_cases))
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--skip", help="but not those whose name contains this")
    parser.add_argument("--out", help="also write the rows to this JSON file")
    options = parser.parse_args()
    rows = []
    for operator in options.operators:
        cases = [case for case in all_cases[operator] if options.only is None or options.only in case.name]
        cases = [case for case in cases if options.skip is None or options.skip not in case.name]
        if cases:
            found = measure(operator, cases, options.rounds)
            Console(width=160).print(table(found))
            rows += found
    if options.out:
        write_json(options.out, rows)
