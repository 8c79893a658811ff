"""``sf.CatalogueIndex`` with a packed int8 copy: it follows every change, and answers as ``catalogue_topk`` does."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast import _native

pytestmark = pytest.mark.usefixtures("one_thread")
if _native.MISSING is not None:
    pytest.skip(f"no native library: {_native.MISSING}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same(index: sf.CatalogueIndex, items: Tensor, bias: Tensor | None = None) -> None:
    """Answers of the operator, and codes as if they were made of these items."""
    assert index._packed is not None
    codes, facts = index._packed.first(len(index))
    for got, wanted in zip((codes, facts), torch.ops.seqrec_fast_native.catalogue_pack_int8(items), strict=True):
        assert got.equal(wanted)
    for rows in (1, 6):
        query = torch.randn(rows, items.shape[1]).to(items.dtype)
        exclude = torch.randint(-1, len(items), (rows, 3))
        found = index.topk(query, 7, scale=0.3, exclude=exclude)
        best = sf.catalogue_topk(query, items, 7, scale=0.3, bias=bias, exclude=exclude)
        assert found.indices.equal(best.indices)
        assert found.values.equal(best.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_copy_follows_every_change(dtype: torch.dtype) -> None:
    items = torch.randn(90, 37).to(dtype)
    index = sf.CatalogueIndex(items, first_pass="int8")
    assert_same(index, items)
    bias = torch.zeros(90, dtype=dtype)
    for step in range(12):
        if step % 3 == 0:
            ids = torch.randperm(len(items))[:9]
            items[ids] = torch.randn(9, 37).to(dtype) * 3
            items[ids[0], 5] = float("inf")
            bias[ids] = torch.where(bias[ids] == float("-inf"), 0, bias[ids])
            index.update(ids, items[ids])
        elif step % 3 == 1:
            rows = torch.randn(31, 37).to(dtype)
            items, bias = torch.cat([items, rows]), torch.cat([bias, bias.new_zeros(31)])
            index.add(rows)
        else:
            ids = torch.randperm(len(items))[:5]
            bias[ids] = float("-inf")
            index.remove(ids)
        assert_same(index, items, bias)


def test_the_copy_is_made_again(tmp_path: Path) -> None:
    items = torch.randn(50, 40)
    index = sf.CatalogueIndex(items, first_pass="int8")
    index.add(items[:20])
    items = torch.cat([items, items[:20]])
    index.save(tmp_path / "index")
    for other in (sf.CatalogueIndex.load(tmp_path / "index"), pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        assert_same(other, items)
        other.update(torch.tensor([3]), torch.ones(1, 40))
    assert_same(index.to("cpu"), items)
    assert_same(index, items)


def test_which_calls_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those with a gradient, a transform or another backend; all answer the same."""
    items, query = torch.randn(200, 32), torch.randn(3, 32)
    index = sf.CatalogueIndex(items)
    wanted = sf.catalogue_topk(query, items, 4)
    used = []
    kernel = torch.ops.seqrec_fast_native.catalogue_topk_packed.default

    def counted(*args: Any) -> Any:
        used.append(1)
        return kernel(*args)

    monkeypatch.setattr(torch.ops.seqrec_fast_native.catalogue_topk_packed, "default", counted)
    assert index.topk(query, 4).indices.equal(wanted.indices)
    assert index.topk(query[0], 4).indices.equal(wanted.indices[0])
    assert len(used) == 2
    with torch.no_grad():
        index.topk(query.clone().requires_grad_(), 4)
    assert len(used) == 3

    values = index.topk(query.clone().requires_grad_(), 4).values
    assert values.requires_grad
    assert values.detach().equal(wanted.values)
    ids = torch.vmap(lambda row: index.topk(row, 4).indices)(query)
    assert ids.equal(wanted.indices)
    with sf.use_backend("reference"):
        assert index.topk(query, 4).indices.equal(wanted.indices)
    assert len(used) == 3


def test_who_has_one() -> None:
    def packed(items: Tensor, first_pass: str = "int8") -> bool:
        return sf.CatalogueIndex(items, first_pass=first_pass)._packed is not None

    assert packed(torch.randn(3, 1))
    assert packed(torch.randn(0, 8))
    assert not packed(torch.randn(3, 0))
    assert not packed(torch.randn(3, 8).double())
    assert not packed(torch.randn(1, 16385))
    assert not packed(torch.empty(3, 64, device="meta"))
    assert packed(torch.randn(3, 64), "auto")
    assert not packed(torch.randn(3, 31), "auto")
    assert not packed(torch.randn(3, 64), "fp32")
    assert not packed(torch.randn(3, 64), "bf16")


def test_memory() -> None:
    items = torch.randn(100, 64)
    index, other = sf.CatalogueIndex(items, first_pass="int8"), sf.CatalogueIndex(items, first_pass="fp32")
    assert index.nbytes - other.nbytes == 100 * (64 + 12)
    assert index.workspace_bytes(256, 10) > other.workspace_bytes(256, 10)


def test_a_search_during_updates_sees_whole_rows() -> None:
    """Codes and rows of one item change together: its best place is either with the old row or with the new."""
    items = torch.randn(3000, 32)
    index = sf.CatalogueIndex(items, first_pass="int8")
    query = torch.randn(5, 32)
    states = []
    for factor in (1.0, -1.0):
        table = items.clone()
        table[::3] *= factor
        states.append(sf.catalogue_topk(query, table, 20))
    stop = threading.Event()

    def write() -> None:
        ids, sign = torch.arange(0, 3000, 3), 1.0
        while not stop.is_set():
            sign = -sign
            index.update(ids, items[ids] * sign)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            found = index.topk(query, 20)
            assert any(found.indices.equal(s.indices) and found.values.equal(s.values) for s in states)
    finally:
        stop.set()
        writer.join()
