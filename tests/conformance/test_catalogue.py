"""Every catalogue operator × option × dtype × backend: values and gradients against fp64, no worse than eager PyTorch.

Rankings are numbers with one right answer: ids are compared exactly, and the values of top-k bit by bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast import _dispatch
from seqrec_fast._dispatch import Spec
from seqrec_fast.testing import assert_no_worse_than_eager, largest_error

from . import catalogue as suite
from . import catalogue_calls as calls
from .catalogue_calls import Case

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = [name for name in _dispatch.NAMES if name != "auto"]
RANKINGS = ("catalogue_topk", "catalogue_rank")
# Only the forward is asked of tables that hold NaN or ±∞ under a softmax: eager's own gradients are NaN where 0 meets ∞.
NOT_FINITE = ("with_infinities", "with_nan")


def reason_against(case: Case, dtype: torch.dtype, backend: str) -> str | None:
    """Why a backend cannot run a case, forward or backward."""
    forward = _dispatch.reasons(calls.spec_of(case, dtype))[backend]
    if forward is not None or case.operator == "catalogue_rank":
        return forward
    return _dispatch.reasons(calls.spec_of(case, dtype, backward=True))[backend]


def parameters() -> list[Any]:
    """Every combination that some backend may run. A backend that runs no case of an operator is one entry, which skips."""
    found = []
    for backend in BACKENDS:
        for operator in calls.PUBLIC:
            wanted = [(case, dtype) for case in calls.CASES if case.operator == operator for dtype in case.dtypes]
            runnable = [pair for pair in wanted if reason_against(*pair, backend) is None]
            for case, dtype in runnable or wanted[:1]:
                name = f"{backend}-{case.id}-{str(dtype).removeprefix('torch.')}"
                found.append(pytest.param(case, dtype, backend, id=name))
    return found


@cache
def eager_runs(case: Case, dtype: torch.dtype) -> list[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
    """Results and gradients of eager PyTorch in a dtype, from the numbers of the case in ``dtype``; summed from both ends."""
    keywords, naive = calls.build(case, dtype), calls.NAIVE[case.operator]
    return [calls.results_and_gradients(run, keywords) for run in (naive, calls.reversed_sums(naive))]


@cache
def expectation(case: Case, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Results and gradients in fp64, from the numbers of the case in ``dtype``."""
    keywords, naive = calls.build(case, dtype), calls.NAIVE[case.operator]
    if case.operator in RANKINGS:  # whose scores are rounded as the dtype says
        return naive(**keywords), {}
    return calls.results_and_gradients(naive, calls.cast(keywords, torch.float64))


def wide_runs(case: Case, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Results of eager PyTorch in fp32: the yardstick of what is returned in fp32 for 16-bit input too."""
    keywords, naive = calls.cast(calls.build(case, dtype), torch.float32), calls.NAIVE[case.operator]
    return [run(**keywords) for run in (naive, calls.reversed_sums(naive))]


@pytest.mark.parametrize(("case", "dtype", "backend"), parameters())
def test_backend(case: Case, dtype: torch.dtype, backend: str) -> None:
    why = reason_against(case, dtype, backend)
    if why is not None:
        pytest.skip(why)
    keywords, public = calls.build(case, dtype), calls.PUBLIC[case.operator]
    truth, truth_gradients = expectation(case, dtype)
    with sf.use_backend(backend):
        if case.operator in RANKINGS:
            for result, right in zip(public(**keywords), truth, strict=True):
                assert result.dtype == right.dtype
                assert result.equal(right)
            return
        results, gradients = calls.results_and_gradients(public, keywords)
    if dtype == torch.float64:
        compare_fp64(results, truth)
        if case.table not in NOT_FINITE:
            compare_fp64(gradients.values(), truth_gradients.values())
        return
    eager = eager_runs(case, dtype)
    wide = wide_runs(case, dtype)
    for n, (result, right) in enumerate(zip(results, truth, strict=True)):
        own_dtype = result.dtype == dtype
        runs = [run[0][n] for run in eager] if own_dtype else [run[n] for run in wide]
        assert result.dtype in (dtype, torch.float32)
        assert_no_worse_than_eager(result, runs, right, name=f"result {n}")
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        if case.table not in NOT_FINITE:
            right, runs = truth_gradients[name], [run[1][name] for run in eager]
            term = saved_term(case, backend, results, right)
            assert_no_worse_than_eager(gradient, runs, right, factor=3, absolute=term, name=f"gradient of {name}")


def saved_term(case: Case, backend: str, results: tuple[Tensor, ...], gradient: Tensor) -> float:
    """What a gradient may err because the backward is given lse (and the context c) rounded, and no B×I array of probabilities.

    A rounding of lse by δ ≤ ½ulp(lse) ≤ ½ε|lse| makes every probability of its row wrong by the factor exp(δ), and so every
    gradient by as much; twice that, as for every rounding here. The reference's backward also scores anew by another matrix
    product than its forward, whose roundings of the scores, of the size of lse where they matter, are not the same: as much again.
    In attention ds = p·(g·v − g·c + dlse) loses what c's rounding makes of g·c, at most ½εΣ|g||c| with |g| ≤ 1 (see
    ``results_and_gradients``) against dlse of size 1.
    """
    lse = results[-1].detach()
    level = float(lse[lse.isfinite()].abs().max()) if bool(lse.isfinite().any()) else 0.0
    if backend == "reference":
        level *= 2
    if case.operator == "catalogue_attention" and results[0].numel():
        level += 0.5 * float(results[0].detach().float().nan_to_num(posinf=0.0, neginf=0.0).abs().sum(-1).max())
    size = gradient.nan_to_num(posinf=0.0, neginf=0.0).abs().max() if gradient.numel() else torch.zeros(())
    return torch.finfo(torch.float32).eps * level * float(size)


def compare_fp64(results: Any, truth: Any) -> None:
    """fp64 has no coarser yardstick than itself: its bound is absolute, a few hundred roundings of the largest score."""
    for result, right in zip(results, truth, strict=True):
        assert result.dtype == torch.float64
        size = max(1.0, float(right.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if right.numel() else 0.0)
        assert largest_error(result, right) <= 1000 * torch.finfo(torch.float64).eps * size


@pytest.mark.parametrize("case", calls.CASES, ids=lambda case: case.id)
def test_the_dispatch_is_asked_what_the_suite_says(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Spec] = []
    choose = _dispatch.choose
    monkeypatch.setattr(_dispatch, "choose", lambda spec: asked.append(spec) or choose(spec))
    with torch.no_grad():
        calls.PUBLIC[case.operator](**calls.build(case, torch.float32))
    assert asked == [calls.spec_of(case, torch.float32)]


@pytest.mark.parametrize("operator", calls.PUBLIC)
def test_the_same_call_gives_the_same_bits(operator: str) -> None:
    case = Case(operator, "repeated", rows=33, items=257, width=33, options=calls.EVERYTHING)
    keywords = calls.build(case, torch.float32)
    first, second = (calls.results_and_gradients(calls.PUBLIC[operator], keywords) for _ in range(2))
    for one, other in zip([*first[0], *first[1].values()], [*second[0], *second[1].values()], strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("operator", calls.PUBLIC)
def test_offsets_past_2_to_the_31(operator: str) -> None:
    """Three items at the two ends and in the middle of more than 2³¹ elements, of which almost none is ever touched."""
    try:
        storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no room for the address space: {error}")
    case = Case(operator, "far_apart", rows=3, items=3, k=2)
    keywords = calls.build(case, torch.bfloat16)
    name = "keys" if operator == "catalogue_attention" else "items"
    far = storage.as_strided(keywords[name].shape, (2**30 + 7, 1))
    far.copy_(keywords[name])
    for result, right in zip(
        calls.PUBLIC[operator](**keywords | {name: far}), calls.PUBLIC[operator](**keywords), strict=True
    ):
        assert result.equal(right)


def test_every_table_is_used() -> None:
    assert {case.table for case in calls.CASES} == set(suite.TABLES)
