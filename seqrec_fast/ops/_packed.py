"""PackedSequence to padded batch and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .._operator import transforms_active


def padded(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """(tokens [T, B, I], rows in the caller's order, 0 at padding; lengths int64 [B])."""
    if not transforms_active():
        return pad_packed_sequence(packed)
    # torch's function reads memory by address, which functional transforms do not allow.
    running = _running(packed)
    tokens, lengths = running.flatten().cumsum(0).sub(1).view(running.shape), running.sum(0)  # [T, B], [B]
    if packed.unsorted_indices is not None:
        order = packed.unsorted_indices.cpu()
        running, tokens, lengths = running[:, order], tokens[:, order], lengths[order]
    data = packed.data
    return data[tokens.to(data.device)].masked_fill(~running[..., None].to(data.device), 0), lengths


def repacked(output: Tensor, like: PackedSequence) -> PackedSequence:
    """[T, B, P], rows in the caller's order, as a PackedSequence with the batch sizes and indices of ``like``."""
    if like.sorted_indices is not None:
        output = output.index_select(1, like.sorted_indices)
    running = _running(like)
    if transforms_active():
        data = output.flatten(0, 1)[running.flatten().nonzero()[:, 0].to(output.device)]
    else:
        data = pack_padded_sequence(output, running.sum(0)).data
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


def _running(packed: PackedSequence) -> Tensor:
    """bool [T, B] on the CPU: which of the rows, by falling length, have a token at a step."""
    return torch.arange(int(packed.batch_sizes[0])) < packed.batch_sizes[:, None]
