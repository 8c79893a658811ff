"""``sf.lstm_embedding``: the module on the rows of a table, with and without the projected table."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqrec_fast as sf
from seqrec_fast.ops import lstm_embedding as implementation
from seqrec_fast.ops.lstm_embedding import PROJECTED

N, B, T, I, H = 20, 3, 7, 6, 5
LENGTHS = torch.tensor([7, 2, 0])
MODULES = [pytest.param(sf.LSTM, id="LSTM"), pytest.param(sf.GRU, id="GRU")]


@pytest.fixture(autouse=True)
def _no_tables_before() -> None:
    sf.clear_cache()


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Parameter]:
    ids = torch.randint(0, N, (B, T))
    ids[torch.arange(T) >= LENGTHS[:, None]] = -7  # padding holds anything
    return ids, nn.Parameter(torch.randn(N, I, dtype=dtype))


def looked_up(ids: Tensor, table: Tensor) -> Tensor:
    return table[ids.clamp(0)]


@pytest.mark.parametrize("module_class", MODULES)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"layer_norm": True, "bias": False}])
@pytest.mark.parametrize("last_only", [False, True])
def test_equals_the_module_on_looked_up_rows(module_class: Any, options: dict[str, Any], last_only: bool) -> None:
    module = module_class(I, H, batch_first=True, **options)
    ids, table = arguments()
    leaves = [table, *module.parameters()]
    found = []
    for output, state in (
        module(looked_up(ids, table), lengths=LENGTHS, last_only=last_only),
        sf.lstm_embedding(ids, table, module, lengths=LENGTHS, last_only=last_only),
    ):
        gradients = torch.autograd.grad(output.sin().sum(), leaves)
        found.append((output, state, gradients))
    torch.testing.assert_close(found[1], found[0])
    module.eval()
    with torch.no_grad():
        for _ in range(2):
            projected = sf.lstm_embedding(ids, table, module, lengths=LENGTHS, last_only=last_only)
            torch.testing.assert_close(projected, found[0][:2])
    assert len(PROJECTED._kept) == (2 if module.bidirectional else 1)


def test_layouts() -> None:
    ids = torch.randint(0, N, (B, T), dtype=torch.int32)
    table = torch.randn(N, I)
    module = sf.GRU(I, H)
    expected, _ = module(table[ids.t().long()])
    torch.testing.assert_close(sf.lstm_embedding(ids.t(), table, module)[0], expected)
    torch.testing.assert_close(sf.lstm_embedding(ids[1], table, module)[0], expected[:, 1])


def test_the_projected_table_is_for_evaluation_only() -> None:
    module = sf.LSTM(I, H, batch_first=True)
    ids, table = arguments()
    with torch.no_grad():
        sf.lstm_embedding(ids, table, module, lengths=LENGTHS)
        assert not PROJECTED._kept  # training
    sf.lstm_embedding(ids, table, module.eval(), lengths=LENGTHS)
    assert not PROJECTED._kept  # a gradient may follow
    with torch.inference_mode():
        sf.lstm_embedding(ids, table.clone(), module, lengths=LENGTHS)
        assert not PROJECTED._kept  # edits of an inference tensor cannot be seen
        sf.lstm_embedding(ids, table, module, lengths=LENGTHS)
        assert len(PROJECTED._kept) == 1


def test_the_projected_table_follows_every_edit() -> None:
    module = sf.LSTM(I, H, batch_first=True).eval()
    ids, table = arguments()

    def check() -> None:
        with torch.no_grad():
            actual, _ = sf.lstm_embedding(ids, table, module, lengths=LENGTHS)
            torch.testing.assert_close(actual, module(looked_up(ids, table), lengths=LENGTHS)[0])

    check()
    rows = next(iter(PROJECTED._kept.values())).rows
    check()
    assert next(iter(PROJECTED._kept.values())).rows is rows  # kept
    with torch.no_grad():
        table.mul_(2)
    check()
    with torch.no_grad():
        module.weight_ih_l0.mul_(2)
    check()
    module.weight_ih_l0 = nn.Parameter(torch.randn(4 * H, I))
    check()
    table.data.mul_(3)  # not seen
    sf.clear_cache()
    check()


def test_projected_tables_are_bounded_and_die_with_their_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sf.GRU(I, H, batch_first=True).eval()
    ids, _ = arguments()
    with torch.no_grad():
        tables = [torch.randn(N, I) for _ in range(6)]
        for table in tables:
            sf.lstm_embedding(ids, table, module, lengths=LENGTHS)
        assert len(PROJECTED._kept) == implementation.KEPT_TABLES
        expected = sf.lstm_embedding(ids, tables[0], module, lengths=LENGTHS)
        del table, tables
        gc.collect()
        assert not PROJECTED._kept
        monkeypatch.setattr(implementation, "PROJECTED_BYTES", N * 3 * H * 4 - 1)
        sf.lstm_embedding(ids, torch.randn(N, I), module, lengths=LENGTHS)
        assert not PROJECTED._kept
    assert expected[0].shape == (B, T, H)


def test_compiled() -> None:
    module = sf.LSTM(I, H, batch_first=True).eval()
    ids, table = arguments()
    compiled = torch.compile(sf.lstm_embedding, fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = []
    for function in (sf.lstm_embedding, compiled):
        output, _ = function(ids, table, module, lengths=LENGTHS)
        gradients.append((output, torch.autograd.grad(output.sin().sum(), [table, *module.parameters()])))
    torch.testing.assert_close(gradients[1], gradients[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, table, module, lengths=LENGTHS)[0], gradients[0][0])


@pytest.mark.parametrize("wrong", [-1, N])
@pytest.mark.parametrize("projected", [False, True])
def test_ids_out_of_range(wrong: int, projected: bool) -> None:
    module = sf.LSTM(I, H, batch_first=True).train(not projected)
    ids, table = arguments()
    ids[0, 3] = wrong
    with torch.no_grad(), pytest.raises(IndexError, match=rf"ids must lie in 0…{N - 1} .*got {wrong}"):
        sf.lstm_embedding(ids, table, module, lengths=LENGTHS)


@pytest.mark.parametrize("wrong", [-1, N])
def test_ids_out_of_range_within_a_transform(wrong: int) -> None:
    """Where the formula runs instead of a kernel. Padding is not looked at there either."""
    module = sf.LSTM(I, H, batch_first=True)
    ids, table = arguments()
    beyond = torch.arange(T) >= LENGTHS[:, None]

    def call(ids: Tensor) -> Tensor:
        output: Tensor = sf.lstm_embedding(ids, table, module, lengths=LENGTHS)[0]
        return output

    mapped = torch.vmap(call)(torch.stack([ids, ids.masked_fill(beyond, wrong)]))
    assert torch.equal(mapped[0], mapped[1])
    ids[0, 3] = wrong
    with pytest.raises(IndexError):
        torch.vmap(call)(ids[None])


def test_bad_arguments() -> None:
    module = sf.LSTM(I, H, batch_first=True)
    ids, table = torch.zeros(B, T, dtype=torch.int64), torch.zeros(N, I)
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((ids.float(), table, module), TypeError, "ids must be an int64 or int32 tensor, got torch.float32"),
        (([1], table, module), TypeError, "ids must be an int64 or int32 tensor, got list"),
        ((ids, table.long(), module), TypeError, "table must be a floating tensor"),
        ((ids[None], table, module), ValueError, "ids must have shape"),
        ((ids, table[:, 1:], module), ValueError, rf"table must have shape \[N, {I}\]"),
        ((ids, table.double(), module), ValueError, "table must have the module's dtype torch.float32"),
        ((ids, table, nn.LSTM(I, H)), TypeError, "module must be an sf.LSTM or sf.GRU .*from_torch"),
    ]
    for args, error, message in bad:
        with pytest.raises(error, match=f"^lstm_embedding: {message}"):
            sf.lstm_embedding(*args)
    with pytest.raises(ValueError, match="lengths must lie in"):
        sf.lstm_embedding(ids, table, module, lengths=torch.full((B,), T + 1))
    with pytest.raises(ValueError, match="lengths cannot go with unbatched input"):
        sf.lstm_embedding(ids[0], table, module, lengths=torch.ones(T, dtype=torch.int64))
