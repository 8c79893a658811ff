"""The packed int8 copy of a catalogue that ``CatalogueIndex`` keeps for the first pass of its ``topk``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._operator import plain

# csrc/catalogue/packed.h: beyond it a query's codes would have too few bits for their products to fit int32.
MOST_WIDTH = 1 << 14
# Codes are padded to 32: narrower catalogues would be no smaller than in fp32.
LEAST_AUTO_WIDTH = 32


def wants_packed(items: Tensor, first_pass: str) -> bool:
    """Whether an index of these items [I, d] keeps the copy."""
    width = items.shape[1]
    asked = first_pass == "int8" or (first_pass == "auto" and width >= LEAST_AUTO_WIDTH)
    fits = items.device.type == "cpu" and items.dtype != torch.float64 and 1 <= width <= MOST_WIDTH
    return asked and fits and plain(items) and _native.MISSING is None


class PackedItems:
    """Codes and facts of a table, which may be longer than the catalogue; every write of the table is repeated here."""

    def __init__(self, items: Tensor) -> None:
        self._codes, self._facts = _pack(items)  # int8 [≥ I, d rounded up to 32], fp32 [3, ≥ I]

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._facts.nbytes

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        return self._codes[:count], self._facts[:, :count]

    def write(self, places: Tensor, rows: Tensor) -> None:
        codes, facts = _pack(rows)
        self._codes.index_copy_(0, places, codes)
        self._facts.index_copy_(1, places, facts)

    def make_room(self, count: int, capacity: int) -> None:
        """Tables of ``capacity`` items, of which the first ``count`` are kept."""
        codes, facts = self.first(count)
        self._codes = codes.new_empty((capacity, codes.shape[1]))
        self._facts = facts.new_empty((3, capacity))
        self._codes[:count] = codes
        self._facts[:, :count] = facts

    def scratch_bytes(self, rows: int, k: int) -> int:
        """What a search takes for each thread beside a search of the items themselves.

        A chunk as int16 and its facts; and room for more candidates (csrc/catalogue/topk_select.h): 16 bytes each, 32 MiB for a
        group of rows unless one row alone takes more.
        """
        more = 16 * min(3 * max(k // 2, 48), self._codes.shape[0])
        return (1 << 17) + 64 * self._codes.shape[1] + more + max(min((rows + 64) * more, 1 << 25), more)


def _pack(items: Tensor) -> tuple[Tensor, Tensor]:
    codes, facts = torch.ops.seqrec_fast_native.catalogue_pack_int8.default(items.detach())
    return codes, facts


__all__ = ["PackedItems", "wants_packed"]
