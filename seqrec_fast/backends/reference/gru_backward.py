"""The gradient of ``gru``, written out: one loop back through the steps, then one product over all tokens for each weight.

    dh_t = dout_t + dh             dh̃ = (1 − k)·dh_t
    dn = dh̃ ⊙ (1−z)·(1−n²)         dz = dh̃ ⊙ (h_{t−1} − n)·z(1−z)        dr = dn ⊙ v_n·r(1−r)
    du = (dr, dz, dn)              dv = (dr, dz, dn ⊙ r)
    dh ← k·dh_t + z ⊙ dh̃ + m ⊙ W_hhᵀ·dv

and afterwards dW_ih = Σ du xᵀ, dW_hh = Σ dv (m ⊙ h_{t−1})ᵀ, db_ih = Σ du, db_hh = Σ dv. Notation as in ``gru``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._calls import SAVE_GATES, GRUCall
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
from .gru import RecurrentPart, widened

# The order of ``output_mask`` and of the results.
GRADIENTS = ("x", "h", "w_ih", "w_hh", "b_ih", "b_hh", "ln_ih", "ln_hh")


def forward(grad_output: Tensor | None, grad_h_n: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The operator ``gru_backward``: one gradient for each name in GRADIENTS, [0] where ``output_mask`` is false.

    ``rest``: the arguments of ``gru``, then its results output and gates, then ``output_mask``.
    """
    call = GRUCall(*rest[:-3])
    output, gates, mask = rest[-3:]
    wanted = {name for name, asked in zip(GRADIENTS, mask, strict=True) if asked}
    found = _Backward(call, output, gates, wanted).run(grad_output, grad_h_n)
    # Not one empty tensor for all: the results of an operator do not share memory.
    return tuple(found[name].to(call.x.dtype) if name in wanted else call.x.new_empty(0) for name in GRADIENTS)


class _Backward:
    """The tokens' tensors [N, …] of one backward pass, in processing order and accumulation dtype.

    The gates' gradients lie side by side as (dn ⊙ r, dr, dz, dn), so that du is the last three blocks and dv the first three: in
    the order n, r, z, in which ``w_hh`` and ``ln_hh`` are kept here too.
    """

    def __init__(self, call: GRUCall, output: Tensor, gates: Tensor, wanted: set[str]) -> None:
        self.call, self.wanted = call, wanted
        self.wide = accumulation_dtype(call.x.dtype)
        self.packing = packing = packing_of("gru", call)
        w_hh, _, ln_hh = widened(call, self.wide)
        self.hidden = hidden = w_hh.shape[1]
        self.w_hh = w_hh.roll(hidden, 0)
        self.ln_hh = None if ln_hh is None else ln_hh.roll(hidden, 0)
        self.noise = call.noise(packing.order, 0, self.wide)
        self.starts = starts_of(call, packing)
        self.inputs = Inputs("gru", call, packing)
        self.h_former = former_states(call, packing, output, call.h, self.starts)
        self.operand = self.h_former  # of W_hh
        if self.noise.recurrent is not None:
            self.operand = self.h_former * self.noise.recurrent[packing.place_of_token()]
        if self.ln_hh is not None:
            self.v_unit, self.v_rstd = normalised(self.operand @ self.w_hh.t())
        self.gates = packing.pack(gates).to(self.wide) if call.save == SAVE_GATES else self._recomputed_gates()

    def _recomputed_gates(self) -> Tensor:
        part = RecurrentPart(self.call, self.wide)
        gates = self.operand.new_empty(self.packing.tokens, 4 * self.hidden)
        self.inputs.project(0, self.packing.tokens, gates[:, : 3 * self.hidden])
        v = None
        if self.ln_hh is not None:
            v = (self.v_unit * self.ln_hh).roll(-self.hidden, 1)
            v = v if part.b_hh is None else v + part.b_hh
        return part(gates, self.operand, v)

    def run(self, grad_output: Tensor | None, grad_h_n: Tensor | None) -> dict[str, Tensor]:
        call, packing, hidden = self.call, self.packing, self.hidden
        self.d_output = None if grad_output is None else packing.pack(grad_output, call.batch_first).to(self.wide)
        if self.d_output is not None and packing.valid is not None:
            self.d_output = self.d_output.masked_fill(~packing.valid, 0)
        self.d_gates = self.operand.new_empty(packing.tokens, 4 * hidden)
        self.dv = self.d_gates[:, : 3 * hidden]  # at the output of the layer normalisation, if there is one
        self.d_product = self.dv if self.ln_hh is None else self.operand.new_empty(packing.tokens, 3 * hidden)
        carry = Carry(packing.sort_rows(torch.zeros_like(call.h) if grad_h_n is None else grad_h_n).to(self.wide))
        for chunk, start, stop in packing.chunks(4 * hidden, not call.reverse):
            self._prepare(slice(start, stop))
            for t in chunk:
                here = slice(packing.offsets[t], packing.offsets[t] + packing.sizes[t])
                carry.current = self._step(t, here, carry.take(packing.sizes[t]))
        return {"h": packing.unsort_rows(carry.final())} | self._weights()

    def _prepare(self, tokens: slice) -> None:
        """Fill ``d_gates`` with the factors of dh̃."""
        r, z, n, v_n = self.gates[tokens].view(-1, 4, self.hidden).unbind(1)
        d_nr, d_r, d_z, d_n = self.d_gates[tokens].view(-1, 4, self.hidden).unbind(1)
        through_n = 1 - z
        torch.addcmul(through_n, through_n * n, n, value=-1, out=d_n)
        torch.mul(d_n, r, out=d_nr)
        torch.addcmul(d_nr, d_nr, r, value=-1, out=d_r).mul_(v_n)
        torch.addcmul(z, z, z, value=-1, out=d_z).mul_(self.h_former[tokens] - n)

    def _step(self, t: int, here: slice, dh_after: Tensor) -> Tensor:
        """dh before step ``t`` from that after it; completes ``d_gates``."""
        rows, hidden = len(dh_after), self.hidden
        dh = dh_after if self.d_output is None else dh_after + self.d_output[here]
        dh, kept = zoneout_gradient(dh, self.noise.hidden(t, rows))
        self.d_gates[here].view(rows, 4, hidden).mul_(dh[:, None])
        d_product = self.dv[here]
        if self.ln_hh is not None:
            d_product = normalised_gradient(d_product * self.ln_hh, self.v_unit[here], self.v_rstd[here])
            self.d_product[here] = d_product
        past_gates = dh * self.gates[here, hidden : 2 * hidden]
        if kept is not None:
            past_gates = past_gates + kept
        if self.noise.recurrent is None:
            dh = torch.addmm(past_gates, d_product, self.w_hh)
        else:
            dh = torch.addcmul(past_gates, d_product @ self.w_hh, self.noise.recurrent[:rows])
        if self.starts is not None:
            dh = dh.masked_fill(self.starts[here], 0)
        return dh if self.packing.valid is None else torch.where(self.packing.valid[here], dh, dh_after)

    def _weights(self) -> dict[str, Tensor]:
        """The gradients that are sums over all tokens."""
        wanted, hidden, found = self.wanted, self.hidden, {}
        if self.packing.valid is not None:
            for gradient in (self.d_gates, self.d_product):
                gradient.masked_fill_(~self.packing.valid, 0)
        du = self.d_gates[:, hidden:]
        if "w_hh" in wanted:
            found["w_hh"] = (self.d_product.t() @ self.operand).roll(-hidden, 0)
        if "b_ih" in wanted:
            found["b_ih"] = du.sum(0)
        if "b_hh" in wanted:
            found["b_hh"] = self.dv.sum(0).roll(-hidden, 0)
        if "ln_hh" in wanted:
            found["ln_hh"] = (self.dv * self.v_unit).sum(0).roll(-hidden, 0)
        return found | self.inputs.gradients(du, wanted)
