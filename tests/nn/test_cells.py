"""``sf.LSTMCell`` and ``sf.GRUCell``: drop-in for torch.nn's cells."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import seqrec_fast as sf

PAIRS = [pytest.param(sf.LSTMCell, nn.LSTMCell, id="LSTM"), pytest.param(sf.GRUCell, nn.GRUCell, id="GRU")]
B, I, H = 3, 4, 5


def state(ours: Any, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    parts = tuple(torch.randn(*shape, dtype=dtype) for _ in range(2))
    return parts if ours is sf.LSTMCell else parts[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_values_gradients_and_state_dict_are_torchs(ours: Any, stock: Any, bias: bool) -> None:
    torch.manual_seed(0)
    theirs = stock(I, H, bias)
    torch.manual_seed(0)
    mine = ours(I, H, bias)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(list(mine.parameters()), list(theirs.parameters()))  # the same start
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    x = torch.randn(B, I, requires_grad=True)
    for args in ((x,), (x, state(ours, B, H)), (x[0],), (x[0], state(ours, H))):
        found = []
        for cell in (theirs, mine):
            results = cell(*args)
            parts = results if isinstance(results, tuple) else (results,)
            found.append((results, torch.autograd.grad(sum(p.sin().sum() for p in parts), [x, *cell.parameters()])))
        torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_from_torch_shares_parameters(ours: Any, stock: Any) -> None:
    for bias in (True, False):
        theirs = stock(I, H, bias).eval()
        mine = ours.from_torch(theirs)
        assert all(a is b for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
        assert not mine.training
        torch.testing.assert_close(mine(torch.ones(B, I)), theirs(torch.ones(B, I)))
    with pytest.raises(TypeError, match="module must be a torch.nn"):
        ours.from_torch(nn.Linear(I, H))


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_copies_pickles_compiles(ours: Any, stock: Any) -> None:
    cell = ours(I, H)
    x = torch.randn(B, I)
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        torch.testing.assert_close(twin(x), cell(x))
    compiled = torch.compile(cell, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (B, 5):
        x = torch.randn(rows, I)
        hx = state(ours, rows, H)
        torch.testing.assert_close(compiled(x, hx), cell(x, hx))


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_reparametrised_and_substituted_weights(ours: Any, stock: Any) -> None:
    cell, theirs = ours(I, H), stock(I, H)
    x = torch.randn(B, I)
    torch.testing.assert_close(torch.func.functional_call(cell, dict(theirs.named_parameters()), (x,)), theirs(x))
    expected = cell(x)
    parametrizations.weight_norm(cell, "weight_hh")
    actual = cell(x)
    torch.testing.assert_close(actual, expected)
    (actual[0] if ours is sf.LSTMCell else actual).sum().backward()
    assert cell.parametrizations.weight_hh.original1.grad is not None


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_autocast(ours: Any, stock: Any) -> None:
    """After a linear layer under autocast the input is bf16 and the weights are fp32."""
    cell = ours(I, H)
    x = torch.randn(B, I).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        actual = cell(x)
    expected = copy.deepcopy(cell).bfloat16()(x)
    torch.testing.assert_close(actual, expected)
    assert (actual[0] if ours is sf.LSTMCell else actual).dtype == torch.bfloat16


BAD: list[tuple[tuple[Any, ...], type[Exception]]] = [
    ((torch.zeros(B, I + 1),), RuntimeError),
    ((torch.zeros(1, B, I),), ValueError),
    ((torch.zeros(B, I, dtype=torch.float64),), RuntimeError),
    ((torch.zeros(B, I, dtype=torch.int64),), RuntimeError),
    ((torch.zeros(B, I), (B + 1, H)), RuntimeError),
    ((torch.zeros(B, I), (B, H + 1)), RuntimeError),
    ((torch.zeros(B, I), (1, B, H)), ValueError),
    ((torch.zeros(B, I), (B, H), torch.float64), RuntimeError),
]


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
@pytest.mark.parametrize(("args", "error"), BAD)
def test_bad_input_raises_what_torch_raises(ours: Any, stock: Any, args: Any, error: type[Exception]) -> None:
    x, *hx = args
    hx = [state(ours, *hx[0], dtype=hx[1] if len(hx) > 1 else torch.float32)] if hx else []
    with pytest.raises(error):
        stock(I, H)(x, *hx)
    with pytest.raises(error, match=f"^{ours.__name__}: "):
        ours(I, H)(x, *hx)


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_an_unavailable_backend_is_told_as_such(ours: Any, stock: Any) -> None:
    with sf.use_backend("triton"), pytest.raises(sf.BackendUnavailable):
        ours(I, H)(torch.zeros(B, I))
