"""Batches: contents, order, buckets, and use with DataLoader and Lightning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqrec_fast.data import (
    Batch,
    BucketSampler,
    EvaluationBatch,
    Histories,
    Interactions,
    Split,
    TrainingSequences,
    evaluation_loader,
    leave_one_out,
    synthetic,
    train_loader,
)


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(synthetic(num_users=300, num_items=120, mean_length=20, max_length=60, seed=3))


def steps(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of each row, without the padding, which is checked."""
    found = []
    for ids, length, target in zip(*batch, strict=True):
        n = int(length)
        assert (ids[n:] == 0).all()
        assert (target[n:] == -100).all()
        found.append((ids[:n].tolist(), target[:n].tolist()))
    return found


def test_next_item_targets() -> None:
    rows = Histories.from_lists([[5, 6, 7], [8], [], [1, 2]])
    sequences = TrainingSequences(rows, max_length=10)
    batch = sequences[[0, 1]]
    assert len(sequences) == 2
    assert batch.ids.tolist() == [[5, 6], [1, 0]]
    assert batch.lengths.tolist() == [2, 1]
    assert batch.target.tolist() == [[6, 7], [2, -100]]
    assert {tensor.dtype for tensor in batch} == {torch.int64}


def test_the_newest_items_are_kept() -> None:
    rows = Histories.from_lists([range(10), range(3)])
    assert steps(TrainingSequences(rows, max_length=3)[[0, 1]]) == [([6, 7, 8], [7, 8, 9]), ([0, 1], [1, 2])]
    assert steps(TrainingSequences(rows, max_length=9)[[0]]) == [(list(range(9)), list(range(1, 10)))]
    assert steps(TrainingSequences(rows, max_length=1)[[0]]) == [([8], [9])]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 6))
@settings(deadline=None)
def test_all_windows_hold_every_step_once(lengths: list[int], max_length: int) -> None:
    rows, start = [], 0
    for length in [*lengths, 2]:
        rows.append(range(start, start + length))
        start += length
    sequences = TrainingSequences(Histories.from_lists(rows), max_length, "all")
    pairs = []
    for ids, target in steps(sequences[list(range(len(sequences)))]):
        assert 1 <= len(ids) <= max_length
        pairs += list(zip(ids, target, strict=True))
    assert sorted(pairs) == [(item, item + 1) for row in rows for item in row[:-1]]


def test_an_epoch_holds_every_sequence_once(split: Split) -> None:
    found = [row for batch in train_loader(split, batch_size=32, max_length=15) for row in steps(batch)]
    expected = [(row[:-1][-15:].tolist(), row[1:][-15:].tolist()) for row in split.train if len(row) >= 2]
    assert sorted(found) == sorted(expected)


def test_the_order_follows_from_seed_and_epoch(split: Split) -> None:
    def epochs(loader: torch.utils.data.DataLoader[Batch], count: int) -> list[list[list[list[int]]]]:
        return [[batch.ids.tolist() for batch in loader] for _ in range(count)]

    first = epochs(train_loader(split, batch_size=32, seed=1), 3)
    assert first == epochs(train_loader(split, batch_size=32, seed=1), 3)
    assert first[0] != first[1] != first[2] != first[0]
    assert first[0] != epochs(train_loader(split, batch_size=32, seed=2), 1)[0]
    loader = train_loader(split, batch_size=32, seed=1)
    loader.sampler.set_epoch(2)  # type: ignore[attr-defined]
    assert epochs(loader, 1)[0] == first[2]
    assert epochs(train_loader(split, batch_size=32, seed=1, num_workers=1), 2) == first[:2]


def test_torchs_generator_is_left_alone(split: Split) -> None:
    state = torch.get_rng_state()
    list(iter(train_loader(split).sampler))
    assert torch.equal(torch.get_rng_state(), state)


def test_buckets_save_padding_and_still_mix() -> None:
    lengths = np.random.default_rng(0).geometric(0.03, size=5000).astype(np.int64)

    def filled(pool: int) -> float:
        return float(lengths.sum()) / sum(
            len(rows) * lengths[rows].max() for rows in BucketSampler(lengths, 64, pool=pool)
        )

    assert filled(1) < 0.3
    assert filled(16) > 0.7
    one, other = (set(map(frozenset, BucketSampler(lengths, 64, seed=seed))) for seed in (0, 1))
    assert not one & other


def test_sampler_sizes_and_arguments() -> None:
    lengths = np.arange(10, dtype=np.int64)
    sampler = BucketSampler(lengths, 4)
    assert len(sampler) == len(list(sampler)) == 3
    assert sorted(row for batch in sampler for row in batch) == list(range(10))
    assert list(BucketSampler(lengths, 4, shuffle=False)) == [[9, 8, 7, 6], [5, 4, 3, 2], [1, 0]]
    for name in ("batch_size", "pool"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            BucketSampler(lengths, **{"batch_size": 4, name: 0})
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        BucketSampler(lengths, 4, seed=-1)


def test_loader_arguments(split: Split) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        train_loader(split, max_length=0)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        evaluation_loader(split, max_length=0)
    with pytest.raises(ValueError, match='windows must be "last" or "all", got \'first\''):
        train_loader(split, windows="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='which must be "validation" or "test"'):
        evaluation_loader(split, "train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no training history has 2 items"):
        train_loader(leave_one_out(Interactions.from_arrays([1, 1, 1, 2], [1, 2, 3, 1])))


@pytest.mark.parametrize("which", ["validation", "test"])
def test_evaluation_batches(split: Split, which: str) -> None:
    rows = split.evaluation(which)
    places = {int(user): row for row, user in enumerate(rows.users)}
    found = []
    for batch in evaluation_loader(split, which, batch_size=64, max_length=10):  # type: ignore[arg-type]
        assert batch.exclude is not None
        assert batch.exclude.dtype == batch.target.dtype == batch.ids.dtype == torch.int64
        for ids, length, target, exclude, user in zip(*batch, strict=True):
            row = places[int(user)]
            history = rows.histories[row].tolist()
            assert ids[: int(length)].tolist() == history[-10:]
            assert (ids[int(length) :] == 0).all()
            assert int(target) == rows.target[row]
            excluded = exclude[exclude >= 0].tolist()
            assert excluded == sorted(set(history) - {int(target)})
            assert (exclude[len(excluded) :] == -1).all()
            found.append(int(user))
    assert sorted(found) == rows.users.tolist()


def test_evaluation_without_the_seen_filter(split: Split) -> None:
    batch = next(iter(evaluation_loader(split, "test", exclude_seen=False)))
    assert batch.exclude is None
    assert batch.to("cpu").exclude is None
    direct = next(iter(evaluation_loader(split.test, exclude_seen=False)))
    assert torch.equal(direct.ids, batch.ids)


def test_a_target_seen_before_is_not_excluded() -> None:
    split = leave_one_out(Interactions.from_arrays([1] * 5, [7, 8, 9, 8, 7]))
    (batch,) = evaluation_loader(split, "test")
    assert batch.target.tolist() == [0]
    assert batch.exclude is not None
    assert batch.exclude.tolist() == [[1, 2]]


def test_moving_a_batch_keeps_its_kind(split: Split) -> None:
    batch = next(iter(train_loader(split))).to("meta")
    assert isinstance(batch, Batch)
    assert batch.target.device.type == "meta"
    evaluation = next(iter(evaluation_loader(split))).to("meta", non_blocking=True)
    assert isinstance(evaluation, EvaluationBatch)
    assert evaluation.exclude is not None
    assert evaluation.exclude.device.type == evaluation.users.device.type == "meta"


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_on_the_loaders(split: Split) -> None:
    lightning = pytest.importorskip("lightning")
    orders: list[list[list[int]]] = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(split.num_items, 4)

        def on_train_epoch_start(self) -> None:
            orders.append([])

        def training_step(self, batch: Batch, _: int) -> torch.Tensor:
            assert isinstance(batch, Batch)
            orders[-1].append(batch.ids[:, 0].tolist())
            scores = self.table(batch.ids) @ self.table.weight.T
            return torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch.target.flatten())

        def validation_step(self, batch: EvaluationBatch, _: int) -> None:
            assert isinstance(batch, EvaluationBatch)
            assert batch.exclude is not None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), train_loader(split, batch_size=64, seed=5), evaluation_loader(split))
    plain = train_loader(split, batch_size=64, seed=5)
    assert orders == [[batch.ids[:, 0].tolist() for batch in plain] for _ in range(2)]
