"""seqrec_fast: fused operators for sequential recommenders in PyTorch.

A sequential recommender spends its time in two places: the steps of its recurrent encoder, and the softmax over its whole item
catalogue. This package owns those two, as operators and as modules that drop into any PyTorch model; see README.md.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._cache import clear_cache
from ._dispatch import BackendUnavailable, use_backend
from ._explain import explain
from .ops.lstm_step import lstm_step

__version__ = "0.1.0"

__all__ = ["BackendUnavailable", "__version__", "clear_cache", "explain", "lstm_step", "use_backend"]

# Imported when first used: they are larger than the operators, or need an extra.
_SUBPACKAGES = ("data", "models", "nn", "testing", "training")
_LAZY = {
    "workspace_bytes": "_workspace", "CatalogueIndex": "index", "LSTM": "nn", "GRU": "nn", "LSTMCell": "nn",
    "GRUCell": "nn", "CatalogueAttention": "nn", "CatalogueCrossEntropyLoss": "nn",
    "catalogue_attention": "ops.catalogue_attention", "catalogue_cross_entropy": "ops.catalogue_cross_entropy",
    "catalogue_rank": "ops.catalogue_rank", "catalogue_topk": "ops.catalogue_topk", "gru": "ops.gru",
    "gru_step": "ops.gru_step", "lstm": "ops.lstm", "lstm_embedding": "ops.lstm_embedding",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"seqrec_fast.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"seqrec_fast.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'seqrec_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBPACKAGES})
