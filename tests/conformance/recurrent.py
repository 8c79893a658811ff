"""The recurrent half of the conformance suite: what every backend is held to.

``naive_lstm`` and ``naive_gru`` are written apart from the package, one row and one step at a time, from the equations: autograd on
them in fp64 is the truth, and the same code in the dtype under test is eager PyTorch, whose error is the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from seqrec_fast.backends.reference._calls import SAVE_GATES, GRUCall, LSTMCall

Call = LSTMCall | GRUCall

# Dropout masks, from the published generator in Python integers (Salmon et al. 2011).

MASK32 = 0xFFFFFFFF
ZONE_H, ZONE_C, DROP_H = 0, 1, 2


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def is_dropped(seed: int, stream: int, row: int, step: int, unit: int, p: float) -> bool:
    word = philox4x32((unit, step // 8, row, stream), (seed & MASK32, (seed >> 32) & MASK32))[step % 8 // 2]
    draw = word >> 16 if step % 2 else word & 0xFFFF
    return draw < round(p * 65536)


def drop_mask(call: Call, kind: int, p: float, row: int, step: int, units: int, like: Tensor) -> Tensor:
    seed = int(call.seed)
    drops = [is_dropped(seed, call.stream + kind, row, step, unit, p) for unit in range(units)]
    return torch.tensor(drops, dtype=like.dtype)


# The recurrences.


def layer_norm(v: Tensor, gain: Tensor | None) -> Tensor:
    if gain is None:
        return v
    return gain * (v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + 1e-5)


def zoned(call: Call, kind: int, row: int, step: int, former: Tensor, new: Tensor) -> Tensor:
    if not call.zoneout:
        return new
    keep = call.zoneout
    if call.seed is not None:
        keep = drop_mask(call, kind, call.zoneout, row, step, new.numel(), new)
    return keep * former + (1 - keep) * new


def recurrent_factor(call: Call, row: int, like: Tensor) -> Tensor | float:
    p = call.recurrent_dropout
    if call.seed is None or not p:
        return 1.0
    return (1 - drop_mask(call, DROP_H, p, row, 0, like.numel(), like)) * (1 / (1 - p) if p < 1 else 0.0)


def plus(value: Tensor, bias: Tensor | None) -> Tensor:
    return value if bias is None else value + bias


Product = Callable[[Tensor, Tensor], Tensor]


def backwards_product(weight: Tensor, vector: Tensor) -> Tensor:
    """The same product, summed from the other end."""
    return weight.flip(1) @ vector.flip(0)


def shuffled_product(weight: Tensor, vector: Tensor, *, seed: int) -> Tensor:
    """weight·vector, summed in an order of its own."""
    order = torch.randperm(len(vector), generator=torch.Generator().manual_seed(seed))
    return weight[:, order] @ vector[order]


PRODUCTS: tuple[Product, ...] = (
    torch.mv,
    backwards_product,
    partial(shuffled_product, seed=1),
    partial(shuffled_product, seed=2),
)


def input_part(call: Call, row: int, step: int, product: Product) -> Tensor:
    tokens = call.x if call.ids is None else call.ids
    token = tokens[row, step] if call.batch_first else tokens[step, row]
    x = token if call.ids is None else call.x[int(token)]
    return layer_norm(x if call.w_ih is None else product(call.w_ih, x), call.ln_ih)


def lstm_step(call: LSTMCall, row: int, step: int, product: Product, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    z = plus(input_part(call, row, step, product), call.b_ih)
    z = z + plus(layer_norm(product(call.w_hh, recurrent_factor(call, row, h) * h), call.ln_hh), call.b_hh)
    i, f, g, o = z.chunk(4)
    c_new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    y = c_new if call.ln_c is None else plus(layer_norm(c_new, call.ln_c), call.ln_c_bias)
    h_new = torch.sigmoid(o) * torch.tanh(y)
    if call.w_hr is not None:
        h_new = product(call.w_hr, h_new)
    return zoned(call, ZONE_H, row, step, h, h_new), zoned(call, ZONE_C, row, step, c, c_new)


def gru_step(call: GRUCall, row: int, step: int, product: Product, h: Tensor) -> tuple[Tensor]:
    u_r, u_z, u_n = plus(input_part(call, row, step, product), call.b_ih).chunk(3)
    v = plus(layer_norm(product(call.w_hh, recurrent_factor(call, row, h) * h), call.ln_hh), call.b_hh)
    v_r, v_z, v_n = v.chunk(3)
    r, z = torch.sigmoid(u_r + v_r), torch.sigmoid(u_z + v_z)
    n = torch.tanh(u_n + r * v_n)
    return (zoned(call, ZONE_H, row, step, h, (1 - z) * n + z * h),)


def drops_state(call: Call, row: int, step: int, length: int) -> bool:
    if call.reset is None:
        return False
    if call.reverse:
        return step + 1 < length and bool(call.reset[row, step + 1])
    return bool(call.reset[row, step])


def naive(call: Call, product: Product = torch.mv) -> tuple[Tensor, ...]:
    """(output, h_n[, c_n]); output is [B, T, P] or [T, B, P] as the call says, also with last_only."""
    steps, rows = call.steps_and_rows
    step_of: Callable[..., tuple[Tensor, ...]] = lstm_step if isinstance(call, LSTMCall) else gru_step
    outputs = [[torch.zeros_like(call.h[row]) for _ in range(steps)] for row in range(rows)]
    last = []
    for row in range(rows):
        length = steps if call.lengths is None else int(call.lengths[row])
        state = (call.h[row], call.c[row]) if isinstance(call, LSTMCall) else (call.h[row],)
        for step in reversed(range(length)) if call.reverse else range(length):
            if drops_state(call, row, step, length):
                state = tuple(torch.zeros_like(part) for part in state)
            state = step_of(call, row, step, product, *state)
            outputs[row][step] = state[0]
        last.append(state)
    width = call.h.shape[1]
    flat = [output for row in outputs for output in row]
    output = torch.stack(flat).view(rows, steps, width) if flat else call.h.new_zeros(rows, steps, width)
    initial = (call.h, call.c) if isinstance(call, LSTMCall) else (call.h,)
    states = tuple(torch.stack(parts) for parts in zip(*last, strict=True)) if last else initial
    return (output if call.batch_first else output.transpose(0, 1), *states)


# The cases.


@dataclass(frozen=True)
class Case:
    """One call: sizes, options and data. Lengths are the first B of a fixed pattern that holds 0, 1, T and repeats."""

    name: str
    rows: int = 5
    steps: int = 11  # crosses a group of eight mask steps
    inputs: int = 6
    hidden: int = 9
    proj: int = 0  # lstm only
    bias: bool = True
    layer_norm: bool = False
    ragged: bool = False
    reset: bool = False
    reverse: bool = False
    batch_first: bool = True
    last_only: bool = False
    save: int = SAVE_GATES
    training: bool = True
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    ids: bool = False
    projected_table: bool = False  # no w_ih: the table holds W_ih·x
    scale: float = 1.0  # of x and the weights: 30 saturates every gate
    data: str = "normal"

    @property
    def options(self) -> frozenset[str]:
        """The options in use, as a backend's ``supports`` sees them."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) != field.default)


# Sizes cross vector and tile edges: 1, a prime, 16 ± 1, 32 ± 1, 64 + 1; more rows than a tile; one step; none.
CASES = [
    Case("plain"),
    Case("time_major", batch_first=False),
    Case("no_bias", bias=False),
    Case("reverse", reverse=True),
    Case("ragged", ragged=True),
    Case("ragged_time_major_reverse", ragged=True, batch_first=False, reverse=True),
    Case("reset", reset=True),
    Case("ragged_reset", ragged=True, reset=True),
    Case("ragged_reset_reverse", ragged=True, reset=True, reverse=True),
    Case("last_only", last_only=True),
    Case("ragged_last_only_reverse", ragged=True, last_only=True, reverse=True),
    Case("recompute", save=1, ragged=True),
    Case("zoneout", zoneout=0.3),
    Case("zoneout_mean", zoneout=0.3, training=False),
    Case("recurrent_dropout", recurrent_dropout=0.4),
    Case("dropped_altogether", recurrent_dropout=1.0),
    Case("all_noise", zoneout=0.1, recurrent_dropout=0.2, ragged=True, reset=True, reverse=True, save=1),
    Case("layer_norm", layer_norm=True),
    Case("layer_norm_no_bias", layer_norm=True, bias=False, save=1),
    Case("everything", layer_norm=True, zoneout=0.2, recurrent_dropout=0.3, ragged=True, reset=True, batch_first=False),
    Case("ids", ids=True, ragged=True),
    Case("projected_table", ids=True, projected_table=True, batch_first=False),
    Case("projected_input", projected_table=True, layer_norm=True),
    Case("one_of_each", rows=1, steps=1, inputs=1, hidden=1),
    Case("no_rows", rows=0),
    Case("no_steps", steps=0),
    Case("no_steps_reverse", steps=0, reverse=True, ragged=True),
    Case("prime", rows=17, steps=3, inputs=13, hidden=31, ragged=True),
    Case("tile_minus_one", rows=15, steps=3, inputs=16, hidden=15),
    Case("tile", rows=16, steps=4, inputs=32, hidden=32, ragged=True),
    Case("tile_plus_one", rows=33, steps=3, inputs=33, hidden=17, ragged=True, reverse=True),
    Case("two_tiles_plus_one", rows=3, steps=2, inputs=64, hidden=65),
    Case("long", rows=2, steps=130, inputs=2, hidden=3, ragged=True),
    Case("saturated", scale=30.0),
    Case("tiny", scale=1e-6),
    Case("equal_rows", data="equal"),
    Case("garbage_in_padding", ragged=True, data="garbage"),
]
LSTM_CASES = [
    *CASES,
    Case("projection", proj=4),
    Case("projection_everything", proj=5, layer_norm=True, zoneout=0.2, recurrent_dropout=0.3, ragged=True, reset=True),
    Case("projection_recompute_reverse", proj=3, bias=False, ragged=True, reverse=True, save=1),
]
TENSORS = ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "ln_ih", "ln_hh", "ln_c", "ln_c_bias")
LENGTHS = (7, 11, 0, 1, 7, 10, 2, 11)


def build(kind: str, case: Case, dtype: torch.dtype = torch.float64, draw: int = 0) -> Call:
    """The raw arguments of ``lstm`` or ``gru`` for a case. The same numbers for every dtype, but for their rounding.

    ``draw``: other numbers of the same kind.
    """
    generator = torch.Generator().manual_seed(len(case.name) * 1000 + case.hidden + 1_000_000 * draw)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    lstm = kind == "lstm"
    gates, width = (4 if lstm else 3) * case.hidden, case.proj or case.hidden
    inputs = gates if case.projected_table else case.inputs
    weight_scale = case.scale * case.hidden**-0.5
    lead = (case.rows, case.steps) if case.batch_first else (case.steps, case.rows)
    x = normal(7 if case.ids else lead[0], *(() if case.ids else lead[1:]), inputs, scale=case.scale)
    lengths = None
    if case.ragged:
        lengths = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(case.rows)]).clamp(max=case.steps)
    if case.data == "equal":
        x = x[:1].expand(lead[0], *x.shape[1:])
    if case.data == "garbage" and lengths is not None:
        padding = torch.arange(case.steps) >= lengths[:, None]
        x = x.masked_fill(padding[..., None], float("nan"))
    ids = torch.randint(0, 7, lead, generator=generator, dtype=torch.int32) if case.ids else None
    reset = torch.rand(case.rows, case.steps, generator=generator) < 0.3 if case.reset else None
    bias, norm = case.bias, case.layer_norm
    noisy = case.training and (case.zoneout or case.recurrent_dropout)
    tensors = {
        "x": x,
        "h": normal(case.rows, width),
        "w_ih": None if case.projected_table else normal(gates, inputs, scale=weight_scale),
        "w_hh": normal(gates, width, scale=weight_scale),
        "b_ih": normal(gates, scale=case.scale) if bias else None,
        "b_hh": normal(gates, scale=case.scale) if bias else None,
        "ln_ih": normal(gates) if norm else None,
        "ln_hh": normal(gates) if norm else None,
    }
    options = {
        "ids": ids,
        "lengths": lengths,
        "reset": reset,
        "seed": torch.tensor(0x1234_5678_9ABC_DEF0) if noisy else None,
        "batch_first": case.batch_first,
        "reverse": case.reverse,
        "last_only": case.last_only,
        "save": case.save,
        "zoneout": case.zoneout,
        "recurrent_dropout": case.recurrent_dropout if case.training else 0.0,
        "stream": 24,
        "precision": 0,
    }
    if not lstm:
        return GRUCall(**tensors, **options)
    return LSTMCall(
        **tensors,
        **options,
        c=normal(case.rows, case.hidden),
        w_hr=normal(width, case.hidden, scale=weight_scale) if case.proj else None,
        ln_c=normal(case.hidden) if norm else None,
        ln_c_bias=normal(case.hidden) if norm and bias else None,
    )


def cast(call: Call, dtype: torch.dtype) -> Call:
    """The call with its floating tensors in another dtype."""
    tensors = {name: getattr(call, name, None) for name in TENSORS}
    return replace(call, **{name: tensor.to(dtype) for name, tensor in tensors.items() if tensor is not None})


def raw(call: Call) -> list[object]:
    """The call as the operator's argument list."""
    return [getattr(call, field.name) for field in fields(call)]


def gradients(
    call: Call, function: Callable[[Call], tuple[Tensor, ...]], seeds: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """The gradient of Σ result·seed with respect to every floating tensor of the call."""
    leaves = {name: getattr(call, name, None) for name in TENSORS}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    results = function(replace(call, **leaves))
    total = sum((result * seed.to(result.dtype)).sum() for result, seed in zip(results, seeds, strict=True))
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def gradient_seeds(call: Call, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Weights of the results in the scalar whose gradient is compared; none for the output with last_only."""
    generator = torch.Generator().manual_seed(7)
    seeds = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in results]
    if call.last_only:
        seeds[0] = torch.zeros_like(seeds[0])
    return tuple(seeds)


# One step, as sequences of length one.

STEP_CASES = [
    Case("one_of_each", rows=1, steps=1, inputs=1, hidden=1),
    Case("no_rows", rows=0, steps=1),
    Case("no_bias", steps=1, bias=False),
    Case("prime", rows=17, steps=1, inputs=13, hidden=31),
    Case("tile_minus_one", rows=15, steps=1, inputs=15, hidden=15),
    Case("tile", rows=16, steps=1, inputs=64, hidden=32),
    Case("tile_plus_one", rows=33, steps=1, inputs=65, hidden=17),
    Case("one_row", rows=1, steps=1, inputs=128, hidden=128),
    Case("saturated", steps=1, scale=30.0),
    Case("tiny", steps=1, scale=1e-6),
    Case("equal_rows", steps=1, data="equal"),
]
CASES_OF = {"lstm": LSTM_CASES, "gru": CASES, "lstm_step": STEP_CASES, "gru_step": STEP_CASES}


def error(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute error; infinite where only one of the two is finite."""
    if not truth.numel():
        return 0.0
    difference = (actual.double() - truth).abs()
    both_nan = actual.double().isnan() & truth.isnan()
    return float(difference.masked_fill(both_nan, 0).nan_to_num(nan=float("inf")).max())


def assert_no_worse_than_eager(
    name: str, actual: Tensor, eager: tuple[Tensor, ...], truth: Tensor, factor: float, absolute: float = 0.0
) -> None:
    """Error ≤ factor × eager's own error in the same dtype, plus two roundings of the largest value, plus ``absolute``.

    Eager's is the largest of four runs that sum in different orders: over nine units, one run's largest error is a matter of
    luck. (Saturated GRU, gradient of h, 40 draws: geometric means 2.0e-6 and 1.7e-6 for two of eager's orders, 1.5e-6 native.)

    Nor is the error biased: truncating instead of rounding puts its mean at half of its maximum.
    """
    assert actual.dtype == eager[0].dtype
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    unit = torch.finfo(actual.dtype).eps * float(truth.nan_to_num().abs().max() if truth.numel() else 0.0)
    own, yardstick = error(actual, truth), max(error(run, truth) for run in eager)
    bound = factor * yardstick + 2 * unit + absolute
    assert own <= bound, f"{name}: error {own:.3g}, eager's is {yardstick:.3g}, the bound {bound:.3g}"
    if truth.numel() >= 256:
        mean = abs(float((actual.double() - truth).mean()))
        assert mean <= 0.4 * max(own, unit), f"{name}: mean signed error {mean:.3g} against a largest of {own:.3g}"
