"""Calls of the native CPU ``lstm_step`` and ``gru_step``: in place, strided, wrong, and in the tier that torch chooses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from step_cases import (
    DTYPES,
    GATES,
    Call,
    Step,
    differing,
    digest,
    each_kind,
    make,
    native,
    run_backward,
    run_forward,
    run_inplace,
    run_native,
)
from torch import Tensor

from seqrec_fast import _native

pytestmark = pytest.mark.usefixtures("one_thread")


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(tier: int, kind: str, dtype: torch.dtype) -> None:
    step = make(kind, (50, 20, 21, 21), dtype).step
    want = {name: value for name, value in run_forward(step).items() if name != "gates"}
    own = step._replace(**{name: state.clone() for name, state in step.states().items()})
    run_inplace(own)
    assert differing(own.states(), want) == []

    # columns of wider arrays: what lies between them stays
    wide = {name: torch.full((50, 42), 7.0, dtype=dtype) for name in step.states()}
    for name, state in step.states().items():
        wide[name][:, ::2] = state
    own = step._replace(**{name: array[:, ::2] for name, array in wide.items()})
    run_inplace(own)
    assert differing(own.states(), want) == []
    assert all((array[:, 1::2] == 7).all() for array in wide.values())


@each_kind
def test_in_place_with_the_state_as_input(tier: int, kind: str) -> None:
    step = make(kind, (50, 21, 21, 21)).step
    step = step._replace(x=step.h)
    want = {name: value for name, value in run_forward(step).items() if name != "gates"}
    own = step._replace(**{name: state.clone() for name, state in step.states().items()})
    run_inplace(own._replace(x=own.h))
    assert differing(own.states(), want) == []


@each_kind
def test_non_contiguous_arguments(tier: int, kind: str) -> None:
    def spread(t: Tensor) -> Tensor:
        return torch.stack([t, t + 1], dim=-1)[..., 0]

    call = make(kind, (11, 12, 13, 13))
    step, want = call.step, run_native(call)
    strided = Call(step.mapped(spread), tuple(map(spread, call.grads)))
    assert not any(t.is_contiguous() for t in strided.step.tensors().values())
    assert differing(run_native(strided), want) == []
    transposed = step._replace(w_ih=step.w_ih.t().contiguous().t(), x=step.x.t().contiguous().t())
    assert differing(run_native(call._replace(step=transposed)), want) == []

    ones = torch.ones(()).expand(11, 13)  # the gradient of a sum
    expanded, full = (call._replace(grads=(t,) * len(call.grads)) for t in (ones, ones.contiguous()))
    assert differing(run_native(expanded), run_native(full)) == []


WRONG: dict[str, Callable[[Step], Step]] = {
    "h": lambda step: step._replace(h=step.h[:2]),
    "c": lambda step: step._replace(c=step.c[:2]),  # type: ignore[index]
    "w_ih": lambda step: step._replace(w_ih=step.w_ih[:-1]),
    "w_hh": lambda step: step._replace(w_hh=step.w_hh[:, 1:]),
    "bias": lambda step: step._replace(b_hh=step.b_hh[:-1]),  # type: ignore[index]
    "matrices": lambda step: step._replace(x=step.x[0]),
    "dtype": lambda step: step._replace(w_hh=step.w_hh.double()),
    "floa": lambda step: step._replace(x=step.x.int()),
}


@pytest.mark.parametrize(
    ("kind", "word"), [(kind, word) for kind in GATES for word in WRONG if (kind, word) != ("gru", "c")]
)
def test_a_direct_call_with_wrong_arguments_is_refused(kind: str, word: str) -> None:
    wrong = WRONG[word](make(kind, (3, 5, 6, 6)).step)
    with pytest.raises(ValueError, match=rf"\b{word}"):
        run_forward(wrong)
    with pytest.raises(ValueError, match=rf"\b{word}"):
        run_inplace(wrong)


@each_kind
def test_a_direct_backward_with_wrong_arguments_is_refused(kind: str) -> None:
    call = make(kind, (3, 5, 6, 6))
    forward = run_forward(call.step)
    with pytest.raises(ValueError, match=f"{kind}_step: gates must have shape .3, 24."):
        run_backward(call, {**forward, "gates": forward["gates"][:, 1:]})
    with pytest.raises(ValueError, match="share one dtype"):
        run_backward(call, {**forward, "gates": forward["gates"].double()})
    with pytest.raises(ValueError, match="grad_h must have shape .3, 6."):
        run_backward(call._replace(grads=tuple(grad[:2] for grad in call.grads)), forward)


def test_in_place_needs_one_width() -> None:
    with pytest.raises(ValueError, match="one width, got 4 and 6"):
        run_inplace(make("lstm", (3, 5, 4, 6)).step)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_torchs_capability_chooses_the_tier(capability: str) -> None:
    index, chosen = _native.TIERS.index(capability), _native.TIERS.index(_native.CPU_TIER)
    if index > chosen:
        pytest.skip(f"this processor does not run {capability}")
    native.set_cpu_tier.default(index)
    want = digest()
    native.set_cpu_tier.default(chosen)
    code = "import step_cases as s; print(s._native.CPU_TIER, s.digest())"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )
    assert answer.stdout.split() == [capability, want]


@each_kind
def test_tiers_agree_but_for_rounding(tier: int, kind: str) -> None:
    call = make(kind, (30, 40, 41, 41))
    got = run_native(call)
    native.set_cpu_tier.default(0)
    want = run_native(call)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(got["h"], want["h"]) == (tier == 0)  # they are different code
