"""The recommender against the same model of stock torch modules, against brute force, and against bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seqrec_fast.models import RecommenderConfig, SequenceRecommender, StockRecommender

NUM_ITEMS = 37

# every encoder, attention and option at least once
VARIANTS = {
    "default": {},
    "gru, no attention": {"encoder": "gru", "attention": None},
    "cnn, dot": {"encoder": "cnn", "num_layers": 3, "attention": "dot", "activation": "gelu"},
    "two layers, projected, heads": {"hidden_dim": 24, "num_layers": 2, "num_heads": 4, "activation": "silu"},
    "bilinear, untied": {"attention": "bilinear", "num_heads": 2, "tie_weights": False, "activation": "relu"},
    "residual, norm": {"encoder": "gru", "residual": True, "layer_norm": True, "activation": "identity"},
    "smoothing, no bias": {"label_smoothing": 0.2, "item_bias": False, "activation": "sigmoid"},
    "additive": {"attention": "additive", "num_heads": 2, "embedding_dim": 20},
}


def build(dtype: torch.dtype = torch.float32, **options) -> SequenceRecommender:
    torch.manual_seed(3)
    model = SequenceRecommender(NUM_ITEMS, **{"embedding_dim": 16, "dropout": 0.0, **options})
    with torch.no_grad():  # biases and W away from their special starting values
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def stock(model: SequenceRecommender, dtype: torch.dtype) -> StockRecommender:
    other = StockRecommender(model.config)
    other.load_state_dict(model.state_dict())
    return other.to(dtype)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
class TestAgainstStock:
    def test_loss_and_gradients_in_fp64(self, variant, batch):
        model = build(torch.float64, **VARIANTS[variant])
        other = stock(model, torch.float64)
        positions = "last" if model.config.attention == "additive" else "all"
        ours, theirs = model.loss(*batch), other.loss(*batch, positions=positions)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        ours, theirs = gradients(model, ours), gradients(other, theirs)
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")

    def test_fp32_is_as_near_the_truth_as_stock(self, variant, batch):
        model = build(**VARIANTS[variant])
        same, truth = stock(model, torch.float32), stock(model, torch.float64)
        positions = "last" if model.config.attention == "additive" else "all"
        exact_loss = truth.loss(*batch, positions=positions)
        ours, theirs = model.loss(*batch), same.loss(*batch, positions=positions)
        assert abs(ours.item() - exact_loss.item()) <= 2 * abs(theirs.item() - exact_loss.item()) + 1e-6
        exact = gradients(truth, exact_loss)
        ours, theirs = gradients(model, ours), gradients(same, theirs)
        for name, gradient in exact.items():
            scale = gradient.abs().max()
            error = (ours[name] - gradient).abs().max()
            assert error <= 3 * (theirs[name] - gradient).abs().max() + 2e-6 * scale, name

    def test_logits_and_recommendations(self, variant, batch):
        model = build(torch.float64, **VARIANTS[variant]).eval()
        other = stock(model, torch.float64).eval()
        torch.testing.assert_close(
            model.logits(batch.ids, batch.lengths), other.logits(batch.ids, batch.lengths), rtol=1e-9, atol=1e-12
        )
        items, scores = model.recommend(batch.ids, batch.lengths, 6)
        expected_items, expected_scores = other.recommend(batch.ids, batch.lengths, 6)
        assert torch.equal(items, expected_items)
        torch.testing.assert_close(scores, expected_scores, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("encoder", ["lstm", "gru", "cnn"])
class TestCausality:
    """What a position gives depends on its own row's past, and on nothing else."""

    def test_later_items_do_not_matter(self, encoder, batch):
        model = build(torch.float64, encoder=encoder, num_layers=2).eval()
        ids = batch.ids.clamp(min=0)
        before = model(ids, all_positions=True)
        changed = ids.clone()
        changed[:, 4:] = (changed[:, 4:] + 1) % NUM_ITEMS
        after = model(changed, all_positions=True)
        torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-13)
        assert (after[:, 4:] - before[:, 4:]).abs().amax(-1).min() > 1e-6

    def test_padding_and_neighbours_do_not_matter(self, encoder, batch):
        model = build(torch.float64, encoder=encoder, num_layers=2).eval()
        together = model.encode(batch.ids, batch.lengths)
        for row, length in enumerate(batch.lengths.tolist()):
            alone = model.encode(batch.ids[row : row + 1, :length])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-13)
        other_padding = batch.ids.where(batch.ids >= 0, 5)
        assert torch.equal(model.encode(other_padding, batch.lengths), together)
        assert torch.equal(model.encode(batch.ids.int(), batch.lengths.int()), together)

    def test_last_position_is_encode(self, encoder, batch):
        model = build(torch.float64, encoder=encoder, num_layers=2).eval()
        every = model(batch.ids, batch.lengths, all_positions=True)
        last = every[torch.arange(4), batch.lengths - 1]
        torch.testing.assert_close(model.encode(batch.ids, batch.lengths), last, rtol=0, atol=1e-13)

    def test_empty_history_is_the_zero_state(self, encoder, batch):
        model = build(torch.float64, encoder=encoder, hidden_dim=12).eval()
        lengths = torch.tensor([7, 0, 4, 0])
        user = model.encode(batch.ids, lengths)
        state = model.projection(torch.zeros(1, 12, dtype=torch.float64))
        expected = model._user_vectors(state)
        torch.testing.assert_close(user[[1, 3]], expected.expand(2, -1), rtol=0, atol=1e-13)
        no_steps = model.encode(batch.ids[:, :0], torch.zeros(4, dtype=torch.int64))
        torch.testing.assert_close(no_steps, expected.expand(4, -1), rtol=0, atol=1e-13)


class TestLoss:
    def test_the_forms_of_target_agree(self, batch):
        model = build(torch.float64)
        ids, lengths, target = batch
        each = torch.full((4, 7), -100)
        for row, length in enumerate(lengths.tolist()):
            each[row, : length - 1] = ids[row, 1:length]
            each[row, length - 1] = target[row]
        expected = model.loss(ids, lengths, target)
        torch.testing.assert_close(model.loss(ids, lengths, each), expected)
        # a history's own next items: the same as leaving the last one off and giving it as the target
        long = lengths > 1
        own = model.loss(ids[long], lengths[long])
        shorter = lengths[long] - 1
        torch.testing.assert_close(own, model.loss(ids[long], shorter, ids[long, shorter]))

    def test_last_position(self, batch):
        model = build(torch.float64)
        logits = model.logits(batch.ids, batch.lengths)
        expected = nn.functional.cross_entropy(logits, batch.target, reduction="none")
        each = model.loss(*batch, positions="last", reduction="none")
        torch.testing.assert_close(each, expected)
        torch.testing.assert_close(model.loss(*batch, positions="last"), expected.mean())

    def test_rows_without_a_target_count_for_nothing(self, batch):
        model = build(torch.float64)
        target = batch.target.clone()
        target[1] = -100  # the row of length 1 has no other position
        keep = [0, 2, 3]
        expected = model.loss(*(part[keep] for part in batch))
        torch.testing.assert_close(model.loss(batch.ids, batch.lengths, target), expected)
        each = torch.full((4, 7), -100)
        each[:, :-1] = batch.ids[:, 1:]
        each[torch.arange(4), batch.lengths - 1] = target
        torch.testing.assert_close(stock(model, torch.float64).loss(batch.ids, batch.lengths, each), expected)
        nothing = model.loss(batch.ids, torch.zeros(4, dtype=torch.int64), batch.target)
        nothing.backward()
        assert nothing.item() == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    def test_it_learns(self):
        """A cycle of items is learned to near certainty, from a fresh model with dropout."""
        torch.manual_seed(0)
        model = SequenceRecommender(12, embedding_dim=16, dropout=0.1)
        ids = (torch.arange(12)[:, None] + torch.arange(9)) % 12
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        first = model.loss(ids[:, :-1], None, ids[:, 1:]).item()
        assert abs(first - torch.log(torch.tensor(12.0))) < 0.2  # a fresh model is undecided
        for _ in range(60):
            optimizer.zero_grad()
            model.loss(ids[:, :-1], None, ids[:, 1:]).backward()
            optimizer.step()
        assert model.eval().loss(ids[:, :-1], None, ids[:, 1:]) < 0.1
        top = model.recommend(ids[:, :-1], k=1, exclude_seen=False).items[:, 0]
        assert torch.equal(top, ids[:, -1])


class TestServing:
    def test_seen_and_excluded_items_are_left_out(self, batch):
        model = build().eval()
        items, scores = model.recommend(batch.ids, batch.lengths, NUM_ITEMS)
        for row, length in enumerate(batch.lengths.tolist()):
            seen = set(batch.ids[row, :length].tolist())
            offered = items[row][items[row] >= 0].tolist()
            assert sorted(offered) == sorted(set(range(NUM_ITEMS)) - seen)
            assert torch.all(scores[row, len(offered) :] == -torch.inf)
        best = model.recommend(batch.ids, batch.lengths, 1, exclude_seen=False).items
        second = model.recommend(batch.ids, batch.lengths, 2, exclude_seen=False).items[:, 1:]
        assert torch.equal(model.recommend(batch.ids, batch.lengths, 1, exclude_seen=False, exclude=best).items, second)

    def test_rank_is_the_place_in_the_recommendations(self, batch):
        model = build().eval()
        everything = model.recommend(batch.ids, batch.lengths, NUM_ITEMS, exclude_seen=False).items
        place = (everything == batch.target[:, None]).int().argmax(1)
        assert torch.equal(model.rank(batch.ids, batch.lengths, batch.target, exclude_seen=False), place)
        # seen items make room, the target itself stays although it was seen
        target = batch.ids[:, 0]
        place = (everything == target[:, None]).int().argmax(1)
        better = [set(row[:end].tolist()) for row, end in zip(everything, place, strict=True)]
        expected = [len(b - set(row.tolist())) for b, row in zip(better, batch.ids, strict=True)]
        assert model.rank(batch.ids, batch.lengths, target).tolist() == expected
        target = torch.where(torch.arange(4) == 2, -100, target)
        assert model.rank(batch.ids, batch.lengths, target)[2] == -1

    def test_dropout_acts_in_training_only(self, batch):
        model = build(num_layers=2, dropout=0.5).train()
        losses = {model.loss(*batch).item() for _ in range(3)}
        assert len(losses) == 3
        first, again = (model.recommend(batch.ids, batch.lengths, 5) for _ in range(2))
        assert torch.equal(first.scores, again.scores)
        assert all(part.training for part in model.modules())
        torch.testing.assert_close(model.explain(batch.ids, batch.lengths, 5).scores, first.scores)

    def test_autocast_serves_too(self, batch):
        model = build().eval()
        expected = model.logits(batch.ids, batch.lengths)
        with torch.autocast("cpu", torch.bfloat16):
            items, scores = model.recommend(batch.ids, batch.lengths, 3, exclude_seen=False)
            loss = model.loss(*batch)
        assert loss.dtype == scores.dtype == torch.float32
        error = (scores - expected.gather(1, items)).abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
        try:
            with torch.autocast("cpu", torch.bfloat16):
                theirs = stock(model, torch.float32).eval().logits(batch.ids, batch.lengths)
        except RuntimeError as refusal:
            pytest.skip(f"torch's own LSTM has no bfloat16 on this processor: {refusal}")
        assert error <= 2 * (theirs - expected).abs().max()


class TestSampledLoss:
    def test_many_negatives_are_the_whole_catalogue(self, batch):
        full, sampled = build(torch.float64), build(torch.float64, negatives=600_000)
        ours, theirs = sampled.train().loss(*batch), full.train().loss(*batch)
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.0)
        assert not torch.equal(ours, theirs)
        for name, gradient in gradients(sampled, ours).items():
            right = gradients(full, full.loss(*batch))[name]
            torch.testing.assert_close(gradient, right, rtol=0.0, atol=0.03 * float(right.abs().max()), msg=name)

    def test_only_in_training(self, batch):
        full, sampled = build(), build(negatives=5)
        assert torch.equal(sampled.eval().loss(*batch), full.eval().loss(*batch))
        losses = {sampled.train().loss(*batch).item() for _ in range(4)}
        assert len(losses) == 4

    @pytest.mark.parametrize("count", [-1, 1.5, True])
    def test_bad_count(self, count):
        with pytest.raises(ValueError, match="negatives must be a whole number of at least 0, got"):
            build(negatives=count)


@pytest.mark.parametrize("variant", ["default", "two layers, projected, heads", "bilinear, untied", "additive"])
class TestExplain:
    def test_attended_items_are_those_of_brute_force(self, variant, batch):
        model = build(torch.float64, **VARIANTS[variant]).eval()
        other = stock(model, torch.float64)
        found = model.explain(batch.ids, batch.lengths, 5)
        state = other._states(batch.ids.clamp(min=0))[torch.arange(4), batch.lengths - 1]
        heads = model.config.num_heads
        weights = brute_force_weights(model, state)  # [B, heads, I]
        top = weights.topk(5)
        assert found.attended_items.shape == (4, heads, 5)
        assert torch.equal(found.attended_items, top.indices)
        torch.testing.assert_close(found.attention_weights, top.values, rtol=1e-6, atol=1e-9)

    def test_items_and_steps_are_those_of_brute_force(self, variant, batch):
        model = build(torch.float64, **VARIANTS[variant]).eval()
        other = stock(model, torch.float64)
        with torch.inference_mode():
            found = model.explain(batch.ids, batch.lengths, 4, num_steps=3)
            items, scores = model.recommend(batch.ids, batch.lengths, 4)
        assert torch.equal(found.items, items)
        torch.testing.assert_close(found.scores, scores)
        assert found.steps[1, :, 1:].eq(-1).all()  # a history of one step
        assert found.contributions[1, :, 1:].eq(0).all()
        for row, length in enumerate(batch.lengths.tolist()):
            ids = batch.ids[row : row + 1, :length]
            embedded: list[Tensor] = []

            def keep(module, inputs, output, embedded=embedded):
                embedded.append(output)

            handle = other.embedding.register_forward_hook(keep)
            logits = other.logits(ids)[0]
            handle.remove()
            for place, item in enumerate(items[row].tolist()):
                (gradient,) = torch.autograd.grad(logits[item], embedded[0], retain_graph=True)
                contribution = (embedded[0] * gradient).sum(-1)[0]  # [length]
                order = contribution.abs().argsort(descending=True)[:3]
                assert found.steps[row, place, : len(order)].tolist() == order.tolist()
                torch.testing.assert_close(
                    found.contributions[row, place, : len(order)], contribution[order], rtol=1e-6, atol=1e-10
                )


def brute_force_weights(model: SequenceRecommender, state: Tensor) -> Tensor:
    items, heads = model.embedding.weight, model.config.num_heads
    keys = items.view(NUM_ITEMS, heads, -1)
    match model.config.attention:
        case "additive":
            pairs = torch.tanh(model.attention.state(state)[:, None] + model.attention.item(items))
            return (pairs.unflatten(-1, (heads, -1)) * model.attention.score).sum(-1).softmax(1).mT
        case "bilinear":
            query, scale = state @ model.attention.projection.weight.T, 1.0
        case _:
            query, scale = state, (model.config.embedding_dim // heads) ** -0.5
    return (scale * torch.einsum("bhd,ihd->bhi", query.view(len(state), heads, -1), keys)).softmax(-1)


class TestStart:
    def test_the_association_passes_the_state_on(self, batch):
        model = SequenceRecommender(NUM_ITEMS, embedding_dim=32, activation="identity", dropout=0.0).eval()
        states = model.encoder(model.embedding(batch.ids.clamp(min=0)))[0]
        user = model(batch.ids.clamp(min=0), all_positions=True)
        assert nn.functional.cosine_similarity(user.flatten(), states.flatten(), 0) > 0.8
        assert not torch.equal(user, states)

    def test_item_vectors_have_unit_length_on_average(self):
        model = SequenceRecommender(2000, embedding_dim=64, tie_weights=False)
        for table in (model.embedding.weight, model.item_vectors):
            assert abs(table.square().sum(1).mean() - 1) < 0.05


class TestBadInput:
    def test_ids(self, batch):
        model = build()
        ids = batch.ids.clone()
        ids[2, 3] = NUM_ITEMS
        with pytest.raises(IndexError, match=r"ids\[2, 3\] is 37, but the items are 0…36"):
            model.encode(ids, batch.lengths)
        ids[2, 3] = -1  # inside the length, so it is no padding
        with pytest.raises(IndexError, match=r"ids\[2, 3\] is -1"):
            model.loss(ids, batch.lengths, batch.target)
        with pytest.raises(TypeError, match="ids must be an int64 or int32 tensor, got torch.float32"):
            model.encode(ids.float(), batch.lengths)
        with pytest.raises(ValueError, match=r"ids must have shape \[B, T\], got \(7,\)"):
            model.encode(ids[0], batch.lengths[:1])

    def test_lengths(self, batch):
        model = build()
        with pytest.raises(ValueError, match="lengths must lie in 0…T = 7, got 8 in row 0"):
            model.encode(batch.ids, batch.lengths + 1)
        with pytest.raises(ValueError, match=r"lengths must have shape \[B\] = \(4,\), got \(3,\)"):
            model.encode(batch.ids, batch.lengths[:3])

    def test_target(self, batch):
        model = build()
        with pytest.raises(TypeError, match="target must be an int64 tensor, got torch.int32"):
            model.loss(batch.ids, batch.lengths, batch.target.int())
        with pytest.raises(ValueError, match=r"target must have shape \[B\] = \(4,\) or \[B, T\] = \(4, 7\)"):
            model.loss(batch.ids, batch.lengths, batch.target[:3])
        with pytest.raises(IndexError, match=r"target\[3\] is 40"):
            model.loss(batch.ids, batch.lengths, torch.tensor([1, 2, 3, 40]))
        with pytest.raises(ValueError, match="target is needed"):
            model.loss(batch.ids, batch.lengths, positions="last")

    def test_exclude(self, batch):
        model = build()
        with pytest.raises(ValueError, match=r"exclude must have shape \[B, n\] with B = 4, got \(3, 1\)"):
            model.recommend(batch.ids, batch.lengths, exclude=torch.zeros(3, 1, dtype=torch.int64))
        with pytest.raises(IndexError, match=r"exclude\[0, 0\] is -2"):
            model.recommend(batch.ids, batch.lengths, exclude=torch.full((4, 1), -2))

    def test_additive_attention_refuses_every_position(self, batch):
        model = build(attention="additive")
        with pytest.raises(ValueError, match="last state only, so positions='all' is not possible"):
            model.loss(*batch, positions="all")
        with pytest.raises(ValueError, match="last state only, so all_positions=True"):
            model(batch.ids, batch.lengths, all_positions=True)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"num_items": 0}, "num_items must be a whole number of at least 1, got 0"),
            ({"embedding_dim": 1.5}, "embedding_dim must be a whole number"),
            ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
            ({"encoder": "rnn"}, "encoder must be one of 'lstm', 'gru', 'cnn', got 'rnn'"),
            ({"attention": "cosine"}, "attention must be one of .*None, got 'cosine'"),
            ({"activation": "swish"}, "activation must be one of"),
            ({"num_heads": 3}, r"num_heads must divide embedding_dim \(64\), got 3"),
        ],
    )
    def test_options(self, option, message):
        with pytest.raises(ValueError, match=message):
            RecommenderConfig(**{"num_items": 5, **option})

    def test_unknown_option_in_a_file(self):
        with pytest.raises(ValueError, match="unknown option of SequenceRecommender: colour"):
            RecommenderConfig.from_dict({"num_items": 5, "colour": "red"})
