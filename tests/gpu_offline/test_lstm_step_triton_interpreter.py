"""The Triton lstm_step executed by Triton's interpreter on the CPU (in a process with TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
]

# (B, I, P, H): one element; odd widths below a tile; exactly a tile; a tile and one; every row class (16, 256, more).
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 11), (16, 32, 16, 16), (17, 33, 31, 33), (257, 8, 5, 5)]


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    rows, width, projected, hidden = shape
    sizes = [(rows, width), (rows, projected), (rows, hidden), (4 * hidden, width), (4 * hidden, projected)]
    return [torch.randn(size).to(dtype) for size in [*sizes, (4 * hidden,), (4 * hidden,)]]


def run(tensors: list[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """h', c' and the seven gradients, in fp64 for comparison."""
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in tensors]
    with sf.use_backend(backend):
        h, c = sf.lstm_step(leaves[0], (leaves[1], leaves[2]), *leaves[3:])
    weight = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).reshape(h.shape)
    loss = (h * weight.to(dtype)).sum() + (c * weight.flip(0).to(dtype)).sum()
    return [tensor.double() for tensor in (h, c, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tensors = make(shape, dtype)
    truth = run(tensors, torch.float64, "reference")
    eager = run(tensors, dtype, "reference")
    ours = run(tensors, dtype, "triton")
    unit = torch.finfo(dtype).eps
    for position, (true, theirs, mine) in enumerate(zip(truth, eager, ours, strict=True)):
        factor = 2 if position < 2 else 3
        scale = true.abs().max()
        # Three activations follow the products, each good to an ulp or so where eager may be lucky: hence two units.
        bound = factor * (theirs - true).abs().max() + 2 * unit * scale
        assert (mine - true).abs().max() <= bound, f"result {position}"


def test_without_bias_and_without_gates() -> None:
    tensors = make((3, 5, 7, 11), torch.float32)
    with torch.no_grad():
        with sf.use_backend("triton"):
            ours = sf.lstm_step(tensors[0], (tensors[1], tensors[2]), *tensors[3:5])
        with sf.use_backend("reference"):
            theirs = sf.lstm_step(tensors[0], (tensors[1], tensors[2]), *tensors[3:5])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-6)


def test_extreme_gates_stay_finite_and_nan_passes() -> None:
    x = torch.tensor([[100.0], [-100.0], [float("nan")], [float("inf")]])
    state = (torch.zeros(4, 1), torch.ones(4, 1))
    w = torch.ones(4, 1)
    with torch.no_grad():
        with sf.use_backend("triton"):
            ours = sf.lstm_step(x, state, w, w)
        with sf.use_backend("reference"):
            theirs = sf.lstm_step(x, state, w, w)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.isnan(mine).equal(torch.isnan(other))
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    tensors = make((16, 33, 31, 33), torch.float32)
    with torch.no_grad(), sf.use_backend("triton"):
        whole, _ = sf.lstm_step(tensors[0], (tensors[1], tensors[2]), *tensors[3:])
        alone, _ = sf.lstm_step(tensors[0][5:6], (tensors[1][5:6], tensors[2][5:6]), *tensors[3:])
    assert whole[5:6].equal(alone)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    tensors = make(shape, torch.float32)
    assert [t.shape for t in run(tensors, torch.float32, "triton")] == [
        t.shape for t in run(tensors, torch.float32, "reference")
    ]


def test_bfloat16_is_refused() -> None:
    tensors = make((2, 3, 4, 4), torch.bfloat16)
    with sf.use_backend("triton"), pytest.raises(sf.BackendUnavailable, match="wrong bfloat16"):
        sf.lstm_step(tensors[0], (tensors[1], tensors[2]), *tensors[3:])


def test_float64_is_refused() -> None:
    tensors = make((2, 3, 4, 4), torch.float64)
    with sf.use_backend("triton"), pytest.raises(sf.BackendUnavailable, match="not torch.float64"):
        sf.lstm_step(tensors[0], (tensors[1], tensors[2]), *tensors[3:])


def test_precision_decides_the_form_of_an_fp32_product() -> None:
    from seqrec_fast.backends.triton.lstm_step import product_form

    assert product_form(torch.float32, 0) == {"PRECISION": "ieee", "NARROW": False}
    assert product_form(torch.float32, 1) == {"PRECISION": "tf32", "NARROW": False}
    assert product_form(torch.float32, 2) == {"PRECISION": "ieee", "NARROW": True}
    assert product_form(torch.bfloat16, 2) == {"PRECISION": "ieee", "NARROW": False}
