"""What the whole-sequence recurrences share: the order in which a ragged batch is processed, and its input projection.

Rows are sorted by falling length and tokens are laid out step by step, so that step t is one contiguous block of the rows that are
still running. Every product and every loop then touches real tokens only: time follows Σ lengths, not B·T.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ._calls import SequenceCall

LAYER_NORM_EPS = 1e-5

# Tokens are projected, and derivatives prepared, a few steps at a time, so that what a step reads is still in the second-level
# cache: 256 k numbers are 1 MB in fp32. Measured at B = 256, T = 50, H = 128 on one thread: 128 k to 2 M differ by noise; 16 k, or
# everything at once, take 1.3 to 1.5 times as long.
CHUNK_ELEMENTS = 1 << 18


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a 16-bit input is computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_lengths(operator: str, lengths: Tensor, steps: int) -> None:
    """Lengths on the CPU lie in 0…T. Reads them, so it belongs inside an opaque operator."""
    outside = (lengths < 0) | (lengths > steps)
    if bool(outside.any()):
        row = int(outside.int().argmax())
        raise ValueError(
            f"{operator}: lengths must lie in 0…{steps} (the number of steps), got {int(lengths[row])} for row {row}"
        )


def segment_starts(reset: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """bool [T, B]: where the state is dropped before a step, from ``reset`` [B, T] (a new segment begins at that step).

    In the reverse direction the segment that begins at step t has just been left before step t − 1.
    """
    starts = reset.t()  # [T, B]
    if not reverse:
        return starts
    if lengths is not None:  # a mark on padding is no boundary of the sequence
        starts = starts & (torch.arange(starts.shape[0], device=starts.device)[:, None] < lengths.to(starts.device))
    return torch.cat([starts[1:], torch.zeros_like(starts[:1])])


class Packing:
    """Where each token lies.

    Lengths on an accelerator are never read, since that would wait for it: then every token is processed and ``valid`` tells the
    real ones.

    Args:
        lengths: int [B] in range, or None when every row has all steps.
        rows: B.
        steps: T.
        device: where the tokens are.
        readable: lengths may be read; by default when they are on the CPU.

    Attributes:
        sizes: for each step, the number of rows still running.
        offsets: for each step, its first token; one more entry: the number of tokens N.
        order: int64 [B], the caller's row at each place.
        valid: bool [N, 1], or None when all N tokens are real.
    """

    def __init__(
        self, lengths: Tensor | None, rows: int, steps: int, device: torch.device, readable: bool | None = None
    ) -> None:
        self.rows, self.steps = rows, steps
        self.valid: Tensor | None = None
        if lengths is not None and not (lengths.device.type == "cpu" if readable is None else readable):
            running = torch.arange(steps, device=device)[:, None] < lengths.to(device)  # [T, B]
            self.valid, lengths = running.reshape(-1, 1), None
        if lengths is None or bool((lengths == steps).all()):
            self.full = True
            self.sizes = [rows] * steps
            self.order = torch.arange(rows, device=device)
        else:
            self.full = False
            sorted_lengths, order = torch.sort(lengths.long(), descending=True, stable=True)
            running = torch.arange(steps)[:, None] < sorted_lengths
            self.sizes = running.sum(1).tolist()
            self.order = order.to(device)
            self._slot = running.flatten().nonzero().flatten().to(device)  # [N]: step·B + place
        self.offsets = [0]
        for size in self.sizes:
            self.offsets.append(self.offsets[-1] + size)
        self.tokens = self.offsets[-1]

    def sort_rows(self, values: Tensor) -> Tensor:
        """[B, …] in the order of processing; never an alias of ``values``."""
        return values.clone() if self.full else values.index_select(0, self.order)

    def unsort_rows(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`sort_rows`."""
        return values if self.full else torch.empty_like(values).index_copy_(0, self.order, values)

    def pack(self, values: Tensor, batch_first: bool = False) -> Tensor:
        """[T, B, …] (or [B, T, …]) → [N, …]. May be a view."""
        if self.full:
            return (values.transpose(0, 1) if batch_first else values).flatten(0, 1)
        return values.flatten(0, 1).index_select(0, self._position(batch_first))

    def unpack(self, tokens: Tensor, batch_first: bool = False) -> Tensor:
        """[N, …] → [T, B, …] (or [B, T, …]), contiguous, 0 at padding. May be a view."""
        shape = (self.rows, self.steps) if batch_first else (self.steps, self.rows)
        if self.full:
            values = tokens.view(self.steps, self.rows, *tokens.shape[1:])
            return values.transpose(0, 1).contiguous() if batch_first else values
        flat = tokens.new_zeros(self.rows * self.steps, *tokens.shape[1:])
        return flat.index_copy_(0, self._position(batch_first), tokens).view(*shape, *tokens.shape[1:])

    def _position(self, batch_first: bool) -> Tensor:
        step, place = self._slot // self.rows, self._slot % self.rows
        row = self.order[place]
        return row * self.steps + step if batch_first else step * self.rows + row

    def place_of_token(self) -> Tensor:
        """int64 [N]: the place of each token's row in the order of processing."""
        if self.full:
            return self.order.repeat(self.steps)
        return self._slot % self.rows

    def previous(self, states: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """The state that each token's step started from: [N, …] from the states after each step and the sorted initial ones."""
        if self.full:
            inner = states[self.rows :] if reverse else states[: max(self.tokens - self.rows, 0)]
            former = torch.cat([inner, initial] if reverse else [initial, inner])[: self.tokens]
            if reverse and self.valid is not None and self.steps:  # the last real step starts from the initial state
                begins = torch.cat([~self.valid[self.rows :], torch.zeros_like(self.valid[: self.rows])])
                former = torch.where(begins, initial.repeat(self.steps, 1), former)
            return former
        step, place = self._slot // self.rows, self._slot % self.rows
        shift = 1 if reverse else -1
        offsets = torch.tensor([0, *self.offsets[:-1], 0], device=states.device)  # of step − 1 … step T, shifted by one
        sizes = torch.tensor([0, *self.sizes, 0], device=states.device)
        neighbour = step + shift + 1
        source = torch.where(place < sizes[neighbour], offsets[neighbour] + place, self.tokens + place)
        return torch.cat([states, initial]).index_select(0, source)

    def chunks(self, width: int, backwards: bool) -> Iterator[tuple[range, int, int]]:
        """(steps, first token, last token + 1), in the order of processing; ``width`` numbers a token."""
        limit = max(CHUNK_ELEMENTS // max(width, 1), 1)
        steps = range(self.steps)[::-1] if backwards else range(self.steps)
        first, count = 0, 0
        for i, step in enumerate(steps):
            if i > first and count + self.sizes[step] > limit:
                yield self._chunk(steps[first:i])
                first, count = i, 0
            count += self.sizes[step]
        if steps:
            yield self._chunk(steps[first:])

    def _chunk(self, steps: range) -> tuple[range, int, int]:
        return steps, self.offsets[min(steps)], self.offsets[max(steps) + 1]


class Carry:
    """The state of the running rows, while their number changes from step to step.

    Rows join with their entry in ``initial`` and leave with the state they have; both happen at the end of the sorted rows.
    """

    def __init__(self, initial: Tensor) -> None:
        self._initial = initial
        self._finished: list[Tensor] = []
        self.current = initial[:0]

    def take(self, size: int) -> Tensor:
        """The state of the first ``size`` rows. Assign ``current`` after the step."""
        have = self.current.shape[0]
        if size < have:
            self._finished.append(self.current[size:])
            self.current = self.current[:size]
        elif size > have:
            joining = self._initial[have:size]
            self.current = torch.cat([self.current, joining]) if have else joining
        return self.current

    def final(self) -> Tensor:
        """[B, …]: the last state of every row, in sorted order."""
        pieces = [self.current, *reversed(self._finished)]
        count = sum(piece.shape[0] for piece in pieces)
        return torch.cat([*pieces, self._initial[count:]])


class Inputs:
    """The tokens' input vectors (rows of x, or rows of a table picked by ids) and their part of the gates.

    Attributes:
        w_ih: [G, I] in the accumulation dtype, or None when the vectors are that part already.
        bias: [G], what :meth:`project` adds, or None.
    """

    def __init__(self, operator: str, call: SequenceCall, packing: Packing) -> None:
        self.wide = accumulation_dtype(call.x.dtype)
        self._call, self._packing = call, packing
        self._rows = call.x if call.ids is not None else packing.pack(call.x, call.batch_first)  # the table, or [N, I]
        self._ids = None if call.ids is None else packing.pack(call.ids, call.batch_first).long()  # [N]
        if self._ids is not None and self._ids.device.type == "cpu":
            check_table_ids(operator, self._ids, call.x.shape[0])
        self.w_ih = None if call.w_ih is None else call.w_ih.to(self.wide)
        self.ln_ih = None if call.ln_ih is None else call.ln_ih.to(self.wide)
        self.bias = input_bias(call)

    def rows(self, start: int, stop: int) -> Tensor:
        """The vectors of some tokens, [stop − start, I]. On an accelerator an id outside the table gives NaN (nothing is read)."""
        if self._ids is None:
            x = self._rows[start:stop].to(self.wide)
        else:
            ids = self._ids[start:stop]
            x = (self._rows[ids] if ids.device.type == "cpu" else lookup(self._rows, ids)).to(self.wide)
        valid = self._packing.valid
        return x if valid is None else x.masked_fill(~valid[start:stop], 0)

    def project(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write W_ih·x + biases of some tokens to ``out`` [stop − start, G]."""
        x = self.rows(start, stop)
        if self.ln_ih is not None:
            u = x if self.w_ih is None else x @ self.w_ih.t()
            out.copy_(F.layer_norm(u, u.shape[-1:], self.ln_ih, self.bias, LAYER_NORM_EPS))
        elif self.w_ih is None:
            out.copy_(x if self.bias is None else x + self.bias)
        elif self.bias is None:
            torch.mm(x, self.w_ih.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.w_ih.t(), out=out)
        return out

    def gradients(self, dz: Tensor, wanted: set[str]) -> dict[str, Tensor]:
        """Those of x (or the table), w_ih and ln_ih that are wanted, from the gradient [N, G] of the input's part of the gates."""
        found: dict[str, Tensor] = {}
        if not wanted & {"x", "w_ih", "ln_ih"}:
            return found
        x = self.rows(0, self._packing.tokens)
        du = dz
        if self.ln_ih is not None:
            unit, rstd = normalised(x if self.w_ih is None else x @ self.w_ih.t())
            if "ln_ih" in wanted:
                found["ln_ih"] = (dz * unit).sum(0)
            du = normalised_gradient(dz * self.ln_ih, unit, rstd)
        if "w_ih" in wanted:
            found["w_ih"] = du.t() @ x
        if "x" in wanted:
            found["x"] = self._scatter(du if self.w_ih is None else du @ self.w_ih)
        return found

    def _scatter(self, d_rows: Tensor) -> Tensor:
        """The gradient of x, or of the table, from that of the tokens' vectors [N, I]."""
        if self._ids is None:
            return self._packing.unpack(d_rows, self._call.batch_first)
        ids = self._ids if self._ids.device.type == "cpu" else self._ids.clamp(0, self._rows.shape[0] - 1)
        return d_rows.new_zeros(self._rows.shape).index_add_(0, ids, d_rows)


def check_table_ids(operator: str, ids: Tensor, count: int) -> None:
    """Ids on the CPU lie in 0…N−1. Reads them, so it belongs inside an opaque operator."""
    outside = (ids < 0) | (ids >= count)
    if bool(outside.any()):
        raise IndexError(
            f"{operator}: ids must lie in 0…{count - 1} (the rows of the table), got {int(ids[outside][0])}"
        )


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table; NaN for an id outside it."""
    inside = ids.clamp(0, table.shape[0] - 1)
    return table[inside].masked_fill((inside != ids)[..., None], float("nan"))


def input_bias(call: SequenceCall) -> Tensor | None:
    """The biases that join the input's part of the gates."""
    wide = accumulation_dtype(call.x.dtype)
    biases = [bias.to(wide) for bias in call.input_biases if bias is not None]
    if len(biases) == 2:
        return biases[0] + biases[1]
    return biases[0] if biases else None


def valid_steps(call: SequenceCall) -> Tensor | None:
    """bool [T, B, 1]: the real tokens, or None when all are."""
    if call.lengths is None:
        return None
    steps = torch.arange(call.steps_and_rows[0], device=call.x.device)
    return (steps[:, None] < call.lengths.to(call.x.device))[..., None]


def plain_input_part(call: SequenceCall, valid: Tensor | None) -> Tensor:
    """W_ih·x + biases, [T, B, G], in differentiable PyTorch. Padding is read as 0."""
    wide = accumulation_dtype(call.x.dtype)
    tokens = call.x if call.ids is None else call.ids
    if call.batch_first:
        tokens = tokens.transpose(0, 1)
    if call.ids is not None:
        ids = tokens.long() if valid is None else tokens.long().masked_fill(~valid[..., 0], 0)
        # On the CPU an id below 0 would be counted from the end: let it be refused as one too large is.
        on_cpu = ids.device.type == "cpu"
        tokens = call.x[ids.masked_fill(ids < 0, call.x.shape[0])] if on_cpu else lookup(call.x, ids)
    x = tokens.to(wide)  # [T, B, I]
    if valid is not None:
        x = x.masked_fill(~valid, 0)
    u = x if call.w_ih is None else x @ call.w_ih.to(wide).t()
    if call.ln_ih is not None:
        u = F.layer_norm(u, u.shape[-1:], call.ln_ih.to(wide), None, LAYER_NORM_EPS)
    bias = input_bias(call)
    return u if bias is None else u + bias


def stack_steps(values: list[Tensor], like: Tensor, valid: Tensor | None) -> Tensor:
    """[T, B, …] from one tensor [B, …] a step, 0 at padding; ``like`` gives the shape where there is no step."""
    if not values:
        return like.new_empty((0, *like.shape))
    stacked = torch.stack(values)
    return stacked if valid is None else stacked.masked_fill(~valid, 0)


def packing_of(operator: str, call: SequenceCall) -> Packing:
    """The packing of a call.

    Raises:
        ValueError: a length outside 0…T.
    """
    steps, rows = call.steps_and_rows
    if call.lengths is not None and call.lengths.device.type == "cpu":
        check_lengths(operator, call.lengths, steps)
    return Packing(call.lengths, rows, steps, call.x.device)


def starts_of(call: SequenceCall, packing: Packing) -> Tensor | None:
    """bool [N, 1]: the tokens before which the state is dropped."""
    if call.reset is None:
        return None
    return packing.pack(segment_starts(call.reset, call.lengths, call.reverse))[:, None]


def former_states(
    call: SequenceCall,
    packing: Packing,
    states: Tensor,
    initial: Tensor,
    starts: Tensor | None,
    time_major: bool = False,
) -> Tensor:
    """The state [N, …] each token's step started from, resets included; ``states``: those after each step, as the forward saved them."""
    wide = accumulation_dtype(call.x.dtype)
    after = packing.pack(states, call.batch_first and not time_major).to(wide)
    former = packing.previous(after, packing.sort_rows(initial).to(wide), call.reverse)
    return former if starts is None else former.masked_fill(starts, 0)


def normalised(values: Tensor) -> tuple[Tensor, Tensor]:
    """((v − mean)·rstd, rstd) over the last dimension."""
    centred = values - values.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
    return centred * rstd, rstd


def normalised_gradient(grad: Tensor, unit: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of v from that of ``unit`` = (v − mean)·rstd."""
    return (grad - grad.mean(-1, keepdim=True) - unit * (grad * unit).mean(-1, keepdim=True)) * rstd
