"""``lstm_step`` and ``gru_step`` beside torch.nn.LSTMCell and torch.nn.GRUCell.

``python -m benchmarks.bench_recurrent_step`` prints interleaved ratios: both sides at one and at two threads in every round, each at
its better setting. ``pytest benchmarks/bench_recurrent_step.py`` is the pytest-benchmark form of the same calls.

Bound of a forward step of G gates (4 or 3): the larger of its multiply-adds at the rate of a large fp32 torch.mm (2·G·B·H·(I + P)
FLOP) and its weights read once from L2 (G·H·(I + P) values) at the rate of torch.sum over an array of their size. Forward and
backward: three times the multiply-adds; the weights read twice, their gradients written (which also reads the lines). Both rates are
measured beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import seqrec_fast as sf
from seqrec_fast._files import write_json
from seqrec_fast._measure import interleaved, medians, on_threads
from seqrec_fast.info import info

Call = Callable[[], object]
State = Any  # (h, c), or h
CELLS: dict[str, tuple[type[nn.Module], type[nn.RNNCellBase], Callable[..., Any], int]] = {
    "lstm": (sf.LSTMCell, nn.LSTMCell, sf.lstm_step, 4),
    "gru": (sf.GRUCell, nn.GRUCell, sf.gru_step, 3),
}
WIDTH = 128
BATCHES = (1, 4, 16, 64, 256)
THREADS = (1, 2)


@dataclass(frozen=True)
class Case:
    """One step of ``rows`` users, I = H = ``width``."""

    cell: str
    rows: int
    width: int
    gradients: bool
    dtype: torch.dtype = torch.float32

    @property
    def multiply_adds(self) -> int:
        return (3 if self.gradients else 1) * self.rows * self.weights

    @property
    def weight_bytes(self) -> int:
        return self.weights * self.dtype.itemsize

    @property
    def weights(self) -> int:
        return CELLS[self.cell][3] * self.width * 2 * self.width

    def calls(self) -> dict[str, Call]:
        """Ours, ours in place (without gradients), and torch's, on the same weights and data."""
        torch.manual_seed(0)
        ours_class, torch_class, step, _ = CELLS[self.cell]
        theirs = torch_class(self.width, self.width, dtype=self.dtype)  # type: ignore[call-arg]
        ours = ours_class.from_torch(theirs)  # type: ignore[attr-defined]
        x, h, c, grad = (torch.randn(self.rows, self.width, dtype=self.dtype) for _ in range(4))
        state: State = (h, c) if self.cell == "lstm" else h
        if self.gradients:
            parameters = tuple(theirs.parameters())  # shared by both
            grads = (grad, grad) if self.cell == "lstm" else (grad,)
            return {
                "ours": partial(_forward_backward, ours, parameters, x, state, grads),
                "torch": partial(_forward_backward, theirs, parameters, x, state, grads),
            }
        calls: dict[str, Call] = {
            "ours": partial(_forward, ours, x, state),
            "torch": partial(_forward, theirs, x, state),
        }
        own: State = (h.clone(), c.clone()) if self.cell == "lstm" else h.clone()
        calls["ours in place"] = partial(_in_place, step, theirs, x, own)
        return calls


def _forward(cell: nn.Module, x: Tensor, state: State) -> None:
    with torch.no_grad():
        cell(x, state)


def _in_place(step: Callable[..., Any], cell: nn.RNNCellBase, x: Tensor, state: State) -> None:
    with torch.no_grad():
        step(x, state, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, inplace=True)


def _forward_backward(
    cell: nn.Module, parameters: tuple[Tensor, ...], x: Tensor, state: State, grads: tuple[Tensor, ...]
) -> None:
    """A training step's share: gradients of the parameters alone, not accumulated, the same for both sides."""
    torch.autograd.grad(cell(x, state), parameters, grads)


def _rates(count: int, threads: int) -> tuple[float, float]:
    """Multiply-adds and bytes of ``count`` weights per second, as torch itself reaches them here."""
    a, weights = torch.randn(1024, 1024), torch.randn(count)
    multiply, read = on_threads(threads, lambda: a @ a, 1), on_threads(threads, weights.sum, 20)
    best = {key: min(times) for key, times in interleaved({"multiply": multiply, "read": read}, rounds=15).items()}
    return 1024**3 / best["multiply"], 20 * 4 * weights.numel() / best["read"]


def measure(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    facts, before = info(), torch.get_num_threads()
    rows = []
    rates = {(count, n): _rates(count, n) for count in {case.weights for case in cases} for n in THREADS}
    for case in cases:
        repeat = max(2, int(300 / case.rows**0.7) // (4 if case.gradients else 1))
        functions = {f"{name}/{n}": on_threads(n, call, repeat) for name, call in case.calls().items() for n in THREADS}
        seconds = interleaved(functions, rounds=rounds)
        middle = {key: 1e6 * value / repeat for key, value in medians(seconds).items()}
        least = {key: 1e6 * min(value) / repeat for key, value in seconds.items()}
        traffic = case.weight_bytes * (4 if case.gradients else 1)
        bounds = [
            1e6 * max(case.multiply_adds / flop, traffic / read)
            for (count, _), (flop, read) in rates.items()
            if count == case.weights
        ]

        def better(times: dict[str, float], name: str) -> float:
            return min(times[f"{name}/{n}"] for n in THREADS)

        for name in case.calls():
            if name == "torch":
                continue
            rows.append(
                {
                    "operator": f"{case.cell}_step",
                    "backend": "native",
                    "pass": ("forward + backward" if case.gradients else "forward") + name.removeprefix("ours"),
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "shape": f"B={case.rows} I=H={case.width}",
                    "us": {
                        key: round(value, 2)
                        for key, value in middle.items()
                        if key.rsplit("/", 1)[0] in (name, "torch")
                    },
                    "ms": better(middle, name) / 1e3,
                    "bound_ms": min(bounds) / 1e3,
                    "peer": f"nn.{CELLS[case.cell][1].__name__}",
                    "peer_ms": better(middle, "torch") / 1e3,
                    "ratio_of_medians": better(middle, "torch") / better(middle, name),
                    "ratio_of_minima": better(least, "torch") / better(least, name),
                    "hardware": f"{facts['cpu']}, at most {max(THREADS)} threads, tier {facts['cpu_tier']}",
                    "versions": {"torch": str(facts["torch"])},
                }
            )
    torch.set_num_threads(before)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    found = Table(title=rows[0]["hardware"], title_justify="left")
    for name in ("operator", "pass", "dtype", "shape"):
        found.add_column(name)
    for name in ("µs", "torch µs", "bound µs", "torch / ours", "of minima"):
        found.add_column(name, justify="right")
    for row in rows:
        times = (f"{1e3 * row[key]:.1f}" for key in ("ms", "peer_ms", "bound_ms"))
        ratios = (f"{row[key]:.2f}×" for key in ("ratio_of_medians", "ratio_of_minima"))
        found.add_row(row["operator"], row["pass"], row["dtype"], row["shape"], *times, *ratios)
    return found


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("side", ["ours", "torch"])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("cell", CELLS)
def test_step(benchmark: Any, cell: str, rows: int, gradients: bool, side: str, threads: int) -> None:
    benchmark.group = f"{cell}_step {'forward + backward' if gradients else 'forward'} B={rows}"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    benchmark(Case(cell, rows, WIDTH, gradients).calls()[side])
    torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description="single steps beside torch.nn's cells, interleaved in one process")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--rows", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    parser.add_argument("--out", help="also write the rows to this JSON file")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    cases = [
        Case(cell, rows, options.width, gradients, dtype)
        for cell in options.cells
        for gradients in (False, True)
        for rows in options.rows
    ]
    rows = measure(cases, options.rounds)
    Console(width=130).print(table(rows))
    if options.out:
        write_json(options.out, rows)


if __name__ == "__main__":
    main()
