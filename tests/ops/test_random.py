"""Seeds and keyed dropout: the published bits, torch's generator, and equality of eager and compiled."""

from __future__ import annotations

import pytest
import torch
from conformance.recurrent import is_dropped, philox4x32
from torch import Tensor

from seqrec_fast.backends.reference._philox import philox
from seqrec_fast.ops._random import draw_seed, keyed_dropout

CPU = torch.device("cpu")
# The known answers of the Random123 distribution for philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert philox4x32(counter, key) == answer  # the yardstick itself
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == answer


@pytest.mark.parametrize("seed", [0, -1, 0x1234_5678_9ABC_DEF0])
@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 1.0])
def test_every_bit_is_the_documented_one(seed: int, p: float) -> None:
    x = torch.ones(3, 19, 5)
    y = keyed_dropout(x, torch.tensor(seed), 11, p, True)
    for row in range(3):
        for step in range(19):
            for unit in range(5):
                expected = 0.0 if is_dropped(seed, 11, row, step, unit, p) else 1 / (1 - p)
                assert y[row, step, unit].item() == pytest.approx(expected)
    assert torch.equal(keyed_dropout(x.transpose(0, 1), torch.tensor(seed), 11, p, False).transpose(0, 1), y)


def test_many_chunks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 50, 4)
    expected = keyed_dropout(x, torch.tensor(9), 2, 0.5, True)
    monkeypatch.setattr("seqrec_fast.backends.reference.keyed_dropout.CHUNK_ELEMENTS", 100)
    assert torch.equal(keyed_dropout(x, torch.tensor(9), 2, 0.5, True), expected)
    assert keyed_dropout(x[:, :0], torch.tensor(9), 2, 0.5, True).shape == (3, 0, 4)
    assert keyed_dropout(x[:0], torch.tensor(9), 2, 0.5, True).shape == (0, 50, 4)


def test_streams_and_units_are_independent() -> None:
    x = torch.ones(64, 64, 16)
    masks = torch.stack([keyed_dropout(x, torch.tensor(4), stream, 0.5, True) > 0 for stream in range(4)]).double()
    assert abs(masks.mean().item() - 0.5) < 0.005  # 3 standard deviations are 0.003
    flat = masks.flatten(1) - 0.5
    correlation = (flat @ flat.t() / flat.shape[1] * 4).fill_diagonal_(0)
    assert correlation.abs().max() < 0.02
    for dim in (1, 2, 3):  # rows, steps and units do not repeat their neighbours
        size = masks.shape[dim] - 1
        agreement = (masks.narrow(dim, 0, size) == masks.narrow(dim, 1, size)).double().mean()
        assert abs(agreement.item() - 0.5) < 0.005


def test_seeds_come_from_the_generator_in_eager_and_compiled_code() -> None:
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + draw_seed(x.device), x + draw_seed(x.device)

    zero = torch.zeros((), dtype=torch.int64)
    torch.manual_seed(3)
    first, second = two(zero)
    assert first != second
    torch.manual_seed(3)
    compiled = torch.compile(two, fullgraph=True)
    compiled(zero)  # compiling draws nothing
    torch.manual_seed(3)
    assert compiled(zero) == (first, second)  # neither merged nor replaced by the compiler's own generator
    torch.manual_seed(3)
    assert torch.ops.seqrec_fast.draw_seed(CPU) == first
    many = torch.stack([draw_seed(CPU) for _ in range(200)])
    assert 50 < int((many < 0).sum()) < 150  # all 64 bits
    assert len(many.unique()) == 200


def test_gradients_and_opcheck() -> None:
    seed = torch.tensor(5)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return keyed_dropout(x, seed, 3, 0.3, True)

    assert torch.autograd.gradcheck(call, x, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, x)
    torch.library.opcheck(torch.ops.seqrec_fast.keyed_dropout.default, (x, seed, 3, 0.3, True))
    gradient = torch.autograd.grad(call(x).sum(), x)[0]
    assert torch.equal(gradient == 0, call(x) == 0)
    torch.testing.assert_close(torch.vmap(call)(torch.stack([x, 2 * x])), torch.stack([call(x), 2 * call(x)]))
