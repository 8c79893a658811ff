"""Dropout whose mask is a function of (seed, stream, row, step, unit); see ``_philox``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._philox import STEPS_PER_CALL, dropped

# Masks are made for this many numbers at a time: the generator's int64 words, eight times fewer, then stay in the second-level cache.
CHUNK_ELEMENTS = 1 << 18


def draw_seed(device: torch.device) -> Tensor:
    """The operator ``draw_seed``: 64 random bits, an int64 scalar tensor, from torch's generator of that device."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def forward(x: Tensor, seed: Tensor, stream: int, p: float, batch_first: bool) -> Tensor:
    """The operator ``keyed_dropout``, and its formula: x/(1 − p) where kept, 0 where dropped."""
    rows, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    units = x.shape[2]
    row_numbers = torch.arange(rows, device=x.device)
    per_block = max(rows * units, 1) * STEPS_PER_CALL
    blocks_at_once = max(CHUNK_ELEMENTS // per_block, 1)
    total = -(-steps // STEPS_PER_CALL)
    scale = 1 / (1 - p) if p < 1 else 0.0
    pieces = []
    for block in range(0, total, blocks_at_once):
        drop = dropped(seed, stream, p, row_numbers, block, min(blocks_at_once, total - block), units)  # [S, B, U]
        first = block * STEPS_PER_CALL
        count = min(drop.shape[0], steps - first)
        drop = drop[:count].transpose(0, 1) if batch_first else drop[:count]
        piece = x.narrow(1 if batch_first else 0, first, count) * scale
        pieces.append(piece.masked_fill(drop, 0))
    return torch.cat(pieces, dim=1 if batch_first else 0) if pieces else x.clone()
