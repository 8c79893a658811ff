"""``LSTM`` and ``GRU``: torch.nn's recurrent layers on the fused operators, with what torch lacks."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._logits import check_strided
from .._precision import autocast_enabled
from ..ops import gru as gru_operator
from ..ops import lstm as lstm_operator
from ..ops._recurrent import Layer, States, sequence, zero_states
from ..ops._recurrent_arguments import Options, Weights, weight_names
from ..ops.gru_step import gru_step
from ..ops.lstm_step import lstm_step

RecurrentType = TypeVar("RecurrentType", bound="_Recurrent")

_PARAMETER_OF = {
    "w_ih": "weight_ih",
    "w_hh": "weight_hh",
    "b_ih": "bias_ih",
    "b_hh": "bias_hh",
    "w_hr": "weight_hr",
    "ln_ih": "weight_ln_ih",
    "ln_hh": "weight_ln_hh",
    "ln_c": "weight_ln_c",
    "ln_c_bias": "bias_ln_c",
}


class _Recurrent(nn.RNNBase):
    """What LSTM and GRU share. An ``nn.RNNBase`` and not an ``nn.LSTM``, since Dynamo refuses to trace the latter."""

    operator: str
    torch_class: type[nn.RNNBase]
    layer: Layer

    def __init__(self, *torch_arguments: Any, regularisers: dict[str, Any], **torch_keywords: Any) -> None:
        layer_norm, save_gates = regularisers["layer_norm"], regularisers["save_gates"]
        self._extra_weights: tuple[str, ...] = ()  # reset_parameters runs within super().__init__
        super().__init__(self.operator.upper(), *torch_arguments, **torch_keywords)
        self.zoneout = regularisers["zoneout"]
        self.recurrent_dropout = regularisers["recurrent_dropout"]
        self.weight_dropout = regularisers["weight_dropout"]
        self.layer_norm = bool(layer_norm)
        self.save_gates = save_gates
        self.options().check(type(self).__name__)
        self._weight_names = weight_names(self.operator, self.bias, self.proj_size > 0, self.layer_norm)
        if self.layer_norm:
            self._add_layer_norm(torch_keywords["device"], torch_keywords["dtype"])

    def _add_layer_norm(self, device: Any, dtype: Any) -> None:
        """Append each layer's normalisation weights to torch's lists of names."""
        gates = (4 if self.operator == "lstm" else 3) * self.hidden_size
        self._extra_weights = tuple(name for name in self._weight_names if name.startswith("ln_"))
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            for extra in self._extra_weights:
                width = self.hidden_size if extra.startswith("ln_c") else gates
                name = _PARAMETER_OF[extra] + suffix
                setattr(self, name, nn.Parameter(torch.empty(width, device=device, dtype=dtype)))
                names.append(name)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self._reset_layer_norm()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√H, as torch; gains of the layer normalisation 1, its shifts 0."""
        super().reset_parameters()
        self._reset_layer_norm()

    def _reset_layer_norm(self) -> None:
        for extra in self._extra_weights:
            for names in self._all_weights:
                parameter = getattr(self, _PARAMETER_OF[extra] + names[0].removeprefix("weight_ih"))
                nn.init.constant_(parameter, 0.0 if extra == "ln_c_bias" else 1.0)

    def _init_flat_weights(self) -> None:
        """torch's list of weights, but of parameters alone: a computed weight's graph would be kept, and forbid copies."""
        self._flat_weights = [self._parameters.get(name) for name in self._flat_weights_names]
        self._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in self._flat_weights]

    def flatten_parameters(self) -> None:
        """Nothing: weights may lie anywhere."""

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("zoneout", "recurrent_dropout", "weight_dropout", "layer_norm"):
            value = getattr(self, name)
            text += f", {name}={value}" if value else ""
        return text if self.save_gates == "auto" else f"{text}, save_gates={self.save_gates}"

    @classmethod
    def from_torch(cls: type[RecurrentType], module: nn.RNNBase, **options: Any) -> RecurrentType:
        """A layer that shares the parameters of a torch.nn layer, so that optimizers and tied weights stay as they are.

        Args:
            module: torch.nn.LSTM for LSTM, torch.nn.GRU for GRU.
            options: what torch lacks, except ``layer_norm``, which has weights of its own.

        Raises:
            TypeError: ``module`` is something else.
            ValueError: ``layer_norm`` is asked for.
        """
        if not isinstance(module, cls.torch_class):
            expected = f"torch.nn.{cls.torch_class.__name__}"
            raise TypeError(f"{cls.__name__}.from_torch: module must be a {expected}, got {type(module).__name__}")
        if options.get("layer_norm"):
            raise ValueError(f"{cls.__name__}.from_torch: layer_norm has weights that a torch module does not have")
        names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
        names += ["proj_size"] if cls.operator == "lstm" else []
        dtype = module.weight_ih_l0.dtype
        layer = cls(**{name: getattr(module, name) for name in names}, device="meta", dtype=dtype, **options)
        for name in layer._flat_weights_names:
            weight: Tensor = getattr(module, name)
            setattr(layer, name, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach().clone()))
        return layer.train(module.training)

    def cell_weights(self) -> list[Weights]:
        """The weights of each layer and direction as they are now: replaced, tied or re-parametrised ones too."""
        p: dict[str, Any] = self._parameters
        return [
            Weights(
                **{
                    field: p[name] if name in p else getattr(self, name)
                    for field, name in zip(self._weight_names, names, strict=True)
                }
            )
            for names in self._all_weights
        ]

    def options(self, last_only: bool = False) -> Options:
        """The operator's options for a forward pass as the module is now."""
        return Options(
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            last_only=last_only,
            training=self.training,
            dropout=self.dropout,
            zoneout=self.zoneout,
            recurrent_dropout=self.recurrent_dropout,
            weight_dropout=self.weight_dropout,
            layer_norm=self.layer_norm,
            save_gates=self.save_gates,
        )

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, ...] | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        last_only: bool,
    ) -> tuple[Any, States]:
        weights = self.cell_weights()
        self._check(input, hx, weights[0].w_hh)
        options = self.options(last_only)
        return sequence(self.operator, type(self).layer, input, hx, weights, options, lengths=lengths, reset=reset)

    def _check(self, input: Any, hx: tuple[Tensor, ...] | None, weight: Tensor) -> None:
        """Kinds, sizes and dtypes of input and hx, with torch.nn's types of exception."""
        name = type(self).__name__
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        if not isinstance(data, Tensor):
            raise TypeError(f"{name}: input must be a tensor or a PackedSequence, got {type(input).__name__}")
        check_strided(name, "input", data)
        if not packed and data.dim() not in (2, 3):
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {data.dim()}D instead")
        autocast = autocast_enabled(data.device.type)
        if data.dtype != weight.dtype and not (autocast and data.is_floating_point()):
            raise ValueError(
                f"{name}: RNN input dtype ({data.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({data.dtype})"
            )
        if data.device != weight.device:
            raise RuntimeError(f"{name}: input is on {data.device} and the weights are on {weight.device}")
        if data.shape[-1] != self.input_size:
            raise RuntimeError(
                f"{name}: input.size(-1) must be equal to input_size {self.input_size}, got {data.shape[-1]}"
            )
        if hx is None:
            return
        lead: tuple[int, ...] = (self.num_layers * (2 if self.bidirectional else 1),)
        if packed:
            lead += (int(input.batch_sizes[0]),)
        elif data.dim() == 3:
            lead += (data.shape[0] if self.batch_first else data.shape[1],)
        for part, width in zip(hx, (self.proj_size or self.hidden_size, self.hidden_size), strict=False):
            if not isinstance(part, Tensor):
                raise TypeError(f"{name}: hx must hold tensors, got {type(part).__name__}")
            if tuple(part.shape) != (*lead, width):
                raise RuntimeError(f"{name}: Expected hidden size {(*lead, width)}, got {tuple(part.shape)}")
            if part.device != data.device or (part.dtype != data.dtype and not autocast):
                raise RuntimeError(
                    f"{name}: hx must have the input's dtype and device ({data.dtype}, {data.device}), "
                    f"got {part.dtype}, {part.device}"
                )

    def _step(self, x: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, States]:
        """One step through all layers; x [B, I] or [I]."""
        name = type(self).__name__
        if self.bidirectional:
            raise ValueError(f"{name}.step: a bidirectional layer needs the whole sequence")
        if not isinstance(x, Tensor) or x.dim() not in (1, 2):
            got = f"{x.dim()} dimensions" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}.step: x must have shape [B, I] or [I], got {got}")
        weights = self.cell_weights()
        steps = x[None] if x.dim() == 1 or not self.batch_first else x[:, None]  # a sequence of one step
        self._check(steps, state, weights[0].w_hh)
        special = self.layer_norm or self.zoneout or autocast_enabled(x.device.type) or self.options().draws
        if special:
            output, finals = sequence(self.operator, type(self).layer, steps, state, weights, self.options())
            return output.squeeze(0 if x.dim() == 1 or not self.batch_first else 1), finals
        if state is None:
            state = zero_states(x, x.shape[0] if x.dim() == 2 else 1, weights[0], self.num_layers, self.operator)
            state = state if x.dim() == 2 else tuple(part[:, 0] for part in state)
        finals_of_layers = []
        for number, cell in enumerate(weights):
            former = tuple(part[number] for part in state)
            final = self._cell_step(x, former, cell)
            x = final[0]
            finals_of_layers.append(final)
        return x, tuple(torch.stack(parts) for parts in zip(*finals_of_layers, strict=True))

    def _cell_step(self, x: Tensor, state: States, cell: Weights) -> States:
        raise NotImplementedError


class LSTM(_Recurrent):
    """torch.nn.LSTM on the fused operator: same parameters, ``state_dict``, arguments and results, and more.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as torch.nn.LSTM.
        zoneout: chance that a unit of h or c keeps its former value at a step; its mean in evaluation.
        recurrent_dropout: chance that a unit of h is hidden from the recurrent weight, for a row's whole sequence.
        weight_dropout: chance that an entry of the recurrent weight is 0 in a forward pass.
        layer_norm: layer-normalised gates and cell; adds the parameters ``weight_ln_ih_l*``, ``weight_ln_hh_l*`` [4H],
            ``weight_ln_c_l*`` [H] and, with ``bias``, ``bias_ln_c_l*`` [H].
        save_gates: keep the gates for the backward, or recompute them.

    The equations and each option are those of :func:`seqrec_fast.lstm`. Weights may be tied, expanded, non-contiguous or
    re-parametrised.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> layer = sf.LSTM(8, 16, num_layers=2, batch_first=True)
        >>> output, (h, c) = layer(torch.randn(4, 10, 8), lengths=torch.tensor([10, 7, 3, 0]))
        >>> output.shape, h.shape
        (torch.Size([4, 10, 16]), torch.Size([2, 4, 16]))
        >>> last, state = layer(torch.randn(4, 10, 8), last_only=True)
        >>> last, state = layer.step(torch.randn(4, 8), state)
        >>> last.shape
        torch.Size([4, 16])
    """

    operator = "lstm"
    torch_class = nn.LSTM
    layer = staticmethod(lstm_operator.layer)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        save_gates: bool | str = "auto",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            regularisers={
                "zoneout": zoneout,
                "recurrent_dropout": recurrent_dropout,
                "weight_dropout": weight_dropout,
                "layer_norm": layer_norm,
                "save_gates": save_gates,
            },
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """(output, (h_n, c_n)); shapes and errors as :func:`seqrec_fast.lstm`, exception types for input and hx as torch.nn.LSTM."""
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            raise TypeError(f"LSTM: hx must be a pair (h, c), got {type(hx).__name__}")
        output, (h_n, c_n) = self._run(input, None if hx is None else tuple(hx), lengths, reset, last_only)
        return output, (h_n, c_n)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One step through all layers: x [B, I] or [I], state (h [L, B, P], c [L, B, H]) or None → (output [B, P], state).

        Raises:
            ValueError: a bidirectional layer, or x of another number of dimensions.
        """
        output, (h_n, c_n) = self._step(x, state)
        return output, (h_n, c_n)

    def _cell_step(self, x: Tensor, state: States, cell: Weights) -> States:
        h, c = state
        assert cell.w_ih is not None
        h, c = lstm_step(x, (h, c), cell.w_ih, cell.w_hh, cell.b_ih, cell.b_hh)
        return (h if cell.w_hr is None else nn.functional.linear(h, cell.w_hr)), c


class GRU(_Recurrent):
    """torch.nn.GRU on the fused operator: same parameters, ``state_dict``, arguments and results, and more.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.GRU.
        zoneout, recurrent_dropout, weight_dropout, save_gates: as for :class:`LSTM`.
        layer_norm: layer-normalised gates; adds the parameters ``weight_ln_ih_l*`` and ``weight_ln_hh_l*`` [3H].

    The equations and each option are those of :func:`seqrec_fast.gru`.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> layer = sf.GRU(8, 16, batch_first=True)
        >>> last, h = layer(torch.randn(4, 10, 8), lengths=torch.tensor([10, 7, 3, 0]), last_only=True)
        >>> last.shape
        torch.Size([4, 16])
    """

    operator = "gru"
    torch_class = nn.GRU
    layer = staticmethod(gru_operator.layer)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        save_gates: bool | str = "auto",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            regularisers={
                "zoneout": zoneout,
                "recurrent_dropout": recurrent_dropout,
                "weight_dropout": weight_dropout,
                "layer_norm": layer_norm,
                "save_gates": save_gates,
            },
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Any, Tensor]:
        """(output, h_n); shapes and errors as :func:`seqrec_fast.gru`, exception types for input and hx as torch.nn.GRU."""
        output, (h_n,) = self._run(input, None if hx is None else (hx,), lengths, reset, last_only)
        return output, h_n

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step through all layers: x [B, I] or [I], state [L, B, H] or None → (output [B, H], state).

        Raises:
            ValueError: a bidirectional layer, or x of another number of dimensions.
        """
        output, (h_n,) = self._step(x, None if state is None else (state,))
        return output, h_n

    def _cell_step(self, x: Tensor, state: States, cell: Weights) -> States:
        assert cell.w_ih is not None
        return (gru_step(x, state[0], cell.w_ih, cell.w_hh, cell.b_ih, cell.b_hh),)
