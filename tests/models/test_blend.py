"""Blends: weights, normalisation, chunks, files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seqrec_fast.models import Blend, LSTMAttentionNet, Markov, Popularity, SequenceRecommender, _ranking

NUM_ITEMS = 37


@pytest.fixture
def models(batch) -> list[nn.Module]:
    histories = [row[:length].numpy() for row, length in zip(batch.ids, batch.lengths, strict=True)]
    torch.manual_seed(5)
    return [
        SequenceRecommender(NUM_ITEMS, embedding_dim=8).eval(),
        Markov(NUM_ITEMS).fit(histories),
        Popularity(NUM_ITEMS).fit(histories),
    ]


def test_fixed_weights_are_used_as_given(models, batch):
    blend = Blend(models, [2.0, -0.5, 0.0])
    a, b, _ = (model.logits(batch.ids, batch.lengths) for model in models)
    torch.testing.assert_close(blend.logits(batch.ids, batch.lengths), 2 * a - 0.5 * b)
    assert not any(name.startswith("weight") for name, _ in blend.named_parameters())
    torch.testing.assert_close(Blend(models).weights, torch.full((3,), 1 / 3))


def test_log_softmax_mixes_log_probabilities(models, batch):
    blend = Blend(models[:2], [0.25, 0.75], normalise="log_softmax")
    a, b = (model.logits(batch.ids, batch.lengths) for model in models[:2])
    torch.testing.assert_close(blend.logits(batch.ids, batch.lengths), 0.25 * a.log_softmax(1) + 0.75 * b)


def test_softmax_mixes_probabilities(models, batch):
    blend = Blend(models[:2], [0.5, 1.5], normalise="softmax")
    a, b = (model.logits(batch.ids, batch.lengths).softmax(1) for model in models[:2])
    mixture = 0.5 * a + 1.5 * b
    torch.testing.assert_close(blend.logits(batch.ids, batch.lengths), mixture)
    expected = -(mixture[torch.arange(4), batch.target] / 2).log().mean()
    torch.testing.assert_close(blend.loss(*batch), expected)


@pytest.mark.parametrize("normalise", ["softmax", "log_softmax"])
def test_learned_weights_find_the_better_model(models, batch, normalise):
    blend = Blend(models[1:], "learned", normalise=normalise)
    torch.testing.assert_close(blend.weights, torch.full((2,), 0.5))
    # the last step of each history is what the Markov model was fitted on
    long = batch.lengths > 1
    ids, lengths = batch.ids[long], batch.lengths[long] - 1
    target = ids.gather(1, lengths[:, None])[:, 0]
    optimizer = torch.optim.Adam([blend.weight_logits], 0.1)
    before = blend.loss(ids, lengths, target)
    for _ in range(50):
        optimizer.zero_grad()
        blend.loss(ids, lengths, target).backward()
        optimizer.step()
    assert blend.loss(ids, lengths, target) < before
    assert blend.weights[0] > 0.9
    assert abs(blend.weights.sum() - 1) < 1e-6


@pytest.mark.parametrize("at_once", [1, 2 * NUM_ITEMS, 1 << 24])
def test_recommend_and_rank_equal_brute_force_in_any_chunks(models, batch, at_once, monkeypatch):
    monkeypatch.setattr(_ranking, "SCORES_AT_ONCE", at_once)
    blend = Blend(models, [0.3, 0.5, 0.2], normalise="log_softmax").train()
    blend.eval()
    scores = blend.logits(batch.ids, batch.lengths).detach()
    for row, length in enumerate(batch.lengths.tolist()):
        scores[row, batch.ids[row, :length]] = -torch.inf
    order = torch.sort(scores, dim=1, descending=True, stable=True)
    blend.train()
    items, values = blend.recommend(batch.ids, batch.lengths, 10)
    assert torch.equal(items, order.indices[:, :10])
    torch.testing.assert_close(values, order.values[:, :10])
    assert all(part.training for part in (blend, models[1]))
    target = order.indices[:, 4]
    assert blend.rank(batch.ids, batch.lengths, target).tolist() == [4] * 4
    target = torch.where(torch.arange(4) == 1, -100, target)
    assert blend.rank(batch.ids, batch.lengths, target).tolist() == [4, -1, 4, 4]


def test_any_module_that_gives_logits(batch):
    torch.manual_seed(0)
    nets = [LSTMAttentionNet(5, 8, 3, 2), LSTMAttentionNet(5, 12, 3, 4)]
    x, lengths = torch.randn(2, 4, 5), torch.tensor([4, 2])
    blended = Blend(nets, [0.9, 0.1])(x, lengths=lengths)
    torch.testing.assert_close(blended, 0.9 * nets[0](x, lengths) + 0.1 * nets[1](x, lengths))
    with pytest.raises(ValueError, match="none of the blended models says how many items it scores"):
        Blend(nets).recommend(batch.ids, batch.lengths)


def test_file(models, batch, tmp_path):
    for blend in (Blend(models, [0.3, 0.5, 0.2]), Blend(models, "learned", normalise="log_softmax")):
        blend.save(tmp_path / "blend.safetensors")
        again = Blend.load(tmp_path / "blend.safetensors")
        assert torch.equal(again.logits(batch.ids, batch.lengths), blend.logits(batch.ids, batch.lengths))
        assert [type(model) for model in again.models] == [type(model) for model in models]
    with pytest.raises(TypeError, match=r"models\[0\] is a Linear, which cannot be saved"):
        Blend([nn.Linear(2, 2)]).save(tmp_path / "other.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["blend.safetensors"]


def test_bad_input(models):
    with pytest.raises(ValueError, match="models must hold at least one model, got none"):
        Blend([])
    with pytest.raises(TypeError, match=r"models\[0\] must be an nn.Module, got int"):
        Blend([3])
    with pytest.raises(ValueError, match="one number for each of the 3 models, got 2"):
        Blend(models, [0.5, 0.5])
    with pytest.raises(TypeError, match="weights must be numbers, None or 'learned', got 'best'"):
        Blend(models, "best")
    with pytest.raises(ValueError, match=r"must score the same catalogue, got num_items \[37, 5\]"):
        Blend([models[1], Popularity(5)])
    with pytest.raises(ValueError, match="normalise must be"):
        Blend(models, normalise="tanh")
    with pytest.raises(IndexError, match=r"target\[0\] is 37"):
        Blend(models).rank(torch.tensor([[1]]), None, torch.tensor([37]))
