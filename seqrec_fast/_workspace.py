"""``workspace_bytes``: what a call of a catalogue operator takes beside its arguments and results, told before the call.

The scan's buffers follow the tile, not the catalogue: nothing here is B×I. What does follow the arguments is what is made of them:
a copy of the queries, sorted exclusion pairs, a vector of I flags, and fp32 sums of a 16-bit gradient.
"""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._dispatch import Spec
from ._logits import is_csr, wide_dtype
from .backends.reference import _scan
from .backends.reference._scan import Plan
from .backends.reference._targets import PAIRS

OPERATORS = ("catalogue_attention", "catalogue_cross_entropy", "catalogue_rank", "catalogue_topk")
# Bytes for each (row, item) pair of an exclusion list: row and item as int64 before and after sorting, the cell they are
# sorted by, its order, and what these are made from.
PAIR_BYTES = 12 * 8
# Buffers of scores that a ranking holds at most, in units of the fp64 scores: these and the same summed in order, two comparisons
# of one byte each, and, where all scores are equal, every pair as row, item, score, bound and rounded value.
RANKING_BUFFERS = 10


@dataclass(frozen=True)
class _Call:
    """What the workspace depends on."""

    operator: str
    rows: int  # B
    items: int  # I
    width: int  # d, of one head
    value_width: int  # d_v, of one head
    heads: int
    dtype: torch.dtype
    pairs: int  # excluded (row, item) pairs, padding included
    targets: int
    candidates: int  # negatives and targets a row; 0 for the full softmax
    own_candidates: bool
    k: int
    bias: bool
    gradient: bool
    smoothing: bool
    own_values: bool


def workspace_bytes(op_name: str, *args: Any, **options: Any) -> int:
    """The most memory, in bytes, that a call takes beside its arguments and results while it runs.

    Only shapes, dtypes and devices are looked at, so tensors on the ``meta`` device will do (they are taken for CPU tensors). Where
    a tensor asks for a gradient the backward is included, and what the forward keeps for it. An upper bound for finite numbers;
    a table that holds NaN or ±∞ takes a few more buffers of the size of a tile.

    Args:
        op_name: ``"catalogue_attention"``, ``"catalogue_cross_entropy"``, ``"catalogue_rank"`` or ``"catalogue_topk"``.
        args, options: as the call takes them.

    Raises:
        ValueError: another operator, or k < 1.
        TypeError: arguments that the operator does not take.
        BackendUnavailable: the backend in force by ``use_backend`` cannot run the call.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> query, items = torch.empty(4096, 64, device="meta"), torch.empty(10**7, 64, device="meta")
        >>> sf.workspace_bytes("catalogue_topk", query, items, 100) < 4096 * 10**7 * 4 // 1000
        True
    """
    if op_name not in OPERATORS:
        raise ValueError(f"workspace_bytes: unknown operator {op_name!r}; known are {', '.join(OPERATORS)}")
    function = getattr(importlib.import_module(f"seqrec_fast.ops.{op_name}"), op_name)
    try:
        bound = inspect.signature(function).bind(*args, **options)
    except TypeError as error:
        raise TypeError(f"{op_name}: {error}") from None
    bound.apply_defaults()
    given = bound.arguments
    if "k" in given and given["k"] < 1:
        raise ValueError(f"{op_name}: k must be at least 1, got {given['k']}")
    call = _describe(op_name, given)
    device = given["query"].device.type
    # By the options that a backend may refuse; the others do not decide.
    names = frozenset(name for name in ("bias", "exclude") if given[name] is not None)
    spec = Spec(op_name, "cpu" if device == "meta" else device, call.dtype, (int(given["query"].shape[-1]),), names)
    forward = _reference(call)
    if _dispatch.choose(spec) == "native" and not call.candidates:
        if op_name in ("catalogue_attention", "catalogue_cross_entropy"):
            return _native_softmax(call)
        forward = _native_topk(call) if op_name == "catalogue_topk" else _native_rank(call)
    return forward + _backward(call) if call.gradient else forward


def _describe(operator: str, given: dict[str, Any]) -> _Call:
    query: Tensor = given["query"]
    items: Tensor = given["keys" if operator == "catalogue_attention" else "items"]
    heads = int(given.get("num_heads", 1))
    values: Tensor = items if given.get("values") is None else given["values"]
    rows = math.prod(query.shape[:-1])
    target, negatives, scale = given.get("target"), given.get("negatives"), given["scale"]
    targets = 0 if target is None else _entries(target)
    candidates = 0
    if negatives is not None:
        candidates = int(negatives.shape[-1]) + (1 if targets <= rows else math.ceil(targets / max(rows, 1)))
    floating = (query, items, values, given["bias"], scale)
    return _Call(
        operator, rows, int(items.shape[0]), int(query.shape[-1]) // heads, int(values.shape[1]) // heads, heads, query.dtype,
        pairs=0 if given["exclude"] is None else _entries(given["exclude"]),
        targets=targets,
        candidates=candidates,
        own_candidates=negatives is not None and negatives.dim() > 1,
        k=int(given.get("k", 0)),
        bias=given["bias"] is not None,
        gradient=torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in floating),
        smoothing=bool(given.get("label_smoothing", 0)),
        own_values=given.get("values") is not None,
    )  # fmt: skip


def _entries(ids: Tensor) -> int:
    return int(ids.col_indices().numel() if is_csr(ids) else ids.numel())


def _scan_bytes(call: _Call, plan: Plan, size: int) -> int:
    """What a :class:`Scan` owns, and what its chunks are made of, with numbers of ``size`` bytes."""
    rows, chunk, width = plan.block_rows, plan.chunk_items, call.width
    scores = (rows * chunk + 1) * size
    queries = call.rows * (3 * width + 8) * size
    # The vectors in the wide dtype, those of the chunk before, and with them the columns for bias and shift.
    copies = chunk * (width + 2) * size * (3 if wide_size(call) != size or call.dtype.itemsize != size else 1)
    flags = call.items * (2 * size + 2) if call.bias else 2 * call.items if call.pairs else 0
    return scores + queries + copies + flags + PAIR_BYTES * (call.pairs + call.targets)


def wide_size(call: _Call) -> int:
    return wide_dtype(call.dtype).itemsize


def _plan(call: _Call) -> Plan:
    least = 2 * min(call.k, call.items) if call.k else 1
    return Plan(call.rows, call.items, call.width, least_items=least)


def _reference(call: _Call) -> int:
    plan = _plan(call)
    if call.operator in ("catalogue_rank", "catalogue_topk"):
        scores = plan.block_rows * plan.chunk_items * 8
        best = 0
        if call.k:
            kept = min(call.k, call.items)
            best = call.rows * (call.k + kept) * 12 + 4 * plan.block_rows * (plan.chunk_items + 2 * kept) * 8
        return _scan_bytes(call, plan, 8) + (RANKING_BUFFERS - 1) * scores + best + 64 * call.rows
    size = wide_size(call)
    if call.candidates:
        return _sampled_bytes(call, size)
    sums = call.rows * (4 * call.value_width + 16) * size
    values = plan.chunk_items * call.value_width * size * (2 if call.dtype.itemsize != size else 0)
    return _scan_bytes(call, plan, size) + sums + values + (_smoothing_bytes(call, plan) if call.smoothing else 0)


def _smoothing_bytes(call: _Call, plan: Plan) -> int:
    """Weights of the items and means of the rows in fp64, and a buffer of weights where rows have lists of their own."""
    gathered = min(call.items, PAIRS) * (call.width + 1) * 16
    listed = (plan.block_rows * min(call.items, _scan.SCORES // plan.block_rows) + 1) * 8 if call.pairs else 0
    means = call.rows * (4 * call.width + 16) * 8
    return 8 * 8 * call.items + means + gathered + listed + 2 * PAIR_BYTES * (call.pairs + call.targets)


def _sampled_bytes(call: _Call, size: int) -> int:
    """A block of rows: scores and masks of its candidates, and their vectors where they are each row's own."""
    own = call.candidates if call.own_candidates else 1
    most = min(_scan.SCORES // max(call.candidates, 1), _scan.CHUNK_NUMBERS // max(own * call.width, 1))
    block = max(1, min(call.rows, most))
    vectors = (block * own + call.candidates) * call.width * size
    bias = 2 * call.items * size if call.bias else 0
    lists = PAIR_BYTES * (call.pairs + call.targets)
    return 16 * block * call.candidates * max(size, 8) + 6 * vectors + 6 * call.rows * call.width * size + bias + lists


def _backward(call: _Call) -> int:
    """Beyond the forward's buffers: another buffer of scores, and wide sums of the gradients of 16-bit tables."""
    if call.operator == "catalogue_rank":
        return 0
    size = wide_size(call)
    kept = (
        call.rows * (call.width + call.value_width) * call.heads * size
    )  # the saved context, and the query's direction
    widths = (call.width + call.value_width) * call.heads
    sums = 0 if call.dtype.itemsize == size else call.items * (widths + 1) * size  # otherwise they are the results
    if call.operator == "catalogue_topk":
        pairs = min(call.rows * call.k, max(PAIRS, call.k))
        return kept + sums + 3 * pairs * call.width * size
    if call.candidates:
        touched = call.targets + call.rows * call.candidates if call.own_candidates else call.targets + call.candidates
        return kept + sums + 4 * touched * (call.width + 2) * size
    plan = _plan(call)
    return kept + sums + (plan.block_rows * plan.chunk_items + plan.chunk_items * (call.width + 2)) * size


def _native_softmax(call: _Call) -> int:
    """csrc/catalogue/cpu_softmax.cpp, and the vectors by row around it."""
    attention = call.operator == "catalogue_attention"
    sizes = (call.rows, call.items, call.width, call.value_width, call.own_values, attention, call.gradient)
    threads = torch.get_num_threads()
    kernels = int(
        torch.ops.seqrec_fast_native.catalogue_softmax_bytes.default(*sizes, call.dtype == torch.bfloat16, threads)
    )
    widths = (call.width + call.value_width) * call.heads
    by_row = call.rows * (4 * widths + 24) * 4
    lists = 16 * call.pairs + 48 * call.targets  # sorted; targets with weights and scores
    if call.smoothing:
        kernels += _smoothing_bytes(call, _plan(call)) + (call.items * widths * 2 if call.dtype.itemsize == 2 else 0)
    return kernels + by_row + lists


def _native_rank(call: _Call) -> int:
    """Each thread packs a group of queries (512 KiB) and a chunk of items; csrc/catalogue/chunk.h, rank_scan.h."""
    group = _native_group(call)
    return (
        torch.get_num_threads() * (group * (4 * call.width + 48) + _native_chunk(call))
        + call.rows * 24
        + call.pairs * 16
    )


def _native_topk(call: _Call) -> int:
    """As for rank, and each thread the candidates of its group (32 MiB, or those of one row); csrc/catalogue/topk_*.h.

    An exclusion list becomes a hash table of at most four places for each of its ids, or sixteen, and half a byte for each place.
    """
    kept = max(min(call.k, call.items), 1)
    # Where bytes can be multiplied many rows are scanned from codes, which leave more of the candidates undecided.
    coded = call.dtype != torch.float64 and call.rows > 16 and 32 <= call.width <= 1 << 14
    candidates = max(min(kept + (4 if coded else 1) * max(kept // 2, 48), call.items), 1)
    row = candidates * (24 if call.dtype == torch.float64 else 16)
    group = min(_native_group(call), max((1 << 25) // row, 1))
    padded = group + 64
    scratch = padded * (4 * call.width + 96) + group * row + candidates * 16 + 2048 + _native_chunk(call)
    scratch += (1 << 15) + 64 * call.width if coded else 0  # the codes of a chunk
    scratch += 16 * call.rows * (kept // 32 + 3 * math.isqrt(kept // 32 + 1) + 4)  # the best of a sample
    tables = call.pairs * 34 + call.rows * 144 if call.pairs else 0
    merge = group * 40 + kept * 64
    return torch.get_num_threads() * (scratch + merge) + call.rows * 56 + tables


def _native_group(call: _Call) -> int:
    return min(call.rows + 64, max((1 << 19) // (4 * max(call.width, 1)), 64))


def _native_chunk(call: _Call) -> int:
    """64 KiB of items, as much in fp64 for a part or all of them, and a tile of rows in fp64."""
    return (1 << 18) + 2048 * call.width
