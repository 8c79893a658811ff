"""What the tests of the catalogue operators share: options, leaves, cuts of the scan, and a watch on memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast._logits import LogitSpec
from seqrec_fast._operator import Operator
from seqrec_fast.backends.reference import _derivatives, _scan, _targets

Keywords = dict[str, Any]
NAN, INFINITY = float("nan"), float("inf")


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def ids_below(num_items: int, *shape: int) -> Tensor:
    """int64 in −1 … num_items − 1: duplicates and padding."""
    return torch.randint(-1, num_items, shape)


def csr(rows: int, num_items: int, share: float = 0.3) -> Tensor:
    return (torch.rand(rows, num_items) < share).double().to_sparse_csr()


def dead_bias(num_items: int) -> Tensor:
    bias = normal(num_items)
    bias[::3] = -INFINITY
    return bias


# By name: the keywords scale, bias and exclude for B rows and I items.
LOGITS: dict[str, Callable[[int, int], Keywords]] = {
    "plain": lambda b, i: {},
    "scale": lambda b, i: {"scale": -0.7},
    "integer_scale": lambda b, i: {"scale": 2},
    "row_scale": lambda b, i: {"scale": normal(b)},
    "bias": lambda b, i: {"bias": normal(i)},
    "dead_items": lambda b, i: {"bias": dead_bias(i)},
    "all_dead": lambda b, i: {"bias": torch.full((i,), -INFINITY, dtype=torch.float64)},
    "exclude": lambda b, i: {"exclude": ids_below(i, b, 5)},
    "exclude_int32": lambda b, i: {"exclude": ids_below(i, b, 5).int()},
    "exclude_nothing": lambda b, i: {"exclude": torch.empty(b, 0, dtype=torch.int64)},
    "exclude_shared": lambda b, i: {"exclude": ids_below(i, 4)},
    "exclude_csr": lambda b, i: {"exclude": csr(b, i)},
    "exclude_all": lambda b, i: {"exclude": torch.arange(i)},
    "everything": lambda b, i: {"scale": normal(b), "bias": dead_bias(i), "exclude": ids_below(i, b, 3)},
    "everything_csr": lambda b, i: {"scale": normal(b), "bias": dead_bias(i), "exclude": csr(b, i)},
}


def with_leaves(keywords: Keywords) -> tuple[Keywords, dict[str, Tensor]]:
    """The keywords with their differentiable tensors as fresh leaves, and those leaves."""
    names = ("query", "items", "keys", "values", "scale", "bias")
    leaves = {
        name: keywords[name].detach().clone().requires_grad_()
        for name in names
        if isinstance(keywords.get(name), Tensor)
    }
    return {**keywords, **leaves}, leaves


def gradients(function: Callable[..., tuple[Tensor, ...]], keywords: Keywords) -> dict[str, Tensor]:
    """Gradient of Σ result·seed for every differentiable tensor; the seeds are the same for every function."""
    keywords, leaves = with_leaves(keywords)
    results = [result for result in function(**keywords) if result.is_floating_point()]
    generator = torch.Generator().manual_seed(3)
    seeds = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    pairs = [(r, s) for r, s in zip(results, seeds, strict=True) if r.requires_grad]
    if not pairs:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        [r for r, _ in pairs], list(leaves.values()), [s for _, s in pairs], allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def record_gradients(monkeypatch: pytest.MonkeyPatch, operator: Operator) -> list[list[bool]]:
    """Grows by an entry a call of a backward operator: which of its results were computed (those left out are empty)."""
    computed: list[list[bool]] = []

    def record(*args: Any, forced: str) -> Any:
        results = type(operator).below_autograd(operator, *args, forced=forced)
        computed.append([result.numel() > 0 for result in results])
        return results

    monkeypatch.setattr(operator, "below_autograd", record)
    return computed


def logit_spec(keywords: Keywords) -> LogitSpec:
    """The options in raw form."""
    options = {name: keywords[name] for name in ("scale", "bias", "exclude") if name in keywords}
    return LogitSpec.build("test", keywords["query"], keywords.get("items", keywords.get("keys")), **options)


def cut_small(monkeypatch: pytest.MonkeyPatch, *, rows: int = 4, scores: int = 20, fold_rows: int = 2) -> None:
    """Have a scan of a few dozen pairs cross every edge: several blocks of rows, several chunks of items, gathered pairs."""
    monkeypatch.setattr(_scan, "ROW_BLOCK", rows)
    monkeypatch.setattr(_scan, "SCORES", scores)
    monkeypatch.setattr(_scan, "FOLD_ROWS", fold_rows)
    monkeypatch.setattr(_derivatives, "SCORES", scores)
    monkeypatch.setattr(_targets, "PAIRS", 3)


EVERY_CHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# How tests cut a scan: with and without bias and shift as two more columns of the product.
CUTS: list[Keywords] = [{}, {"fold_rows": 10**9}]


# Cross-entropy.


def cross_entropy(**keywords: Any) -> tuple[Tensor, Tensor]:
    loss, lse = sf.catalogue_cross_entropy(**{"reduction": "none", **keywords}, return_lse=True)
    return loss, lse


def cross_entropy_arguments(
    rows: int, items: int, targets: str = "single", smoothing: str = "none", logits: str = "plain", width: int = 4
) -> Keywords:
    """Keywords of a call. Some row is ignored, some target listed twice, some weight 0, some prior 0."""
    weights: Tensor | None = None
    if targets == "single":
        target = torch.randint(0, items, (rows,))
        target[1::5] = -100
    elif targets in ("several", "weighted"):
        target = ids_below(items, rows, 3)
        target[1::5] = -1
        target[::3, 0] = target[::3, 2]
        weights = normal(rows, 3).abs() if targets == "weighted" else None
        if weights is not None:
            weights[::2, 1] = 0
    else:
        matrix = torch.rand(rows, items) < 0.3
        matrix[1::5] = False
        target = matrix.double().to_sparse_csr()
        weights = normal(target.col_indices().numel()).abs() if targets == "csr_weighted" else None
    prior = torch.rand(items, dtype=torch.float64) if smoothing == "prior" else None
    if prior is not None:
        prior[::4] = 0
    return {
        "query": normal(rows, width),
        "items": normal(items, width),
        "target": target,
        "target_weights": weights,
        "label_smoothing": 0.0 if smoothing == "none" else 0.3,
        "smoothing_prior": prior,
        **LOGITS[logits](rows, items),
    }


def doubly_differentiated(**keywords: Any) -> tuple[Tensor, ...]:
    """The gradients of the query and the items, as results that can be differentiated."""
    loss, lse = cross_entropy(**keywords)
    return torch.autograd.grad(
        (loss.sin() + lse.cos()).sum(), [keywords["query"], keywords["items"]], create_graph=True
    )
