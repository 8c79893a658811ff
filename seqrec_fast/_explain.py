"""``explain``: which path a call takes, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import _dispatch, _native
from ._dispatch import BackendUnavailable, Spec


@dataclass(frozen=True)
class Explanation:
    """Printed, it is a few lines for a person; its fields are for a program."""

    operator: str
    device: str
    dtype: str
    backend: str | None
    reasons: dict[str, str | None]
    forced: str
    cpu_tier: str | None

    def __str__(self) -> str:
        chosen = f"runs on {self.backend!r}" if self.backend else "cannot run"
        if self.forced != _dispatch.AUTO:
            chosen += f" (use_backend({self.forced!r}) is in force)"
        lines = [f"{self.operator} on {self.device}, {self.dtype}: {chosen}"]
        for name, why in self.reasons.items():
            note = "chosen" if name == self.backend else why or "available, not chosen"
            if name == "native" and why is None and self.device == "cpu":
                note += f" (CPU tier {self.cpu_tier})"
            lines.append(f"  {name}: {note}")
        return "\n".join(lines)


def public_operators() -> list[str]:
    """Not the parts that the operators share, nor their backward forms."""
    import seqrec_fast

    return sorted(name for name in _dispatch.SUPPORTS if name in seqrec_fast.__all__)


def explain(op_name: str, *tensors: Any, **options: Any) -> Explanation:
    """Which backend ``op_name`` would take for these arguments, and why the others would not.

    Args:
        op_name: a public operator, e.g. ``"lstm_step"``.
        tensors: the call's positional arguments; device and dtype are those of the first floating tensor.
        options: the call's keyword arguments; those that are not None count as options in use.

    Raises:
        ValueError: an unknown operator, or no floating tensor among ``tensors``.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> sf.explain("lstm_step", torch.randn(2, 8)).operator
        'lstm_step'
    """
    if op_name == "lstm_embedding":  # no operator of its own: it runs its module's layer
        op_name = next((module.operator for module in tensors if hasattr(module, "operator")), "lstm")
    if op_name not in public_operators():
        raise ValueError(f"explain: unknown operator {op_name!r}; known are {', '.join(public_operators())}")
    first = next((t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), None)
    if first is None:
        raise ValueError("explain: give the tensors of the call; no floating tensor was found among the arguments")
    used = frozenset(name for name, value in options.items() if value is not None and value is not False)
    spec = Spec(op_name, first.device.type, first.dtype, (int(first.shape[-1]),) if first.dim() else (), used)
    backend: str | None
    try:
        backend = _dispatch.choose(spec)
    except BackendUnavailable:
        backend = None
    return Explanation(
        operator=op_name,
        device=spec.device,
        dtype=str(spec.dtype).removeprefix("torch."),
        backend=backend,
        reasons=_dispatch.reasons(spec),
        forced=_dispatch.forced_backend(),
        cpu_tier=_native.CPU_TIER,
    )
