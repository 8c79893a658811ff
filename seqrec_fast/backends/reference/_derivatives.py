"""Second derivatives and tangents of the catalogue operators, in plain differentiable PyTorch, chunk by chunk.

A :class:`Formula` writes a first derivative as a function of tensors by row (query, lse, incoming gradients …) and tensors by
item (items, values, bias): results by row are sums over chunks of items, results by item belong to one chunk. So its own
derivatives can be taken chunk by chunk too, with ``torch.func``, which composes with every transform, and memory stays that of
one chunk. ``linear`` is the part that gathers a few items and needs no chunks.

Nothing here looks at a value: the tensors may be traced, batched or differentiated at any level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..._logits import LogitSpec
from ._scan import SCORES, listed_pairs, shared_items
from ._targets import Targets

Tensors = dict[str, Tensor]
Results = tuple[Tensors, Tensors]  # by row, by item
R = TypeVar("R")


class Formula:
    """A first derivative. Subclasses write :meth:`chunk`, and :meth:`linear` with ``has_linear``."""

    by_row: Tensors
    by_item: Tensors
    has_linear = False

    def chunk(self, by_row: Tensors, by_item: Tensors, span: slice) -> Results:
        """What the items of ``span`` contribute to the results by row, and their results by item."""
        raise NotImplementedError

    def linear(self, by_row: Tensors, by_item: Tensors) -> Results:
        """What is added for the whole catalogue at once, if ``has_linear``."""
        raise NotImplementedError

    def spans(self) -> Iterator[slice]:
        num_rows = next(iter(self.by_row.values())).shape[0]
        num_items = next(iter(self.by_item.values())).shape[0]
        step = max(SCORES // max(num_rows, 1), 1)
        for start in range(0, num_items, step):
            yield slice(start, min(start + step, num_items))

    def parts(self) -> Iterator[tuple[Callable[[Tensors, Tensors], Results], Tensors, slice]]:
        """(function of (by_row, by_item), its items, where its results by item lie)."""
        for span in self.spans():

            def of_chunk(by_row: Tensors, by_item: Tensors, span: slice = span) -> Results:
                return self.chunk(by_row, by_item, span)

            yield of_chunk, {name: tensor[span] for name, tensor in self.by_item.items()}, span

    def pullback(self, by_row: Tensors, by_item: Tensors) -> Results:
        """Vector-Jacobian product: the derivative with respect to the inputs, given that with respect to the results.

        Args:
            by_row, by_item: gradients of the results, by name.
        """
        row_sums = {name: torch.zeros_like(tensor) for name, tensor in self.by_row.items()}
        of_items: dict[str, list[Tensor]] = {name: [] for name in self.by_item}
        for function, items, span in self.parts():
            _, pull = vjp(function, self.by_row, items)
            rows, parts = pull((by_row, {name: gradient[span] for name, gradient in by_item.items()}))
            row_sums = {name: total + rows[name] for name, total in row_sums.items()}
            for name, part in parts.items():
                of_items[name].append(part)
        totals = {n: torch.cat(parts) if parts else self.by_item[n] * 0.0 for n, parts in of_items.items()}
        if self.has_linear:
            _, pull = vjp(self.linear, self.by_row, self.by_item)
            rows, items = pull((by_row, by_item))
            row_sums = {name: total + rows[name] for name, total in row_sums.items()}
            totals = {name: total + items[name] for name, total in totals.items()}
        return row_sums, totals

    def pushforward(self, by_row: Tensors, by_item: Tensors) -> Results:
        """Jacobian-vector product: the derivative of the results along the given tangents of the inputs."""
        row_sums: Tensors | None = None
        of_items: dict[str, list[Tensor]] = {}
        for function, items, span in self.parts():
            tangents = (by_row, {name: tangent[span] for name, tangent in by_item.items()})
            rows, parts = tangent_of(function, (self.by_row, items), tangents)
            row_sums = rows if row_sums is None else {name: total + rows[name] for name, total in row_sums.items()}
            for name, part in parts.items():
                of_items.setdefault(name, []).append(part)
        totals = {name: torch.cat(parts) for name, parts in of_items.items()}
        if row_sums is None:  # an empty catalogue
            rows, items = self.chunk(self.by_row, self.by_item, slice(0, 0))
            row_sums, totals = ({n: torch.zeros_like(t) for n, t in d.items()} for d in (rows, items))
        elif self.has_linear:
            rows, items = tangent_of(self.linear, (self.by_row, self.by_item), (by_row, by_item))
            row_sums = {name: total + rows[name] for name, total in row_sums.items()}
            totals = {name: total + items[name] for name, total in totals.items()}
        return row_sums, totals


def vjp(function: Callable[..., R], *primals: Any) -> tuple[R, Callable[[R], tuple[Any, ...]]]:
    """``torch.func.vjp`` of a function without auxiliary results: (results, their pullback)."""
    return cast("tuple[R, Callable[[R], tuple[Any, ...]]]", torch.func.vjp(function, *primals))


def tangent_of(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """Jacobian-vector product by two vector-Jacobian products, which unlike ``torch.func.jvp`` nests in forward-mode AD."""
    results, pull = vjp(function, *primals)
    zeros = torch.utils._pytree.tree_map(torch.zeros_like, results)
    _, push = vjp(pull, zeros)
    return push(tangents)[0]


def hidden_pairs(
    logits: LogitSpec, targets: Targets | None, num_rows: int, num_items: int, span: slice
) -> Tensor | None:
    """bool [B, C]: pairs of a chunk whose score is −∞ by exclusion or bias. None where no option can make one."""
    ids, crow = logits.exclude, logits.exclude_crow
    width = span.stop - span.start
    mask: Tensor | None = None
    if ids is not None and ids.numel():
        if ids.dim() == 1 and crow is None:
            mask = shared_items(ids, num_items)[span].expand(num_rows, width)
        else:
            mask = _pair_mask(*listed_pairs(ids, crow, num_rows), num_rows, span)
        if targets is not None:
            mask = mask & ~_pair_mask(targets.rows, targets.items, num_rows, span)
    if logits.bias is not None:
        dead: Tensor = logits.bias[span] == float("-inf")
        mask = dead.expand(num_rows, width) if mask is None else mask | dead
    return mask


def _pair_mask(rows: Tensor, items: Tensor, num_rows: int, span: slice) -> Tensor:
    width = span.stop - span.start
    inside = (items >= span.start) & (items < span.stop)
    place = torch.where(inside, rows * width + items - span.start, num_rows * width)
    ones = torch.ones_like(place, dtype=torch.bool)
    flat = torch.zeros(num_rows * width + 1, dtype=torch.bool, device=items.device).scatter(0, place, ones)
    mask: Tensor = flat[:-1].unflatten(0, (num_rows, width))
    return mask


def probabilities(scores: Tensor, lse: Tensor, hidden: Tensor | None) -> Tensor:
    """exp(s − lse), 0 where hidden, without a NaN on the way that would spoil derivatives.

    Args:
        scores: [..., B, C].
        lse: [..., B]; −∞ where nothing has a probability.
        hidden: bool [B, C] or None.
    """
    shift = torch.where(lse == float("-inf"), 0.0, lse)[..., None]
    if hidden is None:
        return torch.exp(scores - shift)
    return torch.where(hidden, 0.0, torch.exp(torch.where(hidden, float("-inf"), scores) - shift))
