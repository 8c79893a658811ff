"""Modules that drop into any PyTorch model."""

from __future__ import annotations

from .catalogue import CatalogueAttention, CatalogueCrossEntropyLoss
from .cells import GRUCell, LSTMCell
from .recurrent import GRU, LSTM

__all__ = ["GRU", "LSTM", "CatalogueAttention", "CatalogueCrossEntropyLoss", "GRUCell", "LSTMCell"]
