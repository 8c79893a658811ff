"""Which units a dropout mask drops, as a function of (seed, stream, row, step, unit) alone.

The bits come from the counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
Every backend must give these bits, so here is the whole definition:

    key      = (low 32 bits of seed, high 32 bits of seed)
    counter  = (unit, step // 8, row, stream)                    32 bits each
    w0…w3    = Philox4x32-10(counter, key)
    draw     = 16 bits of word w[(step % 8) // 2]: the low half where step is even, the high half where it is odd
    dropped  ⇔ draw < round(65536·p)

One call of the generator so serves one unit for eight steps: a vector lane or a GPU thread owns a unit and keeps four words. The
resolution of p is 2⁻¹⁶. ``row`` is the place in the caller's batch, ``step`` the place in time (not the order of processing), so
padding consumes nothing and neither sorting, threads nor the other rows change a mask.

``stream`` tells apart the masks that share a seed: ``stream_of(layer, direction) + kind``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The kinds of mask of one layer and direction.
HIDDEN_ZONEOUT, CELL_ZONEOUT, RECURRENT_DROPOUT, WEIGHT_DROPOUT, INPUT_DROPOUT = range(5)
KINDS = 8

STEPS_PER_CALL = 8
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def stream_of(layer: int, direction: int) -> int:
    """The first stream number of one layer and direction (0 forward, 1 reverse)."""
    return KINDS * (2 * layer + direction)


def _multiply(factor: int, counter: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a 32 × 32 bit product. int64 wraps, so the 64 product bits are all there."""
    product = counter * factor
    return (product >> 32) & _LOW, product & _LOW


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32 bits; counters broadcast.

    Out of place, so that it can be vmapped. Broadcasting makes the first two rounds cheap: only from the third do all four words
    depend on every counter.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _LOW, (k1 + _KEY_INCREMENTS[1]) & _LOW
    return c0, c1, c2, c3


def dropped(seed: Tensor, stream: int, p: float, rows: Tensor, block: int, blocks: int, units: int) -> Tensor:
    """Where units are dropped: bool [8·blocks, R, U], for the steps from 8·block on.

    Args:
        seed: int64 scalar tensor.
        stream: see :func:`stream_of`.
        p: probability of dropping.
        rows: int64 [R], the rows' places in the caller's batch.
        block, blocks: first group of eight steps, and how many.
        units: U.
    """
    device = rows.device
    counter = (
        torch.arange(units, device=device),  # [U]
        torch.arange(block, block + blocks, device=device)[:, None, None],  # [S, 1, 1]
        rows[:, None],  # [R, 1]
        torch.tensor(stream, device=device),
    )
    words = philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]  # 8 of [S, R, U]
    return (torch.stack(halves, dim=1) < round(p * 65536)).flatten(0, 1)


Keep = (
    Tensor | float | None
)  # where the former state is kept: a mask while training, its mean afterwards, None without zoneout


class _Drops:
    """The mask of one kind, asked for step by step; eight steps are made at a time and kept."""

    def __init__(self, seed: Tensor, stream: int, p: float, rows: Tensor, units: int) -> None:
        self._seed, self._stream, self._p, self._rows, self._units = seed, stream, p, rows, units
        self._block = -1
        self._mask = torch.empty(0)

    def at(self, step: int) -> Tensor:
        """bool [R, U]: true where ``step`` drops."""
        block = step // STEPS_PER_CALL
        if block != self._block:
            self._mask = dropped(self._seed, self._stream, self._p, self._rows, block, 1, self._units)
            self._block = block
        return self._mask[step % STEPS_PER_CALL]


class Noise:
    """The masks of one layer and direction.

    Args:
        seed: int64 scalar, or None outside training.
        stream: see :func:`stream_of`.
        zoneout, recurrent_dropout: probabilities.
        rows: int64 [R], the caller's row at each place of the processing order.
        hidden, cell: widths of the hidden state (after projection) and of the cell state (0 where there is none).
        dtype: of :attr:`recurrent`.

    Attributes:
        recurrent: [R, hidden], the factor 0 or 1/(1 − p) on h before W_hh, or None.
    """

    def __init__(
        self,
        seed: Tensor | None,
        stream: int,
        zoneout: float,
        recurrent_dropout: float,
        rows: Tensor,
        hidden: int,
        cell: int,
        dtype: torch.dtype,
    ) -> None:
        self._zoneout = zoneout
        self._hidden: _Drops | None = None
        self._cell: _Drops | None = None
        self.recurrent: Tensor | None = None
        if seed is None:
            return
        if zoneout:
            self._hidden = _Drops(seed, stream + HIDDEN_ZONEOUT, zoneout, rows, hidden)
            self._cell = _Drops(seed, stream + CELL_ZONEOUT, zoneout, rows, cell)
        if recurrent_dropout:
            drop = dropped(seed, stream + RECURRENT_DROPOUT, recurrent_dropout, rows, 0, 1, hidden)[0]
            self.recurrent = keep_factor(drop, recurrent_dropout, dtype)

    def hidden(self, step: int, rows: int) -> Keep:
        """Which of the first ``rows`` rows' hidden units keep their former state at ``step``."""
        return self._at(self._hidden, step, rows)

    def cell(self, step: int, rows: int) -> Keep:
        """As :meth:`hidden`, for the cell state."""
        return self._at(self._cell, step, rows)

    def _at(self, drops: _Drops | None, step: int, rows: int) -> Keep:
        if not self._zoneout:
            return None
        return self._zoneout if drops is None else drops.at(step)[:rows]


def keep_factor(drop: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """0 where dropped, 1/(1 − p) elsewhere."""
    return (~drop).to(dtype) * (1 / (1 - p) if p < 1 else 0.0)


def zoneout(former: Tensor, new: Tensor, keep: Keep) -> Tensor:
    """The state after zoneout."""
    if keep is None:
        return new
    return torch.lerp(new, former, keep) if isinstance(keep, float) else torch.where(keep, former, new)


def zoneout_gradient(grad: Tensor, keep: Keep) -> tuple[Tensor, Tensor | None]:
    """(gradient of the new state, gradient of the former one or None)."""
    if keep is None:
        return grad, None
    if isinstance(keep, float):
        return grad * (1 - keep), grad * keep
    return grad.masked_fill(keep, 0), grad.masked_fill(~keep, 0)
