"""``catalogue_rank``: the target's place in the full ranking, in one pass and without a B×I array."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._dispatch import Spec
from .._logits import LogitSpec, check_int
from .._operator import Operator
from ..backends.reference import catalogue_rank as reference
from . import _catalogue

NAME = "catalogue_rank"


def catalogue_rank(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """0-based place of the target in ``catalogue_topk(query, items, k=I)``: all that HR@k, NDCG@k and MRR@k need, for any k.

    The number of items i with s[r, i] > s[r, t], or s[r, i] = s[r, t] and i < t, where s[r, i] = scale·(q_r·vᵢ) + biasᵢ is the
    fp64 dot product in ascending order of k, times scale, plus bias, rounded once to fp32 (fp64 input: not rounded). So ranks
    are the same on every device.

    Args:
        query: [..., d]; float16, bfloat16, float32 or float64. Every other floating tensor shares its dtype and device.
        items: [I, d].
        target: int64 with the shape of the query's leading dimensions. Never excluded from its own row.
        scale: a float, or one for each row with the shape of the query's leading dimensions.
        bias: [I], added to the scores unscaled. −∞ removes an item.
        exclude: items that do not rank: int64 or int32 [..., n] padded with −1; or [n] for every row; or a
            ``torch.sparse_csr`` matrix [B, I] whose values are ignored.
        ignore_index: rows with this target get −1.

    Returns:
        int64 with the shape of the query's leading dimensions. A target whose score is NaN or −∞ comes after every ranked item.

    Raises:
        TypeError: something is not a tensor of the right kind, or dtypes differ.
        ValueError: a shape or device does not fit.
        IndexError: a target or an excluded id is out of range (CPU; on CUDA such a target gives −1, such an id matches nothing).
        BackendUnavailable: the backend in force by ``use_backend`` cannot run the call.

    Not differentiable, not cast by autocast. Cost: 2·B·I·d FLOPs.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> items = torch.eye(4)
        >>> sf.catalogue_rank(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), items, torch.tensor([2]), exclude=torch.tensor([[0]]))
        tensor([1])
    """
    _catalogue.check_matrices(NAME, query, items)
    target = _catalogue.check_single_target(NAME, target, query)
    logits = LogitSpec.build(NAME, query, items, scale=scale, bias=bias, exclude=exclude)
    ignore_index = check_int(NAME, "ignore_index", ignore_index)
    rows = _catalogue.rows_of(query)
    result: Tensor = CATALOGUE_RANK(rows, items, target, *logits.args(), ignore_index)
    return result.reshape(query.shape[:-1])


def _describe(query: Tensor, items: Tensor, target: Tensor, *rest: Any) -> Spec:
    return _catalogue.describe(NAME, query, rest[:5])


def _fake(query: Tensor, items: Tensor, target: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(target, memory_format=torch.contiguous_format)


CATALOGUE_RANK = Operator(NAME, reference=reference.forward, fake=_fake, describe=_describe, native=_dispatch.always)


@CATALOGUE_RANK.register_function
class CatalogueRankFunction(torch.autograd.Function):
    """``catalogue_rank`` has no gradient; this gives it vmap."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = CATALOGUE_RANK.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
        return (None,) * 9

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _catalogue.vmap(
            CatalogueRankFunction.apply, info, in_dims, args, by_row=(0, 2, 4, 6), crow=(7,), one_dim_shared=(6,)
        )
