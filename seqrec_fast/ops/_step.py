"""What the in-place forms of ``lstm_step`` and ``gru_step`` share."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from .._operator import Operator, tracing, transforms_active
from .._precision import current_precision
from ._checks import check_writable


def step_inplace(operator: Operator, x: Tensor, states: dict[str, Tensor], weights: tuple[Tensor | None, ...]) -> None:
    """Overwrite the states, batched or not, by one step of the in-place operator ``operator``."""
    name = operator.name.removesuffix("_")
    traced = tracing()
    if not traced and not transforms_active() and x.device.type != "meta":
        check_writable(name, states)
    batched = (x, *states.values()) if x.dim() == 2 else (x[None], *(state[None] for state in states.values()))
    if not traced and transforms_active():
        operator.reference(*batched, *weights, current_precision())  # plain PyTorch, which every transform understands
        return
    operator(*batched, *weights, current_precision())
    if not traced:
        # A kernel writes behind autograd's back: a graph that saved a state must notice.
        increment_version(tuple(states.values()))
