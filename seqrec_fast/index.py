"""``CatalogueIndex``: a catalogue that is searched again and again, and changes while it is."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._files import written_beside
from ._logits import ID_DTYPES, check_ids, check_int, check_storage, check_strided
from ._packed import PackedItems, wants_packed
from ._workspace import workspace_bytes
from .ops._checks import FLOATS
from .ops.catalogue_rank import catalogue_rank
from .ops.catalogue_topk import topk_of

NAME = "CatalogueIndex"
FIRST_PASSES = ("auto", "fp32", "bf16", "int8")
FORMAT = "seqrec_fast.CatalogueIndex/1"


class CatalogueIndex:
    """Owns a copy of a catalogue for exact top-k and rank, and lets items be changed, added and removed between calls.

    ``topk`` and ``rank`` answer as :func:`seqrec_fast.catalogue_topk` and :func:`seqrec_fast.catalogue_rank` do for the items of
    that moment: exact, whatever the first pass computes in. Threads may search while one of them writes: a search sees each item as
    it was before or after, never half of it, since writes wait for the searches under way and new searches for a waiting write.

    Args:
        items: [I, d], float16, bfloat16, float32 or float64; copied. Later edits of it are not seen.
        bias: [I] of the same dtype and device, or None; copied.
        first_pass: what ``topk`` scans with before it decides exactly; a hint, and answers do not depend on it. "int8" keeps a
            second copy of the items, d bytes each (rounded up to 32) and 12 more, and reads that: a quarter of fp32's bytes, and
            more products an instruction. Each row's error of rounding is bounded, and what is within the bound is decided in
            fp64. "fp32": no copy; where int8 is multiplied faster, codes are made on the way. "bf16": as "fp32", since products of
            int8 are faster wherever there are some of bf16. "auto": int8 where that is faster, from a width of 32 on. The copy is made and used on the CPU, for float16, bfloat16 and float32 of a
            width up to 16384, by the native backend, where no gradient is wanted and nothing traces or transforms the call; other
            calls scan the items. It does little for items with a few elements far larger than the rest: their codes are coarse,
            and many candidates are decided in fp64.

    Raises:
        TypeError: items or bias is no floating tensor, or their dtypes differ.
        ValueError: a shape, device or ``first_pass`` does not fit.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> index = sf.CatalogueIndex(torch.eye(4))
        >>> index.add(torch.full((1, 4), 0.5)).tolist()
        [4]
        >>> index.remove(torch.tensor([0]))
        >>> index.topk(torch.tensor([[9.0, 5.0, 1.0, 0.0]]), 3).indices.tolist()
        [[4, 1, 2]]
    """

    def __init__(self, items: Tensor, bias: Tensor | None = None, *, first_pass: str = "auto") -> None:
        if first_pass not in FIRST_PASSES:
            raise ValueError(f"{NAME}: first_pass must be one of {', '.join(FIRST_PASSES)}, got {first_pass!r}")
        if not isinstance(items, Tensor):
            raise TypeError(f"{NAME}: items must be a tensor, got {type(items).__name__}")
        check_strided(NAME, "items", items)
        check_storage(NAME, "items", items)
        if items.dtype not in FLOATS:
            raise TypeError(f"{NAME}: items must be float16, bfloat16, float32 or float64, got {items.dtype}")
        if items.dim() != 2:
            raise ValueError(f"{NAME}: items must have shape [I, d], got {tuple(items.shape)}")
        self.first_pass = first_pass
        self._count = items.shape[0]
        # Tables may be longer than the catalogue: room to add items without a copy each time.
        self._items = items.detach().clone(memory_format=torch.contiguous_format)  # [≥ I, d]
        self._bias: Tensor | None = None  # [≥ I], −∞ for removed items
        self._removed: set[int] = set()
        self._lock = _ReadWriteLock()
        if bias is not None:
            self._check_like("bias", bias, (self._count,), "[I]")
            self._bias = bias.detach().clone(memory_format=torch.contiguous_format)
        self._packed = PackedItems(self._items) if wants_packed(self._items, first_pass) else None

    # Searching.

    def topk(
        self, query: Tensor, k: int, *, scale: float | Tensor = 1.0, exclude: Tensor | None = None
    ) -> torch.return_types.topk:
        """The k best items of every row; as :func:`seqrec_fast.catalogue_topk` of the index's items and bias.

        Args:
            query: [..., d] of the index's dtype and device. Not cast by autocast.
            k, scale, exclude: as there. Excluded ids may name removed items.

        Returns:
            ``torch.return_types.topk``: values [..., k], differentiable in ``query`` and ``scale`` (until the next write), and
            indices [..., k]; −∞ and −1 where items run out.
        """
        self._check_query(query)
        with self._lock.reading():
            items, bias = self._tables()
            packed = None if self._packed is None else self._packed.first(self._count)
            return topk_of(query, items, k, scale=scale, bias=bias, exclude=exclude, packed=packed)

    def rank(
        self,
        query: Tensor,
        target: Tensor,
        *,
        scale: float | Tensor = 1.0,
        exclude: Tensor | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        """Each target's place among all items; as :func:`seqrec_fast.catalogue_rank`. A removed target comes last."""
        self._check_query(query)
        with self._lock.reading():
            items, bias = self._tables()
            options: dict[str, Any] = {"scale": scale, "exclude": exclude, "ignore_index": ignore_index}
            return catalogue_rank(query, items, target, bias=bias, **options)

    # Changing.

    def update(self, ids: Tensor, rows: Tensor, bias: Tensor | None = None) -> None:
        """Write items anew. A removed id is back in the catalogue.

        Args:
            ids: int64 or int32 [n], all different.
            rows: [n, d] of the index's dtype and device.
            bias: [n]; None leaves biases as they are, 0 for an id that was removed.

        Raises:
            TypeError, ValueError: kind, dtype, shape or device; an id given twice.
            IndexError: an id out of range. Nothing is written then.
        """
        places = self._check_ids(ids)
        if len(set(places)) != len(places):
            twice = next(id_ for n, id_ in enumerate(places) if id_ in places[:n])
            raise ValueError(f"{NAME}.update: ids must all be different, got {twice} twice")
        self._check_like("rows", rows, (len(places), self._items.shape[1]), "[n, d]")
        if bias is not None:
            self._check_like("bias", bias, (len(places),), "[n]")
        with self._lock.writing(), torch.no_grad():
            where = ids.to(self.device).long()
            self._items.index_copy_(0, where, rows.detach())
            if self._packed is not None:
                self._packed.write(where, rows)
            back = self._removed.intersection(places)
            self._removed -= back
            if bias is not None:
                self._biases().index_copy_(0, where, bias.detach())
            elif back:
                self._biases()[sorted(back)] = 0.0

    def add(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """Append items.

        Args:
            rows: [n, d] of the index's dtype and device.
            bias: [n]; default 0.

        Returns:
            their ids, int64 [n]: I, I + 1, …

        Raises:
            TypeError, ValueError: kind, dtype, shape or device.
        """
        self._check_kind("rows", rows)
        if rows.dim() != 2:
            self._check_like("rows", rows, (0, self._items.shape[1]), "[n, d]")
        self._check_like("rows", rows, (rows.shape[0], self._items.shape[1]), "[n, d]")
        if bias is not None:
            self._check_like("bias", bias, (rows.shape[0],), "[n]")
        with self._lock.writing(), torch.no_grad():
            first, count = self._count, self._count + rows.shape[0]
            self._make_room(count)
            self._items[first:count] = rows.detach()
            if self._packed is not None:
                self._packed.write(torch.arange(first, count), rows)
            self._count = count
            if bias is not None or self._bias is not None:
                self._biases()[first:count] = 0.0 if bias is None else bias.detach()
        return torch.arange(first, count, device=self.device)

    def remove(self, ids: Tensor) -> None:
        """Take items out: as if their bias were −∞. Their ids stay reserved, and no other id changes.

        Args:
            ids: int64 or int32 [n]; ids that are removed already may be among them.

        Raises:
            TypeError, ValueError: kind, shape or dtype.
            IndexError: an id out of range. Nothing is removed then.
        """
        places = self._check_ids(ids)
        with self._lock.writing(), torch.no_grad():
            self._biases().index_fill_(0, ids.to(self.device).long(), float("-inf"))
            self._removed.update(places)

    # Keeping.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to ``path`` (safetensors). The file is whole or absent."""
        with self._lock.reading():
            items, bias = self._tables()
            tensors = {"items": items.contiguous(), "removed": torch.tensor(sorted(self._removed), dtype=torch.int64)}
            if bias is not None:
                tensors["bias"] = bias.contiguous()
            with written_beside(path) as part:
                save_file(tensors, part, metadata={"format": FORMAT, "first_pass": self.first_pass})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CatalogueIndex:
        """Read an index written by :meth:`save`, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, or holds something else: no index, or one that does not fit together.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{NAME}.load: there is no file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{NAME}.load: {path} is not a safetensors file: {error}") from error
        if metadata.get("format") != FORMAT or not {"items", "removed"} <= set(tensors):
            raise ValueError(f"{NAME}.load: {path} holds no {NAME}: expected {FORMAT}, got {metadata.get('format')!r}")
        try:
            index = cls(tensors["items"], tensors.get("bias"), first_pass=metadata.get("first_pass", "none"))
            # Written again, not taken from the biases: an id that is known as removed must not come back from a search.
            if tensors["removed"].numel():
                index.remove(tensors["removed"])
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{NAME}.load: {path} holds no valid {NAME}: {error}") from error
        return index

    def to(self, device: torch.device | str) -> CatalogueIndex:
        """A new index on ``device``; this one stays as it is."""
        with self._lock.reading():
            items, bias = self._tables()
            moved = CatalogueIndex(
                items.to(device), None if bias is None else bias.to(device), first_pass=self.first_pass
            )
            moved._removed = set(self._removed)
        return moved

    # Telling.

    def __len__(self) -> int:
        """I, removed ids included."""
        return self._count

    def __repr__(self) -> str:
        removed = f", {len(self._removed)} removed" if self._removed else ""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{NAME}({len(self)} items of width {self._items.shape[1]}{removed}, {kind}, {self.device})"

    @property
    def dtype(self) -> torch.dtype:
        return self._items.dtype

    @property
    def device(self) -> torch.device:
        return self._items.device

    @property
    def nbytes(self) -> int:
        """Memory held, room for more items and the packed copy included."""
        tables = [self._items] if self._bias is None else [self._items, self._bias]
        packed = 0 if self._packed is None else self._packed.nbytes
        return packed + sum(table.untyped_storage().nbytes() for table in tables)

    def workspace_bytes(self, B: int, k: int) -> int:
        """The most memory that ``topk`` of B rows takes while it runs; see :func:`seqrec_fast.workspace_bytes`.

        Raises:
            TypeError: B or k is not an int.
            ValueError: B < 0 or k < 1.
        """
        B, k = (check_int(f"{NAME}.workspace_bytes", name, value) for name, value in (("B", B), ("k", k)))
        for name, value, least in (("B", B, 0), ("k", k, 1)):
            if value < least:
                raise ValueError(f"{NAME}.workspace_bytes: {name} must be at least {least}, got {value}")
        rows = torch.empty((B, self._items.shape[1]), dtype=self.dtype, device="meta")
        items, bias = (None if t is None else t.to("meta") for t in self._tables())
        packed = 0 if self._packed is None else self._packed.scratch_bytes(B, k) * torch.get_num_threads()
        return packed + workspace_bytes("catalogue_topk", rows, items, k, bias=bias)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock.reading():
            items, bias = (None if t is None else t.clone() for t in self._tables())
            state = {"_items": items, "_bias": bias, "_count": self._count, "_removed": set(self._removed)}
        return state | {"first_pass": self.first_pass}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._packed = PackedItems(self._items) if wants_packed(self._items, self.first_pass) else None
        self._lock = _ReadWriteLock()

    # Within.

    def _tables(self) -> tuple[Tensor, Tensor | None]:
        return self._items[: self._count], None if self._bias is None else self._bias[: self._count]

    def _biases(self) -> Tensor:
        """[≥ I], made when the first one is needed."""
        if self._bias is None:
            self._bias = self._items.new_zeros(self._items.shape[0])
        return self._bias

    def _make_room(self, count: int) -> None:
        """Doubles the tables: n items added one by one are copied O(1) times each."""
        capacity = self._items.shape[0]
        if count <= capacity:
            return
        capacity = max(count, 2 * capacity)
        items = self._items.new_empty((capacity, self._items.shape[1]))
        items[: self._count] = self._items[: self._count]
        self._items = items
        if self._bias is not None:
            bias = self._bias.new_zeros(capacity)
            bias[: self._count] = self._bias[: self._count]
            self._bias = bias
        if self._packed is not None:
            self._packed.make_room(self._count, capacity)

    def _check_query(self, query: Tensor) -> None:
        self._check_kind("query", query)
        if query.dim() == 0 or query.shape[-1] != self._items.shape[1]:
            raise ValueError(f"{NAME}: query must have shape [..., {self._items.shape[1]}], got {tuple(query.shape)}")

    def _check_like(self, name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
        self._check_kind(name, tensor)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{NAME}: {name} must have shape {meaning} = {shape}, got {tuple(tensor.shape)}")

    def _check_kind(self, name: str, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {name} must be a tensor, got {type(tensor).__name__}")
        check_strided(NAME, name, tensor)
        check_storage(NAME, name, tensor)
        if tensor.dtype != self.dtype:
            raise TypeError(f"{NAME}: {name} must have the index's dtype ({self.dtype}), got {tensor.dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{NAME}: {name} must be on the index's device ({self.device}), got {tensor.device}")

    def _check_ids(self, ids: Tensor) -> list[int]:
        """The ids as numbers: a write looks at them, and so waits for the device."""
        if not isinstance(ids, Tensor) or ids.dtype not in ID_DTYPES:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"{NAME}: ids must be an int64 or int32 tensor, got {got}")
        check_strided(NAME, "ids", ids)
        check_storage(NAME, "ids", ids)
        if ids.dim() != 1:
            raise ValueError(f"{NAME}: ids must have shape [n], got {tuple(ids.shape)}")
        check_ids(NAME, "ids", ids, len(self), padding=False)
        return [int(id_) for id_ in ids.tolist()]


class _ReadWriteLock:
    """Many readers or one writer; who wants to write comes before who wants to read."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writers_waiting = 0
        self._writing = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._writers_waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._changed:
            self._writers_waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
            finally:  # an interrupt while waiting must not lock the readers out
                self._writers_waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


__all__ = ["CatalogueIndex"]
