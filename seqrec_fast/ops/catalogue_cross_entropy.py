"""``catalogue_cross_entropy``: the training loss over the whole catalogue, or over sampled negatives; the public function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from .._logits import (
    LogitSpec,
    check_float,
    check_id_tensor,
    check_int,
    check_sparse_layout,
    check_vector,
    csr_parts,
    is_csr,
    wide_dtype,
)
from .._operator import transforms_active
from .._precision import current_precision
from ..backends.reference import catalogue_sampled_cross_entropy as sampled_reference
from ..backends.reference._sampled import Sampled
from . import _catalogue
from ._full_cross_entropy import CATALOGUE_CROSS_ENTROPY
from ._sampled_cross_entropy import CATALOGUE_SAMPLED_CROSS_ENTROPY

if TYPE_CHECKING:
    from typing_extensions import Unpack

NAME = "catalogue_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


class _Keywords(TypedDict, total=False):
    """The keywords that have no say in how many tensors are returned."""

    scale: float | Tensor
    bias: Tensor | None
    exclude: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    target_weights: Tensor | None
    smoothing_prior: Tensor | None
    negatives: Tensor | None
    negatives_log_q: Tensor | None
    sparse_grad: bool
    skip_mass: float


@overload
def catalogue_cross_entropy(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_skipped: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...


@overload
def catalogue_cross_entropy(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[True],
    return_skipped: bool = False,
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, ...]: ...


@overload
def catalogue_cross_entropy(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    return_lse: bool = False,
    return_skipped: bool = False,
    **keywords: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, ...]: ...


def catalogue_cross_entropy(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
    target_weights: Tensor | None = None,
    smoothing_prior: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_log_q: Tensor | None = None,
    sparse_grad: bool = False,
    skip_mass: float = 0.0,
    return_skipped: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """−log softmaxᵢ(s[r, i]) at the target, with s[r, i] = scale·(q_r·vᵢ) + biasᵢ over all I items, without a B×I array.

    The softmax is an online one (Milakov & Gimelshein 2018). The query's gradient is attention over the catalogue, so the
    forward keeps it and the backward scans the catalogue once more, for the items. With ``negatives`` the softmax runs over the
    targets and the negatives alone (Bengio & Senécal 2008), corrected by −log q (Yi et al. 2019).

    Args:
        query: [..., d]; float16, bfloat16, float32 or float64. Every other floating tensor shares its dtype and device.
        items: [I, d].
        target: int64. One a row: [...]. Several a row: [..., P] padded with −1, or a ``torch.sparse_csr`` matrix [B, I] whose
            values are ignored. A row's targets are never excluded from it.
        scale: a float, or one for each row with the shape of the query's leading dimensions.
        bias: [I], added to the scores unscaled. −∞ removes an item.
        exclude: items without a part in a row: int64 or int32 [..., n] padded with −1; or [n] for every row; or a
            ``torch.sparse_csr`` matrix [B, I] whose values are ignored.
        ignore_index: rows with this target have loss and gradients 0 and are absent from the mean. A row of several targets is
            ignored when all are padding.
        label_smoothing: ε in (1 − ε)·nll(target) + ε·(mean of −log p over the row's items that are not excluded).
        reduction: "mean" over the rows that are not ignored (0 when there is none; torch: NaN), "sum" or "none".
        return_lse: also return log Σᵢ exp(s[r, i]), differentiable (for a z-loss); 0 in ignored rows.
        target_weights: for several targets, −Σ w·log p: the shape of ``target`` (CSR: of its column indices). Default: uniform,
            adding up to 1. Not differentiable.
        smoothing_prior: [I], not negative: weights of the mean that smoothing mixes in. Not differentiable.
        negatives: int64 [n] for every row, or [..., n]; −1 is padding. Those that hit a target of the row or are excluded drop
            out. Drawn twice counts twice.
        negatives_log_q: of their shape, subtracted from their scores (not from the target's). Not differentiable.
        sparse_grad: the items' gradient is a coalesced ``torch.sparse_coo`` tensor over the touched rows. Not under
            ``torch.compile``; dense in a double backward and under transforms.
        skip_mass: δ: the backward may leave out tiles of items whose probability in each row adds up to at most δ. 0 is exact. With
            negatives nothing is left out.
        return_skipped: also return a float tensor [...], last, that holds the mass left out of each row after ``backward()``.
            Not under ``torch.compile``.

    Returns:
        loss, then lse and the skipped mass as asked for. Loss (of shape [...] with "none", else a scalar), lse and mass are
        float32 (float64 for float64 input).

    Raises:
        TypeError: something is not a tensor of the right kind, or dtypes differ.
        ValueError: a shape, device or option does not fit.
        IndexError: a target, negative or excluded id is out of range (CPU; on CUDA such a target gives NaN, other ids match
            nothing).
        BackendUnavailable: the backend in force by ``use_backend`` cannot run the call.

    Differentiable twice in query, items, bias and a tensor scale, through loss and lse; forward-mode and vmap included. Under
    autocast query and items are cast. Cost: 4·B·I·d FLOPs forward with a gradient, 4·B·I·d backward.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> query = torch.randn(4, 16, requires_grad=True)
        >>> loss = sf.catalogue_cross_entropy(query, torch.randn(1000, 16), torch.tensor([3, 999, -100, 0]))
        >>> loss.backward()
        >>> query.grad[2].abs().max()
        tensor(0.)
    """
    query, items = _catalogue.autocast(NAME, query=query, items=items)
    _catalogue.check_matrices(NAME, query, items)
    dtypes = _catalogue.autocast_dtypes(query.device, query.dtype)
    logits = LogitSpec.build(NAME, query, items, scale=scale, bias=bias, exclude=exclude, float_dtypes=dtypes)
    label_smoothing, skip_mass, ignore_index = check_options(reduction, label_smoothing, skip_mass, ignore_index)
    targets = _targets(query, items, target, target_weights, ignore_index, dtypes)
    _check_vector_options(query, items, smoothing_prior, negatives, negatives_log_q, dtypes)
    _catalogue.refuse_gradient(
        NAME, target_weights=target_weights, smoothing_prior=smoothing_prior, negatives_log_q=negatives_log_q
    )
    if torch.compiler.is_compiling() and (sparse_grad or return_skipped):
        raise ValueError(f"{NAME}: {'sparse_grad' if sparse_grad else 'return_skipped'}=True has no compiled form")
    rows = _catalogue.rows_of(query)
    skipped = rows.new_zeros(rows.shape[0], dtype=wide_dtype(query.dtype)) if return_skipped else None
    raw_targets = (targets.ids, targets.weights, targets.crow)
    options = (ignore_index, label_smoothing, smoothing_prior)
    precision = current_precision()
    if negatives is None:
        save = _catalogue.wants_gradient(query, logits.row_scale) or transforms_active_eagerly()
        loss, lse, _, _ = CATALOGUE_CROSS_ENTROPY(
            rows, items, *raw_targets, *logits.args(), *options, skip_mass, skipped, sparse_grad, save, precision,
        )  # fmt: skip
    else:
        negatives = negatives if negatives.dim() == 1 else negatives.reshape(rows.shape[0], negatives.shape[-1])
        log_q = None if negatives_log_q is None else negatives_log_q.reshape(negatives.shape)
        if transforms_active_eagerly():
            # Every transform differentiates the plain formula: nothing of it is as large as the catalogue.
            wide = wide_dtype(query.dtype)
            sampled = Sampled.build(*raw_targets, negatives, log_q, logits, *options, items.shape[0], wide)
            row_scale = None if logits.row_scale is None else logits.row_scale.to(wide)
            wide_bias = None if logits.bias is None else logits.bias.to(wide)
            loss, lse = sampled_reference.loss_and_lse(rows.to(wide), items, row_scale, wide_bias, sampled)
        else:
            loss, lse = CATALOGUE_SAMPLED_CROSS_ENTROPY(
                rows, items, *raw_targets, negatives, log_q, *logits.args(), *options, sparse_grad, precision
            )
    lead = query.shape[:-1]
    reduced = _reduce(loss, targets.valid, reduction).reshape(lead if reduction == "none" else ())
    extra = [lse.reshape(lead)] if return_lse else []
    if skipped is not None:
        extra.append(skipped.reshape(lead))
    return (reduced, *extra) if extra else reduced


def transforms_active_eagerly() -> bool:
    return not torch.compiler.is_compiling() and transforms_active()


def _reduce(loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / valid.sum().clamp_min(1)


def check_options(
    reduction: str, label_smoothing: float, skip_mass: float, ignore_index: int
) -> tuple[float, float, int]:
    """The options that are no tensors: label_smoothing, skip_mass and ignore_index as Python's numbers.

    Raises:
        TypeError, ValueError.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"{NAME}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    label_smoothing = check_float(NAME, "label_smoothing", label_smoothing)
    skip_mass = check_float(NAME, "skip_mass", skip_mass)
    for name, value in (("label_smoothing", label_smoothing), ("skip_mass", skip_mass)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{NAME}: {name} must be between 0 and 1, got {value}")
    return label_smoothing, skip_mass, check_int(NAME, "ignore_index", ignore_index)


@dataclass(frozen=True)
class _Targets:
    ids: Tensor  # [B], [B, P], or [N] with crow
    weights: Tensor | None  # of the shape of ids
    crow: Tensor | None  # [B + 1]
    valid: Tensor  # bool [B], rows that are not ignored


def _targets(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    dtypes: tuple[torch.dtype, ...],
) -> _Targets:
    if is_csr(target):
        ids, crow = csr_parts(NAME, "target", target, query, items.shape[0])
        _check_weights(query, weights, ids.shape, dtypes)
        return _Targets(ids.long(), weights, crow, crow.diff() > 0)
    check_sparse_layout(NAME, "target", target)
    check_id_tensor(NAME, "target", target, query, (torch.int64,))
    lead = query.shape[:-1]
    if target.shape == lead:
        if weights is not None:
            raise ValueError(
                f"{NAME}: target_weights needs several targets a row, target [..., P]; got target {tuple(target.shape)}. "
                'Row weights: use reduction="none"'
            )
        ids = target.reshape(-1)
        return _Targets(ids, None, None, ids != ignore_index)
    if target.dim() != query.dim() or target.shape[:-1] != lead:
        raise ValueError(
            f"{NAME}: target must have shape [...] or [..., P] with the query's leading dimensions {tuple(lead)}, "
            f"got {tuple(target.shape)}"
        )
    _check_weights(query, weights, target.shape, dtypes)
    rows = 1
    for size in lead:
        rows *= size
    ids = target.reshape(rows, target.shape[-1])
    weights = None if weights is None else weights.reshape(ids.shape)
    return _Targets(ids, weights, None, (ids != -1).any(1))


def _check_weights(
    query: Tensor, weights: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if weights is None:
        return
    check_vector(NAME, "target_weights", weights, query, dtypes)
    if tuple(weights.shape) != tuple(shape):
        raise ValueError(
            f"{NAME}: target_weights must have the shape of the targets {tuple(shape)}, got {tuple(weights.shape)}"
        )


def _check_vector_options(
    query: Tensor,
    items: Tensor,
    prior: Tensor | None,
    negatives: Tensor | None,
    log_q: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if prior is not None:
        check_vector(NAME, "smoothing_prior", prior, query, dtypes)
        if prior.shape != items.shape[:1]:
            raise ValueError(
                f"{NAME}: smoothing_prior must have shape [I] = ({items.shape[0]},), got {tuple(prior.shape)}"
            )
    if negatives is None:
        if log_q is not None:
            raise ValueError(f"{NAME}: negatives_log_q was given without negatives")
        return
    check_id_tensor(NAME, "negatives", negatives, query, (torch.int64,))
    lead = query.shape[:-1]
    if negatives.dim() != 1 and (negatives.dim() != query.dim() or negatives.shape[:-1] != lead):
        raise ValueError(
            f"{NAME}: negatives must have shape [n], or [..., n] with the query's leading dimensions {tuple(lead)}, "
            f"got {tuple(negatives.shape)}"
        )
    if log_q is not None:
        check_vector(NAME, "negatives_log_q", log_q, query, dtypes)
        if log_q.shape != negatives.shape:
            raise ValueError(
                f"{NAME}: negatives_log_q must have the shape of negatives {tuple(negatives.shape)}, "
                f"got {tuple(log_q.shape)}"
            )
