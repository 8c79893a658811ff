"""Results of ``sf.LSTM`` and ``sf.GRU`` are a row's own: the same bits for any number of threads and any neighbours, NaN included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent_pairs import OURS, loss
from torch import Tensor
from torch.utils._pytree import tree_leaves

import seqrec_fast as sf
from seqrec_fast import _native

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"dropout": 0.3, "weight_dropout": 0.3},
    {"save_gates": False},
    {"layer_norm": True, "zoneout": 0.3},
    {"recurrent_dropout": 0.3},
]


def named(options: dict[str, Any]) -> str:
    return "-".join(options) or "no options"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("ours", OURS)
def test_same_bits_for_any_thread_count(ours: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    module = ours(40, 72, 2, bidirectional=True, **options, dtype=dtype)
    x = torch.randn(9, 50, 40, dtype=dtype, requires_grad=True)
    lengths = torch.randint(0, 10, (50,))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        results = module(x, lengths=lengths)
        found.append([*tree_leaves(results), *torch.autograd.grad(loss(results), [x, *module.parameters()])])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.skipif(_native.MISSING is not None, reason=str(_native.MISSING))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("ours", OURS)
def test_same_bits_in_any_batch(ours: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Whatever lies beside a row, values and the gradient of its input are the same."""
    module = ours(40, 72, 2, bidirectional=True, **options, dtype=dtype)
    x, lengths = torch.randn(9, 23, 40, dtype=dtype), torch.randint(0, 10, (23,))

    def run(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(1)
        part = x[:, rows].clone().requires_grad_()
        output, state = module(part, lengths=lengths[rows])
        return output, tree_leaves(state)[0], torch.autograd.grad(output.sin().sum(), part)[0]

    full = run(slice(None))
    for rows in (slice(1), slice(2), slice(7), slice(16)):  # masks are those of a place in the batch
        for part, whole in zip(run(rows), full, strict=True):
            torch.testing.assert_close(part, whole[:, rows], rtol=0, atol=0)


@pytest.mark.parametrize("where", ["input", "h"])
@pytest.mark.parametrize("ours", OURS)
def test_nan_goes_through_and_stays_in_its_row(ours: Any, where: str) -> None:
    module = ours(4, 5)
    x, h = torch.randn(6, 3, 4), torch.randn(1, 3, 5)
    (x[2, 1] if where == "input" else h[0, 1])[0] = float("nan")
    x.requires_grad_()
    output, _ = module(x, (h, torch.zeros(1, 3, 5)) if ours is sf.LSTM else h)
    first = 2 if where == "input" else 0
    assert output[first:, 1].isnan().all()
    assert output[:first].isfinite().all() and output[:, [0, 2]].isfinite().all()
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert gradient[:, [0, 2]].isfinite().all() and gradient[first:, 1].isnan().all()
