"""The in-place form of the steps: what it may write over, what it refuses, and that autograd notices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import seqrec_fast as sf

B, I, H = 4, 4, 5
BACKENDS = ["native", "reference"]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, W = normal(B, I), (normal(4 * H, I), normal(4 * H, H), normal(4 * H), normal(4 * H) + 1)
GRU_W = (normal(3 * H, I), normal(3 * H, H), normal(3 * H), normal(3 * H) + 1)


def expanded() -> tuple[Tensor, Tensor]:
    return normal(1, H).expand(B, H), normal(B, H)


def expanded_cell() -> tuple[Tensor, Tensor]:
    return normal(B, H), normal(1, H).expand(B, H)


def one_tensor() -> tuple[Tensor, Tensor]:
    state = normal(B, H)
    return state, state


def negated() -> tuple[Tensor, Tensor]:
    return torch.complex(torch.zeros(B, H), normal(B, H)).conj().imag, normal(B, H)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [expanded, expanded_cell, one_tensor, negated])
def test_states_without_a_place_of_their_own_are_refused_before_any_work(
    make: Callable[[], tuple[Tensor, Tensor]], backend: str
) -> None:
    h, c = make()
    before = h.clone(), c.clone()
    with sf.use_backend(backend), pytest.raises(ValueError, match="inplace (cannot write|needs)"):
        sf.lstm_step(X, (h, c), *W, inplace=True)
    assert torch.equal(h, before[0])
    assert torch.equal(c, before[1])


def test_states_that_overlap_in_part_are_refused() -> None:
    memory = normal(B * H + 3)
    with pytest.raises(ValueError, match="memory of their own"):
        sf.lstm_step(X, (memory[: B * H].view(B, H), memory[3:].view(B, H)), *W, inplace=True)
    with pytest.raises(ValueError, match="cannot write c"):
        sf.lstm_step(X, (normal(B, H), normal(B + H - 1).unfold(0, H, 1)), *W, inplace=True)


def test_a_bias_in_the_state_is_refused() -> None:
    h = normal(4, H)
    with pytest.raises(ValueError, match="apart from the weights"):
        sf.lstm_step(X, (h, normal(4, H)), W[0], W[1], h.view(-1), W[3], inplace=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_column_ranges_of_one_matrix_are_states(backend: str) -> None:
    memory = normal(B, 2 * H)
    expected = torch.cat(sf.lstm_step(X, (memory[:, :H].clone(), memory[:, H:].clone()), *W), 1)
    with sf.use_backend(backend):
        sf.lstm_step(X, (memory[:, :H], memory[:, H:]), *W, inplace=True)
    torch.testing.assert_close(memory, expected)


def test_gru_refuses_an_expanded_state() -> None:
    with pytest.raises(ValueError, match="cannot write h"):
        sf.gru_step(X, normal(1, H).expand(B, H), *GRU_W, inplace=True)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_graph_that_saved_the_state_notices(kind: str) -> None:
    h = normal(B, H)
    factor = torch.ones_like(h, requires_grad=True)
    product = (factor * h).sum()
    with torch.no_grad():
        if kind == "lstm":
            sf.lstm_step(X, (h, normal(B, H) + 1), *W, inplace=True)
        else:
            sf.gru_step(X, h, *GRU_W, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_under_transforms_that_do_not_concern_it() -> None:
    h, c = normal(B, H), normal(B, H) + 1
    expected = sf.lstm_step(X, (h, c), *W)
    with forward_ad.dual_level():
        h_next, c_next = sf.lstm_step(X, (h.clone(), c.clone()), *W, inplace=True)
        gru = sf.gru_step(X, h.clone(), *GRU_W, inplace=True)
    torch.testing.assert_close((h_next, c_next), expected)
    torch.testing.assert_close(gru, sf.gru_step(X, h, *GRU_W))
    mapped = torch.func.vmap(lambda x, h, c: sf.lstm_step(x, (h, c), *W, inplace=True))
    found = mapped(X[None], h[None].clone(), c[None].clone())
    torch.testing.assert_close((found[0][0], found[1][0]), expected)


@pytest.mark.parametrize(("state", "shown"), [(None, "NoneType"), ((X,), "tuple of 1"), (normal(2, B, H), "Tensor")])
def test_what_is_no_pair_of_states(state: object, shown: str) -> None:
    with pytest.raises(TypeError, match=f"state must be a pair .h, c., got {shown}$"):
        sf.lstm_step(X, state, *W)  # type: ignore[arg-type]
