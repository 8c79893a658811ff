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


def step_inplace(x: Tensor, *states: Tensor) -> None:
    """Of an LSTM with two states, of a GRU with one."""
    if len(states) == 2:
        sf.lstm_step(x, states, *W, inplace=True)
    else:
        sf.gru_step(x, *states, *GRU_W, inplace=True)


def expanded() -> Tensor:
    return normal(1, H).expand(B, H)


def negated() -> Tensor:
    return torch.complex(torch.zeros(B, H), normal(B, H)).conj().imag


def one_tensor() -> tuple[Tensor, Tensor]:
    return (normal(B, H),) * 2


HOMELESS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "expanded": lambda: (expanded(), normal(B, H)),
    "expanded cell": lambda: (normal(B, H), expanded()),
    "one tensor": one_tensor,
    "negated": lambda: (negated(), normal(B, H)),
    "expanded of a GRU": lambda: (expanded(),),
    "negated of a GRU": lambda: (negated(),),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", HOMELESS)
def test_states_without_a_place_of_their_own_are_refused_before_any_work(what: str, backend: str) -> None:
    states = HOMELESS[what]()
    before = [state.clone() for state in states]
    with sf.use_backend(backend), pytest.raises(ValueError, match="_step: inplace (cannot write|needs) "):
        step_inplace(X, *states)
    assert all(map(torch.equal, states, before))


def test_states_that_overlap_in_part_are_refused() -> None:
    memory = normal(B * H + 3)
    with pytest.raises(ValueError, match="memory of their own"):
        sf.lstm_step(X, (memory[: B * H].view(B, H), memory[3:].view(B, H)), *W, inplace=True)
    windows = normal(B + H - 1).unfold(0, H, 1)
    with pytest.raises(ValueError, match="lstm_step: inplace cannot write c"):
        step_inplace(X, normal(B, H), windows)
    with pytest.raises(ValueError, match="gru_step: inplace cannot write h"):
        step_inplace(X, windows)


def test_a_bias_in_the_state_is_refused() -> None:
    h = normal(4, H)
    with pytest.raises(ValueError, match="lstm_step: inplace needs h and c apart from the weights"):
        sf.lstm_step(X, (h, normal(4, H)), W[0], W[1], h.view(-1), W[3], inplace=True)
    h = normal(3, H)
    with pytest.raises(ValueError, match="gru_step: inplace needs h apart from the weights"):
        sf.gru_step(X[:3], h, GRU_W[0], GRU_W[1], GRU_W[2], h.view(-1), inplace=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_column_ranges_of_one_matrix_are_states(backend: str) -> None:
    memory = normal(B, 2 * H)
    expected = torch.cat(sf.lstm_step(X, (memory[:, :H].clone(), memory[:, H:].clone()), *W), 1)
    with sf.use_backend(backend):
        sf.lstm_step(X, (memory[:, :H], memory[:, H:]), *W, inplace=True)
    torch.testing.assert_close(memory, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("others", [(), (normal(B, H) + 1,)], ids=["gru", "lstm"])
def test_a_graph_that_saved_the_state_notices(others: tuple[Tensor, ...], backend: str) -> None:
    h = normal(B, H)
    factor = torch.ones_like(h, requires_grad=True)
    product = (factor * h).sum()
    with torch.no_grad(), sf.use_backend(backend):
        step_inplace(X, h, *(state.clone() for state in others))
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


def test_a_state_that_is_no_tensor() -> None:
    for inplace in (True, False):
        with pytest.raises(TypeError, match="lstm_step: c must be a tensor, got NoneType"):
            sf.lstm_step(X, (normal(B, H), None), *W, inplace=inplace)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="gru_step: h must be a tensor, got NoneType"):
            sf.gru_step(X, None, *GRU_W, inplace=inplace)  # type: ignore[arg-type]
