"""Our recurrent layers beside torch's, and one number of whatever a module returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import seqrec_fast as sf

PAIRS = [pytest.param(sf.LSTM, nn.LSTM, id="LSTM"), pytest.param(sf.GRU, nn.GRU, id="GRU")]
OURS = [pytest.param(sf.LSTM, id="LSTM"), pytest.param(sf.GRU, id="GRU")]


def loss(results: Any) -> Tensor:
    """Depends on every number of every result, each time by another slope."""
    total: Tensor = torch.stack([part.sin().sum() for part in tree_leaves(results)]).sum()
    return total
