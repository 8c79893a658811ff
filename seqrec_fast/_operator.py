"""Wires one raw operator to the dispatcher: fake, reference and Triton implementations, gradient, and the choice at run time.

How a call travels::

    public function ──► Operator.__call__ ─┬─ tracing ──────────────► seqrec_fast::X  (recorded in the graph)
                                           ├─ no gradient wanted ───► run ──► seqrec_fast_<backend>::X
                                           └─ otherwise ────────────► Function.apply ──► forward ──► run

    seqrec_fast::X  ──► Autograd: Function.apply ──► below autograd ──► CompositeExplicitAutograd: run

Calling the backend's operator directly in eager mode halves the overhead of a call, which is what a single recurrent step costs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from . import _dispatch
from ._dispatch import Spec, Supports
from ._schema import LIBRARIES, PUBLIC, SCHEMAS

Implementation = Callable[..., Any]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl


class Operator:
    """One operator of ``_schema.SCHEMAS``.

    Args:
        name: its name in the schema table.
        reference: the plain PyTorch implementation.
        fake: shapes and dtypes of the results, for tracing.
        describe: the :class:`Spec` of a call, from the raw arguments.
        native: ``supports`` of the C++ implementation, or None where there is none.
        native_implementation: what runs natively where that is not one compiled operator: a Python function around compiled ones.
        triton: name of the module in ``seqrec_fast.backends.triton`` that defines ``supports`` and the implementation, a function
            called ``name``. It is imported when first asked for, so that importing the package does not import Triton.
        of_every_backend: no kernel of its own, but part of what calls of every backend do: runs whichever is asked for by name.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Implementation,
        fake: Implementation,
        describe: Callable[..., Spec],
        native: Supports | None = None,
        native_implementation: Implementation | None = None,
        triton: str | None = None,
        of_every_backend: bool = False,
    ) -> None:
        if name not in SCHEMAS:
            raise KeyError(f"{name} has no schema in seqrec_fast/_schema.py")
        self.name = name
        self.describe = describe
        self.reference = reference
        self.fake = fake
        self.of_every_backend = of_every_backend
        self.function: Any = None
        self.apply: Any = None
        self.apply_native: Any = None
        self.public = getattr(torch.ops.seqrec_fast, name).default
        self.native = getattr(torch.ops.seqrec_fast_native, name).default
        self._backends = {
            "native": self.native,
            "triton": getattr(torch.ops.seqrec_fast_triton, name).default,
            "reference": getattr(torch.ops.seqrec_fast_reference, name).default,
        }
        table: dict[str, Supports] = {"reference": _dispatch.always}
        self._register("seqrec_fast_reference", without_autocast(reference))
        if native is not None:
            table["native"] = native
        if native_implementation is not None:
            LIBRARIES["seqrec_fast_native"].impl(name, without_autocast(native_implementation), "CPU")
        if triton is not None:
            table["triton"] = _lazy_supports(triton)
            self._register("seqrec_fast_triton", _lazy_implementation(triton, name))
        _dispatch.SUPPORTS[name] = table
        self._register(PUBLIC, self.run)
        # Only the public operator is ever traced: see __call__.
        torch.library.register_fake(f"{PUBLIC}::{name}", fake, lib=LIBRARIES[PUBLIC])

    def _register(self, namespace: str, implementation: Implementation) -> None:
        LIBRARIES[namespace].impl(self.name, implementation, "CompositeExplicitAutograd")

    def register_function(self, function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        """Make ``function`` the gradient of this operator. Usable as a class decorator.

        ``function.forward`` must return ``self.below_autograd(*args)``.
        """
        self.function = function
        self.apply = _without_binding(function)
        LIBRARIES[PUBLIC].impl(self.name, function.apply, "Autograd")
        return function

    def register_native_function(self, function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        """Make ``function`` the gradient of the calls that run natively and that nothing traces or transforms.

        Usable as a class decorator. Worth having where a call takes microseconds: its ``forward(ctx, *args)`` needs no
        ``setup_context``, calls ``self.native`` without asking for a backend again, and may return None for the results that only
        the backward reads, which autograd would otherwise wrap and make a gradient of zeros for (a third of a training step at
        one row).
        """
        self.apply_native = _without_binding(function)
        return function

    def run(self, *args: Any, forced: str | None = None) -> Any:
        """Choose a backend and call it. ``forced``: the backend in force in the forward this is the backward of."""
        spec = self.describe(*args)
        if spec.device == "meta":
            return self.fake(*args)  # shapes alone, whatever the backend in force
        if self.of_every_backend:
            forced = _dispatch.AUTO
        backend = _dispatch.choose(spec) if forced is None else _dispatch.choose_forced(spec, forced)
        return self._backends[backend](*args)

    def below_autograd(self, *args: Any, forced: str | None = None) -> Any:
        """The forward of this operator's Function: records the public operator while a graph is traced, else runs a backend."""
        if torch._C._len_torch_dispatch_stack() or any(map(_dispatches, args)):
            with torch._C._AutoDispatchBelowAutograd():
                return self.public(*args)
        return self.run(*args, forced=forced)

    def __call__(self, *args: Any) -> Any:
        if tracing() or any(map(_dispatches, args)):
            return self.public(*args)
        if transforms_active() and self.function is not None:
            return self.function.apply(*args)
        if wants_gradient(*args):
            if self.apply_native is not None and _dispatch.choose(self.describe(*args)) == "native":
                return self.apply_native(*args)
            return self.apply(*args)
        return self.run(*args)


def _dispatches(argument: Any) -> bool:
    """A tensor subclass that says itself what an operator does to it (a fake tensor outside its mode, say)."""
    kind = type(argument)
    return kind is not torch.Tensor and getattr(kind, "__torch_dispatch__", _NO_DISPATCH) is not _NO_DISPATCH


def plain(*arguments: Any) -> bool:
    """Whether nothing records, transforms or differentiates a call with these arguments: it may run any kernel at once."""
    watched = tracing() or transforms_active() or wants_gradient(*arguments)
    return not watched and not any(map(_dispatches, arguments))


def tracing() -> bool:
    """Whether calls are recorded: by Dynamo, or by a dispatch mode (fake tensors, make_fx, a profiler of operators)."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


def transforms_active() -> bool:
    """Whether a functorch transform or a forward-mode level is active."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def wants_gradient(*arguments: Any) -> bool:
    """Whether autograd must record a call with these arguments."""
    if not torch.is_grad_enabled():
        return False
    for argument in arguments:  # noqa: SIM110  (any() over a generator costs twice as much, once per recurrent step)
        if isinstance(argument, torch.Tensor) and argument.requires_grad:
            return True
    return False


def _without_binding(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without binding default arguments through inspect.signature first (15 µs); its base does not."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def without_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A formula's products are computed in the dtype it chose, also inside an autocast block."""

    @functools.wraps(function)
    def implementation(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **options)
        with torch._C._DisableAutocast():
            return function(*args, **options)

    return implementation


def _lazy_supports(module: str) -> Supports:
    def supports(spec: Spec) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'seqrec_fast[triton]')"
        answer: str | None = importlib.import_module(f"seqrec_fast.backends.triton.{module}").supports(spec)
        return answer

    return supports


def _lazy_implementation(module: str, name: str) -> Implementation:
    def implementation(*args: Any) -> Any:
        return getattr(importlib.import_module(f"seqrec_fast.backends.triton.{module}"), name)(*args)

    return implementation
