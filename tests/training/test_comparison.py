"""The comparison with stock torch: the same numbers, and honest ratios."""

from __future__ import annotations

import pytest
import torch

from seqrec_fast._measure import extra_peak_bytes, interleaved
from seqrec_fast.data import leave_one_out, synthetic, train_loader
from seqrec_fast.models import RecommenderConfig
from seqrec_fast.training.comparison import Comparison, Side, compare_with_stock, peak_of_each


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small work on a busy machine is fastest so; the thread count is put back after every test."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("encoder", ["lstm", "gru", "cnn"])
def test_both_take_the_same_steps(encoder: str) -> None:
    split = leave_one_out(synthetic(num_users=40, num_items=50, mean_length=8))
    batches = list(train_loader(split, batch_size=10, max_length=6))
    config = RecommenderConfig(50, embedding_dim=16, encoder=encoder)  # type: ignore[arg-type]
    done: list[int] = []
    found = compare_with_stock(config, batches, learning_rate=0.01, memory=False, on_step=done.append)
    assert done == [1, 2, 3, 4]
    assert found.largest_loss_gap < 1e-4
    assert found.ours.losses[-1] != found.ours.losses[0]
    assert len(found.ours.seconds) == len(found.stock.seconds) == 4
    assert found.positions == [int(batch.lengths.sum()) for batch in batches]
    assert found.memory_ratio is None


def test_memory_is_that_of_one_step_in_a_process_of_its_own() -> None:
    # the stock model must hold positions × items scores: about 620 × 20,000 × 4 bytes
    split = leave_one_out(synthetic(num_users=32, num_items=20_000, mean_length=30, min_length=22))
    (batch,) = train_loader(split, batch_size=32, max_length=20)
    peaks = peak_of_each(RecommenderConfig(20_000, embedding_dim=8, attention=None), batch)
    scores = int(batch.lengths.sum()) * 20_000 * 4
    assert peaks["stock"] is not None
    assert peaks["ours"] is not None
    assert peaks["ours"] < scores < peaks["stock"]


def test_a_time_limit_ends_the_comparison() -> None:
    split = leave_one_out(synthetic(num_users=20, num_items=30, mean_length=8))
    batches = list(train_loader(split, batch_size=2, max_length=6))
    found = compare_with_stock(RecommenderConfig(30, embedding_dim=8), batches, memory=False, max_seconds=0)
    assert len(found.ours.losses) == len(found.stock.seconds) == len(found.positions) == 5


def test_ratios_say_who_wins() -> None:
    ours, stock = Side([2.0, 1.0], [1.0, 2.0], 10), Side([2.0, 1.1], [2.0, 8.0], 5)
    found = Comparison(ours, stock, [3, 4])
    assert found.time_ratio == 3.0
    assert found.memory_ratio == 0.5
    assert found.largest_loss_gap == pytest.approx(0.1 / 1.1)
    assert Comparison(Side([1.0], [1.0], None), stock, [3]).memory_ratio is None


def test_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        compare_with_stock(RecommenderConfig(5), [])


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_the_peak_sees_what_is_freed_again() -> None:
    size = 64 << 20
    found = extra_peak_bytes(lambda: torch.ones(size // 4).sum())
    assert found is not None
    assert 0.9 * size < found < 1.5 * size
