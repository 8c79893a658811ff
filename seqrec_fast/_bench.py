"""``seqrec-fast bench``: a small table, each operator beside its form in stock torch, at shapes people run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import seqrec_fast as sf
from seqrec_fast._files import write_json
from seqrec_fast._measure import cpu_threads, interleaved, medians
from seqrec_fast.info import info

Call = Callable[[], Any]
SHORT = {"forward": "fwd", "forward + backward": "fwd+bwd"}


@dataclass(frozen=True)
class Case:
    """An operator at a shape: ``make`` gives our call, torch's call, and the tensors that explain the backend."""

    operator: str
    shape: str
    peer: str
    make: Callable[[], tuple[Call, Call, Sequence[Tensor]]]
    backward: bool = True  # whether the operator is also timed with its gradients


@dataclass(frozen=True)
class Row:
    """One line of the table, as it is written to JSON."""

    operator: str
    backend: str | None
    pass_: str
    dtype: str
    shape: str
    ms: float
    peer: str
    peer_ms: float
    hardware: str
    versions: dict[str, str]
    commit: str | None

    def as_dict(self) -> dict[str, Any]:
        return {name.rstrip("_"): value for name, value in asdict(self).items()}


def _layer(operator: str, batch: int, steps: int, width: int, *, ragged: bool) -> Case:
    ours_class, torch_class = {"lstm": (sf.LSTM, nn.LSTM), "gru": (sf.GRU, nn.GRU)}[operator]

    def make() -> tuple[Call, Call, Sequence[Tensor]]:
        theirs = torch_class(width, width, batch_first=True)
        ours = ours_class(width, width, batch_first=True)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(batch, steps, width, requires_grad=True)
        if not ragged:
            return lambda: ours(x)[0], lambda: theirs(x)[0], [x]
        lengths = torch.randint(1, steps + 1, (batch,))

        def packed() -> Tensor:
            pack = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            output, _ = nn.utils.rnn.pad_packed_sequence(theirs(pack)[0], batch_first=True, total_length=steps)
            return output

        return lambda: ours(x, lengths=lengths)[0], packed, [x]

    kind = "ragged" if ragged else "full"
    return Case(operator, f"B={batch} T={steps} H={width} {kind}", f"nn.{torch_class.__name__}", make)


def _step(operator: str, batch: int, width: int) -> Case:
    cell_class = {"lstm_step": nn.LSTMCell, "gru_step": nn.GRUCell}[operator]

    def make() -> tuple[Call, Call, Sequence[Tensor]]:
        cell = cell_class(width, width)
        weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        x, h, c = (torch.randn(batch, width, requires_grad=True) for _ in range(3))
        if operator == "lstm_step":
            return lambda: sf.lstm_step(x, (h, c), *weights)[0], lambda: cell(x, (h, c))[0], [x]
        return lambda: sf.gru_step(x, h, *weights), lambda: cell(x, h), [x]

    return Case(operator, f"B={batch} H={width}", f"nn.{cell_class.__name__}", make)


def _vectors(rows: int, items: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width, requires_grad=True), (torch.randn(items, width) / width**0.5).requires_grad_()


def _attention(rows: int, items: int, width: int) -> Case:
    def make() -> tuple[Call, Call, Sequence[Tensor]]:
        query, keys = _vectors(rows, items, width)
        return (
            lambda: sf.catalogue_attention(query, keys),
            lambda: F.scaled_dot_product_attention(query[None], keys[None], keys[None], scale=1.0)[0],
            [query, keys],
        )

    return Case("catalogue_attention", f"B={rows} I={items:,} d={width}", "F.scaled_dot_product_attention", make)


def _cross_entropy(rows: int, items: int, width: int) -> Case:
    def make() -> tuple[Call, Call, Sequence[Tensor]]:
        query, table = _vectors(rows, items, width)
        target = torch.randint(items, (rows,))
        return (
            lambda: sf.catalogue_cross_entropy(query, table, target),
            lambda: F.cross_entropy(query @ table.T, target),
            [query, table],
        )

    return Case("catalogue_cross_entropy", f"B={rows} I={items:,} d={width}", "F.cross_entropy(q @ W.T)", make)


def _topk(rows: int, items: int, width: int, k: int, seen: int) -> Case:
    def make() -> tuple[Call, Call, Sequence[Tensor]]:
        query, table = _vectors(rows, items, width)
        exclude = torch.randint(items, (rows, seen))
        return (
            lambda: sf.catalogue_topk(query, table, k, exclude=exclude).indices,
            lambda: (query @ table.T).scatter(1, exclude, -torch.inf).topk(k).indices,
            [query, table],
        )

    return Case("catalogue_topk", f"B={rows} I={items:,} d={width} k={k}", "(q @ W.T).topk", make, backward=False)


def _rank(rows: int, items: int, width: int, seen: int) -> Case:
    def make() -> tuple[Call, Call, Sequence[Tensor]]:
        query, table = _vectors(rows, items, width)
        exclude, target = torch.randint(items, (rows, seen)), torch.randint(items, (rows,))

        def stock() -> Tensor:
            scores = query @ table.T
            own = scores.gather(1, target[:, None])
            return (scores.scatter(1, exclude, -torch.inf) > own).sum(1)

        return lambda: sf.catalogue_rank(query, table, target, exclude=exclude), stock, [query, table]

    return Case("catalogue_rank", f"B={rows} I={items:,} d={width}", "(q @ W.T > s).sum", make, backward=False)


CASES = [
    _step("lstm_step", 1, 128),
    _step("lstm_step", 64, 128),
    _step("gru_step", 1, 128),
    _step("gru_step", 64, 128),
    _layer("lstm", 64, 50, 128, ragged=False),
    _layer("lstm", 64, 50, 128, ragged=True),
    _layer("gru", 64, 50, 128, ragged=False),
    _layer("gru", 64, 50, 128, ragged=True),
    _attention(256, 20_000, 64),
    _cross_entropy(512, 20_000, 64),
    _topk(64, 100_000, 64, k=10, seen=50),
    _rank(64, 100_000, 64, seen=50),
]


def choose(operators: Sequence[str]) -> list[Case]:
    """The cases of the named operators; all for none.

    Raises:
        ValueError: an operator that has no case.
    """
    known = list(dict.fromkeys(case.operator for case in CASES))
    unknown = [name for name in operators if name not in known]
    if unknown:
        raise ValueError(f"there is no benchmark of {unknown[0]!r}; there are {', '.join(known)}")
    return [case for case in CASES if not operators or case.operator in operators]


def measure(
    cases: Sequence[Case], *, rounds: int = 7, threads: int | None = None, console: Console | None = None
) -> list[Row]:
    """Time every case, forward and with gradients."""
    facts = info()
    hardware = f"{facts['cpu']}, {threads or torch.get_num_threads()} threads, tier {facts['cpu_tier']}"
    versions = {"seqrec_fast": str(facts["seqrec_fast"]), "torch": str(facts["torch"])}
    commit = _commit()
    console = console or Console(stderr=True)
    rows = []
    with cpu_threads(threads), console.status("") as status:
        for case in cases:
            status.update(f"{case.operator}  {case.shape}")
            torch.manual_seed(0)  # real numbers, the same for both sides and every run
            ours, theirs, tensors = case.make()
            backend = sf.explain(case.operator, *tensors).backend
            for name, wrap in _passes(case):
                calls = {"ours": wrap(ours), "torch": wrap(theirs)}
                # a call of microseconds is repeated, so that a round is long enough for the clock
                repeat = _repetitions(calls["ours"])
                times = medians(
                    interleaved({key: _repeated(call, repeat) for key, call in calls.items()}, rounds=rounds)
                )
                ms = {key: 1e3 * seconds / repeat for key, seconds in times.items()}
                rows.append(
                    Row(
                        operator=case.operator,
                        backend=backend,
                        pass_=name,
                        dtype="float32",
                        shape=case.shape,
                        ms=ms["ours"],
                        peer=case.peer,
                        peer_ms=ms["torch"],
                        hardware=hardware,
                        versions=versions,
                        commit=commit,
                    )
                )
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal, in 80 columns; :func:`legend` goes with it."""
    found = Table(box=box.SIMPLE_HEAD)
    for name in ("operator, shape", "pass", "backend"):
        found.add_column(name)
    for name in ("ours ms", "torch ms", "ratio"):
        found.add_column(name, justify="right")
    cases = [list(group) for _, group in groupby(rows, key=lambda row: (row.operator, row.shape))]
    for passes in cases:
        # a case takes two lines whether it has one pass or two, so that 80 columns are enough
        names = (
            [passes[0].operator, passes[0].shape] if len(passes) > 1 else [f"{passes[0].operator}\n{passes[0].shape}"]
        )
        for place, row in enumerate(passes):
            ratio = row.peer_ms / row.ms
            found.add_row(
                names[place] if place < len(names) else "",
                SHORT.get(row.pass_, row.pass_),
                row.backend or "–",
                f"{row.ms:.3f}",
                f"{row.peer_ms:.3f}",
                f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}×[/]",
                end_section=place == len(passes) - 1,
            )
    return found


def legend(rows: Sequence[Row]) -> str:
    """What the short columns of the table mean."""
    peers = dict.fromkeys(f"{row.operator} {row.peer}" for row in rows)
    return (
        "ratio: stock torch's time / ours, below 1 where torch is faster; fwd: forward, fwd+bwd: with gradients; "
        f"stock torch is, for {', for '.join(peers)}"
    )


def write(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """The rows as JSON; the file appears whole or not at all."""
    write_json(Path(path), [row.as_dict() for row in rows])


def _passes(case: Case) -> Iterator[tuple[str, Callable[[Call], Call]]]:
    yield "forward", _without_gradients
    if case.backward:
        yield "forward + backward", _with_gradients


def _without_gradients(call: Call) -> Call:
    def run() -> None:
        with torch.no_grad():
            call()

    return run


def _with_gradients(call: Call) -> Call:
    def run() -> None:
        result = call()
        result.backward(torch.ones_like(result))

    return run


def _repeated(call: Call, times: int) -> Call:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def _repetitions(call: Call) -> int:
    """How often to call in one round to make it about 5 ms long."""
    call()
    seconds = medians(interleaved({"call": call}, rounds=3, warmup=1))["call"]
    return max(1, min(1000, int(5e-3 / max(seconds, 1e-7))))


def _commit() -> str | None:
    """The commit of the checkout this file is in, if it is in one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
