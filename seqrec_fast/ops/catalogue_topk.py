"""``catalogue_topk``: the k best items of every row, exact, in a defined order, without a B×I array."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._dispatch import Spec
from .._logits import LogitSpec, check_int, wide_dtype
from .._operator import Operator, plain
from ..backends.reference import _topk_derivatives as derivatives
from ..backends.reference import catalogue_topk as reference
from ..backends.reference._scan import plain_arithmetic
from . import _catalogue

NAME = "catalogue_topk"


def catalogue_topk(
    query: Tensor,
    items: Tensor,
    k: int,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
) -> torch.return_types.topk:
    """The k best items of every row, best first; equal scores by ascending id.

    The score is scale·(q_r·vᵢ) + biasᵢ: the fp64 dot product in ascending order of k, times scale, plus bias, rounded once to
    fp32 (fp64 input: not rounded). So the ids are the same on every device. −0 equals +0; NaN and −∞ never rank.

    Args:
        query: [..., d]; float16, bfloat16, float32 or float64. Every other floating tensor shares its dtype and device.
        items: [I, d].
        k: at least 1; may be larger than I (torch's ``topk`` raises).
        scale: a float, or one for each row with the shape of the query's leading dimensions.
        bias: [I], added to the scores unscaled. −∞ removes an item.
        exclude: items that do not rank: int64 or int32 [..., n] padded with −1; or [n] for every row; or a
            ``torch.sparse_csr`` matrix [B, I] whose values are ignored.

    Returns:
        ``torch.return_types.topk``: values [..., k] in float32 (float64 for float64) and indices [..., k] int64; value −∞ and
        index −1 where fewer than k items are left.

    Raises:
        TypeError: something is not a tensor of the right kind, or dtypes differ, or k is not an int.
        ValueError: a shape or device does not fit, or k < 1.
        IndexError: an excluded id is out of range (CPU; on CUDA it matches nothing).
        BackendUnavailable: the backend in force by ``use_backend`` cannot run the call.

    The values are differentiable twice, in query, items, bias and a tensor scale, through a gather of the k rows; forward-mode
    and vmap included. Not cast by autocast. Cost: 2·B·I·d FLOPs.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> best = sf.catalogue_topk(torch.tensor([3.0, 1.0, 3.0]), torch.eye(3), 2)
        >>> best.values.tolist(), best.indices.tolist()
        ([3.0, 3.0], [0, 2])
    """
    return topk_of(query, items, k, scale=scale, bias=bias, exclude=exclude)


def topk_of(
    query: Tensor,
    items: Tensor,
    k: int,
    *,
    scale: float | Tensor,
    bias: Tensor | None,
    exclude: Tensor | None,
    packed: tuple[Tensor, Tensor] | None = None,
) -> torch.return_types.topk:
    """As ``catalogue_topk``. ``packed``: codes and facts of the items, for the calls that can make use of them."""
    _catalogue.check_matrices(NAME, query, items)
    k = check_int(NAME, "k", k)
    if k < 1:
        raise ValueError(f"{NAME}: k must be at least 1, got {k}")
    logits = LogitSpec.build(NAME, query, items, scale=scale, bias=bias, exclude=exclude)
    args = (_catalogue.rows_of(query), items, k, *logits.args())
    if packed is not None and plain(*args) and _dispatch.choose(_describe(*args)) == "native":
        codes_and_items = (args[0], items, *packed, *args[2:])
        values, indices = torch.ops.seqrec_fast_native.catalogue_topk_packed.default(*codes_and_items)
    else:
        values, indices = CATALOGUE_TOPK(*args)
    shape = (*query.shape[:-1], k)
    return torch.return_types.topk((values.reshape(shape), indices.reshape(shape)))


# Wiring. Raw arguments: query, items, k, 5 of the LogitSpec.
_BY_ROW = (0, 4, 6)
_NUM_BACKWARD_ARGS = 8


def _describe(query: Tensor, items: Tensor, k: int, *rest: Any) -> Spec:
    return _catalogue.describe(NAME, query, rest[:5])


def _describe_backward(grad: Tensor, indices: Tensor, query: Tensor, *rest: Any) -> Spec:
    return _catalogue.describe(f"{NAME}_backward", query, (*rest[1:4], None, None))


def _fake(query: Tensor, items: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    values = query.new_empty(shape, dtype=wide_dtype(query.dtype))
    return values, query.new_empty(shape, dtype=torch.int64)


def _named(*tensors: Tensor | None) -> dict[str, Tensor | None]:
    return dict(zip(("query", "items", "row_scale", "bias"), tensors, strict=True))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    query, items, _, row_scale, bias, mask = args[2:]
    return _catalogue.fake_gradients(_named(query, items, row_scale, bias), mask, query)


CATALOGUE_TOPK = Operator(NAME, reference=reference.forward, fake=_fake, describe=_describe, native=_dispatch.always)
CATALOGUE_TOPK_BACKWARD = Operator(
    f"{NAME}_backward", reference=reference.backward, fake=_fake_backward, describe=_describe_backward
)


@CATALOGUE_TOPK.register_function
class CatalogueTopKFunction(torch.autograd.Function):
    """The gradient of the values of ``catalogue_topk``."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = CATALOGUE_TOPK.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, items, _, scale, row_scale, bias, _, _ = inputs
        _, indices = output
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, items, row_scale, bias, indices)
        ctx.save_for_forward(query, items, row_scale, bias, indices)
        ctx.scale = scale
        ctx.forced = _dispatch.forced_backend()

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad_values is None:
            return (None,) * 8
        query, items, row_scale, bias, indices = ctx.saved_tensors
        mask = [needs[0], needs[1], needs[4], needs[5]]
        args = (grad_values, indices, query, items, ctx.scale, row_scale, bias, mask)
        results = _catalogue.run_backward(CATALOGUE_TOPK_BACKWARD, args, ctx.forced)
        dq, di, ds, db = (g if wanted else None for g, wanted in zip(results, mask, strict=True))
        return dq, di, None, None, ds, db, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        query, items, row_scale, bias, indices = ctx.saved_tensors
        inputs = _named(query, items, row_scale, bias)
        moved = _named(tangents[0], tangents[1], tangents[4], tangents[5])
        with plain_arithmetic(query.device):
            return derivatives.tangent(inputs, moved, indices, ctx.scale), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _catalogue.vmap(
            CatalogueTopKFunction.apply, info, in_dims, args, by_row=_BY_ROW, crow=(7,), one_dim_shared=(6,)
        )


@CATALOGUE_TOPK_BACKWARD.register_function
class CatalogueTopKBackwardFunction(torch.autograd.Function):
    """The second derivative of the values of ``catalogue_topk``."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        args, forced = _catalogue.split_forced(args, _NUM_BACKWARD_ARGS)
        result: tuple[Tensor, ...] = CATALOGUE_TOPK_BACKWARD.below_autograd(*args, forced=forced)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_values, indices, query, items, scale, row_scale, bias, mask = inputs[:_NUM_BACKWARD_ARGS]
        ctx.save_for_backward(grad_values, indices, query, items, row_scale, bias)
        ctx.save_for_forward(grad_values, indices, query, items, row_scale, bias)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.mask = scale, mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_values, indices, *tensors = ctx.saved_tensors
        inputs = {**_named(*tensors), "grad_values": grad_values}
        with plain_arithmetic(grad_values.device):
            found = derivatives.pullback(inputs, _named(*gradients), indices, ctx.scale)
        names = ("grad_values", None, "query", "items", None, "row_scale", "bias", None)
        return _catalogue.as_gradients(names, found, inputs, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        grad_values, indices, *tensors = ctx.saved_tensors
        likes = _named(*tensors)
        moved = {**_named(tangents[2], tangents[3], tangents[5], tangents[6]), "grad_values": tangents[0]}
        with plain_arithmetic(grad_values.device):
            found = derivatives.pushforward({**likes, "grad_values": grad_values}, moved, indices, ctx.scale)
        return _catalogue.as_results(found, likes, ctx.mask, tensors[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        mask = args[7]
        return _catalogue.vmap(
            CatalogueTopKBackwardFunction.apply,
            info,
            in_dims,
            args,
            by_row=(0, 1, 2, 5),
            crow=(),
            foldable=not (mask[1] or mask[3]),
        )
