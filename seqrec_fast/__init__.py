"""seqrec_fast: fused operators for sequential recommenders in PyTorch."""

from __future__ import annotations

from ._dispatch import BackendUnavailable, use_backend
from .ops.lstm_step import lstm_step

__version__ = "0.1.0"

__all__ = ["BackendUnavailable", "lstm_step", "use_backend"]
