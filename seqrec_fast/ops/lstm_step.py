"""``lstm_step``: one LSTM step for a batch of live users. The worked example of how an operator is built; see CONTRIBUTING."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._dispatch import Spec
from .._operator import Operator, transforms_active, without_autocast
from .._precision import current_precision
from ..backends.reference import lstm_step as reference
from ._checks import check_floating, check_shape, given
from ._step import REFUSALS, runs_in_the_kernel, spec, step_inplace, step_wants_gradient

State = tuple[Tensor, Tensor]


def lstm_step(
    x: Tensor,
    state: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    inplace: bool = False,
) -> State:
    """One step of an LSTM: gates, cell and hidden state in one fused kernel.

    z = x·W_ihᵀ + b_ih + h·W_hhᵀ + b_hh;  c' = σ(z_f)·c + σ(z_i)·tanh(z_g);  h' = σ(z_o)·tanh(c'), with the gates in torch's order
    i, f, g, o (Hochreiter & Schmidhuber 1997; Gers et al. 2000; as torch.nn.LSTMCell).

    Args:
        x: input [B, I] or unbatched [I]; float16, bfloat16, float32 or float64. Every other tensor shares its dtype and device.
        state: (h [B, P], c [B, H]); unbatched [P], [H]. P = H unless the hidden state is projected outside.
        w_ih: [4H, I].
        w_hh: [4H, P].
        b_ih, b_hh: [4H] or None.
        inplace: overwrite h and c and return them: the serving form. No gradient, and P must equal H.

    Returns:
        (h' [B, H], c' [B, H]).

    Raises:
        TypeError: something is not a floating tensor, or dtypes differ.
        ValueError: a shape or device does not fit, or ``inplace`` where a gradient is asked for.
        BackendUnavailable: the backend in force by ``use_backend`` cannot run the call.

    16-bit inputs are accumulated in fp32. float32 products follow torch's ``float32_matmul_precision``. Differentiable twice,
    forward-mode and vmap included. Cost: 8·B·H·(I + P) FLOPs; at small B the bytes of the weights decide.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> w_ih, w_hh = torch.randn(4 * 16, 8), torch.randn(4 * 16, 16)
        >>> h, c = sf.lstm_step(torch.randn(3, 8), (torch.zeros(3, 16), torch.zeros(3, 16)), w_ih, w_hh)
        >>> h.shape
        torch.Size([3, 16])
    """
    h, c = state if type(state) is tuple and len(state) == 2 else _pair(state)
    if inplace:
        step_inplace(LSTM_STEP_INPLACE, _check_inplace, x, (h, c), w_ih, w_hh, b_ih, b_hh)
        return h, c
    if runs_in_the_kernel(x):
        try:
            if step_wants_gradient(x, h, c, w_ih, w_hh, b_ih, b_hh):
                step, save = LSTM_STEP.apply_native, True
            else:
                step, save = LSTM_STEP.native, False
            h_next, c_next, _ = step(x, h, c, w_ih, w_hh, b_ih, b_hh, save, current_precision())
        except REFUSALS:
            # This says which argument it was.
            _check(x, h, c, w_ih, w_hh, b_ih, b_hh)
            raise
        return h_next, c_next
    _check(x, h, c, w_ih, w_hh, b_ih, b_hh)
    if x.dim() == 1:
        h_next, c_next = lstm_step(x[None], (h[None], c[None]), w_ih, w_hh, b_ih, b_hh)
        return h_next[0], c_next[0]
    if not torch.compiler.is_compiling() and transforms_active():
        # functorch and forward-mode AD differentiate the plain formula: it composes with every transform.
        return without_autocast(reference.plain_forward)(x, h, c, w_ih, w_hh, b_ih, b_hh)
    save = step_wants_gradient(x, h, c, w_ih, w_hh, b_ih, b_hh)
    h_next, c_next, _ = LSTM_STEP(x, h, c, w_ih, w_hh, b_ih, b_hh, save, current_precision())
    return h_next, c_next


def _pair(state: Any) -> State:
    if isinstance(state, Tensor) or not hasattr(state, "__len__") or len(state) != 2:
        shown = f"{type(state).__name__} of {len(state)}" if isinstance(state, (tuple, list)) else type(state).__name__
        raise TypeError(f"lstm_step: state must be a pair (h, c), got {shown}")
    h, c = state
    return h, c


def _check(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> None:
    """One clear sentence about the first argument that does not fit."""
    check_floating("lstm_step", x=x, h=h, c=c, w_ih=w_ih, w_hh=w_hh, **given(b_ih=b_ih, b_hh=b_hh))
    if x.dim() not in (1, 2):
        raise ValueError(f"lstm_step: x must have shape [B, I] or [I], got {tuple(x.shape)}")
    if w_ih.dim() != 2 or w_ih.shape[0] % 4:
        raise ValueError(f"lstm_step: w_ih must have shape [4H, I], got {tuple(w_ih.shape)}")
    if w_hh.dim() != 2:
        raise ValueError(f"lstm_step: w_hh must have shape [4H, P], got {tuple(w_hh.shape)}")
    lead, four, hidden = tuple(x.shape[:-1]), w_ih.shape[0], w_ih.shape[0] // 4
    check_shape("lstm_step", "w_ih", w_ih, (four, x.shape[-1]), "[4H, I]")
    check_shape("lstm_step", "c", c, (*lead, hidden), "[B, H]")
    check_shape("lstm_step", "w_hh", w_hh, (four, w_hh.shape[1]), "[4H, P]")
    check_shape("lstm_step", "h", h, (*lead, w_hh.shape[1]), "[B, P]")
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            check_shape("lstm_step", name, bias, (four,), "[4H]")


def _check_inplace(x: Tensor, h: Tensor, c: Tensor, *weights: Any) -> None:
    _check(x, h, c, *weights)
    if h.shape[-1] != c.shape[-1]:
        raise ValueError(f"lstm_step: inplace needs h and c of one width, got {h.shape[-1]} and {c.shape[-1]}")


# Wiring


def _native_supports(call: Spec) -> str | None:
    if call.device == "cuda" and call.dtype == torch.float64:
        return "the CUDA kernel has no float64 form"
    return None


def _fake(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    save_gates: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = x.new_empty((x.shape[0], w_ih.shape[0])) if save_gates else x.new_empty(0)
    return x.new_empty(c.shape), x.new_empty(c.shape), saved


def _fake_backward(
    grad_h: Tensor,
    grad_c: Tensor,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    c_next: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    activated: Tensor,
    output_mask: reference.Mask,
    precision: int,
) -> tuple[Tensor, ...]:
    shapes = (x.shape, h.shape, c.shape, w_ih.shape, w_hh.shape, w_ih.shape[:1])
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, output_mask, strict=True))


LSTM_STEP = Operator(
    "lstm_step",
    reference=reference.forward,
    fake=_fake,
    describe=lambda x, *_: spec("lstm_step", x.device.type, x.dtype),
    native=_native_supports,
    triton="lstm_step",
)
LSTM_STEP_INPLACE = Operator(
    "lstm_step_",
    reference=reference.forward_,
    fake=lambda *args: None,
    describe=lambda x, *_: spec("lstm_step_", x.device.type, x.dtype),
    native=_native_supports,
)
LSTM_STEP_BACKWARD = Operator(
    "lstm_step_backward",
    reference=reference.backward,
    fake=_fake_backward,
    describe=lambda grad_h, grad_c, x, *_: spec("lstm_step_backward", x.device.type, x.dtype),
    native=_native_supports,
    triton="lstm_step",
)


@LSTM_STEP.register_function
class LSTMStepFunction(torch.autograd.Function):
    """The gradient of ``lstm_step``. The gates are saved; a double backward recomputes them from the inputs."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = LSTM_STEP.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.saved_gates, ctx.precision = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[1], output[2])
        ctx.forced = _dispatch.forced_backend()

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_c: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, c, w_ih, w_hh, b_ih, b_hh, c_next, gates = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = (*needs[:5], needs[5] or needs[6])
        if torch.is_grad_enabled() or not ctx.saved_gates or transforms_active():
            # Somebody differentiates this backward: evaluate the formula on tensors that are connected to the graph.
            grads, inputs = (grad_h, grad_c), (x, h, c, w_ih, w_hh, b_ih, b_hh)
            results = _formula_gradients(grads, *inputs, mask=mask, precision=ctx.precision)
        else:
            results = LSTM_STEP_BACKWARD.below_autograd(
                grad_h, grad_c, x, h, c, c_next, w_ih, w_hh, gates, mask, ctx.precision, forced=ctx.forced
            )
        return _by_argument(results, needs)


@LSTM_STEP.register_native_function
class NativeLSTMStepFunction(torch.autograd.Function):
    """The same gradient where nothing is traced, at a third of the overhead: autograd never sees the gates."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, None]:
        h_next, c_next, gates = LSTM_STEP.native(*args)
        ctx.save_for_backward(*args[:7], c_next, gates)
        ctx.precision, ctx.saved_gates, ctx.forced = args[8], True, "native"
        return h_next, c_next, None

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_c: Tensor, _: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or transforms_active():
            return LSTMStepFunction.backward(ctx, grad_h, grad_c, _)
        x, h, c, w_ih, w_hh, _, _, c_next, gates = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = (*needs[:5], needs[5] or needs[6])
        results = LSTM_STEP_BACKWARD.native(grad_h, grad_c, x, h, c, c_next, w_ih, w_hh, gates, mask, ctx.precision)
        return _by_argument(results, needs)


@without_autocast
def _formula_gradients(
    grads: State, x: Tensor, h: Tensor, c: Tensor, *weights: Any, mask: reference.Mask, precision: int
) -> tuple[Tensor, ...]:
    w_ih, w_hh, *_ = weights
    gates = reference.gates(x, h, *weights)
    _, c_next = reference.cell(gates, c)
    return reference.backward(*grads, x, h, c, c_next, w_ih, w_hh, gates, mask, precision)


def _by_argument(results: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of ``lstm_step`` from the results of its backward, which has one for both biases."""
    dx, dh, dc, dw_ih, dw_hh, db = results
    return (
        dx if needs[0] else None,
        dh if needs[1] else None,
        dc if needs[2] else None,
        dw_ih if needs[3] else None,
        dw_hh if needs[4] else None,
        db if needs[5] else None,
        db if needs[6] else None,
        None,
        None,
    )
