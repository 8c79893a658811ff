"""Wiring of ``catalogue_cross_entropy`` over the whole catalogue: raw operators, fakes and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._dispatch import Spec
from .._logits import LogitSpec, wide_dtype
from .._operator import Operator, transforms_active
from ..backends.native import catalogue_cross_entropy as native
from ..backends.reference import _cross_entropy_derivatives as derivatives
from ..backends.reference import catalogue_cross_entropy as reference
from ..backends.reference._scan import plain_arithmetic
from . import _catalogue

NAME = "catalogue_cross_entropy"

# Raw arguments: query, items, target, target_weights, target_crow, 5 of the LogitSpec, ignore_index, label_smoothing,
# smoothing_prior, skip_mass, skipped, sparse_grad, save_context, precision.
_NUM_ARGS = 18
_BY_ROW = (0, 2, 3, 6, 8)
# The backward operator: grad_loss, grad_lse, lse, context, mean_vectors, then from query to skip_mass as above, then
# output_mask and precision.
_SAVED = 5
_NUM_BACKWARD_ARGS = 21


def _describe(query: Tensor, items: Tensor, *rest: Any) -> Spec:
    return _spec(NAME, query, *rest)


def _describe_backward(*args: Any) -> Spec:
    query, _, *rest = args[_SAVED:]
    return _spec(f"{NAME}_backward", query, *rest)


def _spec(operator: str, query: Tensor, target: Tensor, weights: Any, crow: Any, *rest: Any) -> Spec:
    return _catalogue.describe(
        operator,
        query,
        rest[:5],
        targets=target.dim() == 2,
        target_csr=crow is not None,
        label_smoothing=rest[6] > 0,
        smoothing_prior=rest[7] is not None,
        skip_mass=rest[8] > 0,
    )


def _fake(*args: Any) -> tuple[Tensor, ...]:
    query, label_smoothing, items, save = args[0], args[11], args[1], args[16]
    new = {"dtype": wide_dtype(query.dtype)}
    loss, lse = query.new_empty(query.shape[0], **new), query.new_empty(query.shape[0], **new)
    context = query.new_empty(query.shape if save else 0, **new)
    smoothed = save and label_smoothing > 0 and items.shape[0] != 0
    return loss, lse, context, query.new_empty(query.shape if smoothed else 0, **new)


def _named(*tensors: Tensor | None) -> dict[str, Tensor | None]:
    return dict(zip(("query", "items", "row_scale", "bias"), tensors, strict=True))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    query, items, _, _, _, _, row_scale, bias, *_ = args[_SAVED:]
    gradients = _catalogue.fake_gradients(_named(query, items, row_scale, bias), args[19], query)
    return *gradients, query.new_empty(query.shape[0], dtype=wide_dtype(query.dtype))


CATALOGUE_CROSS_ENTROPY = Operator(
    NAME,
    reference=reference.forward,
    fake=_fake,
    describe=_describe,
    native=_catalogue.native_softmax,
    native_implementation=native.forward,
)
CATALOGUE_CROSS_ENTROPY_BACKWARD = Operator(
    f"{NAME}_backward",
    reference=reference.backward,
    fake=_fake_backward,
    describe=_describe_backward,
    native=_catalogue.native_softmax,
    native_implementation=native.backward,
)


def _formula(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    target_weights: Tensor | None,
    target_crow: Tensor | None,
    logits: LogitSpec,
    options: tuple[int, float, Tensor | None],
    **by_row: Tensor,
) -> derivatives.CrossEntropyGradient:
    arguments = reference.Arguments(target, target_weights, target_crow, logits, *options)
    num_rows, num_items = query.shape[0], items.shape[0]
    targets = arguments.targets(num_rows, wide_dtype(query.dtype))
    smoothing = arguments.smoothing(targets, num_rows, num_items)
    return derivatives.make(query, items, logits, targets, smoothing, arguments.label_smoothing, **by_row)


@CATALOGUE_CROSS_ENTROPY.register_function
class CatalogueCrossEntropyFunction(torch.autograd.Function):
    """The gradient of ``catalogue_cross_entropy``."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = CATALOGUE_CROSS_ENTROPY.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, items, target, weights, target_crow, scale, row_scale, bias, exclude, crow, *rest = inputs
        ignore_index, label_smoothing, prior, skip_mass, skipped, sparse_grad, _, precision = rest
        _, lse, context, mean_vectors = output
        ctx.mark_non_differentiable(context, mean_vectors)
        ctx.set_materialize_grads(False)
        saved = (query, items, target, weights, target_crow, row_scale, bias, exclude, crow, prior)
        ctx.save_for_backward(*saved, lse, context, mean_vectors)
        ctx.save_for_forward(*saved, lse, context, mean_vectors)
        ctx.scale, ctx.ignore_index, ctx.label_smoothing = scale, ignore_index, label_smoothing
        ctx.skip_mass, ctx.skipped, ctx.sparse_grad, ctx.precision = skip_mass, skipped, sparse_grad, precision
        ctx.forced = _dispatch.forced_backend()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        query, items, target, weights, target_crow, row_scale, bias, exclude, crow, prior, lse, *kept = (
            ctx.saved_tensors
        )
        needs = ctx.needs_input_grad
        mask = [needs[0], needs[1], needs[6], needs[7]]
        if grad_loss is None:
            grad_loss = torch.zeros_like(lse)
        if grad_lse is None:
            grad_lse = torch.zeros_like(lse)
        logits = (ctx.scale, row_scale, bias, exclude, crow)
        options = (ctx.ignore_index, ctx.label_smoothing, prior, ctx.skip_mass, mask, ctx.precision)
        args = (grad_loss, grad_lse, lse, *kept, query, items, target, weights, target_crow, *logits, *options)
        *results, skipped = _catalogue.run_backward(CATALOGUE_CROSS_ENTROPY_BACKWARD, args, ctx.forced)
        dq, di, ds, db = (g if wanted else None for g, wanted in zip(results, mask, strict=True))
        if ctx.skipped is not None and not transforms_active():
            with torch.no_grad():
                ctx.skipped.copy_(skipped)
        if ctx.sparse_grad and di is not None and not torch.is_grad_enabled() and not transforms_active():
            every = torch.arange(items.shape[0], device=di.device)[None]  # a full softmax touches all of them
            di = torch.sparse_coo_tensor(every, di, items.shape, check_invariants=False, is_coalesced=True)
        return dq, di, None, None, None, None, ds, db, *(None,) * (_NUM_ARGS - 8)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        query, items, target, weights, target_crow, row_scale, bias, exclude, crow, prior, lse, *_ = ctx.saved_tensors
        logits = LogitSpec(ctx.scale, row_scale, bias, exclude, crow)
        options = (ctx.ignore_index, ctx.label_smoothing, prior)
        with plain_arithmetic(query.device, ctx.precision):
            formula = _formula(query, items, target, weights, target_crow, logits, options, lse=lse)
            by_row = _catalogue.directions(formula, query=tangents[0], row_scale=tangents[6])
            by_item = _catalogue.directions(formula, items=tangents[1], bias=tangents[7])
            d_loss, d_lse = derivatives.tangent(formula, by_row, by_item)
        return d_loss, d_lse, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        args = (*args[:14], None, *args[15:])  # the skipped mass has no meaning under transforms
        return _catalogue.vmap(
            CatalogueCrossEntropyFunction.apply,
            info,
            in_dims,
            args,
            by_row=_BY_ROW,
            crow=(4, 9),
            one_dim_shared=(8,),
        )


_INCOMING = ("grad_loss", "grad_lse", "lse")


@CATALOGUE_CROSS_ENTROPY_BACKWARD.register_function
class CatalogueCrossEntropyBackwardFunction(torch.autograd.Function):
    """The second derivative of ``catalogue_cross_entropy``: derivatives of the chunk formula, a chunk at a time."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        args, forced = _catalogue.split_forced(args, _NUM_BACKWARD_ARGS)
        result: tuple[Tensor, ...] = CATALOGUE_CROSS_ENTROPY_BACKWARD.below_autograd(*args, forced=forced)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_loss, grad_lse, lse, _, _, query, items, target, weights, target_crow, *rest = inputs[:_NUM_BACKWARD_ARGS]
        scale, row_scale, bias, exclude, crow, ignore_index, label_smoothing, prior, _, mask, precision = rest
        saved = (grad_loss, grad_lse, lse, query, items, row_scale, bias)
        constants = (target, weights, target_crow, exclude, crow, prior)
        ctx.save_for_backward(*saved, *constants)
        ctx.save_for_forward(*saved, *constants)
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.ignore_index, ctx.label_smoothing = scale, ignore_index, label_smoothing
        ctx.mask, ctx.precision = mask, precision

    @staticmethod
    def _formula(ctx: Any) -> derivatives.CrossEntropyGradient:
        query, items, row_scale, bias, target, weights, target_crow, exclude, crow, prior = ctx.saved_tensors[3:]
        incoming = dict(zip(_INCOMING, ctx.saved_tensors[:3], strict=True))
        logits = LogitSpec(ctx.scale, row_scale, bias, exclude, crow)
        options = (ctx.ignore_index, ctx.label_smoothing, prior)
        return _formula(query, items, target, weights, target_crow, logits, options, **incoming)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dq, di, ds, db, _ = gradients
        with plain_arithmetic(ctx.saved_tensors[0].device, ctx.precision):
            formula = CatalogueCrossEntropyBackwardFunction._formula(ctx)
            rows, items = formula.pullback(
                _catalogue.directions(formula, query=dq, row_scale=ds),
                _catalogue.directions(formula, items=di, bias=db),
            )
        names = (*_INCOMING, None, None, "query", "items", None, None, None, None, "row_scale", "bias", *(None,) * 8)
        likes = dict(zip(_INCOMING, ctx.saved_tensors[:3], strict=True)) | _named(*ctx.saved_tensors[3:7])
        return _catalogue.as_gradients(names, {**rows, **items}, likes, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        incoming = dict(zip(_INCOMING, tangents[:3], strict=True))
        query, items, row_scale, bias = tangents[5], tangents[6], tangents[11], tangents[12]
        with plain_arithmetic(ctx.saved_tensors[0].device, ctx.precision):
            formula = CatalogueCrossEntropyBackwardFunction._formula(ctx)
            rows, of_items = formula.pushforward(
                _catalogue.directions(formula, **incoming, query=query, row_scale=row_scale),
                _catalogue.directions(formula, items=items, bias=bias),
            )
        likes = _named(*ctx.saved_tensors[3:7])
        return *_catalogue.as_results({**rows, **of_items}, likes, ctx.mask, ctx.saved_tensors[3]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        mask = args[19]
        return _catalogue.vmap(
            CatalogueCrossEntropyBackwardFunction.apply,
            info,
            in_dims,
            args,
            by_row=(*range(_SAVED), *(_SAVED + n for n in _BY_ROW)),
            crow=(_SAVED + 4, _SAVED + 9),
            one_dim_shared=(_SAVED + 8,),
            foldable=not (mask[1] or mask[3]),
        )
