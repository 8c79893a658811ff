"""The module forms of the catalogue operators: they hold options, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf

pytestmark = pytest.mark.usefixtures("one_thread")

QUERY, ITEMS, TARGET = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([2, -1, 8])


def test_attention_is_the_operator() -> None:
    values, scale, bias, exclude = torch.randn(9, 6), torch.rand(3), torch.randn(9), torch.tensor([[1], [-1], [2]])
    module = sf.CatalogueAttention(2, scale=0.5, return_lse=True)
    options: dict[str, Any] = {"bias": bias, "exclude": exclude}
    expected = sf.catalogue_attention(QUERY, ITEMS, values, num_heads=2, scale=0.5, return_lse=True, **options)
    torch.testing.assert_close(module(QUERY, ITEMS, values, **options), expected)
    expected = sf.catalogue_attention(QUERY, ITEMS, num_heads=2, scale=scale, return_lse=True)
    torch.testing.assert_close(module(QUERY, ITEMS, scale=scale), expected)
    assert isinstance(sf.CatalogueAttention()(QUERY, ITEMS), Tensor)
    assert repr(module) == "CatalogueAttention(num_heads=2, scale=0.5)"


def test_loss_is_the_operator() -> None:
    options: dict[str, Any] = {
        "ignore_index": -1,
        "label_smoothing": 0.2,
        "reduction": "none",
        "smoothing_prior": torch.rand(9),
        "return_lse": True,
        "skip_mass": 0.1,
        "return_skipped": True,
    }
    tensors: dict[str, Any] = {"bias": torch.randn(9), "exclude": torch.tensor([[1], [-1], [2]])}
    module = sf.CatalogueCrossEntropyLoss(scale=0.5, **options)
    expected = sf.catalogue_cross_entropy(QUERY, ITEMS, TARGET, scale=0.5, **options, **tensors)
    torch.testing.assert_close(module(QUERY, ITEMS, TARGET, **tensors), expected)
    scale = torch.rand(3)
    expected = sf.catalogue_cross_entropy(QUERY, ITEMS, TARGET, scale=scale, **options)
    torch.testing.assert_close(module(QUERY, ITEMS, TARGET, scale=scale), expected)


def test_loss_over_lists_of_targets_and_negatives() -> None:
    target = torch.tensor([[1, 2], [-1, -1], [3, -1]])
    options: dict[str, Any] = {
        "target_weights": torch.rand(3, 2),
        "negatives": torch.randint(0, 9, (3, 4)),
        "negatives_log_q": torch.randn(3, 4),
    }
    items = [ITEMS.clone().requires_grad_() for _ in range(2)]
    loss = sf.CatalogueCrossEntropyLoss(sparse_grad=True)(QUERY, items[0], target, **options)
    expected = sf.catalogue_cross_entropy(QUERY, items[1], target, **options)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert items[0].grad is not None and items[0].grad.is_sparse
    torch.testing.assert_close(items[0].grad.to_dense(), items[1].grad)


def test_takes_the_place_of_the_stock_loss() -> None:
    target = torch.tensor([2, -100, 8])
    stock = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(QUERY @ ITEMS.t(), target)
    torch.testing.assert_close(sf.CatalogueCrossEntropyLoss(label_smoothing=0.1)(QUERY, ITEMS, target), stock)


def test_the_prior_moves_with_the_module() -> None:
    module = sf.CatalogueCrossEntropyLoss(label_smoothing=0.1, smoothing_prior=torch.rand(9)).double()
    assert module(QUERY.double(), ITEMS.double(), TARGET.clamp_min(0)).dtype == torch.float64
    assert list(module.state_dict()) == ["smoothing_prior"]
    assert list(module.parameters()) == []
    other = copy.deepcopy(module)
    assert other.smoothing_prior is not None and other.smoothing_prior.equal(module.smoothing_prior)
    assert repr(module) == "CatalogueCrossEntropyLoss(reduction='mean', label_smoothing=0.1, scale=1.0)"


@pytest.mark.parametrize("module", [sf.CatalogueAttention(2), sf.CatalogueCrossEntropyLoss()])
def test_compiled(module: torch.nn.Module) -> None:
    args = (QUERY, ITEMS) if isinstance(module, sf.CatalogueAttention) else (QUERY, ITEMS, TARGET.clamp_min(0))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), module(*args))


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (sf.CatalogueAttention, {"num_heads": 0}, ValueError, "catalogue_attention: num_heads must be at least 1, got 0"),
    (sf.CatalogueAttention, {"num_heads": "1"}, TypeError, "catalogue_attention: num_heads must be an int, got str"),
    (sf.CatalogueAttention, {"scale": "1"}, TypeError, "CatalogueAttention: scale must be a float, got str"),
    (sf.CatalogueCrossEntropyLoss, {"scale": None}, TypeError, "CatalogueCrossEntropyLoss: scale must be a float, got NoneType"),
    (sf.CatalogueCrossEntropyLoss, {"reduction": "avg"}, ValueError, "catalogue_cross_entropy: reduction must be one of mean, sum, none, got 'avg'"),
    (sf.CatalogueCrossEntropyLoss, {"label_smoothing": 2.0}, ValueError, "catalogue_cross_entropy: label_smoothing must be between 0 and 1, got 2.0"),
    (sf.CatalogueCrossEntropyLoss, {"ignore_index": 0.5}, TypeError, "catalogue_cross_entropy: ignore_index must be an int, got float"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "options", "error", "message"), BAD)
def test_bad_options_are_told_when_the_module_is_made(
    module: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        module(**options)
