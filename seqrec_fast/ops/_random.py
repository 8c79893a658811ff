"""Seeds from torch's generator, and dropout that depends on nothing but a seed and the place of a unit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch import Spec
from .._operator import Operator, transforms_active
from ..backends.reference import keyed_dropout as reference


def draw_seed(device: torch.device) -> Tensor:
    """An int64 scalar tensor from torch's generator of ``device``; the generator moves on by one draw.

    Opaque to a compiler, which would otherwise put its own generator in place of torch's: so eager equals compiled. Under
    ``torch.vmap`` it follows the ``randomness`` argument.
    """
    if not torch.compiler.is_compiling() and transforms_active():
        return reference.draw_seed(device)
    seed: Tensor = DRAW_SEED(device)
    return seed


def keyed_dropout(x: Tensor, seed: Tensor, stream: int, p: float, batch_first: bool) -> Tensor:
    """x/(1 − p) [T, B, U] (or [B, T, U]), 0 where the mask of ``stream`` drops; see ``backends/reference/_philox.py``.

    The gradient is the same operator on the gradient.
    """
    if not torch.compiler.is_compiling() and transforms_active():
        return reference.forward(x, seed, stream, p, batch_first)
    result: Tensor = KEYED_DROPOUT(x, seed, stream, p, batch_first)
    return result


DRAW_SEED = Operator(
    "draw_seed",
    reference=reference.draw_seed,
    fake=lambda device: torch.empty((), dtype=torch.int64, device=device),
    describe=lambda device: Spec("draw_seed", torch.device(device).type, torch.int64),
    of_every_backend=True,
)
KEYED_DROPOUT = Operator(
    "keyed_dropout",
    reference=reference.forward,
    fake=lambda x, *_: x.new_empty(x.shape),
    describe=lambda x, *_: Spec("keyed_dropout", x.device.type, x.dtype),
)


@KEYED_DROPOUT.register_function
class KeyedDropoutFunction(torch.autograd.Function):
    """The gradient of ``keyed_dropout``: a diagonal matrix is its own transpose."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = KEYED_DROPOUT.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, seed, *ctx.options = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        gradient = KEYED_DROPOUT.public(
            grad, seed, *ctx.options
        )  # through its own Autograd kernel: differentiable again
        return gradient, None, None, None, None
