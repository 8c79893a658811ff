"""HR, NDCG and MRR from ranks, and ranks from explicit scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqrec_fast.training.metrics import Quality, RankMetrics, rank_from_scores

INF, NAN = float("inf"), float("nan")


def by_hand(ranks: list[int], k: int) -> dict[str, float]:
    valid = [r for r in ranks if r >= 0]
    return {
        f"HR@{k}": sum(r < k for r in valid) / len(valid),
        f"NDCG@{k}": sum(1 / math.log2(r + 2) for r in valid if r < k) / len(valid),
        f"MRR@{k}": sum(1 / (r + 1) for r in valid if r < k) / len(valid),
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 30), min_size=1, max_size=40).filter(lambda ranks: max(ranks) >= 0), st.integers(1, 40))
def test_metrics_are_the_formulas_whatever_the_batches(ranks: list[int], cut: int) -> None:
    metrics = RankMetrics(31, ks=(1, 5, 10), seen_filter=False)
    for piece in torch.tensor(ranks).split(cut):
        metrics.update(piece)
    quality = metrics.compute()
    for k in (1, 5, 10):
        for name, value in by_hand(ranks, k).items():
            assert quality[name] == pytest.approx(value, abs=1e-12)
    assert quality.num_users == sum(r >= 0 for r in ranks)


def test_the_report_states_how_it_was_measured() -> None:
    metrics = RankMetrics(3416, seen_filter=True)
    metrics.update(torch.tensor([[0, 1], [20, -1]]))
    quality = metrics.compute()
    assert "full ranking over 3,416 items, seen items filtered, 3 users" in str(quality)
    assert "HR@10 0.6667" in str(quality)
    assert list(quality) == ["HR@10", "NDCG@10", "MRR@10"]
    assert "not filtered" in RankMetrics(5, seen_filter=False).compute().protocol


def test_no_user_gives_nan_not_zero() -> None:
    quality = RankMetrics(5, seen_filter=True).compute()
    assert quality.num_users == 0
    assert math.isnan(quality["HR@10"])


@pytest.mark.parametrize("ks", [(), (0,), (10, -1)])
def test_bad_cut_offs(ks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ks must hold"):
        RankMetrics(5, ks=ks, seen_filter=True)


def test_float_ranks_are_refused() -> None:
    with pytest.raises(TypeError, match="integers"):
        RankMetrics(5, seen_filter=True).update(torch.zeros(3))


def rank_by_sorting(scores: torch.Tensor, target: int, exclude: list[int]) -> int:
    """Sort every rankable item by (score descending, id ascending) and look the target up."""
    row = scores.tolist()
    items = [i for i in range(len(row)) if i == target or (i not in exclude and row[i] > -INF)]
    ranked = [i for i in items if row[i] > -INF]  # NaN fails the comparison
    ranked.sort(key=lambda i: (-row[i], i))
    return ranked.index(target) if target in ranked else len(ranked)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rank_from_scores_is_the_sorted_place(data: st.DataObject) -> None:
    num_items = data.draw(st.integers(1, 12))
    values = st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, 0.5, 2.0, INF, NAN])
    rows = data.draw(st.lists(st.lists(values, min_size=num_items, max_size=num_items), min_size=1, max_size=4))
    item = st.integers(0, num_items - 1)
    target = [data.draw(item) for _ in rows]
    exclude = [data.draw(st.lists(st.integers(-1, num_items - 1), min_size=3, max_size=3)) for _ in rows]
    scores = torch.tensor(rows)
    found = rank_from_scores(scores, torch.tensor(target), torch.tensor(exclude))
    expected = [rank_by_sorting(row, t, e) for row, t, e in zip(scores, target, exclude, strict=True)]
    assert found.tolist() == expected


def test_rank_from_scores_ignores_rows_and_checks_targets() -> None:
    scores = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert rank_from_scores(scores, torch.tensor([-100, 0])).tolist() == [-1, 1]
    assert rank_from_scores(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).tolist() == []
    with pytest.raises(IndexError, match="0…1"):
        rank_from_scores(scores, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"\[B, I\]"):
        rank_from_scores(scores[0], torch.tensor([0, 1]))


def test_quality_is_a_mapping() -> None:
    quality = Quality({"HR@10": 0.5}, 2, 7, True)
    assert dict(quality) == {"HR@10": 0.5}
    assert len(quality) == 1
