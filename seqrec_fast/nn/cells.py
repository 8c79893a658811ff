"""``LSTMCell`` and ``GRUCell``: torch.nn's cells on the fused step."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._precision import autocast_enabled
from ..ops.gru_step import gru_step
from ..ops.lstm_step import lstm_step

CellType = TypeVar("CellType", bound="_Cell")

# What a step raises before any work when its arguments do not fit, and a KeyError where a weight is not a plain parameter.
_UNFIT = (KeyError, TypeError, ValueError)


class _Cell(nn.RNNCellBase):
    """What both cells share."""

    torch_class: type[nn.RNNCellBase]
    gates: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=self.gates, device=device, dtype=dtype)

    @classmethod
    def from_torch(cls: type[CellType], module: nn.RNNCellBase) -> CellType:
        """A cell that shares the parameters of a torch.nn cell, so that optimizers and tied weights stay as they are.

        Raises:
            TypeError: ``module`` is not the torch.nn class of the same name.
        """
        if not isinstance(module, cls.torch_class):
            expected = f"torch.nn.{cls.torch_class.__name__}"
            raise TypeError(f"{cls.__name__}.from_torch: module must be a {expected}, got {type(module).__name__}")
        cell = cls(module.input_size, module.hidden_size, module.bias, device="meta", dtype=module.weight_ih.dtype)
        for name in cell._parameters:
            setattr(cell, name, module._parameters[name])
        return cell.train(module.training)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def _step_again(self, step: Any, input: Tensor, state: tuple[Tensor, ...], error: Exception) -> Any:
        """After a refusal: with re-parametrised weights, under autocast, or with torch.nn's type of exception."""
        tensors: list[Any] = [input, *state, *self._weights()]
        autocast = isinstance(input, Tensor) and autocast_enabled(input.device.type)
        if autocast:
            dtype = torch.get_autocast_dtype(input.device.type)
            tensors = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]
        elif not isinstance(error, KeyError):
            raise self._in_torch_terms(input, state, error) from None
        try:
            return step(tensors[0], tensors[1] if len(state) == 1 else tuple(tensors[1:3]), *tensors[-4:])
        except (TypeError, ValueError) as again:
            raise self._in_torch_terms(input, state, again) from None

    def _in_torch_terms(self, input: Any, state: tuple[Any, ...], error: Exception) -> Exception:
        """torch.nn's words, and its types: ValueError for a number of dimensions, RuntimeError for sizes, dtypes and devices."""
        name = type(self).__name__
        hidden = ("hidden",) if len(state) == 1 else ("hx[0]", "hx[1]")
        for what, value in (("input", input), *zip(hidden, state, strict=False)):
            if not isinstance(value, Tensor):
                return TypeError(f"{name}: {what} must be a tensor, got {type(value).__name__}")
            if value.dim() not in (1, 2):
                return ValueError(f"{name}: Expected {what} to be 1D or 2D, got {value.dim()}D instead")
        if input.shape[-1] != self.input_size:
            got = f"got {input.shape[-1]} expected {self.input_size}"
            return RuntimeError(f"{name}: input has inconsistent input_size: {got}")
        for number, part in enumerate(state):
            if part.shape[-1] != self.hidden_size:
                got = f"got {part.shape[-1]}, expected {self.hidden_size}"
                return RuntimeError(f"{name}: hidden{number} has inconsistent hidden_size: {got}")
            if input.dim() == part.dim() == 2 and len(input) != len(part):
                sizes = f"Input batch size {len(input)} doesn't match hidden{number} batch size {len(part)}"
                return RuntimeError(f"{name}: {sizes}")
        return RuntimeError(f"{name}: {error}")


class LSTMCell(_Cell):
    """torch.nn.LSTMCell on the fused step: same parameters, ``state_dict``, arguments and results.

    Args:
        input_size: I.
        hidden_size: H.
        bias: has b_ih and b_hh.
        device, dtype: of the parameters.

    ``forward(input, hx=None)``: input [B, I] or [I]; hx = (h, c), each [B, H] or [H], zeros by default. Returns (h', c').

    Raises:
        ValueError, RuntimeError: as torch.nn.LSTMCell, for a wrong number of dimensions, and wrong sizes, dtypes or devices.

    The formulas are those of :func:`seqrec_fast.lstm_step`. Use that function with ``inplace=True`` for serving.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> cell = sf.LSTMCell.from_torch(torch.nn.LSTMCell(8, 16))
        >>> h, c = cell(torch.randn(3, 8))
        >>> h.shape
        torch.Size([3, 16])
    """

    torch_class = nn.LSTMCell
    gates = 4

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if hx is None:
            zeros = input.new_zeros((*input.shape[:-1], self.hidden_size))
            hx = (zeros, zeros)
        p = self._parameters  # attribute access on a module walks through __getattr__: half a microsecond each
        try:
            return lstm_step(input, hx, p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"])  # type: ignore[arg-type]
        except _UNFIT as error:
            result: tuple[Tensor, Tensor] = self._step_again(lstm_step, input, tuple(hx), error)
            return result


class GRUCell(_Cell):
    """torch.nn.GRUCell on the fused step: same parameters, ``state_dict``, arguments and results.

    Args:
        input_size: I.
        hidden_size: H.
        bias: has b_ih and b_hh.
        device, dtype: of the parameters.

    ``forward(input, hx=None)``: input [B, I] or [I]; hx [B, H] or [H], zeros by default. Returns h'.

    Raises:
        ValueError, RuntimeError: as torch.nn.GRUCell, for a wrong number of dimensions, and wrong sizes, dtypes or devices.

    The formulas are those of :func:`seqrec_fast.gru_step`.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> sf.GRUCell(8, 16)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    torch_class = nn.GRUCell
    gates = 3

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if hx is None:
            hx = input.new_zeros((*input.shape[:-1], self.hidden_size))
        p = self._parameters
        try:
            return gru_step(input, hx, p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"])  # type: ignore[arg-type]
        except _UNFIT as error:
            result: Tensor = self._step_again(gru_step, input, (hx,), error)
            return result
