"""The catalogue half of the conformance suite: what every backend is held to.

The ``naive_*`` functions are written apart from the package, one row at a time, from the meanings in the docstrings: autograd on
them in fp64 is the truth, and the same code in the dtype under test is eager PyTorch, whose error is the yardstick. They take the
keywords of the public functions. A row's items are gathered before anything is computed, so that what is excluded has no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Keywords = dict[str, Any]
NO_WEIGHT: tuple[list[int], list[float]] = ([], [])

# The options.


def excluded_ids(exclude: Tensor | None, row: int) -> set[int]:
    if exclude is None:
        return set()
    if exclude.layout == torch.sparse_csr:
        crow, columns = exclude.crow_indices().tolist(), exclude.col_indices().tolist()
        return set(columns[crow[row] : crow[row + 1]])
    listed = exclude if exclude.dim() == 1 else exclude.flatten(0, -2)[row]
    return {int(id_) for id_ in listed} - {-1}


def scale_of(scale: float | Tensor, row: int) -> float | Tensor:
    return scale.reshape(-1)[row] if isinstance(scale, Tensor) else scale


def rows_of(query: Tensor) -> list[Tensor]:
    return list(query.reshape(math.prod(query.shape[:-1]), query.shape[-1]))


def row_scores(query: Tensor, items: Tensor, ids: list[int], scale: float | Tensor, bias: Tensor | None) -> Tensor:
    """[n] scores of ``ids`` in one row."""
    scores = scale * (items[ids] @ query)
    return scores if bias is None else scores + bias[ids]


def ranked(
    query: Tensor, items: Tensor, ids: Iterator[int] | list[int], scale: float | Tensor, bias: Tensor | None
) -> list[int]:
    """Those of ``ids`` whose score is not −∞."""
    listed = [i for i in ids if bias is None or bias[i] != float("-inf")]
    scores = row_scores(query.detach(), items.detach(), listed, scale, bias).tolist()
    return [i for i, score in zip(listed, scores, strict=True) if score != float("-inf")]


def stacked(rows: list[Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.stack(rows).reshape(shape) if rows else like.new_zeros(shape)


# Attention.


def naive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    num_heads: int = 1,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(context [..., d_v], lse [..., num_heads])."""
    values = keys if values is None else values
    contexts, sums = [], []
    for row, q in enumerate(rows_of(query)):
        gone = excluded_ids(exclude, row)
        kept = [i for i in range(len(keys)) if i not in gone]
        heads = zip(q.chunk(num_heads), keys.chunk(num_heads, 1), values.chunk(num_heads, 1), strict=True)
        results = [_attend(*head, kept, scale_of(scale, row), bias) for head in heads]
        contexts.append(torch.cat([context for context, _ in results]))
        sums.append(torch.stack([lse for _, lse in results]))
    lead = query.shape[:-1]
    return stacked(contexts, query, (*lead, values.shape[1])), stacked(sums, query, (*lead, num_heads))


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, kept: list[int], scale: float | Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    kept = ranked(q, keys, kept, scale, bias)
    if not kept:
        return q.new_zeros(values.shape[1]), q.new_tensor(float("-inf"))
    scores = row_scores(q, keys, kept, scale, bias)
    return torch.softmax(scores, 0) @ values[kept], torch.logsumexp(scores, 0)


# Cross-entropy.


def row_targets(target: Tensor, weights: Tensor | None, row: int, ignore_index: int) -> tuple[list[int], list[Any]]:
    """(ids, weights) of one row; nothing for an ignored row."""
    if target.layout == torch.sparse_csr:
        crow = target.crow_indices().tolist()
        part = slice(crow[row], crow[row + 1])
        ids = target.col_indices()[part].tolist()
        given = None if weights is None else list(weights[part])
    elif target.dim() == 1:
        ids = [int(target[row])]
        return NO_WEIGHT if ids == [ignore_index] else (ids, [1.0])
    else:
        ids = target[row].tolist()
        given = None if weights is None else list(weights[row])
    listed = [n for n, id_ in enumerate(ids) if id_ != -1]
    if given is None:
        given = [1.0 / len(listed)] * len(ids) if listed else []
    return [ids[n] for n in listed], [given[n] for n in listed]


def naive_cross_entropy(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    target_weights: Tensor | None = None,
    smoothing_prior: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_log_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), both of the query's leading shape, before any reduction."""
    lead = query.shape[:-1]
    several = target.layout != torch.sparse_csr and target.shape != lead
    if target.layout != torch.sparse_csr:
        target = target.reshape(-1, target.shape[-1]) if several else target.reshape(-1)
        if target_weights is not None:
            target_weights = target_weights.reshape(target.shape)
    losses, sums = [], []
    for row, q in enumerate(rows_of(query)):
        ids, weights = row_targets(target, target_weights, row, ignore_index)
        if not ids:
            losses.append(q.new_zeros(()))
            sums.append(q.new_zeros(()))
            continue
        own = scale_of(scale, row)
        gone = excluded_ids(exclude, row) - set(ids)
        if negatives is None:
            candidates = ranked(q, items, [i for i in range(len(items)) if i not in gone], own, bias)
            scores = row_scores(q, items, candidates, own, bias)
        else:
            candidates, scores = _candidates(q, items, ids, gone, own, bias, negatives, negatives_log_q, row)
        lse = torch.logsumexp(scores, 0) if candidates else q.new_tensor(float("-inf"))
        loss = q.new_zeros(())
        for id_, weight in zip(ids, weights, strict=True):
            if weight == 0:
                continue
            alive = bool(ranked(q, items, [id_], own, bias))
            score = row_scores(q, items, [id_], own, bias)[0] if alive else -math.inf
            surprise = lse - score if alive or candidates else math.inf
            loss = loss + (1 - label_smoothing) * weight * surprise
        if label_smoothing:
            loss = loss + label_smoothing * _mean_surprise(scores, lse, candidates, smoothing_prior)
        losses.append(loss)
        sums.append(lse)
    return stacked(losses, query, lead), stacked(sums, query, lead)


def _mean_surprise(scores: Tensor, lse: Tensor, candidates: list[int], prior: Tensor | None) -> Tensor | float:
    """Mean of −log p over the candidates, weighted by the prior."""
    share = torch.ones_like(scores) if prior is None else prior[candidates]
    if not bool((share > 0).any()):
        return 0.0
    listed = share > 0
    return (share[listed] * (lse - scores[listed])).sum() / share.sum()


def _candidates(
    q: Tensor,
    items: Tensor,
    targets: list[int],
    gone: set[int],
    scale: float | Tensor,
    bias: Tensor | None,
    negatives: Tensor,
    log_q: Tensor | None,
    row: int,
) -> tuple[list[int], Tensor]:
    """The row's targets, each once, and its negatives, as often as drawn: ids and scores."""
    if negatives.dim() > 1:
        negatives = negatives.flatten(0, -2)[row]
        log_q = None if log_q is None else log_q.flatten(0, -2)[row]
    first = ranked(q, items, sorted(set(targets)), scale, bias)
    drawn = [n for n, id_ in enumerate(negatives.tolist()) if id_ >= 0 and id_ not in gone and id_ not in targets]
    drawn = [n for n in drawn if ranked(q, items, [int(negatives[n])], scale, bias)]
    others = [int(negatives[n]) for n in drawn]
    corrected = row_scores(q, items, others, scale, bias)
    if log_q is not None:
        corrected = corrected - log_q[drawn]
    return first + others, torch.cat([row_scores(q, items, first, scale, bias), corrected])


def reduce(loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(int(valid.sum()), 1)


# Rankings: numbers, not formulas. The order of the sums is part of their meaning.


def ordered_scores(query: Tensor, items: Tensor, scale: float | Tensor, bias: Tensor | None) -> np.ndarray:
    """[B, I]: fp64 products summed in ascending k, scaled, biased, and rounded once to fp32 unless the input is fp64."""
    q, v = torch.stack(rows_of(query)).double().numpy() if query.numel() else None, items.double().numpy()
    scores = np.zeros((math.prod(query.shape[:-1]), len(v)))
    with np.errstate(all="ignore"):
        for k in range(v.shape[1] if q is not None else 0):
            scores += q[:, k, None] * v[:, k]
        scores *= scale.double().reshape(-1, 1).numpy() if isinstance(scale, Tensor) else scale
        if bias is not None:
            scores += bias.double().numpy()
            scores[:, (bias == float("-inf")).numpy()] = -np.inf  # whatever the vector holds
        if query.dtype != torch.float64:
            scores = scores.astype(np.float32).astype(np.float64)
    return scores


def naive_topk(
    query: Tensor,
    items: Tensor,
    k: int,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(values, indices) [..., k]."""
    all_values, all_ids = [], []
    for row, scores in enumerate(ordered_scores(query, items, scale, bias).tolist()):
        gone = excluded_ids(exclude, row)
        order = sorted(_ranked_numbers(scores, gone), key=lambda i: (-scores[i], i))[:k]
        padding = k - len(order)
        all_values.append([scores[i] + 0.0 for i in order] + [-math.inf] * padding)
        all_ids.append(order + [-1] * padding)
    shape = (*query.shape[:-1], k)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.tensor(all_values, dtype=dtype).reshape(shape), torch.tensor(all_ids, dtype=torch.int64).reshape(shape)


def naive_rank(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """int64 [...]."""
    ranks = []
    for row, scores in enumerate(ordered_scores(query, items, scale, bias).tolist()):
        t = int(target.reshape(-1)[row])
        if t == ignore_index:
            ranks.append(-1)
            continue
        others = _ranked_numbers(scores, excluded_ids(exclude, row) | {t})
        if math.isnan(scores[t]) or scores[t] == -math.inf:
            ranks.append(len(others))
        else:
            ranks.append(sum(scores[i] > scores[t] or (scores[i] == scores[t] and i < t) for i in others))
    return torch.tensor(ranks, dtype=torch.int64).reshape(target.shape)


def _ranked_numbers(scores: list[float], gone: set[int]) -> list[int]:
    return [i for i, s in enumerate(scores) if i not in gone and not math.isnan(s) and s != -math.inf]


# Data on which a scan may stumble: [I, d] made of a Gaussian table and the queries [B, d].


def duplicated(items: Tensor, query: Tensor) -> Tensor:
    table = items.clone()
    table[(len(items) + 1) // 2 :] = table[: len(items) // 2].clone()
    return table


def all_equal(items: Tensor, query: Tensor) -> Tensor:
    return items[:1].expand(items.shape).clone()


def ascending(items: Tensor, query: Tensor) -> Tensor:
    """The first row's scores rise: every item is the best so far."""
    return items[(items.double() @ query[0].double()).argsort()]


def huge_and_tiny(items: Tensor, query: Tensor) -> Tensor:
    table = items.clone()
    table[::3] *= 100
    table[1::3] *= 1e-4
    return table


def near_ties(items: Tensor, query: Tensor) -> Tensor:
    """One row, with one element moved by a few ulp: scores differ in the last places only."""
    near = items[:1].repeat(len(items), 1)
    rows, generator = torch.arange(len(items)), torch.Generator().manual_seed(5)
    column = torch.randint(0, items.shape[1], (len(items),), generator=generator)
    steps = torch.randint(-3, 4, (len(items),), generator=generator)
    near[rows, column] *= (1 + steps * torch.finfo(items.dtype).eps).to(items.dtype)
    return near


def few_values(items: Tensor, query: Tensor) -> Tensor:
    """Whole numbers: ties everywhere, and scores of 0 with either sign."""
    return items.round()


def with_infinities(items: Tensor, query: Tensor) -> Tensor:
    table = items.clone()
    table[::7, 0] = float("inf")
    table[1::7, 0] = float("-inf")
    return table


def with_nan(items: Tensor, query: Tensor) -> Tensor:
    table = items.clone()
    table[::5, -1] = float("nan")
    return table


def gaussian(items: Tensor, query: Tensor) -> Tensor:
    return items


FINITE_TABLES = (gaussian, duplicated, all_equal, ascending, huge_and_tiny, near_ties, few_values)
TABLES = {table.__name__: table for table in (*FINITE_TABLES, with_infinities, with_nan)}
