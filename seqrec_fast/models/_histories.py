"""Histories as models take them: checked, with padding made harmless."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # torch's own default ignore_index: positions without a target


class Histories(NamedTuple):
    """A padded batch of histories.

    ``ids`` [B, T] holds 0 wherever ``valid`` [B, T] is False, so that it can index a table; ``lengths`` [B] is on the
    device of ``ids``; ``ragged`` is False when every history is known to be T long.
    """

    ids: Tensor
    lengths: Tensor
    valid: Tensor
    ragged: bool


def check_integer(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int64, torch.int32):
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {got}")


def check_ids(name: str, ids: Tensor, valid: Tensor | None, num_items: int) -> None:
    """Check ids on the CPU, outside a traced graph (elsewhere a look at values would sync or break the graph).

    Raises:
        IndexError: naming the first id that is no item, and its place.
    """
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if low >= 0 and high < num_items:
        return
    wrong = (ids < 0) | (ids >= num_items)
    if valid is not None:
        wrong &= valid
    places = wrong.nonzero()
    if len(places):
        place = tuple(places[0].tolist())
        raise IndexError(f"{name}{list(place)} is {int(ids[place])}, but the items are 0…{num_items - 1}")


def check_histories(ids: Tensor, lengths: Tensor | None, num_items: int) -> Histories:
    """Check a batch of histories; whatever stands in the padding (−1, 0, anything) is replaced by 0.

    Args:
        ids: [B, T] int64 or int32 item ids.
        lengths: [B] int64 or int32, on either device; None: every history is T long.
        num_items: I.

    Raises:
        TypeError: not an integer tensor.
        ValueError: a wrong shape; on the CPU a length outside 0…T.
        IndexError: on the CPU, an id outside 0…I−1 within a history's length.
    """
    check_integer("ids", ids)
    if ids.dim() != 2:
        raise ValueError(f"ids must have shape [B, T], got {tuple(ids.shape)}")
    batch, steps = ids.shape
    if lengths is None:
        check_ids("ids", ids, None, num_items)
        full = torch.full((batch,), steps, dtype=torch.int64, device=ids.device)
        return Histories(ids, full, torch.ones_like(ids, dtype=torch.bool), ragged=False)
    check_integer("lengths", lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape [B] = ({batch},), got {tuple(lengths.shape)}")
    if not torch.compiler.is_compiling() and lengths.device.type == "cpu":
        outside = (lengths < 0) | (lengths > steps)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(f"lengths must lie in 0…T = {steps}, got {int(lengths[row])} in row {row}")
    lengths = lengths.to(ids.device, non_blocking=True)
    valid = torch.arange(steps, device=ids.device) < lengths[:, None]  # [B, T]
    check_ids("ids", ids, valid, num_items)
    return Histories(ids.masked_fill(~valid, 0), lengths, valid, ragged=True)


def at_last(sequence: Tensor, lengths: Tensor) -> Tensor:
    """The last valid step of every row, [B, T, …] → [B, …]; 0 for a row of length 0."""
    if sequence.shape[1] == 0:
        return sequence.new_zeros(sequence.shape[0], *sequence.shape[2:])
    rows = torch.arange(sequence.shape[0], device=sequence.device)
    last = sequence[rows, (lengths - 1).clamp(min=0)]  # [B, …]
    empty = (lengths == 0).view(-1, *[1] * (last.dim() - 1))
    return last.masked_fill(empty, 0)


def next_items(histories: Histories, target: Tensor | None, num_items: int) -> Tensor:
    """What each position has to predict, [B, T] int64, −100 where there is nothing to predict.

    Args:
        histories: the batch.
        target: int64 [B]: the item after each history (the items before are read off the history); [B, T]: the item
            after each position, −100 for none; None: the history's own next items, nothing for its last step.
        num_items: I.

    Raises:
        TypeError, ValueError, IndexError: as the targets of :func:`seqrec_fast.catalogue_cross_entropy`.
    """
    ids, lengths, valid, _ = histories
    batch, steps = ids.shape
    if target is not None:
        if not isinstance(target, Tensor) or target.dtype != torch.int64:
            got = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"target must be an int64 tensor, got {got}")
        if target.shape not in ((batch,), (batch, steps)):
            raise ValueError(
                f"target must have shape [B] = ({batch},) or [B, T] = ({batch}, {steps}), got {tuple(target.shape)}"
            )
        check_ids("target", target, target != IGNORE, num_items)
        if target.dim() == 2:
            return target.masked_fill(~valid, IGNORE)
    shifted = ids.new_full((batch, steps), IGNORE, dtype=torch.int64)
    shifted[:, :-1] = ids[:, 1:]
    final = torch.arange(steps, device=ids.device) == lengths[:, None] - 1  # [B, T]
    last = shifted.new_full((batch, 1), IGNORE) if target is None else target[:, None]
    return torch.where(final, last, shifted).masked_fill(~valid, IGNORE)


def items_to_hide(histories: Histories, exclude_seen: bool, exclude: Tensor | None, num_items: int) -> Tensor | None:
    """The ``exclude`` argument of the catalogue operators: [B, n] ids padded with −1, or None.

    Raises:
        TypeError, ValueError, IndexError: ``exclude`` is not [B, n] of item ids and −1.
    """
    seen = histories.ids.masked_fill(~histories.valid, -1) if exclude_seen else None
    if exclude is None:
        return seen
    check_integer("exclude", exclude)
    if exclude.dim() != 2 or len(exclude) != len(histories.ids):
        raise ValueError(f"exclude must have shape [B, n] with B = {len(histories.ids)}, got {tuple(exclude.shape)}")
    check_ids("exclude", exclude, exclude != -1, num_items)
    return exclude if seen is None else torch.cat((seen, exclude.to(seen.dtype)), 1)
