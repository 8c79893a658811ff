"""One LSTM step: the formulas of torch.nn.LSTMCell, with the backward written out.

    z = x·W_ihᵀ + b_ih + h·W_hhᵀ + b_hh            split into z_i, z_f, z_g, z_o
    i = σ(z_i)   f = σ(z_f)   g = tanh(z_g)   o = σ(z_o)
    c' = f·c + i·g        h' = o·tanh(c')

Source: Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000), as in torch.nn.LSTM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Mask = Sequence[bool]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def gates(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """The activated gates σ(i), σ(f), tanh(g), σ(o) side by side, [B, 4H]."""
    z = torch.nn.functional.linear(x, w_ih, b_ih) + torch.nn.functional.linear(h, w_hh, b_hh)  # [B, 4H]
    i, f, g, o = z.chunk(4, dim=-1)
    return torch.cat([torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)], dim=-1)


def cell(activated: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(h', c') from the activated gates [B, 4H] and the cell state [B, H]."""
    i, f, g, o = activated.chunk(4, dim=-1)
    c_next = f * c + i * g
    return o * torch.tanh(c_next), c_next


def plain_forward(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(h', c') in differentiable PyTorch."""
    return cell(gates(x, h, w_ih, w_hh, b_ih, b_hh), c)


def forward(
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
    """The operator ``lstm_step``: (h', c', gates or [0])."""
    wide = _accumulation_dtype(x.dtype)
    tensors = [t if t is None else t.to(wide) for t in (x, h, w_ih, w_hh, b_ih, b_hh)]
    activated = gates(*tensors)  # type: ignore[arg-type]
    h_next, c_next = cell(activated, c.to(wide))
    saved = activated if save_gates else activated.new_empty(0)
    return h_next.to(x.dtype), c_next.to(x.dtype), saved.to(x.dtype)


def forward_(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    precision: int,
) -> None:
    """The operator ``lstm_step_``: the state is overwritten."""
    h_next, c_next, _ = forward(x, h, c, w_ih, w_hh, b_ih, b_hh, False, precision)
    h.copy_(h_next)
    c.copy_(c_next)


def gate_gradient(
    grad_h: Tensor, grad_c: Tensor, c: Tensor, c_next: Tensor, activated: Tensor
) -> tuple[Tensor, Tensor]:
    """(dz [B, 4H], dc [B, H]) of one step: the derivative of the cell, then of the activations."""
    i, f, g, o = activated.chunk(4, dim=-1)
    tanh_c = torch.tanh(c_next)
    d_c_next = grad_c + grad_h * o * (1 - tanh_c * tanh_c)
    dz = torch.cat(
        [
            d_c_next * g * i * (1 - i),
            d_c_next * c * f * (1 - f),
            d_c_next * i * (1 - g * g),
            grad_h * tanh_c * o * (1 - o),
        ],
        dim=-1,
    )
    return dz, d_c_next * f


def backward(
    grad_h: Tensor,
    grad_c: Tensor,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    c_next: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    activated: Tensor,
    output_mask: Mask,
    precision: int,
) -> tuple[Tensor, ...]:
    """The operator ``lstm_step_backward``: gradients of x, h, c, w_ih, w_hh and b; [0] where ``output_mask`` is false."""
    wide = _accumulation_dtype(x.dtype)
    dtype = x.dtype
    grad_h, grad_c, x, h, c, c_next, w_ih, w_hh, activated = (
        t.to(wide) for t in (grad_h, grad_c, x, h, c, c_next, w_ih, w_hh, activated)
    )
    dz, dc = gate_gradient(grad_h, grad_c, c, c_next, activated)

    def none() -> Tensor:  # not one for all: the results of an operator do not share memory
        return x.new_empty(0)

    results = (
        dz @ w_ih if output_mask[0] else none(),
        dz @ w_hh if output_mask[1] else none(),
        dc if output_mask[2] else none(),
        dz.t() @ x if output_mask[3] else none(),
        dz.t() @ h if output_mask[4] else none(),
        dz.sum(0) if output_mask[5] else none(),
    )
    return tuple(result.to(dtype) for result in results)
