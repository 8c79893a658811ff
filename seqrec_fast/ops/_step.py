"""What ``lstm_step`` and ``gru_step`` share: the short way to the native CPU kernel, and the in-place form."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from .. import _dispatch, _native
from .._dispatch import Spec
from .._operator import Operator, tracing, transforms_active
from .._precision import current_precision
from ._checks import check_writable

# What a kernel raises before any work when its arguments do not fit, and what something that is no tensor raises on its way to it.
REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError)


@lru_cache(maxsize=64)
def spec(operator: str, device: str, dtype: torch.dtype) -> Spec:
    return Spec(operator, device, dtype)  # any width runs everywhere, so a Spec per device and dtype will do


def runs_in_the_kernel(x: Tensor) -> bool:
    """Whether this call ends in the native CPU kernel, which checks its arguments: reading the shapes, dtypes and devices of seven
    tensors in Python takes as long as the step itself. (A weight on another device takes the call to that device's kernel, which
    refuses x.) One frame, not a call for each question: between two steps the weights push the interpreter out of the caches.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dim() == 2
        and _native.MISSING is None
        and _dispatch._forced in ("auto", "native")
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def step_wants_gradient(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> bool:
    """``_operator.wants_gradient`` without its loop, for the path that is counted in microseconds."""
    return torch.is_grad_enabled() and (
        w_ih.requires_grad
        or w_hh.requires_grad
        or x.requires_grad
        or h.requires_grad
        or (c is not None and c.requires_grad)
        or (b_ih is not None and b_ih.requires_grad)
        or (b_hh is not None and b_hh.requires_grad)
    )


def step_inplace(
    operator: Operator,
    check: Callable[..., None],
    x: Tensor,
    states: tuple[Tensor, ...],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> None:
    """Overwrite the states, batched or not, by one step of the in-place operator ``operator``.

    ``check`` takes the tensors that the operator does, and says which of them does not fit.
    """
    h, c = states if len(states) == 2 else (states[0], None)
    tensors = (x, *states, w_ih, w_hh, b_ih, b_hh)
    native = runs_in_the_kernel(x)
    if not native:
        check(*tensors)
    try:
        if step_wants_gradient(x, h, c, w_ih, w_hh, b_ih, b_hh):
            name = operator.name.removesuffix("_")
            raise ValueError(f"{name}: inplace=True has no gradient; use torch.no_grad() or inplace=False")
        if native:  # it refuses states that overlap before it writes
            if h.is_neg() or (c is not None and c.is_neg()):
                _check_writable(operator, states)
            operator.native(*tensors, current_precision())
            increment_version(states)
        else:
            _any_step_inplace(operator, x, states, tensors[-4:])
    except REFUSALS:
        check(*tensors)
        raise


def _any_step_inplace(
    operator: Operator, x: Tensor, states: tuple[Tensor, ...], weights: tuple[Tensor | None, ...]
) -> None:
    """On every backend and device, traced and under transforms."""
    traced = tracing()
    if not traced and not transforms_active() and x.device.type != "meta":
        _check_writable(operator, states)
    batched = (x, *states) if x.dim() == 2 else (x[None], *(state[None] for state in states))
    if not traced and transforms_active():
        operator.reference(*batched, *weights, current_precision())  # plain PyTorch, which every transform understands
        return
    operator(*batched, *weights, current_precision())
    if not traced:
        # A kernel writes behind autograd's back: a graph that saved a state must notice.
        increment_version(states)


def _check_writable(operator: Operator, states: tuple[Tensor, ...]) -> None:
    check_writable(operator.name.removesuffix("_"), dict(zip("hc", states, strict=False)))
