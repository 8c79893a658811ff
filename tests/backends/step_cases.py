"""Calls of ``lstm_step`` and ``gru_step``, their results by name, and how accurate those must be.

Truth is fp64; the yardstick is eager PyTorch's own error in the same dtype on the same data.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from seqrec_fast import _native

if _native.MISSING is not None:
    pytest.skip(f"no native library: {_native.MISSING}", allow_module_level=True)

native = torch.ops.seqrec_fast_native
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GATES = {"lstm": 4, "gru": 3}
# In the order of the results of the backward. Both biases of an LSTM have one gradient.
GRADIENTS = {
    "lstm": ("grad x", "grad h", "grad c", "grad w_ih", "grad w_hh", "grad b_ih"),
    "gru": ("grad x", "grad h", "grad w_ih", "grad w_hh", "grad b_ih", "grad b_hh"),
}
each_kind = pytest.mark.parametrize("kind", GATES)
Shape = tuple[int, int, int, int]  # B, I, P, H
Results = dict[str, Tensor]


class Step(NamedTuple):
    x: Tensor
    h: Tensor
    c: Tensor | None  # None for GRU
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None

    @property
    def kind(self) -> str:
        return "gru" if self.c is None else "lstm"

    def arguments(self) -> list[Tensor | None]:
        """What the operator takes."""
        return [t for name, t in self._asdict().items() if t is not None or name != "c"]

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in self._asdict().items() if t is not None}

    def states(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors().items() if name in ("h", "c")}

    def mapped(self, function: object) -> Step:
        return self._replace(**{name: function(t) for name, t in self.tensors().items()})  # type: ignore[operator]

    def rows(self, rows: Tensor) -> Step:
        return self._replace(**{name: t[rows] for name, t in self.tensors().items() if name in ("x", "h", "c")})


class Call(NamedTuple):
    step: Step
    grads: tuple[Tensor, ...]  # of h' and c'

    def to(self, dtype: torch.dtype) -> Call:
        return Call(self.step.mapped(lambda t: t.to(dtype)), tuple(g.to(dtype) for g in self.grads))


def make(kind: str, shape: Shape, dtype: torch.dtype = torch.float32, *, bias: bool = True, scale: float = 1.0) -> Call:
    """Random arguments; the state of a GRU is as wide as its units, whatever P."""
    rows, inputs, projected, hidden = shape
    gates, projected = GATES[kind] * hidden, projected if kind == "lstm" else hidden

    def normal(*size: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(*size, dtype=torch.float64) * spread).to(dtype)

    spread = scale / max(inputs + projected, 1) ** 0.5
    step = Step(
        normal(rows, inputs),
        normal(rows, projected),
        normal(rows, hidden) if kind == "lstm" else None,
        normal(gates, inputs, spread=spread),
        normal(gates, projected, spread=spread),
        normal(gates) if bias else None,
        normal(gates, spread=0.5) if bias else None,
    )
    return Call(step, tuple(normal(rows, hidden) for _ in step.states()))


def run_forward(step: Step, save_gates: bool = True) -> Results:
    operator = getattr(native, f"{step.kind}_step").default
    return dict(zip((*step.states(), "gates"), operator(*step.arguments(), save_gates, 0), strict=True))


def run_backward(call: Call, forward: Results, wanted: tuple[bool, ...] = (True,) * 6) -> Results:
    """The native backward from the results of a forward."""
    step, grads = call
    operator = getattr(native, f"{step.kind}_step_backward").default
    states = (step.h,) if step.c is None else (step.h, step.c, forward["c"])
    found = operator(*grads, step.x, *states, step.w_ih, step.w_hh, forward["gates"], list(wanted), 0)
    return dict(zip(GRADIENTS[step.kind], found, strict=True))


def run_native(call: Call) -> Results:
    forward = run_forward(call.step)
    return {**forward, **run_backward(call, forward)}


def run_inplace(step: Step) -> None:
    getattr(native, f"{step.kind}_step_").default(*step.arguments(), 0)


def run_eager(call: Call) -> Results:
    """The formula of torch.nn's cell on autograd, in the dtype of its arguments."""
    step = call.step.mapped(lambda t: t.detach().clone().requires_grad_())
    u = torch.nn.functional.linear(step.x, step.w_ih, step.b_ih)
    v = torch.nn.functional.linear(step.h, step.w_hh, step.b_hh)
    if step.c is None:
        (u_r, u_z, u_n), (v_r, v_z, v_n) = u.chunk(3, 1), v.chunk(3, 1)
        r, z = (u_r + v_r).sigmoid(), (u_z + v_z).sigmoid()
        n = (u_n + r * v_n).tanh()
        gates, states = [r, z, n, v_n], {"h": (step.h - n) * z + n}
    else:
        i, f, g, o = (u + v).chunk(4, 1)
        gates = [i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()]
        c = gates[1] * step.c + gates[0] * gates[2]
        states = {"h": gates[3] * c.tanh(), "c": c}
    found = torch.autograd.grad(list(states.values()), list(step.tensors().values()), call.grads)
    gradients = {f"grad {name}": gradient for name, gradient in zip(step.tensors(), found, strict=True)}
    results = {
        **states,
        "gates": torch.cat(gates, 1),
        **{n: gradients[n] for n in GRADIENTS[step.kind] if n in gradients},
    }
    return {name: value.detach() for name, value in results.items()}


def differing(got: Results, want: Results) -> list[str]:
    """The results that are not the same bits."""
    return [name for name, value in want.items() if not torch.equal(got[name], value)]


def assert_as_accurate_as_eager(call: Call) -> None:
    dtype = call.step.x.dtype
    # An absolute term of two roundings of the largest value or of 1, the size of the terms of the sums: on the smallest shapes
    # eager is exact by luck. In fp64 eager is itself the truth, so there the whole error of a few dozen roundings must fit.
    slack = (40 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps / 2
    got, eager = run_native(call), run_eager(call)
    for name, want in run_eager(call.to(torch.float64)).items():
        value = got[name]
        assert (value.shape, value.dtype) == (want.shape, dtype), name
        if want.numel() == 0:
            continue
        error, reference = (value.double() - want).abs().max(), (eager[name].double() - want).abs().max()
        allowed = (3 if name.startswith("grad") else 2) * reference + slack * want.abs().max().clamp_min(1)
        assert error <= allowed, f"{name}: error {error:.2e}, eager's own {reference:.2e}, allowed {allowed:.2e}"


def digest() -> str:
    """A fingerprint of the bits of one forward and backward of each cell in every dtype."""
    torch.manual_seed(5)
    total = hashlib.sha256()
    for kind in GATES:
        for dtype in DTYPES:
            for value in run_native(make(kind, (19, 37, 35, 35), dtype)).values():
                total.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
