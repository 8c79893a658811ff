"""One LSTM step in Triton: both products, the bias, the activations and the cell in one kernel; the backward of the gates in another.

A program owns BLOCK_B rows × BLOCK_H units and keeps the four gates of those units in four accumulators, so nothing of size
[B, 4H] is written unless the gates are kept for the backward. The bound at small B is the bytes of the weights, 4·H·(I + P)
elements, each read once per row tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import Spec
from ..._precision import Precision
from ._maths import sigmoid, tanh
from ._support import unavailable

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class StepConfig:
    """Tile of one program and how it is compiled."""

    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    num_stages: int


# By rows: (most rows, configuration). Row tiles change at published limits only, and BLOCK_K never does, so that a row has the
# same bits whatever other rows of its class it sits with. Four [block_b, block_h] accumulators must fit the registers.
CONFIGS: tuple[tuple[int | None, StepConfig], ...] = (
    (16, StepConfig(block_b=16, block_h=16, block_k=32, num_warps=4, num_stages=3)),
    (256, StepConfig(block_b=32, block_h=32, block_k=32, num_warps=4, num_stages=3)),
    (None, StepConfig(block_b=64, block_h=32, block_k=32, num_warps=8, num_stages=2)),
)
BACKWARD_BLOCK = 256


def config_for(rows: int) -> StepConfig:
    return next(config for limit, config in CONFIGS if limit is None or rows <= limit)


def supports(spec: Spec) -> str | None:
    return unavailable(spec, DTYPES)


@triton.jit
def _gate_product(  # type: ignore[no-untyped-def]
    acc_i, acc_f, acc_g, acc_o, a_ptr, w_ptr, rows, units, B, H, K,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """acc_gate [BLOCK_B, BLOCK_H] += a [B, K] · w[gate] [H, K]ᵀ for the four gates."""
    a_row = a_ptr + rows.to(tl.int64)[:, None] * K
    w_row = w_ptr + units.to(tl.int64)[:, None] * K
    gate = H.to(tl.int64) * K  # from one gate's rows to the next
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_row + k[None, :], mask=(rows < B)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_B, BLOCK_K]
        mask = (units < H)[:, None] & (k < K)[None, :]
        w_i = tl.load(w_row + k[None, :], mask=mask, other=0.0)  # [BLOCK_H, BLOCK_K]
        w_f = tl.load(w_row + gate + k[None, :], mask=mask, other=0.0)
        w_g = tl.load(w_row + 2 * gate + k[None, :], mask=mask, other=0.0)
        w_o = tl.load(w_row + 3 * gate + k[None, :], mask=mask, other=0.0)
        if NARROW:  # fp32 operands, bf16 products: precision "medium"
            a = a.to(tl.bfloat16)
            w_i, w_f, w_g, w_o = w_i.to(tl.bfloat16), w_f.to(tl.bfloat16), w_g.to(tl.bfloat16), w_o.to(tl.bfloat16)
        acc_i = tl.dot(a, tl.trans(w_i), acc_i, input_precision=PRECISION)
        acc_f = tl.dot(a, tl.trans(w_f), acc_f, input_precision=PRECISION)
        acc_g = tl.dot(a, tl.trans(w_g), acc_g, input_precision=PRECISION)
        acc_o = tl.dot(a, tl.trans(w_o), acc_o, input_precision=PRECISION)
    return acc_i, acc_f, acc_g, acc_o


@triton.jit
def _add_bias(acc_i, acc_f, acc_g, acc_o, b_ptr, units, H):  # type: ignore[no-untyped-def]
    inside = units < H
    acc_i += tl.load(b_ptr + units, mask=inside, other=0.0).to(tl.float32)[None, :]
    acc_f += tl.load(b_ptr + H + units, mask=inside, other=0.0).to(tl.float32)[None, :]
    acc_g += tl.load(b_ptr + 2 * H + units, mask=inside, other=0.0).to(tl.float32)[None, :]
    acc_o += tl.load(b_ptr + 3 * H + units, mask=inside, other=0.0).to(tl.float32)[None, :]
    return acc_i, acc_f, acc_g, acc_o


@triton.jit
def lstm_step_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, h_ptr, c_ptr, w_ih_ptr, w_hh_ptr, b_ih_ptr, b_hh_ptr, h_next_ptr, c_next_ptr, gates_ptr,
    B, I, P, H,
    HAS_B_IH: tl.constexpr, HAS_B_HH: tl.constexpr, SAVE_GATES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    zero = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    i, f, g, o = _gate_product(
        zero, zero, zero, zero, x_ptr, w_ih_ptr, rows, units, B, H, I, BLOCK_K, PRECISION, NARROW
    )
    i, f, g, o = _gate_product(i, f, g, o, h_ptr, w_hh_ptr, rows, units, B, H, P, BLOCK_K, PRECISION, NARROW)
    if HAS_B_IH:
        i, f, g, o = _add_bias(i, f, g, o, b_ih_ptr, units, H)
    if HAS_B_HH:
        i, f, g, o = _add_bias(i, f, g, o, b_hh_ptr, units, H)
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)

    inside = (rows < B)[:, None] & (units < H)[None, :]
    at = rows.to(tl.int64)[:, None] * H + units[None, :]  # [BLOCK_B, BLOCK_H]
    c = tl.load(c_ptr + at, mask=inside, other=0.0).to(tl.float32)
    c_next = f * c + i * g
    h_next = o * tanh(c_next)
    out = h_next_ptr.dtype.element_ty
    tl.store(c_next_ptr + at, c_next.to(out), mask=inside)
    tl.store(h_next_ptr + at, h_next.to(out), mask=inside)
    if SAVE_GATES:
        at = rows.to(tl.int64)[:, None] * (4 * H) + units[None, :]
        tl.store(gates_ptr + at, i.to(out), mask=inside)
        tl.store(gates_ptr + at + H, f.to(out), mask=inside)
        tl.store(gates_ptr + at + 2 * H, g.to(out), mask=inside)
        tl.store(gates_ptr + at + 3 * H, o.to(out), mask=inside)


@triton.jit
def lstm_step_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_h_ptr, grad_c_ptr, c_ptr, c_next_ptr, gates_ptr, dz_ptr, dc_ptr, size, H, BLOCK: tl.constexpr
):
    """dz [B, 4H] and dc [B, H] from the saved gates; one element of [B, H] a lane. ``size`` = B·H."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    row, unit = at // H, at % H
    gate = row * (4 * H) + unit
    grad_h = tl.load(grad_h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad_c = tl.load(grad_c_ptr + at, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tanh_c = tanh(tl.load(c_next_ptr + at, mask=inside, other=0.0).to(tl.float32))
    i = tl.load(gates_ptr + gate, mask=inside, other=0.0).to(tl.float32)
    f = tl.load(gates_ptr + gate + H, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gates_ptr + gate + 2 * H, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(gates_ptr + gate + 3 * H, mask=inside, other=0.0).to(tl.float32)
    dc_next = grad_c + grad_h * o * (1.0 - tanh_c * tanh_c)
    out = dz_ptr.dtype.element_ty
    tl.store(dz_ptr + gate, (dc_next * g * i * (1.0 - i)).to(out), mask=inside)
    tl.store(dz_ptr + gate + H, (dc_next * c * f * (1.0 - f)).to(out), mask=inside)
    tl.store(dz_ptr + gate + 2 * H, (dc_next * i * (1.0 - g * g)).to(out), mask=inside)
    tl.store(dz_ptr + gate + 3 * H, (grad_h * tanh_c * o * (1.0 - o)).to(out), mask=inside)
    tl.store(dc_ptr + at, (dc_next * f).to(out), mask=inside)


def product_form(dtype: torch.dtype, precision: int) -> dict[str, object]:
    """How the kernel multiplies: the compile-time arguments that follow from the dtype and the precision."""
    single = dtype == torch.float32
    return {
        "PRECISION": "tf32" if single and precision == Precision.HIGH else "ieee",
        "NARROW": single and precision == Precision.MEDIUM,
    }


def lstm_step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    save_gates: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``lstm_step``."""
    rows, hidden = c.shape
    x, h, c, w_ih, w_hh = (tensor.contiguous() for tensor in (x, h, c, w_ih, w_hh))
    b_ih, b_hh = (None if bias is None else bias.contiguous() for bias in (b_ih, b_hh))
    h_next, c_next = torch.empty_like(c), torch.empty_like(c)
    gates = x.new_empty((rows, 4 * hidden) if save_gates else (0,))
    if rows and hidden:
        config = config_for(rows)
        grid = (triton.cdiv(rows, config.block_b), triton.cdiv(hidden, config.block_h))
        lstm_step_fwd_kernel[grid](
            x, h, c, w_ih, w_hh, b_ih, b_hh, h_next, c_next, gates,
            rows, x.shape[1], h.shape[1], hidden,
            HAS_B_IH=b_ih is not None, HAS_B_HH=b_hh is not None, SAVE_GATES=save_gates,
            BLOCK_B=config.block_b, BLOCK_H=config.block_h, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
            **product_form(x.dtype, precision),
        )  # fmt: skip
    return h_next, c_next, gates


def lstm_step_backward(
    grad_h: Tensor,
    grad_c: Tensor,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    c_next: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    gates: Tensor,
    output_mask: Sequence[bool],
    precision: int,
) -> tuple[Tensor, ...]:
    """The operator ``lstm_step_backward``: our kernel for the gates, the vendor's GEMM for the products."""
    rows, hidden = c.shape
    grad_h, grad_c, c, c_next, gates = (tensor.contiguous() for tensor in (grad_h, grad_c, c, c_next, gates))
    dz = torch.empty_like(gates)  # [B, 4H]
    dc = torch.empty_like(c)
    size = rows * hidden
    if size:
        lstm_step_bwd_kernel[(triton.cdiv(size, BACKWARD_BLOCK),)](
            grad_h, grad_c, c, c_next, gates, dz, dc, size, hidden, BLOCK=BACKWARD_BLOCK
        )
    none = x.new_empty(0)
    return (
        dz @ w_ih if output_mask[0] else none,
        dz @ w_hh if output_mask[1] else none,
        dc if output_mask[2] else none,
        dz.t() @ x if output_mask[3] else none,
        dz.t() @ h if output_mask[4] else none,
        dz.sum(0) if output_mask[5] else none,
    )
