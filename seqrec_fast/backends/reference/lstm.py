"""One LSTM layer in one direction over a whole ragged batch.

    z_t = W_ih·x_t + b_ih + W_hh·(m ⊙ h_{t−1}) + b_hh        split into z_i, z_f, z_g, z_o
    c̃_t = σ(z_f)·c_{t−1} + σ(z_i)·tanh(z_g)
    h̃_t = W_hr·(σ(z_o)·tanh(c̃_t))                            without W_hr: h̃_t = σ(z_o)·tanh(c̃_t)
    c_t = k_c·c_{t−1} + (1 − k_c)·c̃_t        h_t = k_h·h_{t−1} + (1 − k_h)·h̃_t

Sources: Hochreiter & Schmidhuber (1997), forget gate of Gers et al. (2000), projection of Sak et al. (2014), as in torch.nn.LSTM.
Zoneout (Krueger et al. 2017): k is 0 or 1 per unit and step while training, and its mean afterwards. Recurrent dropout (Gal &
Ghahramani 2016): m is 0 or 1/(1 − p) per unit, the same at every step of a row. Layer normalisation (Ba et al. 2016, eq. 20–22):
W_ih·x_t becomes γ_ih ⊙ n(W_ih·x_t), W_hh·h becomes γ_hh ⊙ n(W_hh·h) and tanh(c̃) becomes tanh(γ_c ⊙ n(c̃) + β_c), where
n(v) = (v − mean v)/√(var v + 1e-5) over all 4H (or H) entries; b_ih and b_hh are its shifts.

:func:`formula` is the definition: differentiable PyTorch that never looks at a length. :func:`forward` here and the one in
``lstm_backward`` are the operators: they touch real tokens only, and the tests hold them to the definition.

16-bit inputs: h is carried in the input dtype (it is an operand of a product), c in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._calls import SAVE_GATES, SAVE_NOTHING, LSTMCall
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

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def formula(call: LSTMCall) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) in differentiable PyTorch, whatever ``last_only`` says."""
    steps, rows = call.steps_and_rows
    dtype, wide = call.x.dtype, accumulation_dtype(call.x.dtype)
    w_hh, w_hr, ln_hh, ln_c, ln_c_bias = widened(call, wide)
    hidden = w_hh.shape[0] // 4
    valid = valid_steps(call)  # [T, B, 1]
    z_x = plain_input_part(call, valid).unbind()  # T × [B, 4H]: one backward for all
    starts = None if call.reset is None else segment_starts(call.reset, call.lengths, call.reverse)[..., None]
    noise = call.noise(torch.arange(rows, device=call.x.device), hidden, wide)
    h, c = call.h.to(wide), call.c.to(wide)
    outputs = [h] * steps
    for t in reversed(range(steps)) if call.reverse else range(steps):
        h_former, c_former = h, c
        if starts is not None:
            h_former, c_former = h.masked_fill(starts[t], 0), c.masked_fill(starts[t], 0)
        z_h = (h_former if noise.recurrent is None else h_former * noise.recurrent) @ w_hh.t()  # [B, 4H]
        if ln_hh is not None:
            z_h = F.layer_norm(z_h, z_h.shape[-1:], ln_hh, None, LAYER_NORM_EPS)
        z_if, z_g, z_o = (z_x[t] + z_h).split((2 * hidden, hidden, hidden), dim=-1)
        i, f = torch.sigmoid(z_if).chunk(2, dim=-1)
        g, o = torch.tanh(z_g), torch.sigmoid(z_o)
        c_new = f * c_former + i * g
        y = c_new if ln_c is None else F.layer_norm(c_new, c_new.shape[-1:], ln_c, ln_c_bias, LAYER_NORM_EPS)
        h_new = o * torch.tanh(y)
        if w_hr is not None:
            h_new = h_new @ w_hr.t()
        c_new = zoneout(c_former, c_new, noise.cell(t, rows))
        h_new = zoneout(h_former, h_new, noise.hidden(t, rows)).to(dtype).to(wide)
        outputs[t] = h_new
        h, c = (h_new, c_new) if valid is None else (torch.where(valid[t], h_new, h), torch.where(valid[t], c_new, c))
    output = stack_steps(outputs, h, valid).to(dtype)
    return output.transpose(0, 1) if call.batch_first else output, h.to(dtype), c.to(dtype)


def widened(
    call: LSTMCall, wide: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(w_hh, w_hr, ln_hh, ln_c, ln_c_bias) in the accumulation dtype."""
    optional = (call.w_hr, call.ln_hh, call.ln_c, call.ln_c_bias)
    w_hr, ln_hh, ln_c, ln_c_bias = (None if weight is None else weight.to(wide) for weight in optional)
    return call.w_hh.to(wide), w_hr, ln_hh, ln_c, ln_c_bias


def forward(*raw: Any) -> Results:
    """The operator ``lstm``: (output, h_n, c_n, cells [T, B, H], gates [T, B, 4H]); [0] for what is not wanted."""
    call = LSTMCall(*raw)
    packing = packing_of("lstm", call)
    dtype, wide = call.x.dtype, accumulation_dtype(call.x.dtype)
    hidden = call.w_hh.shape[0] // 4
    new = call.x.new_empty
    states = new((packing.tokens if call.saves_output else 0, call.h.shape[1]))
    cells = new((packing.tokens if call.save != SAVE_NOTHING else 0, hidden), dtype=wide)
    gates = new((packing.tokens if call.save == SAVE_GATES else 0, 4 * hidden), dtype=wide)

    step = _Step(call, packing, wide)
    inputs = Inputs("lstm", call, packing)
    h_carry, c_carry = Carry(packing.sort_rows(call.h).to(wide)), Carry(packing.sort_rows(call.c).to(wide))
    for chunk, start, stop in packing.chunks(4 * hidden, call.reverse):
        z_chunk = inputs.project(
            start, stop, gates[start:stop] if len(gates) else new((stop - start, 4 * hidden), dtype=wide)
        )
        for t in chunk:
            first, size = packing.offsets[t], packing.sizes[t]
            here = slice(first, first + size)
            z = z_chunk[first - start : first - start + size]
            h, c = h_carry.take(size), c_carry.take(size)
            h, c = step(t, z, h, c, here, cells[here] if len(cells) else None, states[here] if len(states) else None)
            h_carry.current, c_carry.current = h, c
    if packing.valid is not None:
        states.masked_fill_(~packing.valid[: len(states)], 0)
    h_n, c_n = (packing.unsort_rows(carry.final()).to(dtype) for carry in (h_carry, c_carry))
    return (
        packing.unpack(states, call.batch_first) if call.saves_output else new(0),
        h_n,
        c_n,
        packing.unpack(cells) if call.save != SAVE_NOTHING else new(0, dtype=wide),
        packing.unpack(gates.to(dtype)) if call.save == SAVE_GATES else new(0),
    )


class _Step:
    """One step of the running rows, in place where a buffer is at hand."""

    def __init__(self, call: LSTMCall, packing: Packing, wide: torch.dtype) -> None:
        self.dtype, self.wide = call.x.dtype, wide
        w_hh, w_hr, self.ln_hh, self.ln_c, self.ln_c_bias = widened(call, wide)
        self.w_hh_t = w_hh.t()
        self.w_hr_t = None if w_hr is None else w_hr.t()
        self.hidden = w_hh.shape[0] // 4
        self.starts = starts_of(call, packing)
        self.noise = call.noise(packing.order, self.hidden, wide)
        self.zoned = call.zoneout > 0
        self.valid = packing.valid

    def __call__(
        self, t: int, z: Tensor, h: Tensor, c: Tensor, here: slice, cell_slot: Tensor | None, state_slot: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(h', c') of step ``t``. ``z`` [n, 4H] holds W_ih·x and the biases, and becomes the gates; ``c`` may be overwritten."""
        rows, hidden = len(z), self.hidden
        h_before, c_before = h, c
        if self.starts is not None:
            h, c = h.masked_fill(self.starts[here], 0), c.masked_fill(self.starts[here], 0)
        operand = h if self.noise.recurrent is None else h * self.noise.recurrent[:rows]
        if self.ln_hh is None:
            z.addmm_(operand, self.w_hh_t)
        else:
            z.add_(F.layer_norm(operand @ self.w_hh_t, (4 * hidden,), self.ln_hh, None, LAYER_NORM_EPS))
        i_and_f, g, o = z.split((2 * hidden, hidden, hidden), dim=1)
        i_and_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        keeps_former = self.zoned or self.valid is not None
        c_slot = None if keeps_former else c if cell_slot is None else cell_slot
        c_new = torch.mul(i_and_f[:, hidden:], c, out=c_slot).addcmul_(i_and_f[:, :hidden], g)
        y = c_new
        if self.ln_c is not None:
            y = F.layer_norm(c_new, (hidden,), self.ln_c, self.ln_c_bias, LAYER_NORM_EPS)
        h_is_final = not keeps_former and self.w_hr_t is None and self.dtype == self.wide
        h_slot = state_slot if h_is_final else None
        h_new = torch.tanh(y, out=h_slot).mul_(o)
        if self.w_hr_t is not None:
            h_new = h_new @ self.w_hr_t
        if self.zoned:
            c_new = zoneout(c, c_new, self.noise.cell(t, rows))
            h_new = zoneout(h, h_new, self.noise.hidden(t, rows))
        if self.valid is not None:
            valid = self.valid[here]
            h_new, c_new = torch.where(valid, h_new, h_before), torch.where(valid, c_new, c_before)
        if keeps_former and cell_slot is not None:
            cell_slot.copy_(c_new)
        if self.dtype != self.wide:
            h_new = h_new.to(self.dtype).to(self.wide)
        if state_slot is not None and h_slot is None:
            state_slot.copy_(h_new)
        return h_new, c_new
