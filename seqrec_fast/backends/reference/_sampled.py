"""The lists of cross-entropy over sampled negatives: which candidates a row has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..._logits import LogitSpec
from ._scan import CHUNK_NUMBERS, SCORES, listed_pairs, shared_items


@dataclass(frozen=True)
class Sampled:
    """The inputs that have no gradient, as padded lists. B rows, P targets a row, n negatives, I items.

    Attributes:
        targets: int64 [B, P], −1 is padding.
        weights: [B, P] wide, 0 in the padding.
        valid: bool [B].
        negatives: int64 [n] or [B, n], −1 is padding.
        log_q: of the same shape, wide, or None.
        logits: scale, exclude and exclude_crow; row_scale and bias are passed with the differentiable inputs.
    """

    targets: Tensor
    weights: Tensor
    valid: Tensor
    negatives: Tensor
    log_q: Tensor | None
    logits: LogitSpec
    label_smoothing: float
    prior: Tensor | None
    num_items: int

    @staticmethod
    def build(
        target: Tensor,
        target_weights: Tensor | None,
        target_crow: Tensor | None,
        negatives: Tensor,
        log_q: Tensor | None,
        logits: LogitSpec,
        ignore_index: int,
        label_smoothing: float,
        prior: Tensor | None,
        num_items: int,
        dtype: torch.dtype,
    ) -> Sampled:
        """From the raw arguments."""
        if target_crow is not None:
            target, target_weights = _padded(target, target_weights, target_crow)
        elif target.dim() == 1:
            target = torch.where(target == ignore_index, -1, target)[:, None]
        listed = target != -1
        count = listed.sum(1, keepdim=True)
        each = 1 / count.to(dtype) if target_weights is None else target_weights.to(dtype)
        return Sampled(
            target,
            torch.where(listed, each, 0.0),
            count[:, 0] > 0,
            negatives,
            None if log_q is None else log_q.to(dtype),
            replace(logits, row_scale=None, bias=None),
            label_smoothing,
            None if prior is None else prior.to(dtype),
            num_items,
        )

    def rows(self, block: slice) -> Sampled:
        """A block of rows."""
        own = self.negatives.dim() == 2
        logits = self.logits
        if logits.exclude is not None and (logits.exclude_crow is not None or logits.exclude.dim() == 2):
            device = self.targets.device
            logits = logits.take_rows(torch.arange(block.start, block.stop, device=device))
        return replace(
            self,
            targets=self.targets[block],
            weights=self.weights[block],
            valid=self.valid[block],
            negatives=self.negatives[block] if own else self.negatives,
            log_q=self.log_q[block] if own and self.log_q is not None else self.log_q,
            logits=logits,
        )

    def blocks(self, width: int) -> Iterator[slice]:
        """Blocks of rows that keep scores, and gathered vectors, within the bounds of a scan."""
        num_rows, candidates = self.targets.shape[0], self.targets.shape[1] + self.negatives.shape[-1]
        gathered = candidates if self.negatives.dim() == 2 else self.targets.shape[1]
        step = min(SCORES // max(candidates, 1), CHUNK_NUMBERS // max(gathered * width, 1))
        step = max(step, 1)
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))

    def hidden(self, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """(bool [B, P], bool [B, n]): targets and negatives that are no candidates."""
        targets = self.targets
        inside = (targets >= 0) & (targets < self.num_items)
        # A target that is listed twice is one candidate.
        twice = (targets[:, :, None] == targets[:, None, :]).tril(-1).any(-1)
        no_target = ~inside | twice
        ids = self.negatives  # [n] or [B, n]
        no_negative = (ids < 0) | (ids >= self.num_items)
        if ids.dim() == 1:
            no_negative, ids = no_negative.expand(targets.shape[0], -1), ids.expand(targets.shape[0], -1)
        no_negative = no_negative | self._is_target(ids) | self._is_excluded(ids)
        if bias is not None and self.num_items:
            dead = bias == float("-inf")
            no_target = no_target | dead[targets.clamp(0, self.num_items - 1)]
            no_negative = no_negative | dead[ids.clamp(0, self.num_items - 1)]
        return no_target, no_negative

    def _is_target(self, ids: Tensor) -> Tensor:
        """bool [B, n]: accidental hits."""
        if self.targets.shape[1] == 1:
            return ids == self.targets
        found = torch.zeros_like(ids, dtype=torch.bool)
        for target in self.targets.unbind(1):
            found = found | (ids == target[:, None])
        return found

    def _is_excluded(self, ids: Tensor) -> Tensor:
        excluded, crow = self.logits.exclude, self.logits.exclude_crow
        if excluded is None or excluded.numel() == 0 or self.num_items == 0:
            return torch.zeros_like(ids, dtype=torch.bool)
        if excluded.dim() == 1 and crow is None:
            return shared_items(excluded, self.num_items)[ids.clamp(0, self.num_items - 1)]
        if crow is None:
            return _in_rows(ids, excluded)
        rows, items = listed_pairs(excluded, crow, ids.shape[0])
        keys = torch.where(items < self.num_items, rows * self.num_items + items, -1).sort().values
        wanted = torch.arange(ids.shape[0], device=ids.device)[:, None] * self.num_items + ids
        place = torch.searchsorted(keys, wanted.contiguous()).clamp_max(keys.shape[0] - 1)
        return (keys[place] == wanted) & (ids >= 0)


def _in_rows(ids: Tensor, listed: Tensor) -> Tensor:
    """bool [B, n]: which of ``ids`` [B, n] are in their row of ``listed`` [B, m]."""
    if torch._C._are_functorch_transforms_active():  # the batching rule of searchsorted warns about its own layout
        found = torch.zeros_like(ids, dtype=torch.bool)
        for column in listed.unbind(1):
            found = found | (ids == column[:, None])
        return found
    ordered = listed.to(ids.dtype).sort(dim=1).values
    place = torch.searchsorted(ordered, ids.contiguous()).clamp_max(listed.shape[1] - 1)
    return ordered.gather(1, place) == ids


def _padded(ids: Tensor, weights: Tensor | None, crow: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compressed sparse rows as a padded list. Looks at the longest row: a synchronisation on CUDA."""
    num_rows = len(crow) - 1
    longest = int(crow.diff().max()) if num_rows else 0
    rows, items = listed_pairs(ids, crow, num_rows)
    slot = slots_of(crow, rows)
    target = torch.full((num_rows, longest), -1, dtype=torch.int64, device=ids.device)
    target[rows, slot] = items
    if weights is None:
        return target, None
    padded = torch.zeros((num_rows, longest), dtype=weights.dtype, device=ids.device)
    padded[rows, slot] = weights
    return target, padded


def slots_of(crow: Tensor, rows: Tensor) -> Tensor:
    """Where an entry of compressed sparse rows lies in its row."""
    return torch.arange(len(rows), device=rows.device) - crow[rows].long()
