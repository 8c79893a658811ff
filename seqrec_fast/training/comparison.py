"""The same model from this package's operators and from stock torch: same weights, same batches, step by step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seqrec_fast._measure import extra_peak_bytes, in_fresh_process, synchronise
from seqrec_fast.data import Batch
from seqrec_fast.models import RecommenderConfig, SequenceRecommender, StockRecommender


@dataclass(frozen=True)
class Side:
    """One of the two: loss and seconds of every step, and the extra memory of a step at its peak (None: unknown)."""

    losses: list[float]
    seconds: list[float]
    peak_bytes: int | None

    @property
    def step(self) -> float:
        """Seconds of a step, the median."""
        return statistics.median(self.seconds)

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return sum(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_with_stock` measured, and the positions of each batch. A ratio above 1 is in favour of ours."""

    ours: Side
    stock: Side
    positions: list[int]

    @property
    def time_ratio(self) -> float:
        """Median over the steps of stock / ours on the same batch, which ran one right after the other."""
        pairs = zip(self.stock.seconds, self.ours.seconds, strict=True)
        return statistics.median(stock / ours for stock, ours in pairs)

    @property
    def memory_ratio(self) -> float | None:
        if not self.ours.peak_bytes or self.stock.peak_bytes is None:
            return None
        return self.stock.peak_bytes / self.ours.peak_bytes

    @property
    def largest_loss_gap(self) -> float:
        """Largest relative difference of the two losses at the same step."""
        pairs = zip(self.ours.losses, self.stock.losses, strict=True)
        return max(abs(ours - stock) / abs(stock) for ours, stock in pairs)


def compare_with_stock(
    config: RecommenderConfig,
    batches: Sequence[Batch],
    *,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    memory: bool = True,
    max_seconds: float = math.inf,
    on_step: Callable[[int], None] | None = None,
) -> Comparison:
    """Train :class:`SequenceRecommender` and :class:`StockRecommender` side by side.

    Both start from the same weights and take the same batches, each with an Adam of its own; dropout is off, since the
    two draw different masks. Each step is timed whole (loss, backward, optimiser), in turn and with the order changing,
    after two untimed steps of each on the largest batch. Memory is that of one step on the batch with the most positions, in a
    process of its own for each.

    Args:
        config: of the model; its dropout is set to 0.
        batches: training batches.
        learning_rate: of both.
        seed: of the weights.
        device: where both run.
        memory: also measure memory (two short processes).
        max_seconds: take no further batch after this long (but at least five).
        on_step: called with the number of steps done.

    Raises:
        ValueError: without a batch.
    """
    if not batches:
        raise ValueError("batches must hold at least one batch to compare on")
    config = replace(config, dropout=0.0, embedding_dropout=None)
    torch.manual_seed(seed)
    device = torch.device(device)
    ours = SequenceRecommender.from_config(config).to(device)
    stock = StockRecommender(config).to(device)
    stock.load_state_dict(ours.state_dict())
    models: dict[str, nn.Module] = {"ours": ours, "stock": stock}
    start = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    largest = max(batches, key=lambda batch: int(batch.lengths.sum()))
    for model in models.values():
        # the first call of anything is slow, and so is the first that needs more memory or the optimiser's state
        warm = torch.optim.Adam(model.parameters(), lr=learning_rate)
        for _ in range(2):
            _step(model, warm, largest.to(device))
        model.load_state_dict(start)
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=learning_rate) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    begun = time.perf_counter()
    for number, batch in enumerate(batches):
        if number >= 5 and time.perf_counter() - begun > max_seconds:
            break
        batch = batch.to(device)
        for name in list(models)[:: 1 if number % 2 else -1]:
            synchronise(device)
            begin = time.perf_counter()
            loss = _step(models[name], optimizers[name], batch)
            synchronise(device)
            seconds[name].append(time.perf_counter() - begin)
            losses[name].append(loss)
        if on_step is not None:
            on_step(number + 1)
    peaks = dict.fromkeys(models) if not memory else peak_of_each(config, largest, device)
    sides = {name: Side(losses[name], seconds[name], peaks[name]) for name in models}
    positions = [int(batch.lengths.sum()) for batch in batches[: len(losses["ours"])]]
    return Comparison(sides["ours"], sides["stock"], positions)


def peak_of_each(config: RecommenderConfig, batch: Batch, device: torch.device | str = "cpu") -> dict[str, int | None]:
    """Extra memory at the peak of one training step of each model, each in a fresh process."""
    threads, values = torch.get_num_threads(), config.to_dict()
    # as numpy arrays: tensors would travel through shared memory files
    rows = [tensor.cpu().numpy() for tensor in batch]
    return {name: in_fresh_process(_peak, name, values, rows, threads, str(device)) for name in ("ours", "stock")}


def _peak(name: str, values: Mapping[str, Any], rows: Sequence[Any], threads: int, device: str) -> int | None:
    torch.set_num_threads(threads)
    config = RecommenderConfig.from_dict(values)
    model: nn.Module = SequenceRecommender.from_config(config) if name == "ours" else StockRecommender(config)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters())
    batch = Batch(*(torch.from_numpy(row) for row in rows)).to(device)
    small = Batch(batch.ids[:2, :8], batch.lengths[:2].clamp(max=8), batch.target[:2, :8])
    _step(model, optimizer, small)  # libraries, the optimiser's state, the gradients
    return extra_peak_bytes(lambda: _step(model, optimizer, batch), device)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    optimizer.zero_grad(set_to_none=True)
    # [B]: the item after each history; what earlier positions predict is in the history itself
    last = batch.target.gather(1, (batch.lengths - 1)[:, None])[:, 0]
    loss: Tensor = model.loss(batch.ids, batch.lengths, last)  # type: ignore[operator]
    loss.backward()
    optimizer.step()
    return float(loss.detach())
