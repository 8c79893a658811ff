"""What ``lstm`` and ``gru`` share: layers and directions made of the one-layer operators, forms of input, masks, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .._operator import tracing, transforms_active, wants_gradient
from .._precision import autocast_enabled, current_precision
from ..backends.reference._calls import SAVE_GATES, SAVE_NOTHING, SAVE_STATES, SequenceCall
from ..backends.reference._philox import INPUT_DROPOUT, WEIGHT_DROPOUT, stream_of
from ..backends.reference._sequence import check_lengths
from ._packed import padded, repacked
from ._random import draw_seed, keyed_dropout
from ._recurrent_arguments import Options, Weights, check_lengths_and_reset

States = tuple[Tensor, ...]  # (h,) or (h, c)


class Pass(NamedTuple):
    """What the operator is told besides tensors and weights, in the order of its schema; see ``backends/reference/_calls.py``."""

    ids: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    seed: Tensor | None
    batch_first: bool
    reverse: bool
    last_only: bool
    save: int
    zoneout: float
    recurrent_dropout: float
    stream: int
    precision: int


Layer = Callable[[Tensor, States, Weights, Pass], tuple[Tensor, States]]


def layers(
    layer: Layer,
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    weights: Sequence[Weights],
    options: Options,
    ids: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, States]:
    """Run every layer and direction, all masks from one seed.

    ``inputs``: for each direction of the first layer [T, B, I] or [B, T, I], or with ids a table; states [L·D, B, …].
    """
    training, batch_first = options.training, options.batch_first
    seed = draw_seed(inputs[0].device) if options.draws else None
    save = SAVE_STATES if options.save_gates is False else SAVE_GATES
    precision = current_precision()
    finals: list[States] = []
    for number in range(options.num_layers):
        if number and seed is not None and options.dropout:
            dropped = keyed_dropout(inputs[0], seed, stream_of(number, 0) + INPUT_DROPOUT, options.dropout, batch_first)
            inputs = (dropped,) * options.directions
        last_only = options.last_only and number == options.num_layers - 1
        outputs = []
        for direction in range(options.directions):
            x = inputs[direction]
            k = number * options.directions + direction
            stream = stream_of(number, direction)
            cell = weights[k]
            if seed is not None and options.weight_dropout:
                masked = keyed_dropout(cell.w_hh[None], seed, stream + WEIGHT_DROPOUT, options.weight_dropout, True)[0]
                cell = cell._replace(w_hh=masked)
            state = tuple(part[k] for part in states)
            recurrent_dropout = options.recurrent_dropout if training else 0.0
            told = Pass(
                ids=ids if number == 0 else None,
                lengths=lengths,
                reset=reset,
                seed=seed if options.zoneout or recurrent_dropout else None,
                batch_first=batch_first,
                reverse=direction == 1,
                last_only=last_only,
                save=save if wants_gradient(x, *state, *cell) else SAVE_NOTHING,
                zoneout=float(options.zoneout),
                recurrent_dropout=float(recurrent_dropout),
                stream=stream,
                precision=precision,
            )
            output, final = layer(x, state, cell, told)
            outputs.append(final[0] if last_only else output)
            finals.append(final)
        inputs = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1),) * options.directions
    return inputs[0], tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def sequence(
    operator: str,
    layer: Layer,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Weights],
    options: Options,
    *,
    tables: tuple[Tensor, ...] | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Any, States]:
    """Bring any accepted form of the arguments to a padded batch, run it, and give back the same form.

    ``input`` holds ids when there are ``tables``, one for each direction. hx [L·D, B, …], or [L·D, …] for unbatched input; shapes are the caller's to check.
    """
    packed = input if isinstance(input, PackedSequence) else None
    batched = True
    if packed is not None:
        if lengths is not None:
            raise ValueError(f"{operator}: lengths cannot go with a PackedSequence, which has its own")
        options = replace(options, batch_first=False)
        tokens, lengths = padded(packed)  # [T, B, I], rows in the caller's order
    else:
        assert isinstance(input, Tensor)
        tokens = input
        batched = input.dim() == (3 if tables is None else 2)
        if not batched:
            if lengths is not None:
                raise ValueError(f"{operator}: lengths cannot go with unbatched input")
            options = replace(options, batch_first=False)
            tokens = input.unsqueeze(1)
            hx = None if hx is None else tuple(part.unsqueeze(1) for part in hx)
            reset = None if reset is None else reset[None]
    rows, steps = tokens.shape[:2] if options.batch_first else (tokens.shape[1], tokens.shape[0])
    check_lengths_and_reset(operator, tokens, rows, steps, lengths, reset)
    if lengths is not None and transforms_active() and not tracing():
        _check_mapped_lengths(operator, lengths, steps)
    inputs, ids = ((tokens,) * options.directions, None) if tables is None else (tables, tokens)
    inputs, hx, weights, no_autocast = _follow_autocast(inputs, hx, weights)
    if hx is None:
        hx = zero_states(inputs[0], rows, weights[0], len(weights), operator)
    with no_autocast:
        output, finals = layers(layer, inputs, hx, weights, options, ids, lengths, reset)
    if packed is not None:
        return output if options.last_only else repacked(output, packed), finals
    if not batched:
        return output.squeeze(0 if options.last_only else 1), tuple(part.squeeze(1) for part in finals)
    return output, finals


def _check_mapped_lengths(operator: str, lengths: Tensor, steps: int) -> None:
    """What a kernel checks where it reads lengths, for the formula, which takes any. lengths [B], perhaps mapped over."""
    while torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        place = torch._C._functorch.maybe_get_bdim(lengths)
        lengths = torch._C._functorch.get_unwrapped(lengths)
        lengths = lengths if place < 0 else lengths.movedim(place, 0)
    if lengths.device.type == "cpu" and lengths.numel() and type(lengths) is Tensor:
        of_each_row = lengths.reshape(-1, lengths.shape[-1])  # [M, B], M calls at once
        for extreme in (of_each_row.amin(0), of_each_row.amax(0)):
            check_lengths(operator, extreme, steps)


def zero_states(x: Tensor, rows: int, cell: Weights, count: int, operator: str) -> States:
    """h (and c) of zeros, [L·D, B, …]."""
    h = x.new_zeros((count, rows, cell.w_hh.shape[1]))
    if operator != "lstm":
        return (h,)
    return h, x.new_zeros((count, rows, cell.w_hh.shape[0] // 4))


def _follow_autocast(
    inputs: tuple[Tensor, ...], hx: tuple[Tensor, ...] | None, weights: Sequence[Weights]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, Sequence[Weights], AbstractContextManager[Any]]:
    """Under autocast every floating tensor takes its dtype, as torch.nn.LSTM does; inside, casts are the operator's own business."""
    device = inputs[0].device.type
    if not autocast_enabled(device):
        return inputs, hx, weights, nullcontext()
    dtype = torch.get_autocast_dtype(device)
    weights = [Weights._make(None if w is None else w.to(dtype) for w in cell) for cell in weights]
    hx = None if hx is None else tuple(part.to(dtype) for part in hx)
    return tuple(x.to(dtype) for x in inputs), hx, weights, torch.autocast(device, enabled=False)


# Gradients


def formula_gradients(
    formula: Callable[[Any], tuple[Tensor, ...]],
    call: SequenceCall,
    names: Sequence[str],
    grads: Sequence[Tensor | None],
) -> dict[str, Tensor]:
    """Gradients of the named arguments by autograd on the formula: differentiable again, and open to every transform."""
    if torch._C._are_functorch_transforms_active():
        return _formula_vjp(formula, call, names, grads)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {}
        for name in names:
            value = getattr(call, name)
            # An alias ends the search at this argument, even where one argument was computed from another.
            leaves[name] = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        results = formula(replace(call, **leaves))  # type: ignore[type-var]
        pairs = [
            (result, grad)
            for result, grad in zip(results, grads, strict=False)
            if grad is not None and result.requires_grad
        ]
        found: Sequence[Tensor | None] = [None] * len(names)
        if pairs:
            found = torch.autograd.grad(
                [result for result, _ in pairs],
                list(leaves.values()),
                [grad for _, grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def _formula_vjp(
    formula: Callable[[Any], tuple[Tensor, ...]],
    call: SequenceCall,
    names: Sequence[str],
    grads: Sequence[Tensor | None],
) -> dict[str, Tensor]:
    """The same where functorch is at work: autograd.grad would lose the tangents of ``grads``."""

    def results(*values: Tensor) -> tuple[Tensor, ...]:
        found = formula(replace(call, **dict(zip(names, values, strict=True))))  # type: ignore[type-var]
        return tuple(value for value, grad in zip(found, grads, strict=False) if grad is not None)

    pull_back = torch.func.vjp(results, *(getattr(call, name) for name in names))[1]
    found = pull_back(tuple(grad for grad in grads if grad is not None))
    return dict(zip(names, found, strict=True))


def loop_over_vmap(operator: Any) -> Callable[..., tuple[Any, Any]]:
    """A vmap rule that calls the operator once for each element: for compiled graphs, where the formula is not at hand."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        columns = [
            [arg] * info.batch_size if dim is None else arg.unbind(dim) for arg, dim in zip(args, in_dims, strict=True)
        ]
        results = [operator(*column) for column in zip(*columns, strict=True)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return rule
