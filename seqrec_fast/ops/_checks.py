"""Argument checks shared by the public functions: one clear sentence naming the argument, what it got and what it expects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._logits import check_storage, check_strided

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """How a value is named in an error message."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that are not None: what of the optional arguments there is to check."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def check_floating(operator: str, **tensors: Tensor) -> None:
    """All are dense tensors, of one floating dtype and on one device.

    Raises:
        TypeError: something else than a dense tensor, an integer tensor, or two different dtypes.
        ValueError: two different devices.
        RuntimeError: a tensor's storage was freed.
    """
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
        check_strided(operator, name, tensor)
        check_storage(operator, name, tensor)
        if first is None:
            if tensor.dtype not in FLOATS:
                raise TypeError(f"{operator}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
            first = (name, tensor)
            continue
        if tensor.dtype != first[1].dtype:
            raise TypeError(
                f"{operator}: {name} must have the dtype of {first[0]} ({first[1].dtype}), got {tensor.dtype}"
            )
        if tensor.device != first[1].device:
            raise ValueError(
                f"{operator}: {name} must be on the device of {first[0]} ({first[1].device}), got {tensor.device}"
            )


def check_writable(operator: str, states: dict[str, Tensor]) -> None:
    """The states of an in-place step are places of their own: none covers itself, and no two begin at one address.

    What only the addresses of all elements tell (one state in the middle of another) the native CPU kernel finds.
    """
    for name, state in states.items():
        if state.is_neg():
            raise ValueError(
                f"{operator}: inplace cannot write {name}, a lazily negated view; use {name}.resolve_neg()"
            )
        if torch._debug_has_internal_overlap(state) == 1:
            raise ValueError(
                f"{operator}: inplace cannot write {name}, whose elements share memory (an expanded tensor)"
            )
    if len({state.data_ptr() for state in states.values()}) < len(states) and min(s.numel() for s in states.values()):
        raise ValueError(f"{operator}: inplace needs {' and '.join(states)} in memory of their own")


def check_shape(operator: str, name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """``tensor`` has exactly the shape ``expected``; ``meaning`` names it, e.g. ``"[B, H]"``."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{operator}: {name} must have shape {meaning} = {tuple(expected)}, got {tuple(tensor.shape)}")
