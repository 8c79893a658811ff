"""For tests of code that uses the operators: look at values that an accelerator does not look at, and compare with eager PyTorch."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._logits import LogitSpec, check_exclusion, check_ids, is_csr
from .backends.reference._sequence import check_lengths, check_table_ids
from .backends.reference.catalogue_cross_entropy import check_prior, check_targets

__all__ = ["assert_no_worse_than_eager", "validate"]

# Public operators, and whether one of their arguments has values that must lie in a range.
OPERATORS = {
    "catalogue_attention": True,
    "catalogue_cross_entropy": True,
    "catalogue_rank": True,
    "catalogue_topk": True,
    "gru": True,
    "gru_step": False,
    "lstm": True,
    "lstm_embedding": True,
    "lstm_step": False,
}


def validate(op_name: str, *args: Any, **options: Any) -> None:
    """Raise for values out of range what the operator itself raises on the CPU, on any device: item ids, priors, lengths.

    On an accelerator a look at values is a wait for the device, so the operators do not look: an out-of-range target gives a NaN
    loss or rank −1, any other such id matches nothing. This looks, and waits. Shapes and dtypes are for the call itself to check.

    Args:
        op_name: a public operator, e.g. ``"catalogue_cross_entropy"``.
        args, options: as the call takes them.

    Raises:
        ValueError: an unknown operator; lengths or a prior out of range.
        TypeError: arguments that the operator does not take.
        IndexError: an id out of range.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> query, items = torch.randn(2, 8), torch.randn(10, 8)
        >>> sf.testing.validate("catalogue_rank", query, items, torch.tensor([3, 10]))
        Traceback (most recent call last):
            ...
        IndexError: catalogue_rank: target must hold item ids in 0…9, got 10
    """
    if op_name not in OPERATORS:
        raise ValueError(f"validate: unknown operator {op_name!r}; known are {', '.join(OPERATORS)}")
    if not OPERATORS[op_name]:
        return
    function: Callable[..., Any] = getattr(importlib.import_module(f"seqrec_fast.ops.{op_name}"), op_name)
    try:
        bound = inspect.signature(function).bind(*args, **options)
    except TypeError as error:
        raise TypeError(f"{op_name}: {error}") from None
    bound.apply_defaults()
    check = _validate_catalogue if op_name.startswith("catalogue_") else _validate_sequence
    check(op_name, bound.arguments)


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()


def _validate_catalogue(operator: str, given: dict[str, Any]) -> None:
    query: Tensor = given["query"]
    items: Tensor = given["keys" if operator == "catalogue_attention" else "items"]
    num_items = items.shape[0]
    # The numbers do not matter for the ids: stand-ins of the right shapes, so that no large tensor is copied.
    stand_ins = torch.empty(query.shape), torch.empty((num_items, 0))
    logits = LogitSpec.build(operator, *stand_ins, exclude=_on_cpu(given["exclude"]))
    check_exclusion(operator, logits, num_items)
    target: Tensor | None = _on_cpu(given.get("target"))
    if target is not None and is_csr(target):
        check_targets(operator, target.col_indices(), target.crow_indices(), 0, num_items)
    elif target is not None:
        several = target.shape != query.shape[:-1]
        flat = target.reshape(-1, target.shape[-1]) if several and target.numel() else target.reshape(-1)
        check_targets(operator, flat, None, given["ignore_index"], num_items)
    negatives = _on_cpu(given.get("negatives"))
    if negatives is not None:
        check_ids(operator, "negatives", negatives, num_items, padding=True)
    check_prior(operator, _on_cpu(given.get("smoothing_prior")))


def _validate_sequence(operator: str, given: dict[str, Any]) -> None:
    embedded = operator == "lstm_embedding"
    tokens = given["ids" if embedded else "input"]
    batch_first = given["module"].batch_first if embedded else given["batch_first"]
    lengths = _on_cpu(given["lengths"])
    inside: Tensor | None = None
    if lengths is not None and isinstance(tokens, Tensor):
        steps = tokens.shape[1 if batch_first else 0]
        check_lengths(operator, lengths, steps)
        inside = torch.arange(steps) < lengths[:, None]  # [B, T]: ids at padding are not looked at
        inside = inside if batch_first else inside.t()
    if embedded:
        ids = tokens.cpu()
        check_table_ids(operator, ids if inside is None else ids[inside], given["table"].shape[0])


def assert_no_worse_than_eager(
    actual: Tensor,
    eager: Tensor | Sequence[Tensor],
    truth: Tensor,
    *,
    factor: float = 2.0,
    absolute: float = 0.0,
    name: str = "result",
) -> None:
    """Error of ``actual`` ≤ ``factor`` × that of eager PyTorch, plus two roundings of the largest value; and no bias.

    The rule that every backend of this package is held to: 2 for values, 3 for gradients.

    Args:
        actual: the result under test.
        eager: the same from plain PyTorch in the same dtype. Several runs that sum in different orders give a steadier yardstick:
            over a few elements, one run's largest error is a matter of luck.
        truth: the same in fp64, from the same numbers. NaN and ±∞ must be where the truth has them.
        factor: of the largest of eager's errors.
        absolute: added to the bound. Say beside the call why it is due.
        name: for the message.

    Raises:
        AssertionError: another shape; a larger error; or, over 256 elements or more, a mean signed error of over 0.4 of the
            largest (truncation instead of rounding has 0.5).

    Example:
        >>> import torch, seqrec_fast as sf
        >>> query, items = torch.randn(5, 8), torch.randn(100, 8)
        >>> stock = lambda q, v: torch.softmax(q @ v.T, 1) @ v
        >>> context = sf.catalogue_attention(query, items)
        >>> truth = stock(query.double(), items.double())
        >>> sf.testing.assert_no_worse_than_eager(context, stock(query, items), truth)
    """
    runs = [eager] if isinstance(eager, Tensor) else list(eager)
    if actual.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if truth.numel() == 0:
        return
    size = float(truth.abs().nan_to_num(nan=0.0, posinf=0.0).max())
    unit = torch.finfo(actual.dtype).eps * size
    own, yardstick = largest_error(actual, truth), max(largest_error(run, truth) for run in runs)
    bound = factor * yardstick + 2 * unit + absolute
    if not own <= bound:
        raise AssertionError(f"{name}: error {own:.3g}, eager's is {yardstick:.3g}, the bound {bound:.3g}")
    finite = truth.isfinite()
    if int(finite.sum()) >= 256:
        mean = abs(float((actual.double() - truth)[finite].mean()))
        if mean > 0.4 * max(own, unit):
            raise AssertionError(f"{name}: mean signed error {mean:.3g} against a largest of {own:.3g}")


def largest_error(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute error; infinite where NaN or ±∞ is not where the truth has it."""
    actual, truth = actual.detach().double().to(truth.device), truth.detach()
    alike = (actual == truth) | (actual.isnan() & truth.isnan())
    difference = torch.where(alike, 0.0, (actual - truth).abs()).nan_to_num(nan=float("inf"))
    return float(difference.max()) if difference.numel() else 0.0
