"""Data for sequential recommendation: loaders, a synthetic default, leave-one-out splits and ragged batches.

Example:
    >>> data = synthetic(num_users=100, num_items=50, seed=0)
    >>> split = leave_one_out(data)
    >>> batch = next(iter(train_loader(split, batch_size=8)))
    >>> batch.ids.shape == batch.target.shape, batch.lengths.shape
    (True, torch.Size([8]))
"""

from __future__ import annotations

from .batches import (
    Batch,
    BucketSampler,
    EvaluationBatch,
    EvaluationSequences,
    TrainingSequences,
    evaluation_loader,
    train_loader,
)
from .interactions import DataError, Histories, Interactions
from .loaders import load
from .split import EvaluationSet, Split, leave_one_out
from .synthetic import Recipe, synthetic

__all__ = [
    "Batch",
    "BucketSampler",
    "DataError",
    "EvaluationBatch",
    "EvaluationSequences",
    "EvaluationSet",
    "Histories",
    "Interactions",
    "Recipe",
    "Split",
    "TrainingSequences",
    "evaluation_loader",
    "leave_one_out",
    "load",
    "synthetic",
    "train_loader",
]
