"""``sf.LSTM`` and ``sf.GRU`` at the edges of sizes: one, none, no multiple of a vector, very many; packed in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent_pairs import OURS, PAIRS, loss
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqrec_fast as sf


@pytest.mark.parametrize(
    ("steps", "rows", "inputs", "hidden"),
    [(1, 1, 1, 1), (4, 3, 2, 7), (4, 5, 3, 9), (3, 2, 17, 33), (3, 0, 4, 5)],
)
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_sizes(ours: Any, stock: Any, steps: int, rows: int, inputs: int, hidden: int) -> None:
    theirs = stock(inputs, hidden, bidirectional=True, dtype=torch.float64)
    mine = ours.from_torch(theirs)
    x = torch.randn(steps, rows, inputs, dtype=torch.float64, requires_grad=True)
    expected, actual = theirs(x), mine(x)
    torch.testing.assert_close(actual, expected)
    wanted = [x, *theirs.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(loss(each), wanted) for each in (actual, expected)))


@pytest.mark.parametrize("ours", OURS)
def test_gradients_of_a_long_sequence(ours: Any) -> None:
    """The last steps of 70,000 have the gradients they would have alone, since the beginning is long forgotten."""
    module = ours(2, 3, dtype=torch.float64)
    x = torch.randn(70_000, 1, 2, dtype=torch.float64, requires_grad=True)
    found = []
    for part in (x, x[-200:]):
        output, _ = module(part)
        of_x, *of_weights = torch.autograd.grad(output[-9:].sin().sum(), [x, *module.parameters()])
        assert not of_x[:-200].abs().max() > 1e-12
        found.append([of_x[-200:], *of_weights])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", ["padded", "batch_first", "unbatched"])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("ours", OURS)
def test_no_steps_give_the_state_back(ours: Any, rows: int, form: str) -> None:
    module = ours(4, 5, 2, bidirectional=True, batch_first=form == "batch_first")
    x = torch.randn({"padded": (0, rows, 4), "batch_first": (rows, 0, 4), "unbatched": (0, 4)}[form])
    lead = (4,) if form == "unbatched" else (4, rows)
    h, c = (torch.randn(*lead, 5, requires_grad=True) for _ in range(2))
    output, state = module(x, (h, c) if ours is sf.LSTM else h)
    assert output.shape == (*x.shape[:-1], 10)
    torch.testing.assert_close(state, (h, c) if ours is sf.LSTM else h, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(loss((output, state)), h)
    torch.testing.assert_close(gradient, h.cos())
    module(x)[0].sum().backward()  # all gradients are 0, and there
    assert not any(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_packed_in_any_order(ours: Any, stock: Any) -> None:
    """Values and gradients, of equal lengths and of lengths in no order."""
    theirs = stock(4, 5, 2, bidirectional=True, dtype=torch.float64)
    mine = ours.from_torch(theirs)
    x = torch.randn(7, 5, 4, dtype=torch.float64, requires_grad=True)
    for lengths in (torch.tensor([3, 7, 1, 7, 2]), torch.full((5,), 7), torch.tensor([1, 2, 3, 4, 5])):
        found = []
        for module in (mine, theirs):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            output, state = module(packed)
            padded = pad_packed_sequence(output)
            found.append((padded, state, torch.autograd.grad(loss((padded[0], state)), [x, *theirs.parameters()])))
        torch.testing.assert_close(*found)
