"""The native CPU ``lstm_step``, in every CPU tier this processor can run.

Truth is fp64; the yardstick is eager PyTorch's own error in the same dtype on the same data. The bits of a row may depend on the
tier, and on nothing else.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from seqrec_fast import _native

if _native.MISSING is not None:
    pytest.skip(f"no native library: {_native.MISSING}", allow_module_level=True)

native = torch.ops.seqrec_fast_native
HIGHEST_TIER = native.highest_cpu_tier.default()
CHOSEN_TIER = _native.TIERS.index(_native.CPU_TIER)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EVERYTHING = [True] * 6

# (B, I, P, H): tiles are 6, 3 or 2 rows (blocks of 48) by 4 units (blocks of 16), lanes 2 to 16 along I and P, chains of 256
# along B and 4H; products 6 rows by 4 or 2 vectors.
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
    (101, 7, 66, 2),
    (259, 5, 9, 130),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small operators on many threads, on a machine that is busy, spend their time waiting."""
    torch.set_num_threads(1)


@pytest.fixture(params=range(HIGHEST_TIER + 1), ids=lambda tier: _native.TIERS[tier])
def tier(request: pytest.FixtureRequest) -> Iterator[int]:
    native.set_cpu_tier.default(request.param)
    yield request.param
    native.set_cpu_tier.default(CHOSEN_TIER)


class Step(NamedTuple):
    x: Tensor
    h: Tensor
    c: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


class Results(NamedTuple):
    h: Tensor
    c: Tensor
    gates: Tensor
    gradients: tuple[Tensor, ...]  # x, h, c, w_ih, w_hh, b


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, *, bias: bool = True, scale: float = 1.0
) -> tuple[Step, Tensor, Tensor]:
    rows, inputs, projected, hidden = shape

    def normal(*size: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(*size, dtype=torch.float64) * spread).to(dtype)

    spread = scale / max(inputs + projected, 1) ** 0.5
    step = Step(
        normal(rows, inputs),
        normal(rows, projected),
        normal(rows, hidden),
        normal(4 * hidden, inputs, spread=spread),
        normal(4 * hidden, projected, spread=spread),
        normal(4 * hidden) if bias else None,
        normal(4 * hidden, spread=0.5) if bias else None,
    )
    return step, normal(rows, hidden), normal(rows, hidden)


def run_native(step: Step, grad_h: Tensor, grad_c: Tensor, mask: list[bool] = EVERYTHING) -> Results:
    h, c, gates = native.lstm_step.default(*step, True, 0)
    gradients = native.lstm_step_backward.default(
        grad_h, grad_c, step.x, step.h, step.c, c, step.w_ih, step.w_hh, gates, mask, 0
    )
    return Results(h, c, gates, gradients)


def run_eager(step: Step, grad_h: Tensor, grad_c: Tensor) -> Results:
    """torch.nn.LSTMCell's formula on autograd, in the dtype of its arguments."""
    step = Step(*(None if t is None else t.detach().clone().requires_grad_() for t in step))
    z = torch.nn.functional.linear(step.x, step.w_ih, step.b_ih) + torch.nn.functional.linear(
        step.h, step.w_hh, step.b_hh
    )
    i, f, g, o = z.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * step.c + i * g
    h = o * c.tanh()
    inputs = [t for t in step if t is not None]
    gradients = torch.autograd.grad([h, c], inputs, [grad_h, grad_c])
    return Results(h.detach(), c.detach(), torch.cat([i, f, g, o], 1).detach(), gradients[:6])


def double(step: Step) -> Step:
    return Step(*(None if t is None else t.double() for t in step))


def flatten(results: Results) -> dict[str, Tensor]:
    names = ("grad x", "grad h", "grad c", "grad w_ih", "grad w_hh", "grad b")
    return {"h": results.h, "c": results.c, "gates": results.gates, **dict(zip(names, results.gradients, strict=False))}


def assert_as_accurate_as_eager(got: Results, eager: Results, true: Results, dtype: torch.dtype) -> None:
    # An absolute term of two roundings of the largest value or of 1, the size of the terms of z: on the smallest shapes eager is
    # exact by luck. In fp64 eager is itself the truth, so there the whole error of a few dozen roundings must fit.
    slack = (40 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps / 2
    eager_all = flatten(eager)
    for name, want in flatten(true).items():
        value = flatten(got)[name]
        assert (value.shape, value.dtype) == (want.shape, dtype), name
        if want.numel() == 0:
            continue
        error, reference = (value.double() - want).abs().max(), (eager_all[name].double() - want).abs().max()
        allowed = (3 if name.startswith("grad") else 2) * reference + slack * want.abs().max().clamp_min(1)
        assert error <= allowed, f"{name}: error {error:.2e}, eager's own {reference:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_accurate_as_eager(
    tier: int, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    step, grad_h, grad_c = make(shape, dtype)
    true = run_eager(double(step), grad_h.double(), grad_c.double())
    eager = run_eager(step, grad_h, grad_c)
    assert_as_accurate_as_eager(run_native(step, grad_h, grad_c), eager, true, dtype)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_small_and_saturated_gates(tier: int, scale: float) -> None:
    step, grad_h, grad_c = make((40, 70, 33, 33), scale=scale)
    true = run_eager(double(step), grad_h.double(), grad_c.double())
    eager = run_eager(step, grad_h, grad_c)
    assert_as_accurate_as_eager(run_native(step, grad_h, grad_c), eager, true, torch.float32)


def test_errors_have_no_bias(tier: int) -> None:
    step, grad_h, grad_c = make((1500, 24, 40, 40))
    true = flatten(run_eager(double(step), grad_h.double(), grad_c.double()))
    for name, value in flatten(run_native(step, grad_h, grad_c)).items():
        error = value.double() - true[name]
        # The mean of n unbiased errors is off by their deviation / sqrt(n); 6 of those is never.
        assert error.mean().abs() <= 6 * error.std() / error.numel() ** 0.5 + 1e-9, name


def test_long_batches_sum_as_accurately_as_eager(tier: int) -> None:
    """dW and db are sums over the batch: their error must not grow with it faster than torch's."""
    step, grad_h, grad_c = make((8193, 5, 6, 6))
    grad_h, grad_c = grad_h + 3, grad_c + 3  # not cancelling
    true = run_eager(double(step), grad_h.double(), grad_c.double())
    eager = run_eager(step, grad_h, grad_c)
    assert_as_accurate_as_eager(run_native(step, grad_h, grad_c), eager, true, torch.float32)


@pytest.mark.parametrize("biases", [(True, False), (False, True), (False, False)], ids=str)
def test_either_bias_may_be_missing(tier: int, biases: tuple[bool, bool]) -> None:
    step, _, _ = make((5, 6, 7, 7))
    zero = torch.zeros(28)
    bias = [b if there else None for b, there in zip((step.b_ih, step.b_hh), biases, strict=True)]
    filled = [zero if b is None else b for b in bias]
    got = native.lstm_step.default(*step[:5], *bias, True, 0)
    want = native.lstm_step.default(*step[:5], *filled, True, 0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_results_are_fp32_results_rounded_once(tier: int, dtype: torch.dtype) -> None:
    step, grad_h, grad_c = make((53, 37, 21, 21), dtype)
    got = run_native(step, grad_h, grad_c)
    wide = Step(*(None if t is None else t.float() for t in step))
    h, c, gates = native.lstm_step.default(*wide, True, 0)
    assert torch.equal(got.h, h.to(dtype))
    assert torch.equal(got.c, c.to(dtype))
    assert torch.equal(got.gates, gates.to(dtype))
    gradients = native.lstm_step_backward.default(
        grad_h.float(), grad_c.float(), *wide[:3], got.c.float(), *wide[3:5], got.gates.float(), EVERYTHING, 0
    )
    for mine, want in zip(got.gradients, gradients, strict=True):
        assert torch.equal(mine, want.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 97])
def test_same_bits_for_every_thread_count(tier: int, dtype: torch.dtype, rows: int) -> None:
    step, grad_h, grad_c = make(
        (rows, 130, 131, 131) if rows > 1 else (1, 1000, 600, 600), dtype
    )  # enough work to be split
    torch.set_num_threads(1)
    want = flatten(run_native(step, grad_h, grad_c))
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        got = flatten(run_native(step, grad_h, grad_c))
        assert [name for name in want if not torch.equal(got[name], want[name])] == [], threads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_whatever_the_other_rows(tier: int, dtype: torch.dtype) -> None:
    """A row alone, in batches of every remainder of the tiles, and in another order."""
    step, grad_h, grad_c = make((103, 37, 35, 35), dtype)
    per_row = ("h", "c", "gates", "grad x", "grad h", "grad c")

    def run(rows: Tensor) -> dict[str, Tensor]:
        part = step._replace(x=step.x[rows], h=step.h[rows], c=step.c[rows])
        return flatten(run_native(part, grad_h[rows], grad_c[rows]))

    whole = run(torch.arange(103))
    batches = [torch.arange(n, 103) for n in (96, 97, 98, 99, 100, 101, 102)]  # 7…1 rows
    for rows in [*batches, torch.tensor([5]), torch.arange(60), torch.randperm(103)]:
        got = run(rows)
        assert [name for name in per_row if not torch.equal(got[name], whole[name][rows])] == [], rows


def test_only_what_is_asked_for(tier: int) -> None:
    step, grad_h, grad_c = make((9, 10, 11, 11))
    whole = run_native(step, grad_h, grad_c).gradients
    for wanted in range(6):
        mask = [i == wanted for i in range(6)]
        gradients = run_native(step, grad_h, grad_c, mask).gradients
        assert torch.equal(gradients[wanted], whole[wanted])
        assert [tuple(g.shape) for i, g in enumerate(gradients) if i != wanted] == [(0,)] * 5
    h, _, gates = native.lstm_step.default(*step, False, 0)
    assert gates.shape == (0,)
    assert torch.equal(h, run_native(step, grad_h, grad_c).h)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(tier: int, dtype: torch.dtype) -> None:
    step, _, _ = make((50, 20, 21, 21), dtype)
    h, c, _ = native.lstm_step.default(*step, False, 0)
    own_h, own_c = step.h.clone(), step.c.clone()
    native.lstm_step_.default(step.x, own_h, own_c, *step[3:], 0)
    assert torch.equal(own_h, h)
    assert torch.equal(own_c, c)

    # columns of wider arrays: what lies between them stays
    wide_h, wide_c = torch.full((50, 42), 7.0, dtype=dtype), torch.full((50, 42), 7.0, dtype=dtype)
    wide_h[:, ::2], wide_c[:, ::2] = step.h, step.c
    native.lstm_step_.default(step.x, wide_h[:, ::2], wide_c[:, ::2], *step[3:], 0)
    assert torch.equal(wide_h[:, ::2], h)
    assert torch.equal(wide_c[:, ::2], c)
    assert (wide_h[:, 1::2] == 7).all()
    assert (wide_c[:, 1::2] == 7).all()


def test_in_place_with_the_state_as_input(tier: int) -> None:
    step, _, _ = make((50, 21, 21, 21))
    step = step._replace(x=step.h)
    h, c, _ = native.lstm_step.default(*step, False, 0)
    own_h, own_c = step.h.clone(), step.c.clone()
    native.lstm_step_.default(own_h, own_h, own_c, *step[3:], 0)
    assert torch.equal(own_h, h)
    assert torch.equal(own_c, c)


def test_non_contiguous_arguments(tier: int) -> None:
    step, grad_h, grad_c = make((11, 12, 13, 13))
    want = flatten(run_native(step, grad_h, grad_c))

    def spread(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.stack([t, t + 1], dim=-1)[..., 0]

    strided = Step(*(spread(t) for t in step))
    assert not any(t.is_contiguous() for t in strided)
    transposed = step._replace(w_ih=step.w_ih.t().contiguous().t(), x=step.x.t().contiguous().t())
    for other in (strided, transposed):
        got = flatten(run_native(other, spread(grad_h), spread(grad_c)))
        assert [name for name in want if not torch.equal(got[name], want[name])] == []

    ones = torch.ones(()).expand(11, 13)  # the gradient of a sum
    got = flatten(run_native(step, ones, ones))
    want = flatten(run_native(step, torch.ones(11, 13), torch.ones(11, 13)))
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("where", ["x", "h", "c", "w_ih", "w_hh", "b_ih"])
def test_special_values_spread_as_in_eager(tier: int, value: float, where: str) -> None:
    step, grad_h, grad_c = make((7, 19, 18, 18))
    getattr(step, where).view(-1)[7 % getattr(step, where).numel()] = value
    got, want = run_native(step, grad_h, grad_c), run_eager(step, grad_h, grad_c)
    for name in ("h", "c", "gates"):
        torch.testing.assert_close(
            flatten(got)[name], flatten(want)[name], equal_nan=True, rtol=1e-5, atol=1e-6, msg=name
        )
    if value != value:  # what a NaN reaches; infinities meet zeros in an order of eager's own in the backward
        for name, gradient in flatten(want).items():
            assert torch.equal(flatten(got)[name].isnan(), gradient.isnan()), name
    if where in ("x", "h", "c"):
        assert flatten(got)["h"][1:].isfinite().all()  # only its own row


def test_denormals_are_kept(tier: int) -> None:
    step, _, _ = make((3, 4, 5, 5))
    zeros = Step(*(torch.zeros_like(t) for t in step))  # gates are exactly 1/2, 1/2, 0, 1/2
    c = torch.full((3, 5), 1e-40)
    h_next, c_next, _ = native.lstm_step.default(*zeros._replace(c=c), False, 0)
    assert torch.equal(c_next, c / 2)
    assert (c_next > 0).all()
    assert torch.equal(h_next, c_next / 2)
    x = torch.full((3, 4), 1e-30)
    w_ih = torch.full((20, 4), 1e-9)  # z = 4e-39, a denormal sum of denormal products
    _, _, gates = native.lstm_step.default(*zeros._replace(x=x, w_ih=w_ih), True, 0)
    z = (x.double() @ w_ih.double().t())[:, 10:15]
    assert ((gates[:, 10:15].double() - z).abs() <= 4e-45).all()
    assert (gates[:, 10:15] > 0).all()


WRONG = {
    "h": lambda step: step._replace(h=step.h[:2]),
    "c": lambda step: step._replace(c=step.c[:2]),
    "w_ih": lambda step: step._replace(w_ih=step.w_ih[:-1]),
    "w_hh": lambda step: step._replace(w_hh=step.w_hh[:, 1:]),
    "bias": lambda step: step._replace(b_hh=step.b_hh[:-1]),
    "matrices": lambda step: step._replace(x=step.x[0]),
    "dtype": lambda step: step._replace(w_hh=step.w_hh.double()),
    "floa": lambda step: step._replace(x=step.x.int()),
}


@pytest.mark.parametrize("word", list(WRONG))
def test_a_direct_call_with_wrong_arguments_is_refused(word: str) -> None:
    step, grad_h, grad_c = make((3, 5, 6, 6))
    wrong = WRONG[word](step)
    with pytest.raises(ValueError, match=rf"\b{word}"):
        native.lstm_step.default(*wrong, True, 0)
    with pytest.raises(ValueError, match=rf"\b{word}"):
        native.lstm_step_.default(*wrong, 0)
    _, c, gates = native.lstm_step.default(*step, True, 0)
    with pytest.raises(ValueError, match="gates"):
        native.lstm_step_backward.default(grad_h, grad_c, *step[:3], c, *step[3:5], gates[:, 1:], EVERYTHING, 0)


def test_in_place_needs_one_width() -> None:
    step, _, _ = make((3, 5, 4, 6))
    with pytest.raises(ValueError, match="one width, got 4 and 6"):
        native.lstm_step_.default(*step, 0)


def digest() -> str:
    """A fingerprint of the bits of one forward and backward in every dtype."""
    torch.manual_seed(5)
    total = hashlib.sha256()
    for dtype in DTYPES:
        for value in flatten(run_native(*make((19, 37, 35, 35), dtype))).values():
            total.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_torchs_capability_chooses_the_tier(capability: str) -> None:
    index = _native.TIERS.index(capability)
    if index > CHOSEN_TIER:
        pytest.skip(f"this processor does not run {capability}")
    native.set_cpu_tier.default(index)
    want = digest()
    native.set_cpu_tier.default(CHOSEN_TIER)
    code = "import test_native_lstm_step as t; print(t._native.CPU_TIER, t.digest())"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )
    assert answer.stdout.split() == [capability, want]


def test_tiers_agree_but_for_rounding() -> None:
    step, grad_h, grad_c = make((30, 40, 41, 41))
    answers = []
    for index in range(HIGHEST_TIER + 1):
        native.set_cpu_tier.default(index)
        answers.append(flatten(run_native(step, grad_h, grad_c)))
    native.set_cpu_tier.default(CHOSEN_TIER)
    for other in answers[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, answers[0][name], rtol=1e-4, atol=1e-5, msg=name)
    if HIGHEST_TIER >= 1:
        assert not torch.equal(answers[0]["h"], answers[1]["h"])  # they are different code
