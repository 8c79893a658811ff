"""Small histories that every model test shares."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

NUM_ITEMS = 37


class Batch(NamedTuple):
    ids: Tensor
    lengths: Tensor
    target: Tensor


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """These tensors are small: a second thread would only wait, and on a busy machine wait long."""
    torch.set_num_threads(1)


@pytest.fixture
def batch() -> Batch:
    """Histories of lengths 1, T and between; −1 in the padding, so that a look at it would be an error."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([7, 1, 4, 6])
    ids = torch.randint(NUM_ITEMS, (4, 7), generator=generator)
    ids[torch.arange(7) >= lengths[:, None]] = -1
    return Batch(ids, lengths, torch.randint(NUM_ITEMS, (4,), generator=generator))
