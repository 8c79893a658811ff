"""The CUDA lstm_step executed by the emulator, against fp64, under every schedule."""

from __future__ import annotations

import mmap
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from seqrec_fast.backends.reference import lstm_step as reference

from .emulator import SCHEDULES, Run, Step, gate_gradients, lstm_step

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCTS = sorted(DTYPES)

# (B, I, P, H). Below 16 rows a warp streams 512 bytes of a weight row at a time and four units share a block.
STREAMED = [
    (1, 1, 1, 1),
    (1, 300, 64, 5),  # more than one trip over x
    (2, 5, 7, 11),
    (4, 33, 31, 4),
    (5, 0, 3, 3),
    (5, 3, 0, 3),
    (7, 264, 520, 3),
    (15, 13, 16, 17),
]
# From 16 rows: tiles of 16 rows × 16 units, 64 × 32 and 128 × 32; slabs of 64 (16-bit) or 32 (fp32) of k.
TILED = [
    ("small", (16, 64, 32, 16)),
    ("small", (17, 65, 63, 17)),
    ("small", (31, 8, 0, 15)),
    ("small", (16, 0, 0, 1)),
    ("small", (33, 200, 136, 7)),  # more slabs than stages
    ("medium", (63, 40, 24, 31)),
    ("medium", (65, 136, 72, 33)),
    ("large", (127, 31, 33, 32)),
    ("large", (129, 72, 64, 33)),
]
FORMS = [
    *((f"streamed_{rows}", shape) for rows, shape in zip((1, 1, 4, 4, 16, 16, 16, 16), STREAMED, strict=True)),
    *TILED,
]


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Step:
    """Weights such that the gates are neither saturated nor all alike."""
    rows, width, projected, hidden = shape
    scale = (width + projected + 1) ** -0.5
    sizes = [(rows, width), (rows, projected), (rows, hidden)]
    weights = [(4 * hidden, width), (4 * hidden, projected)]
    tensors = [torch.randn(size) for size in sizes]
    tensors += [2 * scale * torch.randn(size) for size in weights]
    tensors += [torch.randn(4 * hidden) for _ in range(2)]
    return Step(*(tensor.to(dtype) for tensor in tensors))


def round_to_tf32(tensor: Tensor) -> Tensor:
    return ((tensor.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def outputs(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    gates = reference.gates(step.x, step.h, *step.tensors()[3:])
    h, c = reference.cell(gates, step.c)
    return h, c, gates


def eager(step: Step, product: str) -> tuple[Tensor, Tensor, Tensor]:
    """What torch computes in the same arithmetic."""
    if product != "tf32" or step.x.shape[0] < 16:
        return outputs(step)
    x, h, w_ih, w_hh = (round_to_tf32(t) for t in (step.x, step.h, step.w_ih, step.w_hh))
    return outputs(Step(x, h, step.c, w_ih, w_hh, step.b_ih, step.b_hh))


def check(ours: tuple[Tensor | None, ...], step: Step, product: str) -> None:
    """Error at most twice eager's, and what rounding the result and approximating the activations adds where eager was lucky: an
    ulp and a half for 16-bit results; for fp32 two ulps, one for either of the two activations one behind the other."""
    truth, theirs = outputs(step.to(torch.float64)), eager(step, product)
    unit = torch.finfo(step.x.dtype).eps
    for name, true, their, mine in zip(("h", "c", "gates"), truth, theirs, ours, strict=True):
        if mine is None or true.numel() == 0:
            continue
        slack = (2 if step.x.dtype == torch.float32 else 0.75) * unit * max(1.0, float(true.abs().max()))
        error, bound = (mine.double() - true).abs().max(), 2 * (their.double() - true).abs().max() + slack
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("form", "shape"), FORMS)
def test_values(emulator: ModuleType, form: str, shape: tuple[int, int, int, int], product: str) -> None:
    step = make(shape, DTYPES[product])
    results = [lstm_step(emulator, step, Run(product, form, schedule, seed=1)) for schedule in SCHEDULES]
    check(results[0], step, product)
    for other in results[1:]:  # the order of execution changes nothing, not a bit
        for mine, first in zip(other, results[0], strict=True):
            assert torch.equal(mine, first)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("form", "shape"), FORMS)
def test_sanitized(emulator: ModuleType, form: str, shape: tuple[int, int, int, int], product: str) -> None:
    """Every kernel once: what test_emulator.py runs again with the sanitizers."""
    step = make(shape, DTYPES[product])
    check(lstm_step(emulator, step, Run(product, form, "random")), step, product)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [3, 18])
def test_without_bias_and_without_gates(emulator: ModuleType, rows: int, product: str) -> None:
    full = make((rows, 24, 40, 12), DTYPES[product])
    step = Step(*full.tensors()[:5], None, None)
    ours = lstm_step(emulator, step, Run(product, save_gates=False))
    assert ours[2] is None
    check(ours, step, product)
    one = Step(*full.tensors()[:5], None, full.b_hh)
    check(lstm_step(emulator, one, Run(product)), one, product)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_row_does_not_depend_on_its_batch(emulator: ModuleType, product: str) -> None:
    """Below and from 16 rows: the same bits alone and in any company, in every form."""
    step = make((150, 40, 24, 20), DTYPES[product])

    def rows(first: int, last: int, form: str) -> Tensor:
        part = Step(step.x[first:last], step.h[first:last], step.c[first:last], *step.tensors()[3:])
        return lstm_step(emulator, part, Run(product, form))[0]

    few = rows(0, 15, "streamed_16")
    assert torch.equal(rows(3, 7, "streamed_4"), few[3:7])
    assert torch.equal(rows(9, 10, "streamed_1"), few[9:10])
    many = rows(0, 150, "large")
    assert torch.equal(rows(100, 150, "medium"), many[100:])
    assert torch.equal(rows(60, 79, "small"), many[60:79])


# What `auto` must take: by rows, then by the blocks a tile makes of (B, H).
CHOICES = [
    ((1, 4, 4, 3), "streamed_1"),
    ((4, 4, 4, 3), "streamed_4"),
    ((15, 4, 4, 3), "streamed_16"),
    ((16, 4, 4, 3), "small"),
    ((300, 1, 1, 193), "medium"),  # 5 · 7 medium blocks
    ((1025, 1, 1, 449), "large"),  # 9 · 15 large blocks
]


@pytest.mark.parametrize(("shape", "form"), CHOICES)
def test_the_choice_of_a_kernel(emulator: ModuleType, shape: tuple[int, int, int, int], form: str) -> None:
    """A wrong one would leave rows unwritten, or its launch would be of another shape: only the first block is run."""
    step = make(shape, torch.bfloat16)
    written = []
    for name in ("auto", form):
        h_next = torch.full_like(step.c, torch.nan)
        arrays = [t.view(torch.int16).numpy() for t in (*step.tensors(), h_next, torch.empty_like(step.c))]
        tensors = emulator.StepTensors(*arrays, None)
        emulator.lstm_step("bfloat16", step.sizes, tensors, form=name, schedule="lock_step", seed=0, blocks=(0, 0))
        written.append(h_next)
    assert torch.equal(written[0].isnan(), written[1].isnan())
    assert not written[0].isnan().all()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [4, 16])
def test_extreme_gates_and_nan(emulator: ModuleType, rows: int, product: str) -> None:
    values = [100.0, -100.0, float("nan"), float("inf")]
    x = torch.tensor(values)[:, None].repeat(rows // 4, 1).to(DTYPES[product])
    hidden, one = torch.zeros(rows, 1, dtype=x.dtype), torch.ones(4, 1, dtype=x.dtype)
    step = Step(x, hidden, torch.ones_like(hidden), one, one, None, None)
    h, c, _ = lstm_step(emulator, step, Run(product))
    true_h, true_c, _ = outputs(step.to(torch.float64))
    # ∞·1 + 0·1 is ∞ and not NaN: zeros fill what lies beyond a row, and meet only zeros.
    torch.testing.assert_close(h.double(), true_h, rtol=1e-2, atol=1e-2, equal_nan=True)
    torch.testing.assert_close(c.double(), true_c, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_beside_a_nan_are_untouched(emulator: ModuleType, product: str) -> None:
    step = make((18, 24, 16, 12), DTYPES[product])
    clean = lstm_step(emulator, step, Run(product))[0]
    step.x[3, 5] = torch.nan
    spoiled = lstm_step(emulator, step, Run(product))[0]
    assert spoiled[3].isnan().all()
    assert torch.equal(torch.cat([spoiled[:3], spoiled[4:]]), torch.cat([clean[:3], clean[4:]]))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [5, 20])
def test_the_cell_state_in_place(emulator: ModuleType, rows: int, product: str) -> None:
    """lstm_step_ gives the kernel one array for c and c'."""
    step = make((rows, 16, 12, 12), DTYPES[product])
    h, c, _ = lstm_step(emulator, step, Run(product))
    state, h_next = step.c.clone(), torch.empty_like(step.c)
    arrays = [t.view(torch.int16).numpy() if t.element_size() == 2 else t.numpy()
              for t in (step.x, step.h, state, step.w_ih, step.w_hh, step.b_ih, step.b_hh, h_next, state)]  # fmt: skip
    emulator.lstm_step(product, step.sizes, emulator.StepTensors(*arrays, None), form="auto", schedule="random", seed=3)
    assert torch.equal(state, c)
    assert torch.equal(h_next, h)


def sparse(elements: int) -> np.ndarray:
    """Zeros that take memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    return np.frombuffer(mmap.mmap(-1, elements * 2, flags=flags), dtype=np.int16)


def test_offsets_past_two_to_the_31(emulator: ModuleType) -> None:
    """x and the gates have more than 2³¹ elements; the last block, past that, is run."""
    width, hidden = 64, 16
    rows = 2**31 // width + 37
    tail = make((37, width, 16, hidden), torch.bfloat16)
    expected = lstm_step(emulator, tail, Run("bfloat16", "large"))
    x, h, c = sparse(rows * width), sparse(rows * 16), sparse(rows * hidden)
    h_next, c_next, gates = sparse(rows * hidden), sparse(rows * hidden), sparse(rows * 4 * hidden)
    for array, part in ((x, tail.x), (h, tail.h), (c, tail.c)):
        array[-part.numel() :] = part.reshape(-1).view(torch.int16).numpy()
    weights = [t.view(torch.int16).numpy() for t in tail.tensors()[3:]]
    blocks = -(-rows // 128)
    emulator.lstm_step(
        "bfloat16",
        (rows, width, 16, hidden),
        emulator.StepTensors(x, h, c, *weights, h_next, c_next, gates),
        form="large",
        schedule="greedy",
        seed=0,
        blocks=(blocks - 1, blocks - 1),
    )
    for array, part in zip((h_next, c_next, gates), expected, strict=True):
        assert part is not None
        assert np.array_equal(array[-part.numel() :], part.reshape(-1).view(torch.int16).numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
# One thread, odd and even widths (1 or 4 units a thread), a block of 256 threads exactly, and more than one.
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 12), (16, 64), (9, 33), (17, 68)])
def test_gate_gradients(emulator: ModuleType, shape: tuple[int, int], dtype: str) -> None:
    rows, hidden = shape
    step = make((rows, 5, 4, hidden), DTYPES[dtype])
    _, c_next, gates = outputs(step)
    tensors = [torch.randn_like(step.c), torch.randn_like(step.c), step.c, c_next, gates]
    results = [gate_gradients(emulator, dtype, tensors, schedule, seed=2) for schedule in SCHEDULES]
    truth = reference.gate_gradient(*(t.double() for t in tensors))
    theirs = reference.gate_gradient(*tensors)
    unit = torch.finfo(step.c.dtype).eps
    for true, their, mine in zip(truth, theirs, results[0], strict=True):
        # A gradient is a product of four factors, rounded once here and after each in eager.
        bound = 3 * (their.double() - true).abs().max() + 2 * unit * true.abs().max()
        assert (mine.double() - true).abs().max() <= bound
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])
