"""``gru_step``: one GRU step for a batch of live users."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._operator import Operator, transforms_active, without_autocast
from .._precision import current_precision
from ..backends.reference import gru_step as reference
from ._checks import check_floating, check_shape, given
from ._step import REFUSALS, runs_in_the_kernel, spec, step_inplace, step_wants_gradient


def gru_step(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    inplace: bool = False,
) -> Tensor:
    """One step of a GRU.

    u = W_ih·x + b_ih, v = W_hh·h + b_hh; r = σ(u_r + v_r), z = σ(u_z + v_z), n = tanh(u_n + r·v_n), h' = (1 − z)·n + z·h, with the
    gates in torch's order r, z, n (Cho et al. 2014, reset gate after the product; as torch.nn.GRUCell).

    Args:
        x: input [B, I] or unbatched [I]; float16, bfloat16, float32 or float64. Every other tensor shares its dtype and device.
        h: [B, H]; unbatched [H].
        w_ih: [3H, I].
        w_hh: [3H, H].
        b_ih, b_hh: [3H] or None.
        inplace: overwrite h and return it: the serving form. No gradient.

    Returns:
        h' [B, H].

    Raises:
        TypeError: something is not a floating tensor, or dtypes differ.
        ValueError: a shape or device does not fit, or ``inplace`` where a gradient is asked for.
        BackendUnavailable: the backend in force by ``use_backend`` cannot run the call.

    16-bit inputs are accumulated in fp32. Differentiable twice, forward-mode and vmap included. Cost: 6·B·H·(I + H) FLOPs.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> h = sf.gru_step(torch.randn(3, 8), torch.zeros(3, 16), torch.randn(3 * 16, 8), torch.randn(3 * 16, 16))
        >>> h.shape
        torch.Size([3, 16])
    """
    if inplace:
        step_inplace(GRU_STEP_INPLACE, _check, x, (h,), w_ih, w_hh, b_ih, b_hh)
        return h
    h_next: Tensor
    if runs_in_the_kernel(x):
        try:
            if step_wants_gradient(x, h, None, w_ih, w_hh, b_ih, b_hh):
                step, save = GRU_STEP.apply_native, True
            else:
                step, save = GRU_STEP.native, False
            h_next, _ = step(x, h, w_ih, w_hh, b_ih, b_hh, save, current_precision())
        except REFUSALS:
            # This says which argument it was.
            _check(x, h, w_ih, w_hh, b_ih, b_hh)
            raise
        return h_next
    _check(x, h, w_ih, w_hh, b_ih, b_hh)
    if x.dim() == 1:
        return gru_step(x[None], h[None], w_ih, w_hh, b_ih, b_hh)[0]
    if not torch.compiler.is_compiling() and transforms_active():
        # functorch and forward-mode AD differentiate the plain formula: it composes with every transform.
        return without_autocast(reference.plain_forward)(x, h, w_ih, w_hh, b_ih, b_hh)
    save = step_wants_gradient(x, h, None, w_ih, w_hh, b_ih, b_hh)
    h_next, _ = GRU_STEP(x, h, w_ih, w_hh, b_ih, b_hh, save, current_precision())
    return h_next


def _check(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> None:
    """One clear sentence about the first argument that does not fit."""
    check_floating("gru_step", x=x, h=h, w_ih=w_ih, w_hh=w_hh, **given(b_ih=b_ih, b_hh=b_hh))
    if x.dim() not in (1, 2):
        raise ValueError(f"gru_step: x must have shape [B, I] or [I], got {tuple(x.shape)}")
    if w_ih.dim() != 2 or w_ih.shape[0] % 3:
        raise ValueError(f"gru_step: w_ih must have shape [3H, I], got {tuple(w_ih.shape)}")
    three, hidden = w_ih.shape[0], w_ih.shape[0] // 3
    check_shape("gru_step", "w_ih", w_ih, (three, x.shape[-1]), "[3H, I]")
    check_shape("gru_step", "h", h, (*x.shape[:-1], hidden), "[B, H]")
    check_shape("gru_step", "w_hh", w_hh, (three, hidden), "[3H, H]")
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            check_shape("gru_step", name, bias, (three,), "[3H]")


# Wiring


def _fake(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, save_gates, _ = rest
    return x.new_empty(h.shape), x.new_empty((x.shape[0], 4 * h.shape[1])) if save_gates else x.new_empty(0)


def _fake_backward(
    grad_h: Tensor,
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    activated: Tensor,
    output_mask: reference.Mask,
    precision: int,
) -> tuple[Tensor, ...]:
    shapes = (x.shape, h.shape, w_ih.shape, w_hh.shape, w_ih.shape[:1], w_ih.shape[:1])
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, output_mask, strict=True))


GRU_STEP = Operator(
    "gru_step",
    reference=reference.forward,
    fake=_fake,
    describe=lambda x, *_: spec("gru_step", x.device.type, x.dtype),
    native=_dispatch.always,
)
GRU_STEP_INPLACE = Operator(
    "gru_step_",
    reference=reference.forward_,
    fake=lambda *args: None,
    describe=lambda x, *_: spec("gru_step_", x.device.type, x.dtype),
    native=_dispatch.always,
)
GRU_STEP_BACKWARD = Operator(
    "gru_step_backward",
    reference=reference.backward,
    fake=_fake_backward,
    describe=lambda grad_h, x, *_: spec("gru_step_backward", x.device.type, x.dtype),
    native=_dispatch.always,
)


@GRU_STEP.register_function
class GRUStepFunction(torch.autograd.Function):
    """The gradient of ``gru_step``. The gates are saved; a double backward recomputes them from the inputs."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = GRU_STEP.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.saved_gates, ctx.precision = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])
        ctx.forced = _dispatch.forced_backend()

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, w_ih, w_hh, b_ih, b_hh, gates = ctx.saved_tensors
        mask = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled() or not ctx.saved_gates or transforms_active():
            # Somebody differentiates this backward: evaluate the formula on tensors that are connected to the graph.
            inputs = (x, h, w_ih, w_hh, b_ih, b_hh)
            results = _formula_gradients(grad_h, *inputs, mask=mask, precision=ctx.precision)
        else:
            results = GRU_STEP_BACKWARD.below_autograd(
                grad_h, x, h, w_ih, w_hh, gates, mask, ctx.precision, forced=ctx.forced
            )
        return _by_argument(results, mask)


@GRU_STEP.register_native_function
class NativeGRUStepFunction(torch.autograd.Function):
    """The same gradient where nothing is traced, at a fraction of the overhead: autograd never sees the gates."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, None]:
        h_next, gates = GRU_STEP.native(*args)
        ctx.save_for_backward(*args[:6], gates)
        ctx.precision, ctx.saved_gates, ctx.forced = args[7], True, "native"
        return h_next, None

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, _: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or transforms_active():
            return GRUStepFunction.backward(ctx, grad_h, _)
        x, h, w_ih, w_hh, _, _, gates = ctx.saved_tensors
        mask = ctx.needs_input_grad[:6]
        results = GRU_STEP_BACKWARD.native(grad_h, x, h, w_ih, w_hh, gates, mask, ctx.precision)
        return _by_argument(results, mask)


@without_autocast
def _formula_gradients(
    grad_h: Tensor, x: Tensor, h: Tensor, *weights: Any, mask: reference.Mask, precision: int
) -> tuple[Tensor, ...]:
    w_ih, w_hh, *_ = weights
    gates = reference.gates(x, h, *weights)
    return reference.backward(grad_h, x, h, w_ih, w_hh, gates, mask, precision)


def _by_argument(results: tuple[Tensor, ...], mask: reference.Mask) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of ``gru_step``, of which the last two have none."""
    return (*(result if wanted else None for result, wanted in zip(results, mask, strict=True)), None, None)
