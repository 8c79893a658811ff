"""``sf.testing``: values looked at on request, and the yardstick of every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf

QUERY, ITEMS = torch.randn(2, 4), torch.randn(3, 4)
TARGET = torch.tensor([0, 2])
CSR = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).to_sparse_csr()
LIST = torch.tensor([[0, 2], [-1, -1]])
X, WEIGHTS = torch.randn(2, 5, 3), list(sf.LSTM(3, 4).parameters())
TABLE = torch.randn(7, 3)

GOOD: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("catalogue_attention", (QUERY, ITEMS), {"exclude": LIST}),
    ("catalogue_topk", (QUERY, ITEMS, 2), {"exclude": CSR}),
    ("catalogue_rank", (QUERY, ITEMS, torch.tensor([-7, 1])), {"ignore_index": -7, "exclude": torch.tensor([1])}),
    ("catalogue_cross_entropy", (QUERY, ITEMS, TARGET), {"negatives": LIST, "smoothing_prior": torch.ones(3)}),
    ("catalogue_cross_entropy", (QUERY, ITEMS, LIST), {}),
    ("catalogue_cross_entropy", (QUERY, ITEMS, CSR), {}),
    ("catalogue_cross_entropy", (QUERY[:0], ITEMS, LIST[:0]), {}),
    ("lstm", (X, None, WEIGHTS), {"lengths": torch.tensor([0, 2, 1, 2, 0])}),
    ("lstm", (X, None, WEIGHTS), {}),
    ("lstm_embedding", (torch.tensor([[0, 6, 99]]), TABLE, sf.LSTM(3, 4, batch_first=True)), {"lengths": torch.tensor([2])}),
    ("lstm_embedding", (torch.tensor([0, 6]), TABLE, sf.GRU(3, 4)), {}),
    ("lstm_step", (X[0], (X[0], X[0]), X[0], X[0]), {}),
]  # fmt: skip
BAD: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("catalogue_attention", (QUERY, ITEMS), {"exclude": LIST + 1}, IndexError, "exclude must hold item ids in 0…2, or -1 for padding, got 3"),
    ("catalogue_topk", (QUERY, ITEMS, 2), {"exclude": torch.tensor([-2])}, IndexError, "exclude must hold item ids in 0…2, or -1 for padding, got -2"),
    ("catalogue_rank", (QUERY, ITEMS, TARGET + 1), {}, IndexError, "target must hold item ids in 0…2, got 3"),
    ("catalogue_cross_entropy", (QUERY, ITEMS, LIST * 2), {}, IndexError, "target must hold item ids in 0…2, or -1 for padding, got -2"),
    ("catalogue_cross_entropy", (QUERY, ITEMS, TARGET), {"negatives": LIST + 1}, IndexError, "negatives must hold item ids in 0…2, or -1 for padding, got 3"),
    ("catalogue_cross_entropy", (QUERY, ITEMS, TARGET), {"smoothing_prior": -torch.ones(3)}, ValueError, "smoothing_prior must not be negative, got -1.0"),
    ("lstm", (X, None, WEIGHTS), {"lengths": torch.tensor([0, 2, 1, 3, 0])}, ValueError, r"lengths must lie in 0…2 \(the number of steps\), got 3 for row 3"),
    ("gru", (X, None, WEIGHTS), {"lengths": torch.tensor([6, 0]), "batch_first": True}, ValueError, r"lengths must lie in 0…5 \(the number of steps\), got 6 for row 0"),
    ("lstm_embedding", (torch.tensor([[0, 6, 7]]), TABLE, sf.LSTM(3, 4, batch_first=True)), {"lengths": torch.tensor([3])}, IndexError, r"ids must lie in 0…6 \(the rows of the table\), got 7"),
    ("catalogue_rank", (QUERY, ITEMS), {}, TypeError, "missing a required argument: 'target'"),
    ("catalogue_rank", (QUERY, ITEMS, TARGET), {"k": 3}, TypeError, "got an unexpected keyword argument 'k'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "options"), GOOD)
def test_good_values_pass(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    sf.testing.validate(name, *args, **options)


@pytest.mark.parametrize(("name", "args", "options", "error", "message"), BAD)
def test_bad_values(
    name: str, args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{name}: {message}$"):
        sf.testing.validate(name, *args, **options)


def test_unknown_operator() -> None:
    with pytest.raises(ValueError, match="validate: unknown operator 'softmax'; known are catalogue_attention"):
        sf.testing.validate("softmax", QUERY)


def test_values_of_the_numbers_are_not_copied() -> None:
    """Only ids travel to the CPU: a catalogue without memory will do."""
    query, items = torch.empty(2, 4, device="meta"), torch.empty(3, 4, device="meta")
    with pytest.raises(IndexError, match="target must hold item ids in 0…2, got 3"):
        sf.testing.validate("catalogue_rank", query, items, TARGET + 1)


def noisy(truth: Tensor, size: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return (truth + size * torch.randn_like(truth)).to(dtype)


def test_an_error_like_eagers_passes_and_a_larger_one_does_not() -> None:
    truth = torch.randn(20, 30, dtype=torch.float64)
    eager = [noisy(truth, 1e-5), noisy(truth, 1e-5)]
    sf.testing.assert_no_worse_than_eager(noisy(truth, 1e-5), eager, truth)
    with pytest.raises(AssertionError, match=r"values: error \S+, eager's is \S+, the bound \S+"):
        sf.testing.assert_no_worse_than_eager(noisy(truth, 1e-4), eager, truth, name="values")
    sf.testing.assert_no_worse_than_eager(noisy(truth, 1e-4), eager, truth, factor=20)
    sf.testing.assert_no_worse_than_eager(noisy(truth, 1e-4), eager, truth, absolute=1e-3)


def test_two_roundings_are_free() -> None:
    truth = torch.randn(5, dtype=torch.float64)
    exact = truth.float()
    sf.testing.assert_no_worse_than_eager(exact, exact, truth)
    with pytest.raises(AssertionError):
        sf.testing.assert_no_worse_than_eager(exact * (1 + 1e-6), exact, truth)


def test_truncation_is_a_bias() -> None:
    truth = torch.rand(1000, dtype=torch.float64) * 0.1 + 1
    truncated = (truth.float().view(torch.int32) & ~0xFFFF).view(torch.float32)
    with pytest.raises(AssertionError, match="mean signed error"):
        sf.testing.assert_no_worse_than_eager(truncated.bfloat16(), truncated.bfloat16(), truth)
    sf.testing.assert_no_worse_than_eager(truth.bfloat16(), truncated.bfloat16(), truth)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_must_be_where_the_truth_has_it(value: float) -> None:
    truth = torch.zeros(3, dtype=torch.float64)
    truth[1] = value
    sf.testing.assert_no_worse_than_eager(truth.float(), truth.float(), truth)
    for wrong in (0.0, -value, float("nan")):
        if wrong == value or (wrong != wrong and value != value):
            continue
        actual = truth.float()
        actual[1] = wrong
        with pytest.raises(AssertionError, match="error"):
            sf.testing.assert_no_worse_than_eager(actual, truth.float(), truth)


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"result: shape \(2,\), expected \(1, 2\)"):
        sf.testing.assert_no_worse_than_eager(torch.zeros(2), torch.zeros(2), torch.zeros(1, 2).double())
    sf.testing.assert_no_worse_than_eager(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2).double())
