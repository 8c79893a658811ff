"""The native CPU ``lstm_step`` and ``gru_step``, in every CPU tier this processor can run: accuracy, and which bits.

The bits of a row may depend on the tier, and on nothing else.
"""

from __future__ import annotations

import pytest
import torch
from step_cases import (
    DTYPES,
    GATES,
    Call,
    Results,
    Shape,
    assert_as_accurate_as_eager,
    differing,
    each_kind,
    make,
    run_backward,
    run_eager,
    run_forward,
    run_native,
)

pytestmark = pytest.mark.usefixtures("one_thread")  # on a busy machine, small operators on many threads wait

# (B, I, P, H): tiles are 6, 3 or 2 rows (blocks of 48) by 4 units (blocks of 16), lanes 2 to 16 along I and P, chains of 256
# along B and the gates; products 6 rows by 4 or 2 vectors.
SHAPES = [
    (0, 4, 5, 5),
    (1, 1, 1, 1),
    (1, 128, 128, 128),
    (2, 3, 0, 0),
    (3, 0, 4, 4),
    (5, 15, 17, 16),
    (6, 16, 15, 17),
    (7, 33, 64, 15),
    (13, 65, 3, 63),
    (49, 31, 33, 20),
    (67, 40, 30, 100),
    (101, 7, 66, 2),
    (259, 5, 9, 130),
]


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_accurate_as_eager(tier: int, kind: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_as_accurate_as_eager(make(kind, shape, dtype))


@each_kind
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_small_and_saturated_gates(tier: int, kind: str, scale: float) -> None:
    assert_as_accurate_as_eager(make(kind, (40, 70, 33, 33), scale=scale))


@each_kind
def test_errors_have_no_bias(tier: int, kind: str) -> None:
    call = make(kind, (1500, 24, 40, 40))
    true = run_eager(call.to(torch.float64))
    for name, value in run_native(call).items():
        error = value.double() - true[name]
        # The mean of n unbiased errors is off by their deviation / sqrt(n); 6 of those is never.
        assert error.mean().abs() <= 6 * error.std() / error.numel() ** 0.5 + 1e-9, name


@each_kind
def test_long_batches_sum_as_accurately_as_eager(tier: int, kind: str) -> None:
    """dW and db are sums over the batch: their error must not grow with it faster than torch's."""
    call = make(kind, (8193, 5, 6, 6))
    assert_as_accurate_as_eager(call._replace(grads=tuple(grad + 3 for grad in call.grads)))  # not cancelling


@each_kind
@pytest.mark.parametrize("missing", [("b_hh",), ("b_ih",), ("b_ih", "b_hh")], ids=str)
def test_either_bias_may_be_missing(tier: int, kind: str, missing: tuple[str, ...]) -> None:
    step = make(kind, (5, 6, 7, 7)).step
    without = step._replace(**dict.fromkeys(missing))
    filled = step._replace(**{name: torch.zeros_like(step.b_ih) for name in missing})
    assert differing(run_forward(without), run_forward(filled)) == []


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_results_are_fp32_results_rounded_once(tier: int, kind: str, dtype: torch.dtype) -> None:
    call = make(kind, (53, 37, 21, 21), dtype)
    got, wide = run_native(call), call.to(torch.float32)
    saved = {name: got[name].float() for name in ("c", "gates") if name in got}
    want = {**run_forward(wide.step), **run_backward(wide, saved)}
    assert differing(got, {name: value.to(dtype) for name, value in want.items()}) == []


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1000, 600, 600), (97, 130, 131, 131)], ids=str)
def test_same_bits_for_every_thread_count(tier: int, kind: str, shape: Shape, dtype: torch.dtype) -> None:
    call = make(kind, shape, dtype)  # enough work to be split
    want = run_native(call)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert differing(run_native(call), want) == [], threads


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_whatever_the_other_rows(tier: int, kind: str, dtype: torch.dtype) -> None:
    """A row alone, in batches of every remainder of the tiles, and in another order."""
    step, grads = make(kind, (103, 37, 35, 35), dtype)

    def run(rows: torch.Tensor) -> Results:
        found = run_native(Call(step.rows(rows), tuple(grad[rows] for grad in grads)))
        return {name: found[name] for name in ("h", "c", "gates", "grad x", "grad h", "grad c") if name in found}

    whole = run(torch.arange(103))
    batches = [torch.arange(n, 103) for n in (96, 97, 98, 99, 100, 101, 102)]  # 7…1 rows
    for rows in [*batches, torch.tensor([5]), torch.arange(60), torch.randperm(103)]:
        assert differing(run(rows), {name: value[rows] for name, value in whole.items()}) == [], rows


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_is_asked_for(tier: int, kind: str, dtype: torch.dtype) -> None:
    call = make(kind, (9, 10, 11, 11), dtype)
    forward = run_forward(call.step)
    whole = run_backward(call, forward)
    for wanted in whole:
        gradients = run_backward(call, forward, tuple(name == wanted for name in whole))
        assert torch.equal(gradients.pop(wanted), whole[wanted])
        assert [tuple(gradient.shape) for gradient in gradients.values()] == [(0,)] * 5
    less = run_forward(call.step, save_gates=False)
    assert less.pop("gates").shape == (0,)
    assert differing(less, {name: forward[name] for name in less}) == []


SPECIAL = [(kind, where) for kind in GATES for where in ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize(("kind", "where"), [pair for pair in SPECIAL if pair != ("gru", "c")])
def test_special_values_spread_as_in_eager(tier: int, value: float, kind: str, where: str) -> None:
    call = make(kind, (7, 19, 18, 18))
    tensor = call.step.tensors()[where]
    tensor.view(-1)[7 % tensor.numel()] = value
    got, want = run_native(call), run_eager(call)
    for name in (*call.step.states(), "gates"):
        torch.testing.assert_close(got[name], want[name], equal_nan=True, rtol=1e-5, atol=1e-6, msg=name)
    if value != value:  # what a NaN reaches; infinities meet zeros in an order of eager's own in the backward
        for name, gradient in want.items():
            assert torch.equal(got[name].isnan(), gradient.isnan()), name
    if where in ("x", "h", "c"):
        assert got["h"][1:].isfinite().all()  # only its own row


@each_kind
def test_denormals_are_kept(tier: int, kind: str) -> None:
    zeros = make(kind, (3, 4, 5, 5)).step.mapped(torch.zeros_like)  # gates are exactly 1/2, and the third 0
    carried = [*zeros.states()][-1]  # the state that a gate of 1/2 scales
    state = torch.full((3, 5), 1e-40)
    next_states = run_forward(zeros._replace(**{carried: state}))
    assert torch.equal(next_states[carried], state / 2)
    assert (next_states[carried] > 0).all()
    if kind == "lstm":
        assert torch.equal(next_states["h"], next_states["c"] / 2)
    x = torch.full((3, 4), 1e-30)
    w_ih = torch.full_like(zeros.w_ih, 1e-9)  # sums of 4e-39, a denormal sum of denormal products
    gates = run_forward(zeros._replace(x=x, w_ih=w_ih))["gates"][:, 10:15]  # g, or n
    z = (x.double() @ w_ih.double().t())[:, 10:15]
    assert ((gates.double() - z).abs() <= 4e-45).all()
    assert (gates > 0).all()
