"""One GRU layer in one direction over a whole ragged batch.

    u_t = W_ih·x_t + b_ih        v_t = W_hh·(m ⊙ h_{t−1}) + b_hh        each split into r, z, n
    r = σ(u_r + v_r)    z = σ(u_z + v_z)    n = tanh(u_n + r ⊙ v_n)
    h̃_t = (1 − z) ⊙ n + z ⊙ h_{t−1}          h_t = k·h_{t−1} + (1 − k)·h̃_t

Source: Cho et al. (2014) with the reset gate after the product, as in torch.nn.GRU. Zoneout (Krueger et al. 2017): k is 0 or 1 per
unit and step while training, and its mean afterwards. Recurrent dropout (Gal & Ghahramani 2016): m is 0 or 1/(1 − p) per unit, the
same at every step of a row; z ⊙ h_{t−1} is not dropped. Layer normalisation (after Ba et al. 2016): W_ih·x_t becomes
γ_ih ⊙ n(W_ih·x_t) and W_hh·h becomes γ_hh ⊙ n(W_hh·h), where n(v) = (v − mean v)/√(var v + 1e-5) over all 3H entries; b_ih and b_hh
are its shifts.

:func:`formula` is the definition; :func:`forward` here and the one in ``gru_backward`` are the operators. See ``lstm``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._calls import SAVE_GATES, GRUCall
from ._philox import zoneout
from ._sequence import (
    LAYER_NORM_EPS,
    Carry,
    Inputs,
    Packing,
    accumulation_dtype,
    packing_of,
    plain_input_part,
    segment_starts,
    stack_steps,
    starts_of,
    valid_steps,
)

Results = tuple[Tensor, Tensor, Tensor]


def formula(call: GRUCall) -> tuple[Tensor, Tensor]:
    """(output, h_n) in differentiable PyTorch, whatever ``last_only`` says."""
    steps, rows = call.steps_and_rows
    dtype, wide = call.x.dtype, accumulation_dtype(call.x.dtype)
    w_hh, b_hh, ln_hh = widened(call, wide)
    hidden = w_hh.shape[1]
    valid = valid_steps(call)  # [T, B, 1]
    u_x = plain_input_part(call, valid).unbind()  # T × [B, 3H]: one backward for all
    starts = None if call.reset is None else segment_starts(call.reset, call.lengths, call.reverse)[..., None]
    noise = call.noise(torch.arange(rows, device=call.x.device), 0, wide)
    h = call.h.to(wide)
    outputs = [h] * steps
    for t in reversed(range(steps)) if call.reverse else range(steps):
        former = h if starts is None else h.masked_fill(starts[t], 0)
        v = (former if noise.recurrent is None else former * noise.recurrent) @ w_hh.t()  # [B, 3H]
        if ln_hh is not None:
            v = F.layer_norm(v, v.shape[-1:], ln_hh, None, LAYER_NORM_EPS)
        if b_hh is not None:
            v = v + b_hh
        u_rz, u_n = u_x[t].split((2 * hidden, hidden), dim=-1)
        v_rz, v_n = v.split((2 * hidden, hidden), dim=-1)
        r, z = torch.sigmoid(u_rz + v_rz).chunk(2, dim=-1)
        n = torch.tanh(u_n + r * v_n)
        outputs[t] = new = zoneout(former, n + z * (former - n), noise.hidden(t, rows)).to(dtype).to(wide)
        h = new if valid is None else torch.where(valid[t], new, h)
    output = stack_steps(outputs, h, valid).to(dtype)
    return output.transpose(0, 1) if call.batch_first else output, h.to(dtype)


def widened(call: GRUCall, wide: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(w_hh, b_hh, ln_hh) in the accumulation dtype."""
    b_hh, ln_hh = (None if weight is None else weight.to(wide) for weight in (call.b_hh, call.ln_hh))
    return call.w_hh.to(wide), b_hh, ln_hh


def forward(*raw: Any) -> Results:
    """The operator ``gru``: (output, h_n, gates [T, B, 4H]); [0] for what is not wanted."""
    call = GRUCall(*raw)
    packing = packing_of("gru", call)
    dtype, wide = call.x.dtype, accumulation_dtype(call.x.dtype)
    hidden = call.w_hh.shape[1]
    new = call.x.new_empty
    states = new((packing.tokens if call.saves_output else 0, hidden))
    gates = new((packing.tokens if call.save == SAVE_GATES else 0, 4 * hidden), dtype=wide)

    step = _Step(call, packing, wide)
    inputs = Inputs("gru", call, packing)
    carry = Carry(packing.sort_rows(call.h).to(wide))
    for chunk, start, stop in packing.chunks(4 * hidden, call.reverse):
        block = gates[start:stop] if len(gates) else new((stop - start, 4 * hidden), dtype=wide)
        inputs.project(start, stop, block[:, : 3 * hidden])
        for t in chunk:
            first, size = packing.offsets[t], packing.sizes[t]
            here = slice(first, first + size)
            carry.current = h = step(t, block[first - start : first - start + size], carry.take(size), here)
            if len(states):
                states[here] = h
    if packing.valid is not None:
        states.masked_fill_(~packing.valid[: len(states)], 0)
    return (
        packing.unpack(states, call.batch_first) if call.saves_output else new(0),
        packing.unsort_rows(carry.final()).to(dtype),
        packing.unpack(gates.to(dtype)) if call.save == SAVE_GATES else new(0),
    )


class RecurrentPart:
    """v = W_hh·(m ⊙ h) + b_hh joined with the input's part of the gates, in place."""

    def __init__(self, call: GRUCall, wide: torch.dtype) -> None:
        w_hh, b_hh, self.ln_hh = widened(call, wide)
        self.hidden = hidden = w_hh.shape[1]
        self.b_hh = b_hh
        self.w_t = w_hh.t()
        self.w_rz_t, self.w_n_t = self.w_t[:, : 2 * hidden], self.w_t[:, 2 * hidden :]
        self.b_rz: Tensor | None = None if b_hh is None else b_hh[: 2 * hidden]
        self.b_n: Tensor | None = None if b_hh is None else b_hh[2 * hidden :]

    def __call__(self, gates: Tensor, operand: Tensor, v: Tensor | None = None) -> Tensor:
        """Turn u in the first 3H columns of ``gates`` [n, 4H] into r, z, n and v_n. ``v``: the normalised product, if at hand."""
        rz, n, v_n = gates.split((2 * self.hidden, self.hidden, self.hidden), dim=1)
        if v is None and self.ln_hh is not None:
            v = F.layer_norm(operand @ self.w_t, (3 * self.hidden,), self.ln_hh, self.b_hh, LAYER_NORM_EPS)
        if v is not None:
            rz.add_(v[:, : 2 * self.hidden])
            v_n.copy_(v[:, 2 * self.hidden :])
        else:
            rz.addmm_(operand, self.w_rz_t)
            if self.b_n is None or self.b_rz is None:
                torch.mm(operand, self.w_n_t, out=v_n)
            else:
                rz.add_(self.b_rz)
                torch.addmm(self.b_n, operand, self.w_n_t, out=v_n)
        rz.sigmoid_()
        n.addcmul_(rz[:, : self.hidden], v_n).tanh_()
        return gates


class _Step:
    """One step of the running rows."""

    def __init__(self, call: GRUCall, packing: Packing, wide: torch.dtype) -> None:
        self.dtype, self.wide = call.x.dtype, wide
        self.recurrent_part = RecurrentPart(call, wide)
        self.starts = starts_of(call, packing)
        self.noise = call.noise(packing.order, 0, wide)
        self.valid = packing.valid

    def __call__(self, t: int, block: Tensor, h: Tensor, here: slice) -> Tensor:
        """h' of step ``t``. ``block`` [n, 4H] holds W_ih·x + b_ih in its first 3H columns, and becomes r, z, n, v_n."""
        former = h if self.starts is None else h.masked_fill(self.starts[here], 0)
        operand = former if self.noise.recurrent is None else former * self.noise.recurrent[: len(h)]
        _, z, n, _ = self.recurrent_part(block, operand).chunk(4, dim=1)
        new = zoneout(former, torch.lerp(n, former, z), self.noise.hidden(t, len(h)))
        if self.valid is not None:
            new = torch.where(self.valid[here], new, h)
        return new if self.dtype == self.wide else new.to(self.dtype).to(self.wide)
