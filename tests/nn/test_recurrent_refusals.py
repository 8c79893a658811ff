"""Lengths and states that ``sf.LSTM`` and ``sf.GRU`` refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrent_pairs import OURS
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqrec_fast as sf

LENGTHS: list[tuple[Any, type[Exception], str]] = [
    (torch.tensor([1, -1, 6]), ValueError, "lengths must lie in 0…6 .*got -1 for row 1"),
    (torch.tensor([1, 7, 6]), ValueError, "lengths must lie in 0…6 .*got 7 for row 1"),
    (torch.tensor([1.0, 2.0, 6.0]), TypeError, "lengths must be an int64 or int32 tensor, got torch.float32"),
    (torch.tensor([True, True, False]), TypeError, "lengths must be an int64 or int32 tensor, got torch.bool"),
    ([1, 2, 6], TypeError, "lengths must be an int64 or int32 tensor, got list"),
    (torch.tensor([1, 2]), ValueError, r"lengths must have shape \[B\] = \(3,\), got \(2,\)"),
    (torch.tensor([[1, 2, 6]]), ValueError, r"lengths must have shape \[B\] = \(3,\), got \(1, 3\)"),
    (torch.tensor(3), ValueError, r"lengths must have shape \[B\] = \(3,\), got \(\)"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("lengths", "error", "message"), LENGTHS)
@pytest.mark.parametrize("ours", OURS)
def test_lengths(
    ours: Any, lengths: Any, error: type[Exception], message: str, batch_first: bool, backend: str
) -> None:
    module = ours(4, 5, batch_first=batch_first)
    x = torch.zeros(3, 6, 4) if batch_first else torch.zeros(6, 3, 4)
    with sf.use_backend(backend), pytest.raises(error, match=message):
        module(x, lengths=lengths)


TRANSFORMS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "vmap": lambda call, x, lengths: torch.vmap(call, in_dims=(0, None))(x[None], lengths),
    "vmap over lengths": lambda call, x, lengths: torch.vmap(call, in_dims=(None, 1))(
        x, torch.stack([lengths.clamp(0, 6), lengths], dim=1)
    ),
    "per sample": lambda call, x, lengths: torch.vmap(torch.func.grad(lambda *a: call(*a).sum()))(
        x[None], lengths[None]
    ),
    "jvp": lambda call, x, lengths: torch.func.jvp(lambda x: call(x, lengths), (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("lengths", "message"), [([1, -1, 6], "got -1 for row 1"), ([1, 6, 7], "got 7 for row 2")])
@pytest.mark.parametrize("ours", OURS)
def test_lengths_within_a_transform(ours: Any, lengths: list[int], message: str, transform: str) -> None:
    """Where plain PyTorch runs instead of a kernel."""
    module, x = ours(4, 5), torch.zeros(6, 3, 4)
    with pytest.raises(ValueError, match=f"lengths must lie in 0…6 .*{message}"):
        TRANSFORMS[transform](lambda x, lengths: module(x, lengths=lengths)[0], x, torch.tensor(lengths))
    TRANSFORMS[transform](lambda x, lengths: module(x, lengths=lengths)[0], x, torch.tensor([1, 0, 6]))


@pytest.mark.parametrize("ours", OURS)
def test_lengths_beside_input_that_has_its_own(ours: Any) -> None:
    module = ours(4, 5)
    for value in (pack_padded_sequence(torch.zeros(6, 3, 4), torch.full((3,), 6)), torch.zeros(6, 4)):
        with pytest.raises(ValueError, match="lengths cannot go with"):
            module(value, lengths=torch.full((3,), 6))


PACKED = pack_padded_sequence(torch.zeros(6, 3, 4), torch.tensor([6, 2, 1]))


def zeros(*shapes: tuple[int, ...]) -> Any:
    return tuple(torch.zeros(shape) for shape in shapes) if len(shapes) > 1 else torch.zeros(shapes[0])


@pytest.mark.parametrize(
    ("ours", "stock", "hx"),
    [
        (sf.GRU, nn.GRU, zeros((1, 2, 5))),
        (sf.GRU, nn.GRU, zeros((1, 3, 6))),
        (sf.LSTM, nn.LSTM, zeros((1, 2, 5), (1, 3, 5))),
        (sf.LSTM, nn.LSTM, zeros((1, 3, 6), (1, 3, 5))),
        (sf.LSTM, nn.LSTM, zeros((1, 3, 5), (1, 2, 5))),
        (sf.LSTM, nn.LSTM, zeros((1, 3, 5), (1, 3, 6))),
    ],
)
def test_states_of_a_packed_batch(ours: Any, stock: Any, hx: Any) -> None:
    """B is the number of sequences, and c is measured as h is."""
    with pytest.raises(RuntimeError):
        stock(4, 5)(PACKED, hx)
    with pytest.raises(RuntimeError, match=rf"{ours.__name__}: Expected hidden size \(1, 3, 5\)"):
        ours(4, 5)(PACKED, hx)
