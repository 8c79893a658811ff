"""The catalogue scan: scores of a chunk of items for a block of rows, in a reused buffer that stays in cache.

    s[r, i] = scale · row_scale[r] · (q_r · v_i) + bias[i] − shift[r]         −∞ where (r, i) is excluded or bias[i] = −∞

Nothing of size B×I exists: a block has at most ``ROW_BLOCK`` rows and a buffer ``SCORES`` scores, whatever B and I are. The work
of a scan is one matrix product per buffer; bias and shift ride along as two more columns of it (measured: no extra time at
d = 64, against 15 % for each pass over the buffer), where fp32 products are fp32-accurate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor

from ..._logits import LogitSpec, wide_dtype
from ..._precision import Precision, autocast_enabled

ROW_BLOCK = 512
SCORES = 1 << 20  # 4 MiB in fp32: 2^18 to 2^21 measured the same, fewer scores pay for more calls
CHUNK_NUMBERS = 1 << 22  # of items that are copied (16-bit tables) for one chunk
FOLD_ROWS = 32  # with fewer rows, copying the items to add two columns costs more than two passes over the scores


class _Products(Protocol):
    """How a backend multiplies fp32 matrices."""

    fp32_precision: str


class _Backend(Protocol):
    """``torch.backends.mkldnn`` gets its ``matmul`` at run time, so its stub has none."""

    matmul: _Products


@contextlib.contextmanager
def plain_arithmetic(device: torch.device, precision: int = Precision.HIGHEST) -> Iterator[None]:
    """No autocast, and fp32 matrix products that are fp32-accurate (on CUDA: as ``precision`` says)."""
    with contextlib.ExitStack() as stack:
        if autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        products = cast(_Backend, torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
        wanted = "tf32" if device.type == "cuda" and precision != Precision.HIGHEST else "ieee"
        former = products.fp32_precision
        if former not in ("none", wanted):
            products.fp32_precision = wanted
            stack.callback(setattr, products, "fp32_precision", former)
        yield


@dataclass(frozen=True)
class Block:
    """A block of rows start … stop − 1."""

    index: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        return self.stop - self.start


class Plan:
    """How B rows and I items are cut up: chunks of items outside, blocks of rows inside.

    Args:
        num_rows, num_items, width: B, I, d.
        least_items: a chunk has at least so many items (where there are so many).
    """

    def __init__(self, num_rows: int, num_items: int, width: int, least_items: int = 1) -> None:
        least = max(1, min(num_items, least_items))
        self.block_rows = max(1, min(num_rows, ROW_BLOCK, SCORES // least))
        most = min(SCORES // self.block_rows, CHUNK_NUMBERS // (width + 2))
        self.chunk_items = max(least, min(num_items, most))
        self.num_rows, self.num_items = num_rows, num_items
        starts = range(0, num_rows, self.block_rows)
        self.blocks = [Block(n, start, min(start + self.block_rows, num_rows)) for n, start in enumerate(starts)]
        self.num_chunks = -(-num_items // self.chunk_items)

    def items_of(self, chunk: int) -> slice:
        start = chunk * self.chunk_items
        return slice(start, min(start + self.chunk_items, self.num_items))


class Pairs:
    """(row, item) pairs, sorted so that those of one block and chunk are found at once.

    On the CPU padding is dropped. On other devices that would be a synchronisation: all pairs are kept, in the order given, and
    those outside of a block and chunk are sent to the element behind the scores.

    Args:
        rows, items: int64 [N]; items out of range (padding) are no pairs.
        plan: how the scan is cut.
        weight: [N] or None, sorted along.
        drop: whether pairs may be dropped and sorted; default: on the CPU.
    """

    def __init__(
        self, rows: Tensor, items: Tensor, plan: Plan, weight: Tensor | None = None, *, drop: bool | None = None
    ) -> None:
        self.plan = plan
        self.bounds: list[int] | None = None
        if (rows.device.type == "cpu") if drop is None else drop:
            rows, items, weight = self._sort(rows, items, weight)
        self.rows, self.items, self.weight = rows, items, weight

    def _sort(self, rows: Tensor, items: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        plan = self.plan
        keep = items >= 0
        if not bool(keep.all()):
            kept = keep.nonzero()[:, 0]
            rows, items = rows[kept], items[kept]
            weight = None if weight is None else weight[kept]
        cells = len(plan.blocks) * plan.num_chunks
        if cells <= 1:
            self.bounds = [0, len(rows)]
            return rows, items, weight
        cell = (rows // plan.block_rows) * plan.num_chunks + items // plan.chunk_items
        cell, order = cell.sort(stable=True)
        self.bounds = torch.searchsorted(cell, torch.arange(cells + 1)).tolist()
        return rows[order], items[order], None if weight is None else weight[order]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, block: Block, chunk: int, *, transposed: bool) -> tuple[Tensor, slice, Tensor | None]:
        """Where the pairs of one block and chunk lie in the scores.

        Returns:
            (positions in the flat buffer, which pairs these are, which of them are inside: None for all).
        """
        items = self.plan.items_of(chunk)
        width = items.stop - items.start
        if self.bounds is None:
            which = slice(0, len(self.rows))
        else:
            cell = block.index * self.plan.num_chunks + chunk
            which = slice(self.bounds[cell], self.bounds[cell + 1])
        row, item = self.rows[which] - block.start, self.items[which] - items.start
        position = item * block.size + row if transposed else row * width + item
        if self.bounds is not None:
            return position, which, None
        inside = (row >= 0) & (row < block.size) & (item >= 0) & (item < width)
        return torch.where(inside, position, block.size * width), which, inside


def listed_pairs(ids: Tensor, crow: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor]:
    """(rows, items) int64 [N] of a padded [B, n] or compressed sparse row list of ids."""
    device = ids.device
    if crow is None:
        rows = torch.arange(num_rows, device=device)[:, None].expand(num_rows, ids.shape[1])
        return rows.reshape(-1), ids.reshape(-1).long()
    places = torch.arange(ids.shape[0], device=device, dtype=crow.dtype)
    return torch.searchsorted(crow, places, right=True) - 1, ids.long()


def dead_items(bias: Tensor | None) -> Tensor | None:
    """bool [I]: a bias of −∞ removes an item for every row, whatever its vector holds. None (CPU only) where there is none."""
    if bias is None:
        return None
    dead = bias == float("-inf")
    return dead if dead.device.type != "cpu" or bool(dead.any()) else None


def shared_items(ids: Tensor, num_items: int) -> Tensor:
    """bool [I] from a list of ids; padding and (on CUDA) ids out of range match nothing."""
    inside = (ids >= 0) & (ids < num_items)
    mask = torch.zeros(num_items + 1, dtype=torch.bool, device=ids.device)
    return mask.index_fill(0, torch.where(inside, ids, num_items).long(), True)[:-1]


class Exclusion:
    """Which scores become −∞: excluded pairs, items excluded for every row, items with a bias of −∞.

    Args:
        logits: the options.
        plan: how the scan is cut.
        targets: pairs that an exclusion list does not touch.
        drop: as :class:`Pairs`.
    """

    def __init__(
        self, logits: LogitSpec, plan: Plan, targets: Pairs | None = None, *, drop: bool | None = None
    ) -> None:
        self.plan = plan
        self.targets = targets
        self.pairs: Pairs | None = None
        self.shared: Tensor | None = None  # bool [I]
        self.dead = dead_items(logits.bias)  # bool [I]
        ids, crow = logits.exclude, logits.exclude_crow
        if ids is None or ids.numel() == 0:
            return
        if ids.dim() == 1 and crow is None:
            self.shared = shared_items(ids, plan.num_items)
        else:
            self.pairs = Pairs(*listed_pairs(ids, crow, plan.num_rows), plan, drop=drop)

    def apply(self, scores: Tensor, flat: Tensor, block: Block, chunk: int, *, transposed: bool) -> None:
        """Writes −∞ into the scores of one block and chunk; ``flat`` is the same memory and one element more."""
        if self.pairs is not None or self.shared is not None:
            if self.targets is not None:
                place, _, _ = self.targets.at(block, chunk, transposed=transposed)
                kept = flat[place]
            if self.shared is not None:
                scores.masked_fill_(self._of(self.shared, chunk, transposed), float("-inf"))
            if self.pairs is not None:
                flat.index_fill_(0, self.pairs.at(block, chunk, transposed=transposed)[0], float("-inf"))
            if self.targets is not None:
                flat.index_copy_(0, place, kept)
        if self.dead is not None:
            scores.masked_fill_(self._of(self.dead, chunk, transposed), float("-inf"))

    def _of(self, mask: Tensor, chunk: int, transposed: bool) -> Tensor:
        of_chunk = mask[self.plan.items_of(chunk)]
        return of_chunk[:, None] if transposed else of_chunk


class Chunk:
    """A chunk of items in the wide dtype."""

    def __init__(self, index: int, span: slice, vectors: Tensor, augmented: Tensor | None) -> None:
        self.index = index
        self.span = span
        self.vectors = vectors  # [C, d]
        self.augmented = augmented  # [C, d + 2]: vectors, bias, 1

    @cached_property
    def finite(self) -> bool:
        return all_finite(self.vectors)


class Scan:
    """One catalogue against one set of queries.

    Args:
        query: [B, d], any float dtype.
        items: [I, d], its dtype.
        logits: scale, row_scale and bias are applied here.
        plan: how the scan is cut.
        exclusion: applied to every buffer.
        dtype: of the scores; default wide.
        precision: bias and shift are two more columns of the product only where products keep all bits of fp32.
    """

    def __init__(
        self,
        query: Tensor,
        items: Tensor,
        logits: LogitSpec,
        plan: Plan,
        exclusion: Exclusion,
        *,
        dtype: torch.dtype | None = None,
        precision: int = Precision.HIGHEST,
    ) -> None:
        self.plan, self.exclusion, self.items = plan, exclusion, items
        self.dtype = dtype or wide_dtype(query.dtype)
        self.width = query.shape[1]
        self.bias = None if logits.bias is None else logits.bias.to(self.dtype)  # [I]
        self.shift: Tensor | None = None  # [B]
        exact = precision == Precision.HIGHEST or query.device.type == "cpu"
        self._fold = exact and plan.block_rows >= FOLD_ROWS
        scaled = scaled_query(query.to(self.dtype), logits)
        self._rows = scaled  # [B, d], or [B, d + 2]: scaled query, 1, −shift
        if self._fold:
            self._rows = torch.cat([scaled, scaled.new_ones((scaled.shape[0], 2))], dim=1)
            self._rows[:, -1] = 0
        self.query = self._rows[:, : self.width]  # [B, d], scaled
        self._scores = query.new_empty(plan.block_rows * plan.chunk_items + 1, dtype=self.dtype)
        self._copy = query.new_empty(0, dtype=self.dtype)

    def set_shift(self, shift: Tensor | None) -> None:
        """[B], subtracted from the scores of the chunks from now on. Later edits of ``shift`` need another call."""
        self.shift = shift
        if self._fold:
            self._rows[:, -1] = 0.0 if shift is None else -shift

    def chunks(self) -> Iterator[Chunk]:
        for index in range(self.plan.num_chunks):
            span = self.plan.items_of(index)
            vectors = self.items[span]
            augmented = None
            if self._fold and (self.bias is not None or self.shift is not None):
                augmented = self._augment(vectors, span)
                if vectors.dtype != self.dtype:
                    vectors = augmented[:, : self.width]
            yield Chunk(index, span, vectors.to(self.dtype), augmented)

    def _augment(self, vectors: Tensor, span: slice) -> Tensor:
        shape = (vectors.shape[0], self.width + 2)
        if self._copy.shape != shape:
            self._copy = self._copy.new_empty(shape)
        self._copy[:, : self.width] = vectors
        self._copy[:, -2] = 0.0 if self.bias is None else self.bias[span]
        self._copy[:, -1] = 1.0
        return self._copy

    def scores(self, block: Block, chunk: Chunk) -> Tensor:
        """[R, C], valid until the next call."""
        return self._product(block, chunk, transposed=False)

    def transposed(self, block: Block, chunk: Chunk) -> Tensor:
        """[C, R], valid until the next call."""
        return self._product(block, chunk, transposed=True)

    def buffer(self, block: Block, chunk: Chunk, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """The memory of the scores [R, C] or [C, R], and the same flat with one element more."""
        shape = (chunk.vectors.shape[0], block.size) if transposed else (block.size, chunk.vectors.shape[0])
        flat = self._scores[: shape[0] * shape[1] + 1]
        return flat[:-1].view(shape), flat

    def _product(self, block: Block, chunk: Chunk, *, transposed: bool) -> Tensor:
        rows = self._rows[block.rows]
        items = chunk.vectors if chunk.augmented is None else chunk.augmented
        if chunk.augmented is None and self._fold:
            rows = rows[:, : self.width]
        left, right = (items, rows) if transposed else (rows, items)
        scores, flat = self.buffer(block, chunk, transposed=transposed)
        torch.mm(left, right.t(), out=scores)
        if chunk.augmented is None:
            if self.bias is not None:
                bias = self.bias[chunk.span]
                scores.add_(bias[:, None] if transposed else bias)
            if self.shift is not None:
                shift = self.shift[block.rows]
                scores.sub_(shift if transposed else shift[:, None])
        self.exclusion.apply(scores, flat, block, chunk.index, transposed=transposed)
        return scores


def scaled_query(query: Tensor, logits: LogitSpec) -> Tensor:
    """scale · row_scale · q, [B, d], in the query's dtype. Differentiable."""
    if logits.row_scale is not None:
        query = query * logits.row_scale.to(query.dtype)[:, None]
    return query if logits.scale == 1.0 else query * logits.scale


def all_finite(tensor: Tensor) -> bool:
    """Whether a product with this tensor's finite entries is safe. On CUDA not looked at: it would be a synchronisation."""
    return tensor.device.type != "cpu" or bool(torch.isfinite(tensor.sum()))


def add_product(out: Tensor, left: Tensor, right: Tensor, finite: bool) -> None:
    """out += left @ right, where a zero of ``left`` (a pair of no probability) meets NaN or ±∞ without becoming NaN.

    ``finite``: whether ``right`` is known to be finite, when a plain product will do.
    """
    if finite:
        out.addmm_(left, right)
        return
    infinity = float("inf")
    out.addmm_(left, torch.nan_to_num(right, nan=0.0, posinf=0.0, neginf=0.0))
    right_signs = [(right == infinity).to(right.dtype), (right == -infinity).to(right.dtype)]
    rising, falling = (left > 0).to(right.dtype), (left < 0).to(right.dtype)
    up = rising @ right_signs[0] + falling @ right_signs[1]
    down = rising @ right_signs[1] + falling @ right_signs[0]
    spoiled = (left != 0).to(right.dtype) @ torch.isnan(right).to(right.dtype)  # NaN != 0
    out.add_(torch.where(up > 0, infinity, 0.0)).add_(torch.where(down > 0, -infinity, 0.0))
    out.add_(torch.where(spoiled > 0, float("nan"), 0.0))
