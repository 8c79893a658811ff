"""``sf.gru_step`` against torch.nn.GRUCell, its checks, gradients, graphs and transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf

NAMES = ("x", "h", "w_ih", "w_hh", "b_ih", "b_hh")


def arguments(rows: int, inputs: int, hidden: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = ((rows, inputs), (rows, hidden), (3 * hidden, inputs), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))
    return {name: torch.randn(shape, dtype=dtype) for name, shape in zip(NAMES, shapes, strict=True)}


def stock(a: dict[str, Tensor]) -> torch.nn.GRUCell:
    cell = torch.nn.GRUCell(a["x"].shape[1], a["h"].shape[1], dtype=a["x"].dtype)
    cell.load_state_dict({"weight_ih": a["w_ih"], "weight_hh": a["w_hh"], "bias_ih": a["b_ih"], "bias_hh": a["b_hh"]})
    return cell


@pytest.mark.parametrize(("rows", "inputs", "hidden"), [(0, 3, 4), (1, 1, 1), (7, 13, 17), (33, 16, 31)])
def test_values_and_gradients_equal_torch(rows: int, inputs: int, hidden: int) -> None:
    a = {name: value.requires_grad_() for name, value in arguments(rows, inputs, hidden).items()}
    cell = stock({name: value.detach() for name, value in a.items()})
    expected, actual = cell(a["x"], a["h"]), sf.gru_step(**a)
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected.sin().sum(), [a["x"], a["h"], *cell.parameters()])
    torch.testing.assert_close(torch.autograd.grad(actual.sin().sum(), [a[name] for name in NAMES]), wanted)
    without_bias = {**a, "b_ih": torch.zeros(3 * hidden, dtype=torch.float64), "b_hh": torch.zeros(3 * hidden).double()}
    torch.testing.assert_close(sf.gru_step(*(a[name] for name in NAMES[:4])), sf.gru_step(**without_bias))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_unbatched_and_inplace(backend: str) -> None:
    a = arguments(3, 4, 5)
    expected = sf.gru_step(**a)
    with sf.use_backend(backend):
        torch.testing.assert_close(sf.gru_step(**(a | {"x": a["x"][1], "h": a["h"][1]})), expected[1])
        for rows in (slice(None), 1):
            h = a["h"].clone()
            result = sf.gru_step(**(a | {"x": a["x"][rows], "h": h[rows]}), inplace=True)
            torch.testing.assert_close(h[rows], expected[rows])
            assert result.data_ptr() == h[rows].data_ptr()
        before = a["h"].clone()
        with pytest.raises(ValueError, match="gru_step: inplace=True has no gradient"):
            sf.gru_step(**(a | {"w_ih": a["w_ih"].requires_grad_()}), inplace=True)
        assert torch.equal(a["h"], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_no_larger_than_eager(dtype: torch.dtype) -> None:
    a = arguments(33, 17, 31, dtype)
    truth = sf.gru_step(**{name: value.double() for name, value in a.items()})
    ours = (sf.gru_step(**a).double() - truth).abs().max()
    eager = (stock(a)(a["x"], a["h"]).double() - truth).abs().max()
    assert ours <= 2 * eager + torch.finfo(dtype).eps


def test_gradcheck_forward_mode_and_double_backward() -> None:
    a = tuple(value.requires_grad_() for value in arguments(2, 3, 2).values())
    assert torch.autograd.gradcheck(sf.gru_step, a, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(sf.gru_step, a)


def test_transforms_graphs_and_opcheck() -> None:
    a = arguments(4, 3, 5)
    expected = sf.gru_step(**a)
    weights = [a[name] for name in NAMES[2:]]
    torch.testing.assert_close(torch.vmap(lambda x, h: sf.gru_step(x, h, *weights))(a["x"], a["h"]), expected)
    compiled = torch.compile(sf.gru_step, fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = {name: value.clone().requires_grad_() for name, value in a.items()}
    gradients = [torch.autograd.grad(f(**leaves).sin().sum(), list(leaves.values())) for f in (sf.gru_step, compiled)]
    torch.testing.assert_close(gradients[1], gradients[0])
    args = (*leaves.values(), True, 0)
    torch.library.opcheck(torch.ops.seqrec_fast.gru_step.default, args)
    torch.library.opcheck(torch.ops.seqrec_fast.gru_step_.default, (*(a[name].clone() for name in NAMES), 0))
    h, gates = torch.ops.seqrec_fast.gru_step(*a.values(), True, 0)
    backward = (h, *(a[name] for name in NAMES[:4]), gates, [True, False, True, True, False, True], 0)
    torch.library.opcheck(torch.ops.seqrec_fast.gru_step_backward.default, backward)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": 3}, TypeError, "x must be a tensor, got int"),
    ({"x": torch.zeros(2, 3)}, TypeError, "h must have the dtype of x"),
    ({"x": torch.zeros(1, 2, 3).double()}, ValueError, r"x must have shape \[B, I\] or \[I\]"),
    ({"x": torch.zeros(2, 4).double()}, ValueError, r"w_ih must have shape \[3H, I\] = \(12, 4\)"),
    ({"h": torch.zeros(3, 4).double()}, ValueError, r"h must have shape \[B, H\] = \(2, 4\)"),
    ({"w_ih": torch.zeros(13, 3).double()}, ValueError, r"w_ih must have shape \[3H, I\]"),
    ({"w_hh": torch.zeros(12, 5).double()}, ValueError, r"w_hh must have shape \[3H, H\] = \(12, 4\)"),
    ({"b_hh": torch.zeros(4).double()}, ValueError, r"b_hh must have shape \[3H\] = \(12,\)"),
    ({"b_ih": torch.zeros(12)}, TypeError, "b_ih must have the dtype of x"),
    ({"w_hh": [1.0]}, TypeError, "w_hh must be a tensor, got list"),
    ({"h": torch.zeros(2, 4, device="meta").double()}, ValueError, "h must be on the device of x .cpu., got meta"),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str, backend: str, inplace: bool) -> None:
    with sf.use_backend(backend), pytest.raises(error, match=f"gru_step: {message}"):
        sf.gru_step(**(arguments(2, 3, 4) | change), inplace=inplace)


def test_weights_changed_before_the_backward_are_an_error() -> None:
    a = {name: value.requires_grad_() for name, value in arguments(3, 4, 5).items()}
    h = sf.gru_step(**a)
    with torch.no_grad():
        a["w_hh"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
