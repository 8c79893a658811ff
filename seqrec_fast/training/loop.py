"""Training and evaluation as two small functions, for people with a loop of their own. Nothing here needs Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from seqrec_fast.data import Batch, EvaluationBatch
from seqrec_fast.ops.catalogue_rank import catalogue_rank

from .metrics import Quality, RankMetrics, rank_from_scores

if TYPE_CHECKING:
    from seqrec_fast.models import LogitModel


class _Module(Protocol):
    """What is used of an ``nn.Module`` that is no model yet."""

    training: bool

    def train(self, mode: bool = True) -> object: ...

    def eval(self) -> object: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]: ...


class TrainableModel(_Module, Protocol):
    """What :func:`train_epoch` takes: a module with a loss."""

    def loss(self, ids: Tensor, lengths: Tensor, target: Tensor) -> Tensor: ...


class RankedModel(_Module, Protocol):
    """What :func:`evaluate` takes: a module that knows its catalogue, and has what :func:`target_ranks` needs."""

    @property
    def num_items(self) -> int: ...


class ProductModel(Protocol):
    """A model whose scores are the products of a user vector with the items' vectors."""

    @property
    def item_vectors(self) -> Tensor: ...

    def encode(self, ids: Tensor, lengths: Tensor) -> Tensor: ...


def train_epoch(
    model: TrainableModel,
    loader: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    gradient_clip: float | None = None,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> float:
    """One pass over the training batches with ``model.loss(ids, lengths, target)``.

    Args:
        model: anything with such a ``loss``; left in training mode.
        loader: batches, as :func:`seqrec_fast.data.train_loader` gives them; moved to the model's device.
        optimizer: over the model's parameters.
        gradient_clip: largest norm of all gradients together; None: not clipped.
        autocast: ``torch.bfloat16`` for mixed precision; None: none. (fp16 needs a gradient scaler: use ``fit``.)
        on_step: called after each step with its number and its detached loss, for progress or logging.

    Returns:
        The mean loss over the positions that had a target.

    Raises:
        ValueError: when there is no batch.

    Example:
        >>> from seqrec_fast.data import leave_one_out, synthetic, train_loader
        >>> from seqrec_fast.models import SequenceRecommender
        >>> split = leave_one_out(synthetic(num_users=20, num_items=30))
        >>> model = SequenceRecommender(split.num_items, embedding_dim=8)
        >>> adam = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> losses = [train_epoch(model, train_loader(split, batch_size=8), adam) for _ in range(3)]
        >>> losses[-1] < losses[0]
        True
    """
    device = _device_of(model)
    model.train()
    total, positions = 0.0, 0
    for step, batch in enumerate(loader):
        batch = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            loss = model.loss(batch.ids, batch.lengths, batch.target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if gradient_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
        optimizer.step()
        here = int((batch.target >= 0).sum())
        total += float(loss.detach()) * here
        positions += here
        if on_step is not None:
            on_step(step, loss.detach())
    if positions == 0:
        raise ValueError("the training loader gave no batch with a target")
    return total / positions


@torch.no_grad()
def target_ranks(model: object, batch: EvaluationBatch) -> Tensor:
    """The target's 0-based place in the full ranking, for every row of a batch: int64 [B].

    ``batch.exclude`` is what takes no place. A model with ``encode`` and ``item_vectors`` is ranked by
    :func:`seqrec_fast.catalogue_rank`, with no [B, I] array; one that only has ``logits`` through its scores.

    Raises:
        TypeError: for a model with neither.
    """
    if hasattr(model, "encode") and hasattr(model, "item_vectors"):
        product = cast(ProductModel, model)
        table = product.item_vectors
        user = product.encode(batch.ids, batch.lengths).to(table.dtype)  # [B, d]; autocast may have narrowed it
        bias = getattr(model, "item_bias", None)
        return catalogue_rank(user, table, batch.target, bias=bias, exclude=batch.exclude)
    if hasattr(model, "logits"):
        scores = cast("LogitModel", model).logits(batch.ids, batch.lengths)
        return rank_from_scores(scores, batch.target, batch.exclude)
    raise TypeError(f"{type(model).__name__} has neither encode and item_vectors nor logits, so it ranks nothing")


@torch.no_grad()
def evaluate(model: RankedModel, loader: Iterable[EvaluationBatch], *, ks: Sequence[int] = (10,)) -> Quality:
    """HR@k, NDCG@k and MRR@k over the full catalogue, with dropout off; the model's mode is put back afterwards.

    The loader decides about the seen filter: ``evaluation_loader(split, "test", exclude_seen=False)`` for none.

    Args:
        model: a model of :mod:`seqrec_fast.models`, or one with ``num_items`` and ``logits(ids, lengths) -> [B, I]``.
        loader: batches, as :func:`seqrec_fast.data.evaluation_loader` gives them.
        ks: the cut-offs.

    Returns:
        The metrics, with the number of users and items and whether seen items were filtered.

    Raises:
        ValueError: when some batches have a seen filter and others do not, or a cut-off is below 1.
        TypeError: for a model that ranks nothing.

    Complexity: O(users · items · width) time; memory does not grow with users × items for models that are a product.

    Example:
        >>> from seqrec_fast.data import evaluation_loader, leave_one_out, synthetic
        >>> from seqrec_fast.models import Popularity
        >>> split = leave_one_out(synthetic(num_users=200, num_items=50))
        >>> quality = evaluate(Popularity(50).fit(split.train), evaluation_loader(split, "test"))
        >>> quality.protocol
        'full ranking over 50 items, seen items filtered, 200 users'
    """
    device, was_training = _device_of(model), model.training
    metrics: RankMetrics | None = None
    model.eval()
    try:
        for batch in loader:
            seen_filter = batch.exclude is not None
            if metrics is None:
                metrics = RankMetrics(int(model.num_items), ks, seen_filter=seen_filter)
            elif metrics.seen_filter != seen_filter:
                raise ValueError("loader must give every batch an exclude, or none: the seen filter changed midway")
            metrics.update(target_ranks(model, batch.to(device, non_blocking=True)))
    finally:
        model.train(was_training)
    return (metrics or RankMetrics(int(model.num_items), ks, seen_filter=False)).compute()


def _device_of(model: _Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
