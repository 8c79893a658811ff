"""The choice of a backend: forced, automatic, and refused with a reason."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch

import seqrec_fast as sf
from seqrec_fast import _dispatch, _native
from seqrec_fast._dispatch import Spec, choose, reasons

CPU = Spec("lstm_step", "cpu", torch.float32)


def call() -> tuple[torch.Tensor, torch.Tensor]:
    w = torch.ones(4, 1)
    return sf.lstm_step(torch.ones(1, 1), (torch.ones(1, 1), torch.ones(1, 1)), w, w)


def test_context_manager_restores() -> None:
    with sf.use_backend("reference"):
        assert choose(CPU) == "reference"
        with sf.use_backend("auto"):
            assert choose(CPU) == ("native" if _native.MISSING is None else "reference")
        assert choose(CPU) == "reference"
    assert _dispatch.forced_backend() == "auto"


def test_context_manager_restores_after_an_error() -> None:
    with pytest.raises(KeyError), sf.use_backend("reference"):
        raise KeyError
    assert _dispatch.forced_backend() == "auto"


def test_called_as_a_function_it_returns_a_restorer() -> None:
    restore = sf.use_backend("reference")
    try:
        assert choose(CPU) == "reference"
    finally:
        restore()
    assert _dispatch.forced_backend() == "auto"


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, native, triton, reference, got 'cudnn'"):
        sf.use_backend("cudnn")
    assert _dispatch.forced_backend() == "auto"


def test_a_backend_that_cannot_run_raises_with_the_reason() -> None:
    with sf.use_backend("triton"), pytest.raises(sf.BackendUnavailable, match="TRITON_INTERPRET"):
        call()
    assert issubclass(sf.BackendUnavailable, RuntimeError)


def test_an_operator_without_an_implementation_says_so() -> None:
    assert reasons(Spec("no_such_operator", "cpu", torch.float32))["native"] == ("there is no native implementation")


def test_native_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "MISSING", "no C++ compiler was found")
    _dispatch._choose.cache_clear()
    try:
        assert choose(CPU) == "reference"
        with sf.use_backend("native"), pytest.raises(sf.BackendUnavailable, match="no C\\+\\+ compiler was found"):
            call()
    finally:
        _dispatch._choose.cache_clear()


def test_every_operator_has_a_reference() -> None:
    for operator, table in _dispatch.SUPPORTS.items():
        assert table["reference"](Spec(operator, "cpu", torch.float64)) is None


def test_backward_keeps_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from seqrec_fast.ops.lstm_step import LSTM_STEP_BACKWARD

    seen = []
    for backend in ("native", "reference"):
        original = LSTM_STEP_BACKWARD._backends[backend]
        monkeypatch.setitem(
            LSTM_STEP_BACKWARD._backends,
            backend,
            lambda *args, _original=original, _name=backend: (seen.append(_name), _original(*args))[1],
        )
    w = torch.ones(4, 1, requires_grad=True)
    with sf.use_backend("reference"):
        h, _ = sf.lstm_step(torch.ones(1, 1), (torch.ones(1, 1), torch.ones(1, 1)), w, w)
    h.sum().backward()
    assert seen == ["reference"]


CATALOGUE_CALLS = {
    "catalogue_attention": lambda q, items: sf.catalogue_attention(q, items),
    "catalogue_topk": lambda q, items: sf.catalogue_topk(q, items, 2).values,
    "catalogue_cross_entropy": lambda q, items: sf.catalogue_cross_entropy(
        q, items, torch.zeros(len(q), dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("name", CATALOGUE_CALLS)
def test_a_differentiable_backward_keeps_the_backend_of_its_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(_dispatch, "choose_forced", lambda spec, forced: (seen.append(forced), "reference")[1])
    query = torch.randn(2, 3, requires_grad=True)
    with sf.use_backend("reference"):
        result = CATALOGUE_CALLS[name](query, torch.randn(5, 3))
    (gradient,) = torch.autograd.grad(result.sum(), query, create_graph=True)
    assert seen == ["reference"]
    if gradient.requires_grad:
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", CATALOGUE_CALLS)
def test_backwards_of_several_threads_leave_the_backend_alone(name: str) -> None:
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = CATALOGUE_CALLS[name]
    former = sys.getswitchinterval()
    found = []

    def work() -> None:
        query, items = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3)
        for _ in range(20):
            with_graph = function(query, items).sum()
            torch.autograd.grad(with_graph, query, create_graph=True)
            found.append(_dispatch._forced)

    restore = sf.use_backend("reference")
    query, items = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3)
    forced = [
        function(query, items).sum() for _ in range(60)
    ]  # their backwards want a backend that is not in force then
    restore()

    def work_forced(results: list[torch.Tensor]) -> None:
        for result in results:
            torch.autograd.grad(result, query, create_graph=True)
            found.append(_dispatch._forced)

    threads = [threading.Thread(target=work) for _ in range(2)]
    threads += [threading.Thread(target=work_forced, args=(forced[n::3],)) for n in range(3)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(former)
        left, _dispatch._forced = _dispatch._forced, "auto"
    assert left == "auto"
    assert set(found) == {"auto"}
