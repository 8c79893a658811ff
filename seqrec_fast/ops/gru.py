"""``gru``: stacked, bidirectional GRU layers over a whole ragged batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import _dispatch
from .._dispatch import Spec
from .._operator import Operator, transforms_active
from .._schema import LIBRARIES, PUBLIC
from ..backends.reference import gru as reference
from ..backends.reference import gru_backward
from ..backends.reference._calls import SAVE_GATES, SAVE_NOTHING, GRUCall
from ._recurrent import Pass, States, formula_gradients, loop_over_vmap, sequence
from ._recurrent_arguments import Options, Weights, check_arguments, split_weights


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    last_only: bool = False,
    training: bool = False,
    dropout: float = 0.0,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    layer_norm: bool = False,
    save_gates: bool | str = "auto",
) -> tuple[Any, Tensor]:
    """GRU layers over whole sequences, ragged if need be: the function behind ``sf.GRU``.

    The equations are torch.nn.GRU's (Cho et al. 2014, reset gate after the product); those of the options are written out in
    ``seqrec_fast/backends/reference/gru.py``.

    Args:
        input: [T, B, I], [B, T, I] with ``batch_first``, unbatched [T, I], or a PackedSequence; float16, bfloat16, float32 or
            float64. Every other floating tensor shares its dtype and device. L layers, D directions, H units.
        hx: h [L·D, B, H]; unbatched [L·D, H]; None: zeros.
        weights: flat list in torch's order: for each layer and direction w_ih [3H, I], w_hh [3H, H], b_ih, b_hh [3H] (both or
            neither); with ``layer_norm`` then γ_ih, γ_hh [3H].
        lengths, reset, last_only, training, dropout, zoneout, recurrent_dropout, weight_dropout, save_gates: as for
            :func:`seqrec_fast.lstm`. Recurrent dropout hides units of h from w_hh, not from z ⊙ h.
        layer_norm: normalise W_ih·x and W_hh·h (after Ba et al. 2016).

    Returns:
        (output, h_n): output [T, B, D·H] in the form of the input, h_n [L·D, B, H]. For T = 0 the output is empty and h_n is ``hx``.

    Raises:
        TypeError: something is not a floating tensor, dtypes differ, lengths are not integer or reset is not bool.
        ValueError: a shape, device or option does not fit; lengths with packed or unbatched input; lengths outside 0…T (told on
            the CPU only).
        BackendUnavailable: the backend in force by ``use_backend`` cannot run the call.

    Masks, accumulation and gradients are as for :func:`seqrec_fast.lstm`. Cost: 6·H·(I + H) FLOPs a token and direction.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> weights = [torch.randn(48, 8), torch.randn(48, 16), torch.zeros(48), torch.zeros(48)]
        >>> output, h = sf.gru(torch.randn(2, 5, 8), None, weights, batch_first=True, lengths=torch.tensor([5, 3]))
        >>> output.shape, bool((output[1, 3:] == 0).all()), bool((output[1, 2] == h[0, 1]).all())
        (torch.Size([2, 5, 16]), True, True)
    """
    options = Options(
        num_layers,
        bidirectional,
        batch_first,
        last_only,
        training,
        dropout,
        zoneout,
        recurrent_dropout,
        weight_dropout,
        layer_norm,
        save_gates,
    )
    options.check("gru")
    cells = split_weights("gru", weights, options)
    check_arguments("gru", input, hx, cells, options)
    state = None if hx is None else (hx,)
    output, (h_n,) = sequence("gru", layer, input, state, cells, options, lengths=lengths, reset=reset)
    return output, h_n


def layer(x: Tensor, state: States, weights: Weights, told: Pass) -> tuple[Tensor, States]:
    """One layer in one direction: (output, (h_n,))."""
    w = weights
    args: tuple[Any, ...] = (x, *state, w.w_ih, w.w_hh, w.b_ih, w.b_hh, w.ln_ih, w.ln_hh, *told)
    if not torch.compiler.is_compiling() and transforms_active():
        # functorch and forward-mode AD differentiate the plain formula: it composes with every transform.
        output, h_n = reference.formula(GRUCall(*args))
    else:
        output, h_n, _ = GRU(*args)
    return output, (h_n,)


# Wiring

_TENSORS = [field.name for field in fields(GRUCall)].index("batch_first")  # the leading arguments that are tensors


def describe(operator: str, call: GRUCall) -> Spec:
    """The :class:`Spec` of a call; options by the names of the public keywords."""
    used = {
        "lengths": call.lengths is not None,
        "reset": call.reset is not None,
        "reverse": call.reverse,
        "last_only": call.last_only,
        "layer_norm": call.ln_hh is not None,
        "zoneout": call.zoneout > 0,
        "recurrent_dropout": call.recurrent_dropout > 0,
        "ids": call.ids is not None,
        "projected_input": call.w_ih is None,
    }
    widths = (int(call.x.shape[-1]), int(call.h.shape[-1]))
    return Spec(operator, call.x.device.type, call.x.dtype, widths, frozenset(n for n, value in used.items() if value))


def _fake(*args: Any) -> tuple[Tensor, ...]:
    call = GRUCall(*args)
    steps, rows = call.steps_and_rows
    hidden, new = call.h.shape[1], call.x.new_empty
    lead = (rows, steps) if call.batch_first else (steps, rows)
    return (
        new((*lead, hidden)) if call.saves_output else new(0),
        new(call.h.shape),
        new((steps, rows, 4 * hidden) if call.save == SAVE_GATES else 0),
    )


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    call, mask = GRUCall(*args[2:-3]), args[-1]
    shapes = [
        getattr(call, name).shape if asked else (0,) for name, asked in zip(gru_backward.GRADIENTS, mask, strict=True)
    ]
    return tuple(call.x.new_empty(shape) for shape in shapes)


GRU = Operator(
    "gru",
    reference=reference.forward,
    fake=_fake,
    describe=lambda *args: describe("gru", GRUCall(*args)),
    native=_dispatch.always,
)
GRU_BACKWARD = Operator(
    "gru_backward",
    reference=gru_backward.forward,
    fake=_fake_backward,
    describe=lambda *args: describe("gru_backward", GRUCall(*args[2:-3])),
    native=_dispatch.always,
)
torch.library.register_vmap(f"{PUBLIC}::gru", loop_over_vmap(GRU.public), lib=LIBRARIES[PUBLIC])
torch.library.register_vmap(f"{PUBLIC}::gru_backward", loop_over_vmap(GRU_BACKWARD.public), lib=LIBRARIES[PUBLIC])


@GRU.register_function
class GRUFunction(torch.autograd.Function):
    """The gradient of ``gru``. Hidden states are saved, and the gates or not; a double backward takes the formula."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = GRU.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        states, _, gates = output
        ctx.mark_non_differentiable(gates, *((states,) if GRUCall(*inputs).last_only else ()))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_TENSORS], states, gates)
        ctx.options = inputs[_TENSORS:]
        ctx.forced = _dispatch.forced_backend()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, states, gates = ctx.saved_tensors
        args = (*tensors, *ctx.options)
        call = GRUCall(*args)
        needs = dict(zip((field.name for field in fields(GRUCall)), ctx.needs_input_grad, strict=True))
        grad_output, grad_h_n = (None if call.last_only else grads[0]), grads[1]
        if grad_output is None and grad_h_n is None:
            return (None,) * len(args)
        if torch.is_grad_enabled() or call.save == SAVE_NOTHING or transforms_active():
            # Somebody differentiates this backward, or maps over it.
            names = [name for name, wanted in needs.items() if wanted]
            found = formula_gradients(reference.formula, call, names, (grad_output, grad_h_n))
        else:
            mask = [needs[name] for name in gru_backward.GRADIENTS]
            results = GRU_BACKWARD.below_autograd(grad_output, grad_h_n, *args, states, gates, mask, forced=ctx.forced)
            found = dict(zip(gru_backward.GRADIENTS, results, strict=True))
        return tuple(found[name] if wanted else None for name, wanted in needs.items())
