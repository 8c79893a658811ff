"""The options and weights of the whole-sequence recurrences, and the checks of their public functions' arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .._precision import autocast_enabled
from ._checks import check_floating, check_shape


@dataclass(frozen=True)
class Options:
    """The keywords of ``lstm`` and ``gru``; their meaning is told there."""

    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    last_only: bool = False
    training: bool = False
    dropout: float = 0.0
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    layer_norm: bool = False
    save_gates: bool | str = "auto"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def draws(self) -> bool:
        """Some mask is random."""
        between_layers = self.dropout > 0 and self.num_layers > 1
        return self.training and (between_layers or max(self.zoneout, self.recurrent_dropout, self.weight_dropout) > 0)

    def check(self, operator: str) -> None:
        """Raise ValueError for a value out of range."""
        if self.num_layers < 1:
            raise ValueError(f"{operator}: num_layers must be at least 1, got {self.num_layers}")
        for name in ("dropout", "zoneout", "recurrent_dropout", "weight_dropout"):
            p = getattr(self, name)
            if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0 <= p <= 1:
                raise ValueError(f"{operator}: {name} must be a probability in [0, 1], got {p!r}")
        if self.save_gates not in (True, False, "auto"):
            raise ValueError(f'{operator}: save_gates must be "auto", True or False, got {self.save_gates!r}')


class Weights(NamedTuple):
    """The weights of one layer in one direction; G = 4H (lstm) or 3H (gru)."""

    w_ih: Tensor | None  # [G, I]
    w_hh: Tensor  # [G, P]
    b_ih: Tensor | None = None  # [G]
    b_hh: Tensor | None = None  # [G]
    w_hr: Tensor | None = None  # [P, H], lstm
    ln_ih: Tensor | None = None  # [G]
    ln_hh: Tensor | None = None  # [G]
    ln_c: Tensor | None = None  # [H], lstm
    ln_c_bias: Tensor | None = None  # [H], lstm


def weight_names(operator: str, bias: bool, projected: bool, layer_norm: bool) -> tuple[str, ...]:
    """The fields of :class:`Weights` that a layer has, in the order of a flat list: torch's, then those of the normalisation."""
    lstm = operator == "lstm"
    names: tuple[str, ...] = ("w_ih", "w_hh")
    names += ("b_ih", "b_hh") if bias else ()
    names += ("w_hr",) if projected else ()
    if layer_norm:
        names += ("ln_ih", "ln_hh")
        names += (("ln_c", "ln_c_bias") if bias else ("ln_c",)) if lstm else ()
    return names


def split_weights(operator: str, flat: Sequence[Tensor], options: Options) -> list[Weights]:
    """One :class:`Weights` for each layer and direction.

    Raises:
        ValueError: the list has a length that no layer makes.
    """
    cells = options.num_layers * options.directions
    each = len(flat) // cells
    possible = {}
    for bias in (True, False):
        for projected in (False, True) if operator == "lstm" else (False,):
            names = weight_names(operator, bias, projected, options.layer_norm)
            possible[len(names)] = names
    if len(flat) != each * cells or each not in possible:
        counts = " or ".join(str(count) for count in sorted(possible))
        raise ValueError(
            f"{operator}: weights must hold {counts} tensors for each of {options.num_layers} layers × "
            f"{options.directions} directions (layer_norm={options.layer_norm}), got {len(flat)}"
        )
    names = possible[each]
    return [Weights(**dict(zip(names, flat[k * each : (k + 1) * each], strict=True))) for k in range(cells)]


def check_arguments(
    operator: str,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Weights],
    options: Options,
) -> None:
    """Kinds, dtypes, devices and shapes of the floating arguments of ``lstm`` and ``gru``.

    Raises:
        TypeError, ValueError.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    state_names = ("h", "c") if operator == "lstm" else ("h",)
    states = _as_states(operator, hx, len(state_names))
    named = {"input": data, **dict(zip(state_names, states or (), strict=False))}
    for k, cell in enumerate(weights):
        there = {n: w for n, w in cell._asdict().items() if w is not None or n in ("w_ih", "w_hh")}
        named.update({f"{name} of weights (layer and direction {k})": w for name, w in there.items()})
    if isinstance(data, Tensor) and autocast_enabled(data.device.type):
        for name, tensor in named.items():  # they may differ: each will take autocast's dtype
            check_floating(operator, **{name: tensor})
    else:
        check_floating(operator, **named)
    packed = isinstance(input, PackedSequence)
    if data.dim() != 2 and (packed or data.dim() != 3):
        expected = (
            "[N, I] in a PackedSequence" if packed else "[T, B, I], [B, T, I] with batch_first, or unbatched [T, I]"
        )
        raise ValueError(f"{operator}: input must have shape {expected}, got {tuple(data.shape)}")
    _check_weights(operator, data.shape[-1], weights, options)
    if states is None:
        return
    count, width = len(weights), weights[0].w_hh.shape[1]
    lead: tuple[int, ...] = (count,)
    if isinstance(input, PackedSequence):
        lead = (count, int(input.batch_sizes[0]))
    elif data.dim() == 3:
        lead = (count, data.shape[0] if options.batch_first else data.shape[1])
    letters = "L·D, B" if len(lead) == 2 else "L·D"
    check_shape(operator, "h of hx", states[0], (*lead, width), f"[{letters}, P]")
    if operator == "lstm":
        check_shape(operator, "c of hx", states[1], (*lead, weights[0].w_hh.shape[0] // 4), f"[{letters}, H]")


def _as_states(operator: str, hx: Any, count: int) -> tuple[Any, ...] | None:
    if hx is None:
        return None
    if count == 1:
        return (hx,)
    if not isinstance(hx, (tuple, list)) or len(hx) != count:
        raise TypeError(f"{operator}: hx must be a pair (h, c) of tensors or None, got {type(hx).__name__}")
    return tuple(hx)


def _check_weights(operator: str, inputs: int, weights: Sequence[Weights], options: Options) -> None:
    gates = 4 if operator == "lstm" else 3
    letter = f"{gates}H"
    first = weights[0]
    if first.w_hh.dim() != 2 or first.w_hh.shape[0] % gates or not first.w_hh.shape[0]:
        raise ValueError(f"{operator}: w_hh must have shape [{letter}, P], got {tuple(first.w_hh.shape)}")
    total, width = first.w_hh.shape
    hidden = total // gates
    for k, cell in enumerate(weights):
        layer_inputs = inputs if k < options.directions else options.directions * width
        expected = {
            "w_ih": ((total, layer_inputs), f"[{letter}, I]"),
            "w_hh": ((total, width), f"[{letter}, P]"),
            "w_hr": ((width, hidden), "[P, H]"),
            "ln_c": ((hidden,), "[H]"),
            "ln_c_bias": ((hidden,), "[H]"),
        }
        for name, weight in cell._asdict().items():
            if weight is not None:
                shape, meaning = expected.get(name, ((total,), f"[{letter}]"))
                check_shape(operator, f"{name} of weights (layer and direction {k})", weight, shape, meaning)
        if cell.w_hr is None and width != hidden:
            check_shape(
                operator, f"w_hh of weights (layer and direction {k})", cell.w_hh, (total, hidden), f"[{letter}, H]"
            )


def check_lengths_and_reset(
    operator: str, tokens: Tensor, rows: int, steps: int, lengths: Tensor | None, reset: Tensor | None
) -> None:
    """Kind, dtype, shape and device; the values of lengths are checked where they are read.

    Raises:
        TypeError, ValueError.
    """
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
            got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"{operator}: lengths must be an int64 or int32 tensor, got {got}")
        if tuple(lengths.shape) != (rows,):
            raise ValueError(f"{operator}: lengths must have shape [B] = ({rows},), got {tuple(lengths.shape)}")
        if lengths.device.type != "cpu" and lengths.device != tokens.device:
            raise ValueError(f"{operator}: lengths must be on the CPU or on {tokens.device}, got {lengths.device}")
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            got = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
            raise TypeError(f"{operator}: reset must be a bool tensor, got {got}")
        if tuple(reset.shape) != (rows, steps):
            raise ValueError(
                f"{operator}: reset must have shape [B, T] = ({rows}, {steps}) whatever batch_first, got {tuple(reset.shape)}"
            )
        if reset.device != tokens.device:
            raise ValueError(f"{operator}: reset must be on {tokens.device}, got {reset.device}")
