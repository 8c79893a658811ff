"""What the public catalogue functions and their gradients share: checks, autocast, leading dimensions, vmap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._dispatch import Spec
from .._logits import check_id_tensor, check_storage, wide_dtype
from .._operator import Operator, tracing, transforms_active
from .._precision import autocast_enabled
from ..backends.reference._derivatives import Formula
from ._checks import check_floating


def check_is_tensor(operator: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(value).__name__}")


def autocast_dtypes(device: torch.device, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What floating options may be beside tensors of ``dtype`` (after autocast): wide too where autocast is on."""
    return (dtype, torch.float32) if autocast_enabled(device.type) and dtype != torch.float64 else (dtype,)


def autocast(operator: str, **tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast wants matrix operands, where it is on; fp64 is left alone, as torch does."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_is_tensor(operator, name, tensor)
    kind = next((tensor.device.type for tensor in tensors.values() if tensor is not None), "cpu")
    if not autocast_enabled(kind):
        return tuple(tensors.values())
    for name, tensor in tensors.items():
        if tensor is not None:
            check_storage(operator, name, tensor)
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor | None) -> Tensor | None:
        castable = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if castable and tensor is not None else tensor

    return tuple(cast(tensor) for tensor in tensors.values())


def check_matrices(operator: str, query: Tensor, items: Tensor, items_name: str = "items") -> None:
    """query [..., d] and items [I, d] of one dtype and device.

    Raises:
        TypeError, ValueError.
    """
    for name, tensor in (("query", query), (items_name, items)):
        check_is_tensor(operator, name, tensor)
    check_floating(operator, **{"query": query, items_name: items})
    for name, tensor in (("query", query), (items_name, items)):
        check_storage(operator, name, tensor)
    if query.dim() == 0:
        raise ValueError(f"{operator}: query must have shape [..., d], got a scalar")
    if items.dim() != 2:
        raise ValueError(f"{operator}: {items_name} must have shape [I, d], got {tuple(items.shape)}")
    if items.shape[1] != query.shape[-1]:
        raise ValueError(
            f"{operator}: {items_name} must have the query's width d = {query.shape[-1]}, got {tuple(items.shape)}"
        )


def rows_of(query: Tensor) -> Tensor:
    """[..., d] → [B, d]."""
    if query.dim() == 2:
        return query
    count = 1
    for size in query.shape[:-1]:
        count *= size
    return query.reshape(count, query.shape[-1])  # not -1: d or B may be 0


def check_single_target(operator: str, target: Tensor, query: Tensor) -> Tensor:
    """target int64 of the query's leading shape → [B].

    Raises:
        TypeError, ValueError.
    """
    check_id_tensor(operator, "target", target, query, (torch.int64,))
    if target.shape != query.shape[:-1]:
        raise ValueError(
            f"{operator}: target must have the shape of the query's leading dimensions {tuple(query.shape[:-1])}, "
            f"got {tuple(target.shape)}"
        )
    return target.reshape(-1)


@lru_cache(maxsize=256)
def _spec(operator: str, device: str, dtype: torch.dtype, width: int, options: frozenset[str]) -> Spec:
    return Spec(operator, device, dtype, (width,), options)


def describe(operator: str, query: Tensor, logits: tuple[Any, ...], **flags: bool) -> Spec:
    """The :class:`Spec` of a call: the width of the query and the names of the options in use."""
    _, row_scale, bias, exclude, crow = logits
    options = [name for name, wanted in flags.items() if wanted]
    if row_scale is not None:
        options.append("row_scale")
    if bias is not None:
        options.append("bias")
    if exclude is not None:
        options.append("exclude_csr" if crow is not None else "exclude")
    return _spec(operator, query.device.type, query.dtype, int(query.shape[1]), frozenset(options))


def native_softmax(spec: Spec) -> str | None:
    """``supports`` of the compiled softmax over the catalogue."""
    return "the native softmax scan computes in fp32, so not for float64" if spec.dtype == torch.float64 else None


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_gradient(operator: str, **tensors: Tensor | None) -> None:
    """Options that are constants of the loss.

    Raises:
        ValueError: one requires a gradient, which it would silently not get.
    """
    for name, tensor in tensors.items():
        if wants_gradient(tensor):
            raise ValueError(f"{operator}: {name} has no gradient; pass {name}.detach()")


# Gradients.


def run_backward(operator: Operator, args: tuple[Any, ...], forced: str) -> tuple[Tensor, ...]:
    """The backward operator, differentiable where somebody may differentiate it; with the backend of the forward."""
    # ``forced`` goes along as an argument: use_backend is one setting for all threads, and backwards run in several at once.
    results: tuple[Tensor, ...]
    if not (torch.is_grad_enabled() or transforms_active()):
        results = operator.below_autograd(*args, forced=forced)
    elif tracing():
        results = operator(*args)
    elif transforms_active() or any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        results = operator.function.apply(*args, forced)
    else:
        results = operator.run(*args, forced=forced)
    return results


def split_forced(args: tuple[Any, ...], count: int) -> tuple[tuple[Any, ...], str | None]:
    """The ``count`` raw arguments of a backward operator, and the backend that :func:`run_backward` added to them, if it did."""
    return args[:count], args[count] if len(args) > count else None


def directions(formula: Formula, **given: Tensor | None) -> dict[str, Tensor]:
    """Tangents or incoming gradients of those tensors that the formula has, zeros where None, in its dtype."""
    found: dict[str, Tensor] = {}
    for name, like in {**formula.by_row, **formula.by_item}.items():  # torch.func wants one order
        if name not in given:
            continue
        tensor = given[name]
        unknown = tensor is None or tensor.shape != like.shape  # [0]: a gradient that nobody asked for
        found[name] = torch.zeros_like(like) if unknown or tensor is None else tensor.to(like.dtype)
    return found


def as_gradients(
    names: Sequence[str | None], found: dict[str, Tensor], likes: dict[str, Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the raw arguments ``names``, each in its input's dtype.

    ``needs`` may be one longer than ``names``, by the backend that :func:`run_backward` adds.
    """
    gradients: list[Tensor | None] = []
    for name, needed in itertools.zip_longest(names, needs):
        gradient = found.get(name) if needed and name is not None else None
        like = None if name is None else likes.get(name)
        gradients.append(gradient if gradient is None or like is None else gradient.to(like.dtype))
    return tuple(gradients)


def empty_gradient(query: Tensor, name: str, like: Tensor | None) -> Tensor:
    """What a backward operator returns for a gradient that is not wanted: [0]."""
    wide = name in ("row_scale", "bias") and like is None
    return query.new_empty(0, dtype=wide_dtype(query.dtype) if wide else query.dtype if like is None else like.dtype)


def as_results(
    found: dict[str, Tensor], likes: dict[str, Tensor | None], mask: Sequence[bool], query: Tensor
) -> tuple[Tensor, ...]:
    """Tangents of a backward operator's gradients, [0] where ``mask`` is false."""
    return tuple(
        found[name].to(like.dtype) if wanted and like is not None else empty_gradient(query, name, like)
        for (name, like), wanted in zip(likes.items(), mask, strict=True)
    )


def fake_gradients(likes: dict[str, Tensor | None], mask: Sequence[bool], query: Tensor) -> tuple[Tensor, ...]:
    """Shapes and dtypes of a backward operator's gradients."""
    return tuple(
        torch.empty_like(like, memory_format=torch.contiguous_format)
        if wanted and like is not None
        else empty_gradient(query, name, like)
        for (name, like), wanted in zip(likes.items(), mask, strict=True)
    )


# vmap. A batch of queries against one catalogue is just more rows; otherwise the members run one by one.


def vmap(
    apply: Callable[..., Any],
    info: Any,
    in_dims: tuple[Any, ...],
    args: tuple[Any, ...],
    *,
    by_row: Collection[int],
    crow: Collection[int],
    one_dim_shared: Collection[int] = (),
    foldable: bool = True,
) -> tuple[Any, Any]:
    """The vmap rule of a catalogue operator's Function.

    Args:
        apply: the Function.
        info, in_dims, args: as torch passes them.
        by_row: places of the arguments that have a row for each query.
        crow: places of arguments that begin rows; given any, nothing can be folded.
        one_dim_shared: places of arguments that hold for every row alike when 1-D.
        foldable: whether all results wanted are by row.
    """
    size = info.batch_size
    batched = {n for n, dim in enumerate(in_dims) if isinstance(args[n], Tensor) and dim is not None}

    def per_member_dim(n: int) -> int:
        return int(args[n].dim()) - (1 if n in batched else 0)

    shared = {n for n in one_dim_shared if args[n] is not None and per_member_dim(n) == 1}
    fold = foldable and all(args[n] is None for n in crow) and all(n in by_row and n not in shared for n in batched)
    if not fold:
        return _one_by_one(apply, size, in_dims, args, batched)
    folded = list(args)
    for n in by_row:
        if args[n] is None or n in shared:
            continue
        tensor = args[n].movedim(in_dims[n], 0) if n in batched else args[n].expand(size, *args[n].shape)
        folded[n] = tensor.flatten(0, 1)
    results = apply(*folded)
    if isinstance(results, Tensor):
        return results.unflatten(0, (size, results.shape[0] // size)), 0
    return tuple(r.unflatten(0, (size, r.shape[0] // size)) for r in results), (0,) * len(results)


def _one_by_one(
    apply: Callable[..., Any], size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], batched: set[int]
) -> tuple[Any, Any]:
    members = [
        apply(*(arg.select(in_dims[n], member) if n in batched else arg for n, arg in enumerate(args)))
        for member in range(size)
    ]
    if isinstance(members[0], Tensor):
        return torch.stack(members), 0
    return tuple(torch.stack(results) for results in zip(*members, strict=True)), (0,) * len(members[0])
