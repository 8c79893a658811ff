"""Calls of the native softmax over the catalogue, against the reference in fp64 from the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqrec_fast.backends.native import catalogue_cross_entropy as cross_entropy
from seqrec_fast.backends.reference import catalogue_attention as reference_attention
from seqrec_fast.backends.reference import catalogue_cross_entropy as reference_cross_entropy

native = torch.ops.seqrec_fast_native
# Of the largest number of a result: fp32 sums over thousands of terms, scores of size 10 made twice.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Logits:
    scale: float = 1.0
    row_scale: Tensor | None = None
    bias: Tensor | None = None
    exclude: Tensor | None = None
    crow: Tensor | None = None

    def args(self) -> tuple[Any, ...]:
        return self.scale, self.row_scale, self.bias, self.exclude, self.crow

    def double(self) -> Logits:
        wide = (None if t is None else t.double() for t in (self.row_scale, self.bias))
        return Logits(self.scale, *wide, self.exclude, self.crow)


PLAIN = Logits()


@dataclass(frozen=True)
class Attention:
    query: Tensor
    keys: Tensor
    values: Tensor | None = None
    heads: int = 1
    logits: Logits = PLAIN

    def tensors(self) -> tuple[Any, ...]:
        return self.query, self.keys, self.values, self.heads

    def double(self) -> Attention:
        values = None if self.values is None else self.values.double()
        return replace(
            self, query=self.query.double(), keys=self.keys.double(), values=values, logits=self.logits.double()
        )

    def seeds(self) -> tuple[Tensor, Tensor]:
        width = (self.keys if self.values is None else self.values).shape[1]
        generator = torch.Generator().manual_seed(3)
        of_context = torch.randn((len(self.query), width), generator=generator).to(self.query.dtype)
        return of_context, torch.randn((len(self.query), self.heads), generator=generator)

    def mask(self) -> list[bool]:
        return [True, True, self.values is not None, self.logits.row_scale is not None, self.logits.bias is not None]

    def native(self) -> list[Tensor]:
        """context, lse, and the gradients of query, keys, values, row_scale and bias."""
        context, lse = native.catalogue_attention.default(*self.tensors(), *self.logits.args(), 0)
        incoming = (*self.seeds(), context, lse)
        args = (*incoming, *self.tensors(), *self.logits.args(), self.mask(), 0)
        return [context, lse, *native.catalogue_attention_backward.default(*args)]

    def reference(self) -> list[Tensor]:
        wide = self.double()
        context, lse = reference_attention.forward(*wide.tensors(), *wide.logits.args(), 0)
        incoming = (*(seed.double() for seed in self.seeds()), context, lse)
        args = (*incoming, *wide.tensors(), *wide.logits.args(), self.mask(), 0)
        return [context, lse, *reference_attention.backward(*args)]


@dataclass(frozen=True)
class CrossEntropy:
    query: Tensor
    items: Tensor
    target: Tensor
    logits: Logits = PLAIN
    weights: Tensor | None = None
    crow: Tensor | None = None
    label_smoothing: float = 0.0
    skip_mass: float = 0.0

    def run(self, backend: Any, case: CrossEntropy) -> list[Tensor]:
        lists = (case.target, case.weights, case.crow)
        options = (-100, case.label_smoothing, None, case.skip_mass)
        loss, lse, context, means = backend.forward(
            case.query, case.items, *lists, *case.logits.args(), *options, None, False, True, 0
        )
        generator = torch.Generator().manual_seed(3)
        seeds = (torch.randn(len(case.query), generator=generator).to(loss.dtype) for _ in range(2))
        mask = [True, True, case.logits.row_scale is not None, case.logits.bias is not None]
        args = (*seeds, lse, context, means, case.query, case.items, *lists, *case.logits.args(), *options, mask, 0)
        return [loss, lse, *backend.backward(*args)]

    def native(self) -> list[Tensor]:
        """loss, lse, the gradients of query, items, row_scale and bias, and the mass skipped."""
        return self.run(cross_entropy, self)

    def reference(self) -> list[Tensor]:
        weights = None if self.weights is None else self.weights.double()
        wide = replace(
            self,
            query=self.query.double(),
            items=self.items.double(),
            weights=weights,
            logits=self.logits.double(),
            skip_mass=0.0,
        )
        return self.run(reference_cross_entropy, wide)


def check(case: Attention | CrossEntropy, tolerance: float | None = None) -> None:
    dtype = case.query.dtype
    for n, (own, right) in enumerate(zip(case.native(), case.reference(), strict=True)):
        assert own.shape == right.shape or own.numel() == right.numel() == 0, n
        if not right.numel():
            continue
        assert own.isnan().equal(right.isnan()), n
        assert (own == float("-inf")).equal(right == float("-inf")), n
        finite = right.isfinite()
        if bool(finite.any()):
            size = max(1e-3, float(right[finite].abs().max()))
            error = float((own.double() - right)[finite].abs().max())
            assert error <= (tolerance or TOLERANCE[dtype]) * size, (n, error, size)


def lists(rows: int, items: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, items, (rows, length), generator=generator)


def options(rows: int, items: int, dtype: torch.dtype) -> Logits:
    """Every option at once."""
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(items, generator=generator).masked_fill(torch.rand(items, generator=generator) < 0.1, -torch.inf)
    row_scale = 0.5 + torch.rand(rows, generator=generator)
    return Logits(0.75, row_scale.to(dtype), bias.to(dtype), lists(rows, items, 7))
