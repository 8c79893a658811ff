"""Derivatives of the values of top-k beyond the first, and their tangent: plain PyTorch on a gather of the listed items."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._logits import LogitSpec, wide_dtype
from ._derivatives import tangent_of, vjp
from .catalogue_topk import gathered_scores

Named = dict[str, "Tensor | None"]


def _present(inputs: Named, like: Named | None = None) -> dict[str, Tensor]:
    """The tensors that are there, wide; of ``like`` those that ``inputs`` has, zeros where None or [0]."""
    found = {}
    for name, tensor in inputs.items():
        if tensor is None:
            continue
        wide = wide_dtype(tensor.dtype)
        if like is None:
            found[name] = tensor.to(wide)
            continue
        other = like[name]
        same = other is not None and other.shape == tensor.shape
        found[name] = other.to(wide) if same and other is not None else torch.zeros_like(tensor, dtype=wide)
    return found


class _Values:
    """Values [B, k] as a function of the named tensors, and their first derivative as one."""

    def __init__(self, ids: Tensor, scale: float) -> None:
        self.ids, self.scale = ids, scale

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        logits = LogitSpec(self.scale, tensors.get("row_scale"), tensors.get("bias"))
        return gathered_scores(tensors["query"], tensors["items"], logits, self.ids)

    def gradient(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: tensor for name, tensor in tensors.items() if name != "grad_values"}
        _, pull = vjp(self, inputs)
        result: dict[str, Tensor] = pull(tensors["grad_values"])[0]
        return result


def tangent(inputs: Named, moved: Named, ids: Tensor, scale: float) -> Tensor:
    """Tangent of the values."""
    primals = _present(inputs)
    result: Tensor = tangent_of(_Values(ids, scale), (primals,), (_present(inputs, moved),))
    return result


def pullback(inputs: Named, gradients: Named, ids: Tensor, scale: float) -> dict[str, Tensor]:
    """Gradients of the inputs, ``grad_values`` included, given those of the first derivative's results."""
    primals = _present(inputs)
    of_results = {name: tensor for name, tensor in inputs.items() if name != "grad_values"}
    _, pull = vjp(_Values(ids, scale).gradient, primals)
    result: dict[str, Tensor] = pull(_present(of_results, gradients))[0]
    return result


def pushforward(inputs: Named, moved: Named, ids: Tensor, scale: float) -> dict[str, Tensor]:
    """Tangents of the first derivative's results."""
    primals = _present(inputs)
    result: dict[str, Tensor] = tangent_of(_Values(ids, scale).gradient, (primals,), (_present(inputs, moved),))
    return result
