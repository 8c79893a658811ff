"""``catalogue_attention``: softmax attention of query rows over the whole catalogue, without a B×I array."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _dispatch
from .._dispatch import Spec
from .._logits import LogitSpec, check_int, check_storage, wide_dtype
from .._operator import Operator
from .._precision import current_precision
from ..backends.reference import _attention_derivatives as derivatives
from ..backends.reference import catalogue_attention as reference
from ..backends.reference._scan import plain_arithmetic
from . import _catalogue
from ._checks import check_floating

NAME = "catalogue_attention"


@overload
def catalogue_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    num_heads: int = 1,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def catalogue_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    num_heads: int = 1,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def catalogue_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    num_heads: int = 1,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the whole catalogue: g_r = Σᵢ softmaxᵢ(s[r, i])·vᵢ with s[r, i] = scale·(q_r·kᵢ) + biasᵢ.

    Vaswani et al. (2017), with an online softmax (Milakov & Gimelshein 2018). Nothing of size B×I is held.

    Args:
        query: [..., d]; float16, bfloat16, float32 or float64. Every other floating tensor shares its dtype and device.
        keys: [I, d], one catalogue for all rows.
        values: [I, d_v]; default: the keys.
        num_heads: d and d_v are split into so many parts, which are attended independently and share scale, bias and exclude.
        scale: a float, or one for each row with the shape of the query's leading dimensions. Default 1 (torch's
            ``scaled_dot_product_attention``: 1/√d).
        bias: [I], added to the scores unscaled. −∞ removes an item.
        exclude: items without a part in a row: int64 or int32 [..., n] padded with −1; or [n] for every row; or a
            ``torch.sparse_csr`` matrix [B, I] whose values are ignored.
        return_lse: also return log Σᵢ exp(s[r, i]).

    Returns:
        context [..., d_v] in the query's dtype; with ``return_lse`` (context, lse), lse [...] or [..., num_heads] in float32
        (float64 for float64). A row without any item has context 0, lse −∞ and gradients 0.

    Raises:
        TypeError: something is not a tensor of the right kind, or dtypes differ.
        ValueError: a shape or device does not fit, or a width does not divide by ``num_heads``.
        IndexError: an excluded id is out of range (CPU; on CUDA it matches nothing).
        BackendUnavailable: the backend in force by ``use_backend`` cannot run the call.

    Differentiable twice in query, keys, values, bias and a tensor scale, through context and lse; forward-mode and vmap
    included. Under autocast query, keys and values are cast. Cost: 2·B·I·(d + d_v) FLOPs forward, 2·B·I·(3d + 2d_v) backward.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> interest = sf.catalogue_attention(torch.randn(4, 16), torch.randn(1000, 16), num_heads=2, scale=0.25)
        >>> interest.shape
        torch.Size([4, 16])
    """
    query, keys, values = _catalogue.autocast(NAME, query=query, keys=keys, values=values)
    num_heads = _check(query, keys, values, num_heads)
    dtypes = _catalogue.autocast_dtypes(query.device, query.dtype)
    logits = LogitSpec.build(NAME, query, keys, scale=scale, bias=bias, exclude=exclude, float_dtypes=dtypes)
    rows = _catalogue.rows_of(query)
    context: Tensor
    lse: Tensor
    context, lse = CATALOGUE_ATTENTION(rows, keys, values, num_heads, *logits.args(), current_precision())
    lead = query.shape[:-1]
    context = context.reshape(*lead, context.shape[1])
    if not return_lse:
        return context
    return context, lse.reshape(lead if num_heads == 1 else (*lead, num_heads))


def _check(query: Tensor, keys: Tensor, values: Tensor | None, num_heads: int) -> int:
    _catalogue.check_matrices(NAME, query, keys, "keys")
    if values is not None:
        check_floating(NAME, query=query, values=values)
        check_storage(NAME, "values", values)
        if values.dim() != 2 or values.shape[0] != keys.shape[0]:
            raise ValueError(
                f"{NAME}: values must have shape [I, d_v] with I = {keys.shape[0]}, got {tuple(values.shape)}"
            )
    num_heads = check_num_heads(num_heads)
    for name, width in (("query", query.shape[-1]), ("values", query.shape[-1] if values is None else values.shape[1])):
        if width % num_heads:
            raise ValueError(f"{NAME}: the width of {name}, {width}, must be a multiple of num_heads = {num_heads}")
    return num_heads


def check_num_heads(num_heads: int) -> int:
    """A positive int.

    Raises:
        TypeError, ValueError.
    """
    num_heads = check_int(NAME, "num_heads", num_heads)
    if num_heads < 1:
        raise ValueError(f"{NAME}: num_heads must be at least 1, got {num_heads}")
    return num_heads


# Wiring. Raw arguments: query, keys, values, num_heads, 5 of the LogitSpec, precision.
_BY_ROW = (0, 5, 7)
_INCOMING = ("grad_context", "grad_lse", "context", "lse")  # come first in the backward operator
_NUM_BACKWARD_ARGS = 15


def _describe(query: Tensor, keys: Tensor, values: Tensor | None, num_heads: int, *rest: Any) -> Spec:
    return _catalogue.describe(NAME, query, rest[:5], values=values is not None, heads=num_heads > 1)


def _describe_backward(*args: Any) -> Spec:
    _, _, _, _, query, _, values, num_heads, *rest = args
    return _catalogue.describe(
        f"{NAME}_backward", query, tuple(rest[:5]), values=values is not None, heads=num_heads > 1
    )


def _fake(query: Tensor, keys: Tensor, values: Tensor | None, num_heads: int, *rest: Any) -> tuple[Tensor, Tensor]:
    table = keys if values is None else values
    context = query.new_empty((query.shape[0], table.shape[1]))
    return context, query.new_empty((query.shape[0], num_heads), dtype=wide_dtype(query.dtype))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    query, keys, values, _, _, row_scale, bias, *_, mask, _ = args[4:]
    return _catalogue.fake_gradients(_named(query, keys, values, row_scale, bias), mask, query)


def _named(*tensors: Tensor | None) -> dict[str, Tensor | None]:
    """What a gradient is for, in the order of the backward operator's results."""
    return dict(zip(("query", "keys", "values", "row_scale", "bias"), tensors, strict=True))


CATALOGUE_ATTENTION = Operator(
    NAME, reference=reference.forward, fake=_fake, describe=_describe, native=_catalogue.native_softmax
)
CATALOGUE_ATTENTION_BACKWARD = Operator(
    f"{NAME}_backward",
    reference=reference.backward,
    fake=_fake_backward,
    describe=_describe_backward,
    native=_catalogue.native_softmax,
)


@CATALOGUE_ATTENTION.register_function
class CatalogueAttentionFunction(torch.autograd.Function):
    """The gradient of ``catalogue_attention``."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = CATALOGUE_ATTENTION.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, keys, values, num_heads, scale, row_scale, bias, exclude, crow, precision = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, keys, values, row_scale, bias, exclude, crow, *output)
        ctx.save_for_forward(query, keys, values, row_scale, bias, exclude, crow, *output)
        ctx.num_heads, ctx.scale, ctx.precision = num_heads, scale, precision
        ctx.forced = _dispatch.forced_backend()

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, keys, values, row_scale, bias, exclude, crow, context, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = [needs[0], needs[1], needs[2], needs[5], needs[6]]
        if grad_context is None:
            grad_context = torch.zeros_like(context)
        if grad_lse is None:
            grad_lse = torch.zeros_like(lse)
        logits = (ctx.scale, row_scale, bias, exclude, crow)
        incoming = (grad_context, grad_lse, context, lse)
        args = (*incoming, query, keys, values, ctx.num_heads, *logits, mask, ctx.precision)
        results = _catalogue.run_backward(CATALOGUE_ATTENTION_BACKWARD, args, ctx.forced)
        dq, dk, dv, ds, db = (g if wanted else None for g, wanted in zip(results, mask, strict=True))
        return dq, dk, dv, None, None, ds, db, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        query, keys, values, row_scale, bias, exclude, crow, context, lse = ctx.saved_tensors
        logits = LogitSpec(ctx.scale, row_scale, bias, exclude, crow)
        formula = derivatives.make(query, keys, values, ctx.num_heads, logits, context=context, lse=lse)
        by_row = _catalogue.directions(formula, query=tangents[0], row_scale=tangents[5])
        by_item = _catalogue.directions(formula, keys=tangents[1], values=tangents[2], bias=tangents[6])
        with plain_arithmetic(query.device, ctx.precision):
            d_context, d_lse = derivatives.tangent(formula, by_row, by_item)
        return d_context.to(context.dtype), d_lse

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _catalogue.vmap(
            CatalogueAttentionFunction.apply, info, in_dims, args, by_row=_BY_ROW, crow=(8,), one_dim_shared=(7,)
        )


@CATALOGUE_ATTENTION_BACKWARD.register_function
class CatalogueAttentionBackwardFunction(torch.autograd.Function):
    """The second derivative of ``catalogue_attention``: derivatives of the chunk formula, a chunk at a time."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        args, forced = _catalogue.split_forced(args, _NUM_BACKWARD_ARGS)
        result: tuple[Tensor, ...] = CATALOGUE_ATTENTION_BACKWARD.below_autograd(*args, forced=forced)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *incoming, query, keys, values, num_heads, scale, row_scale, bias, exclude, crow, mask, precision = inputs[
            :_NUM_BACKWARD_ARGS
        ]
        ctx.save_for_backward(*incoming, query, keys, values, row_scale, bias, exclude, crow)
        ctx.save_for_forward(*incoming, query, keys, values, row_scale, bias, exclude, crow)
        ctx.set_materialize_grads(False)
        ctx.num_heads, ctx.scale, ctx.mask, ctx.precision = num_heads, scale, mask, precision

    @staticmethod
    def _formula(ctx: Any) -> derivatives.AttentionGradient:
        incoming = dict(zip(_INCOMING, ctx.saved_tensors[:4], strict=True))
        query, keys, values, row_scale, bias, exclude, crow = ctx.saved_tensors[4:]
        logits = LogitSpec(ctx.scale, row_scale, bias, exclude, crow)
        return derivatives.make(query, keys, values, ctx.num_heads, logits, **incoming)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        formula = CatalogueAttentionBackwardFunction._formula(ctx)
        dq, dk, dv, ds, db = gradients
        with plain_arithmetic(formula.by_row["query"].device, ctx.precision):
            rows, items = formula.pullback(
                _catalogue.directions(formula, query=dq, row_scale=ds),
                _catalogue.directions(formula, keys=dk, values=dv, bias=db),
            )
        names = (*_INCOMING, "query", "keys", "values", None, None, "row_scale", "bias", None, None, None, None)
        likes = {**dict(zip(_INCOMING, ctx.saved_tensors[:4], strict=True)), **_named(*ctx.saved_tensors[4:9])}
        return _catalogue.as_gradients(names, {**rows, **items}, likes, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        formula = CatalogueAttentionBackwardFunction._formula(ctx)
        incoming = dict(zip(_INCOMING, tangents[:4], strict=True))
        query, keys, values, _, _, row_scale, bias, *_ = tangents[4:]
        with plain_arithmetic(formula.by_row["query"].device, ctx.precision):
            rows, items = formula.pushforward(
                _catalogue.directions(formula, **incoming, query=query, row_scale=row_scale),
                _catalogue.directions(formula, keys=keys, values=values, bias=bias),
            )
        likes = _named(*ctx.saved_tensors[4:9])
        return _catalogue.as_results({**rows, **items}, likes, ctx.mask, ctx.saved_tensors[4])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        mask = args[13]
        return _catalogue.vmap(
            CatalogueAttentionBackwardFunction.apply,
            info,
            in_dims,
            args,
            by_row=(0, 1, 2, 3, *(4 + n for n in _BY_ROW)),
            crow=(12,),
            one_dim_shared=(11,),
            foldable=not (mask[1] or mask[2] or mask[4]),
        )
