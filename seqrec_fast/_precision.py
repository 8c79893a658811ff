"""The one place that reads torch's switches for the precision of matrix products."""

from __future__ import annotations

from enum import IntEnum

import torch


class Precision(IntEnum):
    """How products of fp32 operands are computed; accumulation is always at least fp32.

    ``HIGHEST`` is fp32-accurate. ``HIGH`` allows tf32, or three products of a two-way bf16 split. ``MEDIUM`` allows bf16
    products. 16-bit and fp64 operands ignore it.
    """

    HIGHEST = 0
    HIGH = 1
    MEDIUM = 2


_BY_NAME = {precision.name.lower(): int(precision) for precision in Precision}


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a type of device. On meta tensors torch has none, and does not want to be asked."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def current_precision() -> int:
    """torch.get_float32_matmul_precision() as a :class:`Precision` value.

    Dynamo cannot trace torch's getter, so it calls this while tracing and keeps the answer. Its global-state guard watches the
    switch for tf32, so a change from or to ``highest`` compiles again; ``high`` against ``medium`` is not watched.
    """
    return _BY_NAME[torch.get_float32_matmul_precision()]


# What torch.compiler.assume_constant_result does, without importing the whole of torch._dynamo (two seconds) to do it.
current_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]
