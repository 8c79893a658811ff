"""Synthetic data: the same from the same seed, shaped as promised, fast, and worth learning."""

from __future__ import annotations

import importlib
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seqrec_fast.data import (
    EvaluationBatch,
    Recipe,
    Split,
    evaluation_loader,
    leave_one_out,
    synthetic,
    train_loader,
)


def test_the_same_arguments_give_the_same_data() -> None:
    data = synthetic(num_users=50, num_items=80, seed=4)
    assert synthetic(num_users=50, num_items=80, seed=4).sha256 == data.sha256
    assert synthetic(num_users=50, num_items=80, seed=5).sha256 != data.sha256
    assert data.source == "synthetic(num_users=50, num_items=80, seed=4)"


def test_the_default_is_drawn_in_under_two_seconds() -> None:
    start = time.process_time()
    data = synthetic()
    assert time.process_time() - start < 2
    assert (data.num_users, data.num_items) == (5000, 2000)
    lengths = data.histories.lengths
    assert 38 < lengths.mean() < 42
    assert lengths.min() >= 5
    assert lengths.max() <= 200


def test_popularity_falls_by_a_power_law() -> None:
    counts = np.sort(np.bincount(synthetic(recipe=Recipe(0, 0, 0)).histories.items, minlength=2000))[::-1]
    places = np.array([20, 60, 200, 600])  # the first places are flattened, since nobody has an item twice
    slope = np.polyfit(np.log(places), np.log(counts[places]), 1)[0]
    assert -1.15 < slope < -0.75


def test_hardly_any_item_comes_twice() -> None:
    data = synthetic(num_users=500)
    pairs = data.histories.rows * data.num_items + data.histories.items
    assert len(np.unique(pairs)) > 0.99 * len(pairs)


@pytest.mark.parametrize("block", [1, 1000, 64 << 20])
def test_blocks_of_users(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    module = importlib.import_module("seqrec_fast.data.synthetic")  # the package's attribute is the function
    monkeypatch.setattr(module, "_SEEN_BYTES", block)
    data = synthetic(num_users=37, num_items=90)
    assert data.num_users == 37
    assert data.histories.items.max() < 90


@pytest.mark.parametrize(("num_users", "num_items"), [(1, 2), (3, 3), (10, 21), (5, 41)])
def test_small_catalogues(num_users: int, num_items: int) -> None:
    data = synthetic(num_users=num_users, num_items=num_items)
    assert (data.num_users, data.num_items) == (num_users, num_items)
    assert data.histories.lengths.max() <= num_items


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_users": 0}, "num_users must be at least 1, got 0"),
        ({"num_items": 1}, "num_items must be at least 2, got 1"),
        ({"mean_length": float("nan")}, "mean_length must be at least 1, got nan"),
        ({"min_length": 9, "max_length": 8}, "max_length must be at least 9, got 8"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"follow": 0.5, "skip": 0.4, "taste": 0.2}, r"follow \+ skip \+ taste must be at most 1"),
        ({"skip": -0.1}, "skip must be at least 0 and finite, got -0.1"),
        ({"popularity": float("nan")}, "popularity must be at least 0 and finite, got nan"),
        ({"genres": 0}, "genres must be at least 1, got 0"),
    ],
)
def test_recipes(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)  # type: ignore[arg-type]


def hit_rate(split: Split, score: object) -> float:
    """HR@10 over the full catalogue, seen items left out."""
    hits = 0
    for batch in evaluation_loader(split, "test"):
        scores: Tensor = score(batch)  # type: ignore[operator]
        assert batch.exclude is not None
        rows, columns = torch.nonzero(batch.exclude >= 0, as_tuple=True)
        scores[rows, batch.exclude[rows, columns]] = -torch.inf
        hits += int(((scores > scores.gather(1, batch.target[:, None])).sum(1) < 10).sum())
    return hits / len(split.test)


def test_a_sequence_model_beats_markov_beats_popularity() -> None:
    torch.set_num_threads(1)
    split = leave_one_out(synthetic(num_users=2000, num_items=400, seed=0))
    items, rows = torch.from_numpy(split.train.items), torch.from_numpy(split.train.rows)
    popular = torch.bincount(items, minlength=400).float()
    follows = rows[1:] == rows[:-1]
    counts = torch.zeros(400, 400).index_put_(
        (items[:-1][follows], items[1:][follows]), torch.ones(()), accumulate=True
    )

    table, lstm = nn.Embedding(400, 32), nn.LSTM(32, 32, batch_first=True)
    nn.init.normal_(table.weight, std=32**-0.5)
    optimizer = torch.optim.Adam([*table.parameters(), *lstm.parameters()], lr=0.006)
    loader = train_loader(split, batch_size=64, max_length=50)
    for _ in range(10):
        for batch in loader:
            states = lstm(table(batch.ids))[0] @ table.weight.T  # [B, T, I]
            loss = nn.functional.cross_entropy(states.flatten(0, 1), batch.target.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def last(batch: EvaluationBatch) -> Tensor:
        return torch.arange(len(batch.ids)), batch.lengths - 1  # type: ignore[return-value]

    with torch.no_grad():
        by_popularity = hit_rate(split, lambda batch: popular.repeat(len(batch.ids), 1))
        by_markov = hit_rate(split, lambda batch: counts[batch.ids[last(batch)]] + popular / popular.sum())
        by_lstm = hit_rate(split, lambda batch: lstm(table(batch.ids))[0][last(batch)] @ table.weight.T)
    assert by_popularity > 2 * 10 / 400
    assert by_markov > 2 * by_popularity
    assert by_lstm > 1.05 * by_markov, (by_popularity, by_markov, by_lstm)
