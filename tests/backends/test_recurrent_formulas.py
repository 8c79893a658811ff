"""The recurrent formulas in plain PyTorch, apart from any operator: against naive loops, torch.nn, and autograd in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import recurrent as suite
from torch import Tensor

from seqrec_fast.backends.reference import _sequence, gru, gru_backward, lstm, lstm_backward

CASES = [pytest.param("lstm", case, id=f"lstm-{case.name}") for case in suite.LSTM_CASES]
CASES += [pytest.param("gru", case, id=f"gru-{case.name}") for case in suite.CASES]
BOTH_WAYS = [pytest.param(*case.values, True, id=f"{case.id}-lengths_read") for case in CASES]
BOTH_WAYS += [pytest.param(*case.values, False, id=f"{case.id}-never_read") for case in CASES if case.values[1].ragged]
FORMULA: dict[str, Callable[..., Any]] = {"lstm": lstm.formula, "gru": gru.formula}
FORWARD: dict[str, Callable[..., Any]] = {"lstm": lstm.forward, "gru": gru.forward}


def states(call: suite.Call) -> int:
    """How many results a caller sees: output, h_n[, c_n]."""
    return 3 if isinstance(call, suite.LSTMCall) else 2


def run_backward(call: suite.Call, seeds: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The hand-written gradient, by the names of the arguments."""
    kind = lstm if isinstance(call, suite.LSTMCall) else gru
    module = lstm_backward if isinstance(call, suite.LSTMCall) else gru_backward
    results = kind.forward(*suite.raw(call))
    saved = (results[0], *results[states(call) :])
    grads = [None if call.last_only else seeds[0], *seeds[1:]]
    has = {name: getattr(call, "b_ih" if name == "b" else name) is not None for name in module.GRADIENTS}
    found = module.forward(*grads, *suite.raw(call), *saved, list(has.values()))
    named = dict(zip(module.GRADIENTS, found, strict=True))
    if "b" in named:
        named["b_ih"] = named["b_hh"] = named.pop("b")
    return {name: named[name] for name in suite.TENSORS if getattr(call, name, None) is not None}


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_formula_equals_the_naive_loop(kind: str, case: suite.Case) -> None:
    call = suite.build(kind, case)
    for name, actual, expected in zip("ohc", FORMULA[kind](call), suite.naive(call), strict=False):
        assert_close(actual, expected, name)


@pytest.mark.parametrize(("kind", "case", "readable"), BOTH_WAYS)
def test_operator_equals_the_formula(
    kind: str, case: suite.Case, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not readable:
        hide_lengths(monkeypatch)
    call = suite.build(kind, case)
    expected = FORMULA[kind](call)
    actual = FORWARD[kind](*suite.raw(call))
    for i, (value, truth) in enumerate(zip(actual, expected, strict=False)):
        if i or call.saves_output:
            assert value.is_contiguous()
            assert_close(value, truth, "ohc"[i])
        else:
            assert value.shape == (0,)
    # What is saved besides proves itself in the backward; here: nothing more than was asked for.
    steps, rows = call.steps_and_rows
    saved = [(steps, rows, 4 * case.hidden) if call.save == 2 else (0,)]
    if kind == "lstm":
        saved.insert(0, (steps, rows, case.hidden) if call.save >= 1 else (0,))
    assert [tuple(value.shape) for value in actual[len(expected) :]] == saved


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_nothing_is_saved_for_inference(kind: str) -> None:
    call = suite.build(kind, suite.Case("inference", ragged=True, last_only=True, save=0))
    output, *rest = FORWARD[kind](*suite.raw(call))
    assert output.shape == (0,)
    assert all(saved.shape == (0,) for saved in rest[len(FORMULA[kind](call)) - 1 :])
    for actual, expected in zip(rest, FORMULA[kind](call)[1:], strict=False):
        assert_close(actual, expected, "state")


@pytest.mark.parametrize(("kind", "case", "readable"), BOTH_WAYS)
def test_backward_equals_autograd_on_the_naive_loop(
    kind: str, case: suite.Case, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = suite.build(kind, case)
    seeds = suite.gradient_seeds(call, suite.naive(call))
    expected = suite.gradients(call, suite.naive, seeds)
    if not readable:
        hide_lengths(monkeypatch)
    for name, actual in run_backward(call, seeds).items():
        assert_close(actual, expected[name], name)


def hide_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process lengths on the CPU as if they were on an accelerator."""
    packing = _sequence.Packing

    def without_reading(lengths: Tensor | None, rows: int, steps: int, device: torch.device) -> _sequence.Packing:
        return packing(lengths, rows, steps, device, readable=False)

    monkeypatch.setattr(_sequence, "Packing", without_reading)
