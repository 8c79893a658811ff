"""What only the native sequence kernels could get wrong: tiles, parts, threads, and calls past the public functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast import _native

pytestmark = pytest.mark.skipif(_native.MISSING is not None, reason=str(_native.MISSING))

KINDS = {"lstm": (sf.lstm, 4), "gru": (sf.gru, 3)}


@pytest.fixture(autouse=True)
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks from the same seed in every run, one that has all 64 bits."""
    monkeypatch.setattr("seqrec_fast.ops._recurrent.draw_seed", lambda device: torch.tensor(-0x1234_5678_9ABC_DEF0))


def weights_of(
    kind: str,
    inputs: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    option: str | None = None,
    seed: int = 0,
) -> list[Tensor]:
    gates, option = KINDS[kind][1] * hidden, option or ""
    generator = torch.Generator().manual_seed(hidden + 1000 * seed)
    projected = (hidden + 1) // 2 if "projection" in option else hidden
    shapes: list[tuple[int, ...]] = [(gates, inputs), (gates, projected), (gates,), (gates,)]
    if "projection" in option:
        shapes.append((projected, hidden))
    if "layer_norm" in option:
        shapes += [(gates,), (gates,), *([(hidden,), (hidden,)] if kind == "lstm" else [])]
    # The gains and β_c come last; anything but small.
    scales = [hidden**-0.5] * (5 if "projection" in option else 4) + [1.0] * 4
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=False)
    ]


def run(kind: str, x: Tensor, weights: list[Tensor], **options: Any) -> list[Tensor]:
    """Output, final states and the gradients of everything."""
    leaves = [x.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
    output, state = KINDS[kind][0](leaves[0], None, leaves[1:], **options)
    states = state if isinstance(state, tuple) else (state,)
    total = (output * torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view_as(output)).sum()
    grads = torch.autograd.grad(total + sum((s**2).sum() for s in states), leaves)
    return [output.detach(), *(s.detach() for s in states), *grads]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save_gates", [True, False])
@pytest.mark.parametrize(
    ("steps", "rows", "inputs", "hidden"),
    [
        (3, 1, 5, 70),  # one row: several blocks of units at once, and the rest
        (2, 2, 3, 33),
        (2, 7, 17, 16),  # groups of four and three rows
        (3, 97, 5, 17),  # two tiles forward
        (2, 131, 3, 5),  # sixteen parts of unequal size, chunks of many tokens
        (140, 3, 4, 6),  # several chunks of one tile
        (1, 1100, 2, 3),  # several tiles a part
        (3, 5, 140, 129),  # more than one chain
    ],
)
def test_across_tile_edges(kind: str, steps: int, rows: int, inputs: int, hidden: int, save_gates: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(steps, rows, inputs, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, steps + 1, (rows,), generator=generator)
    reset = torch.rand(rows, steps, generator=generator) < 0.3
    weights = weights_of(kind, inputs, hidden, torch.float64)
    for options in ({}, {"lengths": lengths, "reset": reset}):
        with sf.use_backend("reference"):
            expected = run(kind, x, weights, save_gates=save_gates, **options)
        with sf.use_backend("native"):
            actual = run(kind, x, weights, save_gates=save_gates, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


OPTIONS: dict[str, dict[str, Any]] = {
    "zoneout": {"zoneout": 0.3, "training": True},
    "zoneout_mean": {"zoneout": 0.3},
    "always_zoned": {"zoneout": 1.0, "training": True},
    "recurrent_dropout": {"recurrent_dropout": 0.4, "training": True},
    "noise": {"zoneout": 0.2, "recurrent_dropout": 0.3, "training": True},
    "projection": {},
    "noise, projection": {"zoneout": 0.2, "recurrent_dropout": 0.3, "training": True},
    "layer_norm": {"layer_norm": True},
    "noise, layer_norm": {"zoneout": 0.2, "recurrent_dropout": 0.3, "training": True, "layer_norm": True},
    "zoneout_mean, projection, layer_norm": {"zoneout": 0.3, "layer_norm": True},
}


def takes(kind: str, option: str) -> bool:
    return kind == "lstm" or "projection" not in option


OPTION_CASES = [(kind, option) for kind in KINDS for option in OPTIONS if takes(kind, option)]


@pytest.mark.parametrize(("kind", "option"), OPTION_CASES)
@pytest.mark.parametrize("save_gates", [True, False])
@pytest.mark.parametrize(
    ("steps", "rows", "hidden"),
    [
        (3, 1, 1),
        (20, 6, 5),  # masks of three groups of steps
        (17, 7, 16),
        (9, 33, 17),
        (2, 100, 100),  # two tiles forward
        (150, 2, 5),  # several chunks of one tile
    ],
)
def test_options_across_tile_edges(
    kind: str, option: str, steps: int, rows: int, hidden: int, save_gates: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(steps, rows, 6, generator=generator, dtype=torch.float64)
    ragged = {
        "lengths": torch.randint(0, steps + 1, (rows,), generator=generator),
        "reset": torch.rand(rows, steps, generator=generator) < 0.3,
    }
    weights = weights_of(kind, 6, hidden, torch.float64, option)
    told = {"save_gates": save_gates, **OPTIONS[option]}
    found = {}
    for backend in ("reference", "native"):
        with sf.use_backend(backend):
            found[backend] = [run(kind, x, weights, **told), run(kind, x, weights, **ragged, **told)]
            both = [*weights, *weights_of(kind, 6, hidden, torch.float64, option, seed=1)]
            found[backend].append(run(kind, x, both, bidirectional=True, last_only=True, **ragged, **told))
    torch.testing.assert_close(found["native"], found["reference"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_zoneout_keeps_the_same_units_as_the_reference(kind: str) -> None:
    """A kept unit has its former bits, so the masks can be read off the outputs."""
    x, weights = torch.randn(21, 5, 6), weights_of(kind, 6, 37)
    kept = []
    for backend in ("reference", "native"):
        with sf.use_backend(backend):
            output = run(kind, x, weights, zoneout=0.3, training=True)[0]
        kept.append(output[1:] == output[:-1])
    assert torch.equal(*kept)
    assert 0.2 < kept[0].float().mean() < 0.4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", [None, *OPTIONS])
def test_same_bits_for_any_number_of_threads(kind: str, option: str | None) -> None:
    if option is not None and not takes(kind, option):
        pytest.skip("lstm only")
    x, weights = torch.randn(9, 50, 20), weights_of(kind, 20, 40, option=option)
    lengths = torch.randint(0, 10, (50,))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(kind, x, weights, lengths=lengths, **OPTIONS.get(option or "", {})))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", [None, *OPTIONS])
def test_same_bits_in_any_batch(kind: str, option: str | None) -> None:
    if option is not None and not takes(kind, option):
        pytest.skip("lstm only")
    x, weights = torch.randn(6, 23, 20), weights_of(kind, 20, 40, option=option)
    told = OPTIONS.get(option or "", {})
    full, *states = run(kind, x, weights, **told)[:3]
    # A mask depends on the place of its row in the batch.
    drawn = told.get("training", False)
    for rows in ([0], [0, 1, 2], list(range(20))) if drawn else ([0], [5, 3], list(range(7, 20))):
        part, *part_states = run(kind, x[:, rows], weights, **told)[:3]
        assert torch.equal(part, full[:, rows])
        assert torch.equal(part_states[0], states[0][:, rows])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_table(kind: str) -> None:
    module = (sf.LSTM if kind == "lstm" else sf.GRU)(12, 20)
    table = torch.randn(30, 12, requires_grad=True)
    ids, lengths = torch.randint(0, 30, (8, 14)), torch.randint(0, 15, (8,))
    found = []
    for backend in ("native", "reference"):
        with sf.use_backend(backend):
            output, _ = sf.lstm_embedding(ids.t(), table, module, lengths=lengths)
            found.append(torch.autograd.grad(output.square().sum(), (table, *module.parameters())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def raw(**changes: Any) -> list[Any]:
    """A valid call of the operator, with changes."""
    values: dict[str, Any] = {
        "x": torch.randn(4, 3, 5),
        "h": torch.zeros(3, 6),
        "c": torch.zeros(3, 6),
        "w_ih": torch.randn(24, 5),
        "w_hh": torch.randn(24, 6),
        "b_ih": None,
        "b_hh": None,
        **dict.fromkeys(("w_hr", "ln_ih", "ln_hh", "ln_c", "ln_c_bias", "ids", "lengths", "reset", "seed")),
        "batch_first": False,
        "reverse": False,
        "last_only": False,
        "save": 0,
        "zoneout": 0.0,
        "recurrent_dropout": 0.0,
        "stream": 0,
        "precision": 0,
    }
    return list((values | changes).values())


NORM = {"ln_ih": torch.ones(24), "ln_hh": torch.ones(24), "ln_c": torch.ones(6)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(4, 5)}, ValueError, "x must be"),
        ({"h": torch.zeros(2, 6)}, ValueError, "h has a shape"),
        ({"c": torch.zeros(3, 7)}, ValueError, "c has a shape"),
        ({"w_ih": torch.randn(24, 6)}, ValueError, "w_ih has a shape"),
        ({"w_hh": torch.randn(23, 6)}, ValueError, "w_hh has a shape"),
        ({"w_hh": torch.randn(24, 6).double()}, ValueError, "w_hh has a shape or dtype"),
        ({"w_ih": None}, ValueError, "24 wide, got 5"),
        ({"b_ih": torch.zeros(6)}, ValueError, "a bias"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, "lengths must have shape"),
        ({"lengths": torch.tensor([1, 2, 5])}, ValueError, "got 5 for row 2"),
        ({"lengths": torch.tensor([1, -2, 3])}, ValueError, "got -2 for row 1"),
        ({"lengths": torch.tensor([1.0, 2.0, 3.0])}, ValueError, "int64 or int32"),
        ({"reset": torch.zeros(4, 3, dtype=torch.bool)}, ValueError, "reset must be bool"),
        ({"x": torch.randn(9, 5), "ids": torch.full((4, 3), 9)}, IndexError, "0…8"),
        ({"w_hr": torch.randn(5, 6)}, ValueError, "w_hr has a shape"),
        ({"w_hr": torch.randn(6, 5)}, ValueError, "w_hr has a shape"),
        ({"w_hr": torch.randn(6, 6), "c": torch.zeros(18)}, ValueError, "c must be"),
        ({"ln_hh": torch.ones(24)}, ValueError, "ln_ih, ln_hh and ln_c go together"),
        ({**NORM, "ln_c": None}, ValueError, "ln_ih, ln_hh and ln_c go together"),
        ({**NORM, "ln_ih": torch.ones(6)}, ValueError, "a gain of the gates has a shape"),
        ({**NORM, "ln_c": torch.ones(24)}, ValueError, "ln_c or its bias has a shape"),
        ({**NORM, "ln_c_bias": torch.ones(6).double()}, ValueError, "ln_c or its bias has a shape or dtype"),
        ({"ln_c_bias": torch.ones(6)}, ValueError, "ln_c_bias goes with ln_c"),
        ({"zoneout": 1.1}, ValueError, "must lie in 0…1, got 1.1"),
        ({"recurrent_dropout": -0.1}, ValueError, "must lie in 0…1, got -0.1"),
        ({"zoneout": 0.1, "seed": torch.zeros(2, dtype=torch.long)}, ValueError, "one int64 number"),
        ({"zoneout": 0.1, "seed": torch.tensor(1.0)}, ValueError, "one int64 number"),
    ],
)
def test_a_direct_call_stays_within_its_arrays(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch.ops.seqrec_fast_native.lstm(*raw(**changes))


@pytest.mark.parametrize(("kind", "option"), OPTION_CASES)
def test_no_option_falls_back(kind: str, option: str) -> None:
    with sf.use_backend("native"):  # would raise
        run(kind, torch.randn(3, 2, 5), weights_of(kind, 5, 6, option=option), **OPTIONS[option])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("option", ["zoneout", "recurrent_dropout"])
def test_masks_are_drawn_whichever_backend_is_asked_for(
    kind: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # torch's own generator
    x, weights = torch.randn(5, 3, 4), weights_of(kind, 4, 6)
    found = []
    for backend in ("auto", "native", "reference"):
        torch.manual_seed(3)
        with sf.use_backend(backend):
            found.append(getattr(sf, kind)(x, None, weights, training=True, **{option: 0.4})[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0])
