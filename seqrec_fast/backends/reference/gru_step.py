"""One GRU step: the formulas of torch.nn.GRUCell, with the backward written out.

    u = W_ih·x + b_ih        v = W_hh·h + b_hh            each split into r, z, n
    r = σ(u_r + v_r)   z = σ(u_z + v_z)   n = tanh(u_n + r·v_n)
    h' = n + z·(h − n)

Source: Cho et al. (2014) with the reset gate after the product, as in torch.nn.GRU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._sequence import accumulation_dtype

Mask = Sequence[bool]


def gates(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """r, z, n and v_n side by side, [B, 4H]."""
    u_r, u_z, u_n = linear(x, w_ih, b_ih).chunk(3, dim=-1)
    v_r, v_z, v_n = linear(h, w_hh, b_hh).chunk(3, dim=-1)
    r, z = torch.sigmoid(u_r + v_r), torch.sigmoid(u_z + v_z)
    return torch.cat([r, z, torch.tanh(u_n + r * v_n), v_n], dim=-1)


def state(activated: Tensor, h: Tensor) -> Tensor:
    """h' from the activated gates [B, 4H] and h [B, H]."""
    _, z, n, _ = activated.chunk(4, dim=-1)
    return n + z * (h - n)


def plain_forward(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """h' in differentiable PyTorch; 16-bit inputs are computed in fp32."""
    wide = accumulation_dtype(x.dtype)
    tensors = [t if t is None else t.to(wide) for t in (x, h, w_ih, w_hh, b_ih, b_hh)]
    return state(gates(*tensors), h.to(wide)).to(x.dtype)  # type: ignore[arg-type]


def forward(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    save_gates: bool,
    precision: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``gru_step``: (h', gates or [0])."""
    wide = accumulation_dtype(x.dtype)
    tensors = [t if t is None else t.to(wide) for t in (x, h, w_ih, w_hh, b_ih, b_hh)]
    activated = gates(*tensors)  # type: ignore[arg-type]
    saved = activated if save_gates else activated.new_empty(0)
    return state(activated, h.to(wide)).to(x.dtype), saved.to(x.dtype)


def forward_(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, precision: int
) -> None:
    """The operator ``gru_step_``: the state is overwritten."""
    h.copy_(forward(x, h, w_ih, w_hh, b_ih, b_hh, False, precision)[0])


def backward(
    grad_h: Tensor,
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    activated: Tensor,
    output_mask: Mask,
    precision: int,
) -> tuple[Tensor, ...]:
    """The operator ``gru_step_backward``: gradients of x, h, w_ih, w_hh, b_ih, b_hh; [0] where ``output_mask`` is false."""
    wide, dtype = accumulation_dtype(x.dtype), x.dtype
    grad_h, x, h, w_ih, w_hh, activated = (t.to(wide) for t in (grad_h, x, h, w_ih, w_hh, activated))
    r, z, n, v_n = activated.chunk(4, dim=-1)
    d_n = grad_h * (1 - z) * (1 - n * n)
    d_z = grad_h * (h - n) * z * (1 - z)
    d_r = d_n * v_n * r * (1 - r)
    du = torch.cat([d_r, d_z, d_n], dim=-1)  # [B, 3H]
    dv = torch.cat([d_r, d_z, d_n * r], dim=-1)

    def none() -> Tensor:  # not one for all: the results of an operator do not share memory
        return x.new_empty(0)

    results = (
        du @ w_ih if output_mask[0] else none(),
        grad_h * z + dv @ w_hh if output_mask[1] else none(),
        du.t() @ x if output_mask[2] else none(),
        dv.t() @ h if output_mask[3] else none(),
        du.sum(0) if output_mask[4] else none(),
        dv.sum(0) if output_mask[5] else none(),
    )
    return tuple(result.to(dtype) for result in results)
