"""The gradient of ``lstm``, written out: one loop back through the steps, then one product over all tokens for each weight.

With the derivatives of the activations prepared, a step costs two products of elements, one matrix product and two sums:

    dh_t = dout_t + dh           dh̃ = (1 − k_h)·dh_t        dm = W_hrᵀ·dh̃
    dz_o = dm ⊙ tanh(y)·o(1−o)   dy  = dm ⊙ o·(1 − tanh²y)   dc̃ = (1 − k_c)·dc + ∂y/∂c̃ᵀ·dy
    dz_i = dc̃ ⊙ g·i(1−i)         dz_f = dc̃ ⊙ c_{t−1}·f(1−f)   dz_g = dc̃ ⊙ i·(1−g²)
    dc  ← k_c·dc + f ⊙ dc̃        dh  ← k_h·dh_t + m ⊙ W_hhᵀ·dv,  where dv = dz, or its image under the layer normalisation

and afterwards dW_ih = Σ du xᵀ, dW_hh = Σ dv (m ⊙ h_{t−1})ᵀ, db = Σ dz, dW_hr = Σ dh̃ (o·tanh y)ᵀ. Notation as in ``lstm``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._calls import SAVE_GATES, LSTMCall
from ._philox import zoneout_gradient
from ._sequence import (
    Carry,
    Inputs,
    accumulation_dtype,
    former_states,
    normalised,
    normalised_gradient,
    packing_of,
    starts_of,
)
from .lstm import widened

# The order of ``output_mask`` and of the results. Both biases have the gradient "b".
GRADIENTS = ("x", "h", "c", "w_ih", "w_hh", "b", "w_hr", "ln_ih", "ln_hh", "ln_c", "ln_c_bias")


def forward(
    grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """The operator ``lstm_backward``: one gradient for each name in GRADIENTS, [0] where ``output_mask`` is false.

    ``rest``: the arguments of ``lstm``, then its results output, cells and gates, then ``output_mask``.
    """
    call = LSTMCall(*rest[:-4])
    output, cells, gates, mask = rest[-4:]
    wanted = {name for name, asked in zip(GRADIENTS, mask, strict=True) if asked}
    found = _Backward(call, output, cells, gates, wanted).run(grad_output, grad_h_n, grad_c_n)
    # Not one empty tensor for all: the results of an operator do not share memory.
    return tuple(found[name].to(call.x.dtype) if name in wanted else call.x.new_empty(0) for name in GRADIENTS)


class _Backward:
    """The tokens' tensors [N, …] of one backward pass, in processing order and accumulation dtype."""

    def __init__(self, call: LSTMCall, output: Tensor, cells: Tensor, gates: Tensor, wanted: set[str]) -> None:
        self.call, self.wanted = call, wanted
        self.wide = accumulation_dtype(call.x.dtype)
        self.packing = packing = packing_of("lstm", call)
        self.w_hh, self.w_hr, self.ln_hh, self.ln_c, self.ln_c_bias = widened(call, self.wide)
        self.hidden = self.w_hh.shape[0] // 4
        self.noise = call.noise(packing.order, self.hidden, self.wide)
        self.starts = starts_of(call, packing)
        self.inputs = Inputs("lstm", call, packing)
        h_former = former_states(call, packing, output, call.h, self.starts)
        self.c_former = former_states(call, packing, cells, call.c, self.starts, time_major=True)
        self.operand = h_former  # of W_hh
        if self.noise.recurrent is not None:
            self.operand = h_former * self.noise.recurrent[packing.place_of_token()]
        if self.ln_hh is not None:
            self.v_unit, self.v_rstd = normalised(self.operand @ self.w_hh.t())
        self.gates = packing.pack(gates).to(self.wide) if call.save == SAVE_GATES else self._recomputed_gates()
        i, f, g, _ = self.gates.view(-1, 4, self.hidden).unbind(1)
        # With zoneout the saved cell state is no longer the c̃ that went into tanh.
        self.cells = torch.addcmul(f * self.c_former, i, g) if call.zoneout else packing.pack(cells)

    def _recomputed_gates(self) -> Tensor:
        z = self.inputs.project(0, self.packing.tokens, self.operand.new_empty(self.packing.tokens, 4 * self.hidden))
        if self.ln_hh is None:
            z.addmm_(self.operand, self.w_hh.t())
        else:
            z.addcmul_(self.v_unit, self.ln_hh)
        i_and_f, g, o = z.split((2 * self.hidden, self.hidden, self.hidden), dim=1)
        i_and_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        return z

    def run(self, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None) -> dict[str, Tensor]:
        call, packing, hidden = self.call, self.packing, self.hidden
        self.d_output = None if grad_output is None else packing.pack(grad_output, call.batch_first).to(self.wide)
        if self.d_output is not None and packing.valid is not None:
            self.d_output = self.d_output.masked_fill(~packing.valid, 0)
        new, tokens = self.operand.new_empty, packing.tokens
        self.dz = new((tokens, 4 * hidden))
        self.dv = self.dz if self.ln_hh is None else new((tokens, 4 * hidden))
        self.d_projected = new((tokens if self.w_hr is not None else 0, call.h.shape[1]))
        self.m = new((tokens if self.w_hr is not None else 0, hidden))  # o·tanh(y), the operand of W_hr
        self.dy = new((tokens if self.ln_c is not None else 0, hidden))
        self.y_unit = new(self.dy.shape)
        carries = []
        for grad, like in ((grad_h_n, call.h), (grad_c_n, call.c)):
            carries.append(Carry(packing.sort_rows(torch.zeros_like(like) if grad is None else grad).to(self.wide)))
        for chunk, start, stop in packing.chunks(4 * hidden, not call.reverse):
            slope, y_rstd = self._prepare(start, stop)
            for t in chunk:
                first, size = packing.offsets[t], packing.sizes[t]
                here, near = slice(first, first + size), slice(first - start, first - start + size)
                dh, dc = (carry.take(size) for carry in carries)
                dh, dc = self._step(t, here, dh, dc, slope[near], None if y_rstd is None else y_rstd[near])
                carries[0].current, carries[1].current = dh, dc
        found = {name: packing.unsort_rows(carry.final()) for name, carry in zip("hc", carries, strict=True)}
        found.update(self._weights())
        return found

    def _prepare(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Fill dz with the factors of dc̃ and dm. Returns (o·(1 − tanh²y), rstd of c̃ or None)."""
        tokens = slice(start, stop)
        i, f, g, o = self.gates[tokens].view(-1, 4, self.hidden).unbind(1)
        dz_i, dz_f, dz_g, dz_o = self.dz[tokens].view(-1, 4, self.hidden).unbind(1)
        y, y_rstd = self.cells[tokens], None
        if self.ln_c is not None:
            self.y_unit[tokens], y_rstd = normalised(y)
            y = self.y_unit[tokens] * self.ln_c
            y = y if self.ln_c_bias is None else y + self.ln_c_bias
        tanh_y = torch.tanh(y)
        m = o * tanh_y
        torch.addcmul(i, i, i, value=-1, out=dz_i).mul_(g)
        torch.addcmul(f, f, f, value=-1, out=dz_f).mul_(self.c_former[tokens])
        torch.addcmul(i, i * g, g, value=-1, out=dz_g)
        torch.addcmul(m, m, o, value=-1, out=dz_o)
        if self.w_hr is not None:
            self.m[tokens] = m
        return torch.addcmul(o, m, tanh_y, value=-1), y_rstd

    def _step(
        self, t: int, here: slice, dh: Tensor, dc: Tensor, slope: Tensor, y_rstd: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(dh, dc) before step ``t`` from those after it; completes dz and what else the weights need."""
        rows = len(dh)
        dh_after, dc_after = dh, dc
        if self.d_output is not None:
            dh = dh + self.d_output[here]
        dh, dh_kept = zoneout_gradient(dh, self.noise.hidden(t, rows))
        dc, dc_kept = zoneout_gradient(dc, self.noise.cell(t, rows))
        dm = dh
        if self.w_hr is not None:
            self.d_projected[here] = dh
            dm = dh @ self.w_hr
        if self.ln_c is None or y_rstd is None:
            dc = torch.addcmul(dc, dm, slope)
        else:
            dy = torch.mul(dm, slope, out=self.dy[here])
            dc = dc + normalised_gradient(dy * self.ln_c, self.y_unit[here], y_rstd)
        dz = self.dz[here].view(rows, 4, self.hidden)
        dz[:, :3].mul_(dc[:, None])
        dz[:, 3].mul_(dm)
        dv = self.dz[here]
        if self.ln_hh is not None:
            dv = normalised_gradient(dv * self.ln_hh, self.v_unit[here], self.v_rstd[here])
            self.dv[here] = dv
        dh = dv @ self.w_hh
        dc = dc * self.gates[here, self.hidden : 2 * self.hidden]
        if self.noise.recurrent is not None:
            dh.mul_(self.noise.recurrent[:rows])
        if dh_kept is not None and dc_kept is not None:
            dh, dc = dh + dh_kept, dc + dc_kept
        if self.starts is not None:
            dh, dc = dh.masked_fill(self.starts[here], 0), dc.masked_fill(self.starts[here], 0)
        if self.packing.valid is not None:
            valid = self.packing.valid[here]
            dh, dc = torch.where(valid, dh, dh_after), torch.where(valid, dc, dc_after)
        return dh, dc

    def _weights(self) -> dict[str, Tensor]:
        """The gradients that are sums over all tokens."""
        wanted, found = self.wanted, {}
        if self.packing.valid is not None:
            for gradient in (self.dz, self.dv, self.d_projected, self.dy):
                gradient.masked_fill_(~self.packing.valid[: len(gradient)], 0)
        if "w_hh" in wanted:
            found["w_hh"] = self.dv.t() @ self.operand
        if "b" in wanted:
            found["b"] = self.dz.sum(0)
        if "w_hr" in wanted:
            found["w_hr"] = self.d_projected.t() @ self.m
        if "ln_hh" in wanted:
            found["ln_hh"] = (self.dz * self.v_unit).sum(0)
        if "ln_c" in wanted:
            found["ln_c"] = (self.dy * self.y_unit).sum(0)
        if "ln_c_bias" in wanted:
            found["ln_c_bias"] = self.dy.sum(0)
        return found | self.inputs.gradients(self.dz, wanted)
