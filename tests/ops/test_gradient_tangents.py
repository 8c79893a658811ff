"""A backward pass that is itself differentiated forwards: tangents of the incoming gradient must come out again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import seqrec_fast as sf

W = (torch.randn(20, 4), torch.randn(20, 5), torch.randn(20), torch.randn(20))
GRU_W = tuple(w[:15] for w in W)
H, C = torch.randn(3, 5), torch.randn(3, 5)

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "lstm_step": lambda x: sf.lstm_step(x[0], (H, C), *W)[0],
    "gru_step": lambda x: sf.gru_step(x[0], H, *GRU_W),
    "lstm": lambda x: sf.lstm(x, None, W)[0],
    "gru": lambda x: sf.gru(x, None, GRU_W)[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_tangents_pass_through_the_backward(name: str) -> None:
    x = torch.randn(6, 3, 4, requires_grad=True)
    output = CALLS[name](x)
    seed = torch.ones_like(output)

    def gradient(seed: Tensor) -> Tensor:
        return torch.autograd.grad(output, x, seed, retain_graph=True)[0]

    expected = gradient(seed)  # linear in the seed, so its own tangent
    _, tangent = torch.func.jvp(gradient, (seed,), (seed,))
    torch.testing.assert_close(tangent, expected)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(gradient(forward_ad.make_dual(seed, seed))).tangent
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("name", ["lstm_step", "gru_step"])
def test_the_formula_ignores_autocast_as_the_kernels_do(name: str) -> None:
    x = torch.randn(1, 3, 4)
    plain = CALLS[name](x)
    with torch.autocast("cpu", torch.bfloat16):
        mapped = torch.func.vmap(lambda row: CALLS[name](row[None]))(x)[0]
    torch.testing.assert_close(mapped, plain)
