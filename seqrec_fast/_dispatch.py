"""Which backend runs an operator. The only place that chooses.

``SUPPORTS[operator][backend]`` is a pure function of a :class:`Spec` that answers None (it can run) or the reason why not. It is
asked each time an operator runs, never while a graph is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import NamedTuple

import torch

from . import _native

AUTO = "auto"
NAMES = (AUTO, "native", "triton", "reference")


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run this call; the message says why."""


class Spec(NamedTuple):
    """What a choice may depend on: nothing else of a call is looked at."""

    operator: str
    device: str  # "cpu", "cuda", …
    dtype: torch.dtype
    widths: tuple[int, ...] = ()  # the feature widths (not batch, time or number of items)
    options: frozenset[str] = frozenset()  # names of options that are in use


Supports = Callable[[Spec], "str | None"]
SUPPORTS: dict[str, dict[str, Supports]] = {}

# The backend asked for by use_backend. A module global, not a ContextVar: Dynamo cannot trace the latter.
_forced = AUTO


def forced_backend() -> str:
    return _forced


class use_backend:
    """Force one backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Takes effect at once; as a context manager it restores the former choice at the end of the block, and otherwise when the
    returned object is called. A backward pass uses the backend that was in force in its forward. Not recorded in a compiled or
    exported graph. One setting for the whole process, not per thread.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> x, h, w = torch.randn(2, 8), torch.randn(2, 8), torch.randn(32, 8)
        >>> with sf.use_backend("reference"):
        ...     h_next, c_next = sf.lstm_step(x, (h, h), w, w)
    """

    def __init__(self, name: str) -> None:
        global _forced
        if name not in NAMES:
            raise ValueError(f"use_backend: backend must be one of {', '.join(NAMES)}, got {name!r}")
        self._former = _forced
        _forced = name

    def __call__(self) -> None:
        """Restore the former choice."""
        global _forced
        _forced = self._former

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self()


def preference(device: str) -> tuple[str, ...]:
    """Backends from the fastest to the one that always works."""
    # Triton's interpreter on the CPU is for testing: it runs only when asked for by name.
    return ("native", "triton", "reference") if device == "cuda" else ("native", "reference")


def reasons(spec: Spec) -> dict[str, str | None]:
    """For every backend: None when it can run the call, otherwise why not."""
    table = SUPPORTS.get(spec.operator, {})
    return {name: _ask(table.get(name), name, spec) for name in NAMES[1:]}


def _ask(supports: Supports | None, backend: str, spec: Spec) -> str | None:
    if supports is None:
        return f"there is no {backend} implementation"
    if backend == "native":
        if _native.MISSING is not None:
            return _native.MISSING
        if not _native.has_kernel(spec.operator, spec.device):
            return f"the compiled library has no {spec.device} kernel of it"
    return supports(spec)


@lru_cache(maxsize=4096)
def _choose(spec: Spec, forced: str) -> str:
    table = SUPPORTS.get(spec.operator, {})
    if forced != AUTO:
        why = _ask(table.get(forced), forced, spec)
        if why is not None:
            raise BackendUnavailable(f"{spec.operator}: backend {forced!r} cannot run this call: {why}")
        return forced
    for name in preference(spec.device):  # asked one by one: the last ones may have to import Triton to answer
        if _ask(table.get(name), name, spec) is None:
            return name
    raise BackendUnavailable(f"{spec.operator}: no backend can run this call: {reasons(spec)}")


def choose(spec: Spec) -> str:
    """The backend that runs a call.

    Raises:
        BackendUnavailable: the backend in force by :class:`use_backend` cannot run it.
    """
    return _choose(spec, _forced)


def choose_forced(spec: Spec, forced: str) -> str:
    """As :func:`choose`, with the choice that was in force when a forward ran."""
    return _choose(spec, forced)


def always(spec: Spec) -> str | None:
    """``supports`` of a backend that runs every call of an operator (reference)."""
    return None
