"""The arguments of the whole-sequence operators, in the order of their schemas: ``LSTMCall(*raw)`` names them.

Shapes: B rows, T steps, I input width, H hidden units, P width of the hidden state (H unless projected).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._philox import Noise

# ``save``: what a backward pass will find. Recomputing the gates costs one matrix product over all tokens.
SAVE_NOTHING, SAVE_STATES, SAVE_GATES = range(3)


class SequenceCall:
    """What both calls derive from their arguments."""

    x: Tensor
    h: Tensor
    w_ih: Tensor | None
    w_hh: Tensor
    ln_ih: Tensor | None
    ids: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    seed: Tensor | None
    batch_first: bool
    reverse: bool
    last_only: bool
    save: int
    zoneout: float
    recurrent_dropout: float
    stream: int

    @property
    def input_biases(self) -> tuple[Tensor | None, Tensor | None]:
        """What may be added to W_ih·x before the recurrence."""
        raise NotImplementedError

    @property
    def steps_and_rows(self) -> tuple[int, int]:
        """(T, B)."""
        tokens = self.x if self.ids is None else self.ids
        first, second = tokens.shape[:2]
        return (second, first) if self.batch_first else (first, second)

    @property
    def saves_output(self) -> bool:
        """The hidden states of all steps are a result: wanted by the caller, or by the backward."""
        return not self.last_only or self.save != SAVE_NOTHING

    def noise(self, rows: Tensor, cell: int, dtype: torch.dtype) -> Noise:
        """The masks, for the caller's rows ``rows`` [R]; ``cell`` is the width of the cell state."""
        return Noise(self.seed, self.stream, self.zoneout, self.recurrent_dropout, rows, self.h.shape[1], cell, dtype)


@dataclass(frozen=True)
class LSTMCall(SequenceCall):
    """The arguments of ``lstm``."""

    x: Tensor  # [T, B, I] or [B, T, I]; with ids the table [N, I]. Without w_ih: W_ih·x itself, I = 4H
    h: Tensor  # [B, P]
    c: Tensor  # [B, H]
    w_ih: Tensor | None  # [4H, I]
    w_hh: Tensor  # [4H, P]
    b_ih: Tensor | None  # [4H]
    b_hh: Tensor | None  # [4H]
    w_hr: Tensor | None  # [P, H]
    ln_ih: Tensor | None  # [4H]
    ln_hh: Tensor | None  # [4H]
    ln_c: Tensor | None  # [H]
    ln_c_bias: Tensor | None  # [H]
    ids: Tensor | None  # int [T, B] or [B, T]: rows of the table
    lengths: Tensor | None  # int [B]
    reset: Tensor | None  # bool [B, T]
    seed: Tensor | None  # int64 scalar; None: zoneout by its mean, no recurrent dropout
    batch_first: bool  # layout of x, ids and output
    reverse: bool
    last_only: bool  # output is not wanted
    save: int
    zoneout: float
    recurrent_dropout: float
    stream: int
    precision: int

    @property
    def input_biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.b_ih, self.b_hh


@dataclass(frozen=True)
class GRUCall(SequenceCall):
    """The arguments of ``gru``; the remarks at :class:`LSTMCall` hold."""

    x: Tensor
    h: Tensor  # [B, H]
    w_ih: Tensor | None  # [3H, I]
    w_hh: Tensor  # [3H, H]
    b_ih: Tensor | None  # [3H]
    b_hh: Tensor | None  # [3H]
    ln_ih: Tensor | None  # [3H]
    ln_hh: Tensor | None  # [3H]
    ids: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    seed: Tensor | None
    batch_first: bool
    reverse: bool
    last_only: bool
    save: int
    zoneout: float
    recurrent_dropout: float
    stream: int
    precision: int

    @property
    def input_biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.b_ih, None  # b_hh stays with W_hh·h, whose part of n is multiplied by r
