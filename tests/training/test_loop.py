"""train_epoch, evaluate and target_ranks, without Lightning."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from seqrec_fast.data import EvaluationBatch, Split, evaluation_loader, leave_one_out, synthetic, train_loader
from seqrec_fast.models import Blend, Markov, Popularity, SequenceRecommender
from seqrec_fast.training import RankMetrics, evaluate, rank_from_scores, target_ranks, train_epoch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small work on a busy machine is fastest so; the thread count is put back after every test."""
    torch.set_num_threads(1)


ITEMS = 50


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(synthetic(num_users=80, num_items=ITEMS, mean_length=12, seed=1))


@pytest.fixture
def model() -> SequenceRecommender:
    torch.manual_seed(0)
    return SequenceRecommender(ITEMS, embedding_dim=8, encoder="gru")


def test_an_epoch_lowers_the_loss_and_reports_its_mean(split: Split, model: SequenceRecommender) -> None:
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    seen: list[tuple[int, float]] = []
    losses = []
    for _ in range(4):
        seen.clear()
        model.eval()  # it must train all the same
        loader = train_loader(split, batch_size=16, seed=2)
        losses.append(train_epoch(model, loader, adam, on_step=lambda step, loss: seen.append((step, float(loss)))))
        assert model.training
    assert losses[-1] < losses[0]
    batches = train_loader(split, batch_size=16, seed=2)
    positions = [int((batch.target >= 0).sum()) for batch in batches]
    assert [step for step, _ in seen] == list(range(len(positions)))
    mean = sum(loss * n for (_, loss), n in zip(seen, positions, strict=True)) / sum(positions)
    assert losses[-1] == pytest.approx(mean, rel=1e-6)


def test_gradients_are_clipped(split: Split, model: SequenceRecommender) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_epoch(
        model, train_loader(split, batch_size=80), torch.optim.SGD(model.parameters(), lr=1.0), gradient_clip=1e-3
    )
    moved = torch.stack([(model.state_dict()[name] - before[name]).norm() for name in before]).norm()
    assert 0.9e-3 < moved < 1.1e-3  # one step of rate 1 along a gradient of norm 1e-3


def test_autocast_computes_in_bfloat16(split: Split, model: SequenceRecommender) -> None:
    kinds = set()
    hook = model.association.linear.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    train_epoch(model, train_loader(split, batch_size=40), adam, autocast=torch.bfloat16)
    hook.remove()
    assert kinds == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_no_batch_is_an_error(model: SequenceRecommender) -> None:
    with pytest.raises(ValueError, match="no batch with a target"):
        train_epoch(model, [], torch.optim.Adam(model.parameters()))


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_evaluate_is_the_ranking_of_explicit_scores(
    split: Split, model: SequenceRecommender, exclude_seen: bool
) -> None:
    loader = evaluation_loader(split, "test", batch_size=32, exclude_seen=exclude_seen)
    model.train()
    quality = evaluate(model, loader, ks=(1, 10))
    assert model.training
    expected = RankMetrics(ITEMS, (1, 10), seen_filter=exclude_seen)
    model.eval()
    with torch.no_grad():
        for batch in loader:
            scores = model.encode(batch.ids, batch.lengths).double() @ model.item_vectors.double().T
            assert model.item_bias is not None
            rounded = (scores + model.item_bias.double()).float()
            expected.update(rank_from_scores(rounded, batch.target, batch.exclude))
    assert dict(quality) == dict(expected.compute())
    assert (quality.num_users, quality.num_items, quality.seen_filter) == (80, ITEMS, exclude_seen)


def test_models_with_logits_only_are_ranked() -> None:
    split = leave_one_out(synthetic(num_users=500, num_items=300, mean_length=30, seed=1))
    markov = Markov(300).fit(split.train)
    popularity = Popularity(300).fit(split.train)
    loader = evaluation_loader(split, "test", batch_size=500)
    floors = evaluate(markov, loader), evaluate(popularity, loader)
    assert floors[0]["NDCG@10"] > floors[1]["NDCG@10"] > 0  # the data follows a first-order chain
    assert dict(evaluate(Blend([markov, popularity], [1.0, 0.0]), loader)) == dict(floors[0])
    (batch,) = loader
    ranks = target_ranks(markov, batch)
    alone = torch.cat([markov.rank(batch.ids, batch.lengths, batch.target)])
    # the loader's filter never holds the target, and covers the whole history, as the model's own does here
    assert torch.equal(ranks, alone)


def test_what_cannot_rank_is_refused(split: Split) -> None:
    (batch,) = evaluation_loader(split, "test")
    with pytest.raises(TypeError, match="Linear has neither encode and item_vectors nor logits"):
        target_ranks(nn.Linear(1, 1), batch)


def test_a_seen_filter_that_comes_and_goes_is_refused(split: Split, model: SequenceRecommender) -> None:
    (batch,) = evaluation_loader(split, "test")
    with pytest.raises(ValueError, match="seen filter changed midway"):
        evaluate(model, [batch, batch._replace(exclude=None)])
    assert model.training


def test_constant_scores_gain_nothing() -> None:
    class Constant(nn.Module):
        num_items = 100

        def logits(self, ids: Tensor, lengths: Tensor) -> Tensor:
            return torch.zeros(len(ids), self.num_items)

    rows = torch.arange(100)
    batch = EvaluationBatch(rows[:, None], torch.ones(100, dtype=torch.int64), rows, None, rows)
    assert evaluate(Constant(), [batch])["HR@10"] == pytest.approx(0.1)


def test_no_lightning_is_imported_for_an_own_loop() -> None:
    program = """
import sys, torch
from seqrec_fast.training import evaluate, train_epoch, Quality, FitOptions, OptimizerOptions
assert not any(name.split(".")[0] in ("lightning", "typer", "polars", "matplotlib", "triton") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_fit_without_lightning_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import seqrec_fast.training

    monkeypatch.setattr("seqrec_fast.training._lightning.importlib.util.find_spec", lambda name: None)
    with pytest.raises(seqrec_fast.training.MissingExtra, match=r"pip install 'seqrec_fast\[train\]'"):
        _ = seqrec_fast.training.fit
    assert seqrec_fast.training.evaluate is evaluate
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = seqrec_fast.training.fitt  # type: ignore[attr-defined]
