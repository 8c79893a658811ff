"""``lstm``: stacked, bidirectional LSTM layers over a whole ragged batch."""

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
from ..backends.reference import lstm as reference
from ..backends.reference import lstm_backward
from ..backends.reference._calls import SAVE_GATES, SAVE_NOTHING, LSTMCall
from ..backends.reference._sequence import accumulation_dtype
from ._recurrent import Pass, States, formula_gradients, loop_over_vmap, sequence
from ._recurrent_arguments import Options, Weights, check_arguments, split_weights

State = tuple[Tensor, Tensor]


def lstm(
    input: Tensor | PackedSequence,
    hx: State | None,
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
) -> tuple[Any, State]:
    """LSTM layers over whole sequences, ragged if need be: the function behind ``sf.LSTM``.

    The equations are torch.nn.LSTM's (Hochreiter & Schmidhuber 1997; Gers et al. 2000; projection: Sak et al. 2014); those of the
    options are written out in ``seqrec_fast/backends/reference/lstm.py``.

    Args:
        input: [T, B, I], [B, T, I] with ``batch_first``, unbatched [T, I], or a PackedSequence; float16, bfloat16, float32 or
            float64. Every other floating tensor shares its dtype and device. L layers, D directions, H units, P = H or, with a
            projection, the width of w_hr.
        hx: (h [L·D, B, P], c [L·D, B, H]); unbatched [L·D, P], [L·D, H]; None: zeros.
        weights: flat list in torch's order: for each layer and direction w_ih [4H, I], w_hh [4H, P], b_ih, b_hh [4H] (both or
            neither), w_hr [P, H] (optional); with ``layer_norm`` then γ_ih, γ_hh [4H], γ_c [H] and, if there are biases, β_c [H].
        lengths: int64 or int32 [B] on the CPU or on the input's device, never read on an accelerator. Output beyond a length is 0
            and carries no gradient; the final states are those after the last valid step; the reverse direction starts there.
        reset: bool [B, T] (unbatched [T]): a new segment begins at that step. The forward direction drops its state before step t,
            the reverse direction before step t − 1.
        last_only: give the last layer's final hidden states instead of the output of every step, [B, D·P].
        training: draw dropout masks. Otherwise zoneout takes its mean, and nothing is dropped.
        dropout: between layers.
        zoneout: chance that a unit of h or c keeps its former value at a step (Krueger et al. 2017).
        recurrent_dropout: chance that a unit of h is hidden from w_hh, for a row's whole sequence (Gal & Ghahramani 2016).
        weight_dropout: chance that an entry of w_hh is 0 in this call (DropConnect; Merity et al. 2018).
        layer_norm: normalise W_ih·x, W_hh·h and, before the output's tanh, c (Ba et al. 2016).
        save_gates: keep the gates for the backward (True; 24 bytes a token and unit in fp32), or recompute them (False; 8 bytes).

    Returns:
        (output, (h_n, c_n)): output [T, B, D·P] in the form of the input, h_n [L·D, B, P], c_n [L·D, B, H]. For T = 0 the output is
        empty and the states are ``hx``.

    Raises:
        TypeError: something is not a floating tensor, dtypes differ, lengths are not integer or reset is not bool.
        ValueError: a shape, device or option does not fit; lengths with packed or unbatched input; lengths outside 0…T (told on
            the CPU only).
        BackendUnavailable: the backend in force by ``use_backend`` cannot run the call.

    Masks come from torch's generator: one seed a call, then a mask is a function of (seed, row, step, unit), so that padding, other
    rows and compilation do not change it. 16-bit inputs are accumulated in fp32. Differentiable twice, forward-mode and vmap
    included. Cost: 8·H·(I + P) FLOPs a token and direction; time follows the number of real tokens.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> weights = [torch.randn(64, 8), torch.randn(64, 16), torch.zeros(64), torch.zeros(64)]
        >>> output, (h, c) = sf.lstm(torch.randn(2, 5, 8), None, weights, batch_first=True, lengths=torch.tensor([5, 3]))
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
    options.check("lstm")
    cells = split_weights("lstm", weights, options)
    check_arguments("lstm", input, hx, cells, options)
    output, (h_n, c_n) = sequence("lstm", layer, input, hx, cells, options, lengths=lengths, reset=reset)
    return output, (h_n, c_n)


def layer(x: Tensor, state: States, weights: Weights, told: Pass) -> tuple[Tensor, States]:
    """One layer in one direction: (output, (h_n, c_n))."""
    args = (x, *state, *weights, *told)
    if not torch.compiler.is_compiling() and transforms_active():
        # functorch and forward-mode AD differentiate the plain formula: it composes with every transform.
        output, h_n, c_n = reference.formula(LSTMCall(*args))  # type: ignore[arg-type]
    else:
        output, h_n, c_n, _, _ = LSTM(*args)
    return output, (h_n, c_n)


# Wiring

_TENSORS = [field.name for field in fields(LSTMCall)].index("batch_first")  # the leading arguments that are tensors


def describe(operator: str, call: LSTMCall) -> Spec:
    """The :class:`Spec` of a call; options by the names of the public keywords."""
    used = {
        "lengths": call.lengths is not None,
        "reset": call.reset is not None,
        "reverse": call.reverse,
        "last_only": call.last_only,
        "projection": call.w_hr is not None,
        "layer_norm": call.ln_hh is not None,
        "zoneout": call.zoneout > 0,
        "recurrent_dropout": call.recurrent_dropout > 0,
        "ids": call.ids is not None,
        "projected_input": call.w_ih is None,
    }
    widths = (int(call.x.shape[-1]), int(call.c.shape[-1]), int(call.h.shape[-1]))
    return Spec(operator, call.x.device.type, call.x.dtype, widths, frozenset(n for n, value in used.items() if value))


def _fake(*args: Any) -> tuple[Tensor, ...]:
    call = LSTMCall(*args)
    steps, rows = call.steps_and_rows
    hidden, new = call.c.shape[1], call.x.new_empty
    lead = (rows, steps) if call.batch_first else (steps, rows)
    wide = accumulation_dtype(call.x.dtype)
    return (
        new((*lead, call.h.shape[1])) if call.saves_output else new(0),
        new(call.h.shape),
        new(call.c.shape),
        new((steps, rows, hidden) if call.save != SAVE_NOTHING else 0, dtype=wide),
        new((steps, rows, 4 * hidden) if call.save == SAVE_GATES else 0),
    )


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    call, mask = LSTMCall(*args[3:-4]), args[-1]
    found = []
    for name, asked in zip(lstm_backward.GRADIENTS, mask, strict=True):
        like = getattr(call, "b_ih" if name == "b" and call.b_ih is not None else "b_hh" if name == "b" else name)
        found.append(call.x.new_empty(like.shape if asked else (0,)))
    return tuple(found)


LSTM = Operator(
    "lstm",
    reference=reference.forward,
    fake=_fake,
    describe=lambda *args: describe("lstm", LSTMCall(*args)),
    native=_dispatch.always,
)
LSTM_BACKWARD = Operator(
    "lstm_backward",
    reference=lstm_backward.forward,
    fake=_fake_backward,
    describe=lambda *args: describe("lstm_backward", LSTMCall(*args[3:-4])),
    native=_dispatch.always,
)
torch.library.register_vmap(f"{PUBLIC}::lstm", loop_over_vmap(LSTM.public), lib=LIBRARIES[PUBLIC])
torch.library.register_vmap(f"{PUBLIC}::lstm_backward", loop_over_vmap(LSTM_BACKWARD.public), lib=LIBRARIES[PUBLIC])


@LSTM.register_function
class LSTMFunction(torch.autograd.Function):
    """The gradient of ``lstm``. Hidden and cell states are saved, and the gates or not; a double backward takes the formula."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = LSTM.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        states, _, _, cells, gates = output
        ctx.mark_non_differentiable(cells, gates, *((states,) if LSTMCall(*inputs).last_only else ()))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_TENSORS], states, cells, gates)
        ctx.options = inputs[_TENSORS:]
        ctx.forced = _dispatch.forced_backend()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, states, cells, gates = ctx.saved_tensors
        args = (*tensors, *ctx.options)
        call = LSTMCall(*args)
        needs = dict(zip((field.name for field in fields(LSTMCall)), ctx.needs_input_grad, strict=True))
        grad_output, grad_h_n, grad_c_n = (None if call.last_only else grads[0]), grads[1], grads[2]
        if grad_output is None and grad_h_n is None and grad_c_n is None:
            return (None,) * len(args)
        if torch.is_grad_enabled() or call.save == SAVE_NOTHING or transforms_active():
            # Somebody differentiates this backward, or maps over it.
            names = [name for name, wanted in needs.items() if wanted]
            found = formula_gradients(reference.formula, call, names, (grad_output, grad_h_n, grad_c_n))
        else:
            mask = [needs["b_ih"] or needs["b_hh"] if name == "b" else needs[name] for name in lstm_backward.GRADIENTS]
            results = LSTM_BACKWARD.below_autograd(
                grad_output, grad_h_n, grad_c_n, *args, states, cells, gates, mask, forced=ctx.forced
            )
            found = dict(zip(lstm_backward.GRADIENTS, results, strict=True))
            found["b_ih"] = found["b_hh"] = found.pop("b")
        return tuple(found[name] if wanted else None for name, wanted in needs.items())
