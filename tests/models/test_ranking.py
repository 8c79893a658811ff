"""The order of dense scores: value descending, id ascending, −0 = +0, no place for −∞ and NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqrec_fast.models._ranking import hide, rank_of, top_k

INF, NAN = torch.inf, torch.nan

NASTY = {
    "signs and zeros": [[-0.0, 0.0, -1.0, 1.0, -1e-45, 1e-45, -3e38, 3e38]],
    "infinities": [[INF, -INF, 0.0, INF, -INF, -1.0, 2.0, 2.0]],
    "nan": [[NAN, 1.0, -NAN, 3.0, 1.0, NAN, -2.0, 0.0]],
    "all equal": [[2.5] * 8],
    "all gone": [[-INF] * 8],
}


def in_order(row: Tensor) -> list[int]:
    """By Python's sort, which is stable."""
    ranked = [item for item in range(len(row)) if row[item] > -INF]
    return sorted(ranked, key=lambda item: -row[item].item())


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("k", [1, 3, 8, 11])
def test_top_k(name, k):
    scores = torch.tensor(NASTY[name])
    items, values = top_k(hide(scores, torch.empty(1, 0, dtype=torch.int64)), k)
    expected = in_order(scores[0])[:k]
    assert items[0].tolist() == expected + [-1] * (k - len(expected))
    assert values[0].tolist() == scores[0, expected].tolist() + [-INF] * (k - len(expected))


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("exclude", [[-1, -1], [3, 1, 3, -1], [0, 7, 4, 4, 4, 2]])
def test_rank(name, exclude):
    """The place in the sorted list of what is left, the target left in."""
    scores = torch.tensor(NASTY[name])
    target = torch.arange(8)
    expected = []
    for wanted in range(8):
        left = scores[0].clone()
        left[[item for item in exclude if item not in (-1, wanted)]] = -INF
        order = in_order(left)
        expected.append(order.index(wanted) if wanted in order else len(order))
    assert rank_of(scores.repeat(8, 1), target, torch.tensor(exclude).repeat(8, 1)).tolist() == expected


def test_hidden_items(batch):
    scores = torch.randn(4, 37)
    exclude = torch.cat((batch.ids, batch.ids[:, :2], torch.full((4, 1), -1)), 1)  # duplicates, padding
    hidden = hide(scores, exclude)
    for row in range(4):
        seen = set(exclude[row].tolist()) - {-1}
        assert {item for item in range(37) if hidden[row, item] == -INF} == seen
        kept = sorted(set(range(37)) - seen)
        assert torch.equal(hidden[row, kept], scores[row, kept])


def test_k_below_one():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_k(torch.zeros(1, 3), 0)
