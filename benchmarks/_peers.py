"""Nearest-neighbour libraries as peers of ``catalogue_topk``: those that are installed (faiss-cpu, implicit, usearch)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]
USEARCH_SCORES = 30_000_000  # it takes 16 bytes for each


def searches(query: Tensor, items: Tensor, k: int, seen: Tensor | None) -> dict[str, Call]:
    """fp32 searches by inner product, on as many threads as torch is set to. Only implicit leaves out what was seen."""
    if query.dtype != torch.float32:
        return {}
    makers: dict[str, Callable[[Any], Call]] = {
        "faiss": lambda module: _faiss(module, query, items, k),
        "implicit.cpu.topk": lambda module: _implicit(module, query, items, k, seen),
        "usearch.index": lambda module: _usearch(module, query, items, k),
    }
    if len(query) * len(items) > USEARCH_SCORES:
        del makers["usearch.index"]
    return {
        name.partition(".")[0]: make(importlib.import_module(name))
        for name, make in makers.items()
        if importlib.util.find_spec(name.partition(".")[0]) is not None
    }


def _faiss(faiss: Any, query: Tensor, items: Tensor, k: int) -> Call:
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items.numpy())

    def run() -> object:
        faiss.omp_set_num_threads(torch.get_num_threads())
        return index.search(query.numpy(), k)

    return run


def _implicit(topk: Any, query: Tensor, items: Tensor, k: int, seen: Tensor | None) -> Call:
    sparse = importlib.import_module("scipy.sparse")
    filter_ = None
    if seen is not None:
        crow = torch.arange(0, seen.numel() + 1, seen.shape[1]).numpy()
        ones = torch.ones(seen.numel()).numpy()
        filter_ = sparse.csr_matrix((ones, seen.flatten().numpy(), crow), shape=(len(query), len(items)))
    return lambda: topk.topk(
        items.numpy(), query.numpy(), k, filter_query_items=filter_, num_threads=torch.get_num_threads()
    )


def _usearch(index: Any, query: Tensor, items: Tensor, k: int) -> Call:
    return lambda: index.search(items.numpy(), query.numpy(), k, "ip", exact=True, threads=torch.get_num_threads())
