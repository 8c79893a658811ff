"""seqrec_fast: fused operators for sequential recommenders in PyTorch.

A sequential recommender spends its time in two places: the steps of its recurrent encoder, and the softmax over its whole item
catalogue. This package owns those two, as operators and as modules that drop into any PyTorch model; see README.md.

``models``, ``data``, ``training`` and ``testing`` are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import nn
from ._cache import clear_cache
from ._dispatch import BackendUnavailable, use_backend
from ._explain import explain
from ._workspace import workspace_bytes
from .nn import GRU, LSTM, CatalogueAttention, CatalogueCrossEntropyLoss, GRUCell, LSTMCell
from .ops.catalogue_attention import catalogue_attention
from .ops.catalogue_cross_entropy import catalogue_cross_entropy
from .ops.catalogue_rank import catalogue_rank
from .ops.catalogue_topk import catalogue_topk
from .ops.gru import gru
from .ops.gru_step import gru_step
from .ops.lstm import lstm
from .ops.lstm_embedding import lstm_embedding
from .ops.lstm_step import lstm_step

if TYPE_CHECKING:
    from . import data, models, testing, training
    from .index import CatalogueIndex

__version__ = "0.1.0"

__all__ = [
    "GRU", "LSTM", "BackendUnavailable", "CatalogueAttention", "CatalogueCrossEntropyLoss", "CatalogueIndex",
    "GRUCell", "LSTMCell", "__version__", "catalogue_attention", "catalogue_cross_entropy", "catalogue_rank",
    "catalogue_topk", "clear_cache", "data", "explain", "gru", "gru_step", "lstm", "lstm_embedding", "lstm_step",
    "models", "nn", "testing", "training", "use_backend", "workspace_bytes",
]  # fmt: skip

_ON_FIRST_USE = ("data", "models", "testing", "training")


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"seqrec_fast.{name}")
    if name == "CatalogueIndex":  # needs safetensors, which no operator does
        return importlib.import_module("seqrec_fast.index").CatalogueIndex
    raise AttributeError(f"module 'seqrec_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE, "CatalogueIndex"})
