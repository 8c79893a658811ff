"""``lstm_embedding``: a recurrent module on rows of an embedding table, which are never written out as [B, T, I]."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .. import _cache
from .._operator import transforms_active, wants_gradient
from .._precision import autocast_enabled, current_precision
from ._recurrent import Layer, sequence
from ._recurrent_arguments import Options, Weights

# A projected table replaces the input product by a gather. Up to this size the first call makes it (4.3 GFLOP for 32 k items at
# I = H = 128); a larger one would cost more memory and time than many batches save.
PROJECTED_BYTES = 64 << 20
KEPT_TABLES = 4


class RecurrentModule(Protocol):
    """What is used of an ``sf.LSTM`` or ``sf.GRU``."""

    operator: str
    layer: Layer

    def cell_weights(self) -> list[Weights]: ...

    def options(self, last_only: bool = False) -> Options: ...


def lstm_embedding(
    ids: Tensor, table: Tensor, module: nn.Module, *, lengths: Tensor | None = None, last_only: bool = False
) -> tuple[Any, Any]:
    """``module(table[ids])`` without the array [B, T, I]: ids in, hidden states out.

    In evaluation (``module.eval()`` and nothing asks for a gradient) the product table·W_ihᵀ is made once and its rows are gathered
    instead of multiplying each token; it is made anew when the table or the weights change, and :func:`seqrec_fast.clear_cache`
    drops it. Only a table whose product takes at most 64 MB is treated so.

    Args:
        ids: int64 or int32 [B, T], or [T, B] without the module's ``batch_first``; unbatched [T].
        table: [N, I], the module's dtype and device, I = its ``input_size``. Its gradient is dense.
        module: ``sf.LSTM`` or ``sf.GRU``.
        lengths: int64 or int32 [B]; ids at padding are not looked at.
        last_only: give the last layer's final hidden states [B, D·P] instead of every output.

    Returns:
        What the module returns for ``table[ids]`` from a zero state.

    Raises:
        TypeError: ids or lengths are not integer, the table is not a floating tensor, or module is something else.
        ValueError: a shape, dtype or device does not fit; lengths outside 0…T.
        IndexError: an id outside 0…N−1 (on the CPU; on an accelerator, where nothing is read, its state becomes NaN).

    Example:
        >>> import torch, seqrec_fast as sf
        >>> layer = sf.GRU(8, 16, batch_first=True)
        >>> table = torch.nn.Embedding(100, 8).weight
        >>> last, h = sf.lstm_embedding(torch.randint(0, 100, (4, 10)), table, layer, last_only=True)
        >>> last.shape
        torch.Size([4, 16])
    """
    if not isinstance(module, nn.RNNBase) or not hasattr(module, "cell_weights"):
        raise TypeError(
            "lstm_embedding: module must be an sf.LSTM or sf.GRU (a torch module becomes one by from_torch), "
            f"got {type(module).__name__}"
        )
    recurrent = cast(RecurrentModule, module)
    weights = recurrent.cell_weights()
    _check(ids, table, module, weights[0])
    options = recurrent.options(last_only)
    tables = (table,) * options.directions
    if _may_project(table, weights, module):
        projected = [PROJECTED.rows(table, cell.w_ih) for cell in weights[: options.directions]]
        products = tuple(rows for rows in projected if rows is not None)
        if len(products) == len(projected):
            tables = products
            weights = [cell._replace(w_ih=None) if k < options.directions else cell for k, cell in enumerate(weights)]
    output, states = sequence(
        recurrent.operator, type(recurrent).layer, ids, None, weights, options, tables=tables, lengths=lengths
    )
    return output, states if len(states) == 2 else states[0]


def _check(ids: Tensor, table: Tensor, module: nn.RNNBase, cell: Weights) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"lstm_embedding: ids must be an int64 or int32 tensor, got {got}")
    if not isinstance(table, Tensor) or not table.is_floating_point():
        got = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"lstm_embedding: table must be a floating tensor, got {got}")
    if ids.dim() not in (1, 2):
        raise ValueError(f"lstm_embedding: ids must have shape [B, T], [T, B] or [T], got {tuple(ids.shape)}")
    if table.dim() != 2 or table.shape[1] != module.input_size:
        raise ValueError(
            f"lstm_embedding: table must have shape [N, {module.input_size}] (the module's input_size), "
            f"got {tuple(table.shape)}"
        )
    autocast = autocast_enabled(table.device.type)
    if table.dtype != cell.w_hh.dtype and not autocast:
        raise ValueError(f"lstm_embedding: table must have the module's dtype {cell.w_hh.dtype}, got {table.dtype}")
    if table.device != cell.w_hh.device or ids.device != table.device:
        raise ValueError(
            f"lstm_embedding: ids, table and module must be on one device, got {ids.device}, {table.device} and "
            f"{cell.w_hh.device}"
        )


def _may_project(table: Tensor, weights: Sequence[Weights], module: nn.Module) -> bool:
    return not (
        module.training
        or torch.compiler.is_compiling()
        or transforms_active()
        or autocast_enabled(table.device.type)
        or wants_gradient(table, *(w for cell in weights for w in cell))
    )


@dataclass
class _Projected:
    table: weakref.ref[Tensor]
    weight: weakref.ref[Tensor]
    stamp: tuple[int, ...]
    rows: Tensor


class ProjectedTables:
    """table·W_ihᵀ, kept for as long as neither changes and both live."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], _Projected] = {}
        _cache.on_clear(self._kept.clear)

    def rows(self, table: Tensor, weight: Tensor | None) -> Tensor | None:
        """[N, G], or None where it would be too large, or an edit could not be seen."""
        if weight is None or table.is_inference() or weight.is_inference():
            return None  # inference tensors have no version counter
        if table.shape[0] * weight.shape[0] * table.element_size() > PROJECTED_BYTES:
            return None
        key = (id(table), id(weight))
        stamp = (table._version, weight._version, table.data_ptr(), weight.data_ptr(), current_precision())
        kept = self._kept.pop(key, None)
        if kept is None or kept.table() is not table or kept.weight() is not weight or kept.stamp != stamp:

            def forget(_: object) -> None:
                self._forget(key)

            with torch.no_grad():
                product = table @ weight.t()
            kept = _Projected(weakref.ref(table, forget), weakref.ref(weight, forget), stamp, product)
        self._kept[key] = kept  # the most recently used is last
        for old in list(self._kept)[:-KEPT_TABLES]:
            del self._kept[old]
        return kept.rows

    def _forget(self, key: tuple[int, int]) -> None:
        """Drop an entry whose table or weight died; another may have taken its key."""
        kept = self._kept.get(key)
        if kept is not None and (kept.table() is None or kept.weight() is None):
            del self._kept[key]


PROJECTED = ProjectedTables()
