"""``lstm`` and ``gru`` beside torch.nn.LSTM and torch.nn.GRU, over B × T × H with I = H.

``python -m benchmarks.bench_recurrent`` prints interleaved ratios, both sides at one and at two threads in every round and each at
its better setting, and geometric means. ``--ragged`` compares with torch's packed sequences instead: lengths drawn between 1 and
2·fill·T (fill 0.3), and beside it the share of real tokens, to which our time should be proportional. ``--options`` times what
torch has not (zoneout, recurrent dropout, layer normalisation) and the projection as multiples of our own plain layer instead.

Inference: no gradients. Training: forward, and the gradients of the parameters from that of every output.

Bound: the multiply-adds of W_ih and W_hh (three times that with gradients) at the rate of a large fp32 torch.mm, measured beside
it; in bf16 the same, although products of bf16 may be faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqrec_fast as sf
from seqrec_fast._files import write_json
from seqrec_fast._measure import interleaved, medians, on_threads
from seqrec_fast.info import info

Call = Callable[[], object]
THREADS = (1, 2)
PEERS: dict[str, tuple[type[nn.Module], type[nn.Module], int]] = {
    "lstm": (sf.LSTM, nn.LSTM, 4),
    "gru": (sf.GRU, nn.GRU, 3),
}
FILL = 0.3
# Arguments of our modules.
OPTIONS: dict[str, dict[str, Any]] = {
    "zoneout": {"zoneout": 0.1},
    "recurrent dropout": {"recurrent_dropout": 0.2},
    "projection": {},  # of half the width
    "layer norm": {"layer_norm": True},
}


@dataclass(frozen=True)
class Case:
    operator: str
    rows: int
    steps: int
    width: int
    train: bool
    dtype: torch.dtype = torch.float32
    ragged: bool = False

    @property
    def multiply_adds(self) -> int:
        gates = PEERS[self.operator][2] * self.width
        tokens = int(self.lengths().sum()) if self.ragged else self.rows * self.steps
        return (3 if self.train else 1) * tokens * gates * 2 * self.width

    def lengths(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(1, round(2 * FILL * self.steps) + 1, (self.rows,), generator=generator)

    def calls(self) -> dict[str, Call]:
        """Ours and torch's on the same weights and data; ragged also ours on the padded batch."""
        torch.manual_seed(0)
        ours_class, torch_class, _ = PEERS[self.operator]
        theirs = torch_class(self.width, self.width, dtype=self.dtype)
        ours = ours_class.from_torch(theirs)  # type: ignore[attr-defined]
        parameters = tuple(theirs.parameters())
        x = torch.randn(self.steps, self.rows, self.width, dtype=self.dtype)

        def run(output: Callable[[], Tensor]) -> Call:
            return _training(parameters, output) if self.train else partial(_infer, output)

        if not self.ragged:
            return {"ours": run(lambda: ours(x)[0]), "torch": run(lambda: theirs(x)[0])}
        lengths = self.lengths()
        return {
            "ours": run(lambda: ours(x, lengths=lengths)[0]),
            "padded": run(lambda: ours(x)[0]),
            "torch": run(lambda: theirs(pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data),
        }


def _infer(output: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        output()


def _training(parameters: tuple[Tensor, ...], output: Callable[[], Tensor]) -> Call:
    seed = torch.randn_like(output())

    def run() -> None:
        torch.autograd.grad(output(), parameters, seed)

    return run


def _multiply_rate() -> float:
    a = torch.randn(1024, 1024)
    seconds = interleaved({str(n): on_threads(n, lambda: a @ a) for n in THREADS}, rounds=15)
    return 1024**3 / min(min(times) for times in seconds.values())


def measure(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    facts, before = info(), torch.get_num_threads()
    rate = _multiply_rate()
    rows = []
    for case in track(cases, "measuring", transient=True):
        calls = case.calls()
        # Long enough for the clock: 10 ms of ours a round.
        warm = interleaved({"ours": calls["ours"]}, rounds=3)["ours"]
        repeat = max(1, round(0.01 / min(warm)))
        functions = {f"{name}/{n}": on_threads(n, call, repeat) for name, call in calls.items() for n in THREADS}
        ms = {key: 1e3 * value / repeat for key, value in medians(interleaved(functions, rounds=rounds)).items()}
        best = {name: min(ms[f"{name}/{n}"] for n in THREADS) for name in calls}
        rows.append(
            {
                "operator": case.operator,
                "backend": "native",
                "pass": "forward + backward" if case.train else "forward",
                "dtype": str(case.dtype).removeprefix("torch."),
                "shape": f"B={case.rows} T={case.steps} H={case.width}" + (" ragged" if case.ragged else ""),
                "width": case.width,
                "ms": best["ours"],
                "ms_of": {key: round(value, 4) for key, value in ms.items()},
                "bound_ms": 1e3 * case.multiply_adds / rate,
                "peer": f"nn.{case.operator.upper()}" + (" packed" if case.ragged else ""),
                "peer_ms": best["torch"],
                "ratio": best["torch"] / best["ours"],
                "hardware": f"{facts['cpu']}, at most {max(THREADS)} threads, tier {facts['cpu_tier']}",
                "versions": {"torch": str(facts["torch"])},
            }
        )
        if case.ragged:
            share = float(case.lengths().sum()) / (case.rows * case.steps)
            rows[-1]["time_over_share"] = best["ours"] / best["padded"] / share
    torch.set_num_threads(before)
    return rows


def measure_options(cases: list[Case], rounds: int) -> Table:
    """Time with one option over time without, on one thread: medians of interleaved rounds."""
    before = torch.get_num_threads()
    found = Table(title="time of an option ÷ time of the plain layer, one thread", title_justify="left")
    for name in ("operator", "pass", "shape", "plain ms", *OPTIONS):
        found.add_column(name)
    for case in track(cases, "measuring", transient=True):
        module = PEERS[case.operator][0]
        x = torch.randn(case.steps, case.rows, case.width, dtype=case.dtype)
        calls: dict[str, Call] = {}
        for name, told in {"plain": {}, **OPTIONS}.items():
            if name == "projection":
                told = {"proj_size": case.width // 2}
                if case.operator == "gru":
                    continue
            layer = module(case.width, case.width, dtype=case.dtype, **told)
            output = partial(_output_of, layer, x)
            calls[name] = _training(tuple(layer.parameters()), output) if case.train else partial(_infer, output)
        seconds = medians(interleaved({name: on_threads(1, call) for name, call in calls.items()}, rounds=rounds))
        ratios = (f"{seconds[name] / seconds['plain']:.2f}×" if name in seconds else "—" for name in OPTIONS)
        shape = f"B={case.rows} T={case.steps} H={case.width}"
        name = "forward + backward" if case.train else "forward"
        found.add_row(case.operator, name, shape, f"{1e3 * seconds['plain']:.2f}", *ratios)
    torch.set_num_threads(before)
    return found


def _output_of(layer: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = layer(x)[0]
    return output


def table(rows: list[dict[str, Any]]) -> Table:
    found = Table(title=rows[0]["hardware"], title_justify="left")
    for name in ("operator", "pass", "dtype", "shape"):
        found.add_column(name)
    for name in ("ms", "torch ms", "bound ms", "torch / ours"):
        found.add_column(name, justify="right")
    for row in rows:
        times = (f"{row[key]:.3f}" for key in ("ms", "peer_ms", "bound_ms"))
        found.add_row(row["operator"], row["pass"], row["dtype"], row["shape"], *times, f"{row['ratio']:.2f}×")
    return found


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Geometric means over H ≤ 256, and the worst cell."""
    lines = []
    for key in dict.fromkeys((row["operator"], row["pass"]) for row in rows):
        ratios = [row["ratio"] for row in rows if (row["operator"], row["pass"]) == key and row["width"] <= 256]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            lines.append(f"{key[0]} {key[1]}, H ≤ 256: {mean:.2f}×, worst {min(ratios):.2f}× ({len(ratios)} cells)")
    lines += [
        f"{row['operator']} {row['pass']} {row['shape']}: time ÷ (share of real tokens × padded time) {row['time_over_share']:.2f}"
        for row in rows
        if "time_over_share" in row
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="lstm and gru beside torch.nn, interleaved in one process")
    parser.add_argument("--operators", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--passes", nargs="+", choices=["inference", "training"], default=["inference", "training"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 256, 1024])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 200])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 96, 128, 256, 512])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--options", action="store_true", help="each option beside the plain layer, instead of torch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="also write the rows to this JSON file")
    options = parser.parse_args()
    if options.options and (options.ragged or options.out):
        parser.error("--options goes with neither --ragged nor --out")
    cases = [
        Case(operator, rows, steps, width, name == "training", getattr(torch, options.dtype), options.ragged)
        for operator in options.operators
        for name in options.passes
        for width in options.widths
        for steps in options.steps
        for rows in options.rows
    ]
    console = Console(width=120)
    if options.options:
        console.print(measure_options(cases, options.rounds))
        return
    rows = measure(cases, options.rounds)
    console.print(table(rows))
    for line in summary(rows):
        console.print(line)
    if options.out:
        write_json(options.out, rows)


if __name__ == "__main__":
    main()
