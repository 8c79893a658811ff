"""Modules that drop into any PyTorch model."""

from __future__ import annotations

from .cells import GRUCell, LSTMCell
from .recurrent import GRU, LSTM

__all__ = ["GRU", "LSTM", "GRUCell", "LSTMCell"]
