"""``sf.CatalogueIndex``: the answers of the operators, on a catalogue that changes."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import catalogue as suite
from safetensors.torch import save_file
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast.index import _ReadWriteLock

pytestmark = pytest.mark.usefixtures("one_thread")

INFINITY = float("inf")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def assert_same(index: sf.CatalogueIndex, items: Tensor, bias: Tensor | None) -> None:
    """The index answers like the operators on these tables."""
    assert len(index) == len(items)
    query = torch.randn(3, items.shape[1]).to(items.dtype)
    options: dict[str, Any] = {
        "scale": torch.randn(3).to(items.dtype),
        "exclude": torch.randint(-1, len(items), (3, 2)),
    }
    values, found = index.topk(query, len(items) + 1, **options)
    wanted_values, wanted = suite.naive_topk(query, items, len(items) + 1, bias=bias, **options)
    assert found.equal(wanted)
    assert values.equal(wanted_values)
    target = torch.randint(0, len(items), (3,))
    target[1] = -7
    ranks = index.rank(query, target, **options, ignore_index=-7)
    assert ranks.equal(suite.naive_rank(query, items, target, bias=bias, **options, ignore_index=-7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("first_pass", ["auto", "fp32", "bf16", "int8"])
def test_answers_of_the_operators(dtype: torch.dtype, biased: bool, first_pass: str) -> None:
    items, bias = torch.randn(23, 5).to(dtype), torch.randn(23).to(dtype) if biased else None
    assert_same(sf.CatalogueIndex(items, bias, first_pass=first_pass), items, bias)


def test_leading_dimensions() -> None:
    items = torch.randn(9, 4)
    index = sf.CatalogueIndex(items)
    for lead in ((), (2, 3), (0,)):
        query = torch.randn(*lead, 4)
        assert index.topk(query, 2).indices.equal(sf.catalogue_topk(query, items, 2).indices)
        assert index.rank(query, torch.zeros(lead, dtype=torch.int64)).shape == lead


def test_owns_its_copy() -> None:
    items, bias = torch.randn(9, 4, requires_grad=True), torch.randn(9)
    index = sf.CatalogueIndex(items, bias)
    kept, kept_bias = items.detach().clone(), bias.clone()
    with torch.no_grad():
        items.zero_()
        bias.zero_()
    assert_same(index, kept, kept_bias)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_changes(biased: bool, seed: int) -> None:
    """Against plain tables: random updates, additions and removals, searched after each."""
    torch.manual_seed(seed)
    items, bias = torch.randn(6, 3), torch.randn(6) if biased else None
    index = sf.CatalogueIndex(items, bias)
    biases = torch.zeros(6) if bias is None else bias.clone()
    for _ in range(12):
        step = int(torch.randint(0, 3, ()))
        some = torch.randperm(len(items))[: int(torch.randint(0, 4, ()))]
        own = torch.randn(len(some)) if bool(torch.rand(()) < 0.5) else None
        if step == 0:
            rows = torch.randn(len(some), 3)
            index.update(some.int() if seed % 2 else some, rows, own)
            items = items.index_copy(0, some, rows)
            revived = torch.where(biases[some] == -INFINITY, 0.0, biases[some])
            biases[some] = revived if own is None else own
        elif step == 1:
            rows = torch.randn(len(some), 3)
            assert index.add(rows, own).tolist() == list(range(len(items), len(items) + len(some)))
            items = torch.cat([items, rows])
            biases = torch.cat([biases, torch.zeros(len(some)) if own is None else own])
        else:
            index.remove(some)
            biases[some] = -INFINITY
        assert_same(index, items, biases)


def test_removed_items_vanish_and_come_back() -> None:
    items, query = torch.eye(3), torch.tensor([3.0, 2.0, 1.0])
    index = sf.CatalogueIndex(items)
    index.remove(ids(0, 0))
    index.remove(ids(0))
    assert len(index) == 3
    assert index.topk(query, 3).indices.tolist() == [1, 2, -1]
    assert index.rank(query, torch.tensor(0)) == 2  # after every other
    assert index.topk(query, 1, exclude=ids(0)).indices.tolist() == [1]  # its id stays a valid one
    index.update(ids(0), items[:1])
    assert index.topk(query, 3).indices.tolist() == [0, 1, 2]


def test_a_bias_of_minus_infinity_that_was_given_is_kept_by_update() -> None:
    index = sf.CatalogueIndex(torch.eye(2), torch.tensor([-INFINITY, 0.0]))
    index.update(ids(0), torch.ones(1, 2))
    assert index.topk(torch.ones(2), 2).indices.tolist() == [1, -1]


def test_adding_one_by_one_copies_little() -> None:
    index = sf.CatalogueIndex(torch.randn(1, 2))
    places = set()
    for _ in range(200):
        index.add(torch.randn(1, 2))
        places.add(index._items.data_ptr())
    assert len(index) == 201
    assert len(places) <= 9
    assert index.nbytes == 256 * 2 * 4


def test_an_empty_catalogue_grows() -> None:
    index = sf.CatalogueIndex(torch.empty(0, 2))
    assert index.topk(torch.ones(2), 2).indices.tolist() == [-1, -1]
    assert index.add(torch.ones(1, 2)).tolist() == [0]
    assert index.topk(torch.ones(2), 2).indices.tolist() == [0, -1]


def test_gradient_of_the_query() -> None:
    items, query = torch.randn(9, 4), torch.randn(2, 4, requires_grad=True)
    index = sf.CatalogueIndex(items)
    index.topk(query, 3).values.sum().backward()
    own = query.detach().clone().requires_grad_()
    sf.catalogue_topk(own, items, 3).values.sum().backward()
    assert query.grad is not None and own.grad is not None
    assert query.grad.equal(own.grad)


def test_autocast_does_not_cast() -> None:
    items, query = torch.randn(50, 8), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sf.CatalogueIndex(items).topk(query, 5)
    assert found.values.equal(suite.naive_topk(query, items, 5)[0])


# Keeping.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_save_and_load(dtype: torch.dtype, tmp_path: Path) -> None:
    items, bias = torch.randn(9, 4).to(dtype), torch.randn(9).to(dtype)
    for given in (None, bias):
        index = sf.CatalogueIndex(items, given, first_pass="bf16")
        index.save(tmp_path / "plain")
        assert_same(sf.CatalogueIndex.load(tmp_path / "plain"), items, given)
        index.add(torch.randn(1, 4).to(dtype))
        index.remove(ids(2, 9))
        index.save(str(tmp_path / "changed"))
        loaded = sf.CatalogueIndex.load(tmp_path / "changed")
        assert (len(loaded), loaded.dtype, loaded.first_pass) == (10, dtype, "bf16")
        loaded.update(ids(2), items[2:3])  # still known as removed: comes back with bias 0
        expected = torch.zeros(10) if given is None else torch.cat([bias.float(), torch.zeros(1)])
        expected[2], expected[9] = 0.0, -INFINITY
        assert_same(loaded, torch.cat([items, items[:1]]), expected.to(dtype))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "plain"]


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="CatalogueIndex.load: there is no file .*/none"):
        sf.CatalogueIndex.load(tmp_path / "none")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(ValueError, match="CatalogueIndex.load: .*/text is not a safetensors file"):
        sf.CatalogueIndex.load(tmp_path / "text")
    save_file({"items": torch.zeros(1, 2)}, tmp_path / "other")
    with pytest.raises(
        ValueError, match="CatalogueIndex.load: .*/other holds no CatalogueIndex: expected seqrec_fast.Cata.*got None"
    ):
        sf.CatalogueIndex.load(tmp_path / "other")


WHOLE = {"items": torch.eye(3), "removed": torch.tensor([1])}
METADATA = {"format": "seqrec_fast.CatalogueIndex/1", "first_pass": "auto"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"format": METADATA["format"]}, "first_pass must be one of auto, fp32, bf16, int8, got 'none'"),
        ({}, METADATA | {"first_pass": "fp8"}, "first_pass must be one of auto, fp32, bf16, int8, got 'fp8'"),
        ({"items": torch.eye(3).long()}, METADATA, "items must be float16, .* got torch.int64"),
        ({"bias": torch.zeros(2)}, METADATA, r"bias must have shape \[I\] = \(3,\), got \(2,\)"),
        ({"removed": torch.tensor([3])}, METADATA, "ids must hold item ids in 0…2, got 3"),
        ({"removed": torch.tensor([-1])}, METADATA, "ids must hold item ids in 0…2, got -1"),
        ({"removed": torch.tensor([[1]])}, METADATA, r"ids must have shape \[n\], got \(1, 1\)"),
        ({"removed": torch.tensor([1.0])}, METADATA, "ids must be an int64 or int32 tensor, got torch.float32"),
    ],
)
def test_load_looks_at_what_the_file_holds(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    save_file(WHOLE | tensors, tmp_path / "file", metadata=metadata)
    with pytest.raises(ValueError, match=f"^CatalogueIndex.load: .*/file holds no valid CatalogueIndex: .*{message}$"):
        sf.CatalogueIndex.load(tmp_path / "file")


@pytest.mark.parametrize("bias", [None, torch.zeros(3)], ids=["without", "with"])
def test_a_removed_id_of_a_file_never_comes_back(bias: torch.Tensor | None, tmp_path: Path) -> None:
    save_file(WHOLE if bias is None else WHOLE | {"bias": bias}, tmp_path / "file", metadata=METADATA)
    index = sf.CatalogueIndex.load(tmp_path / "file")
    assert index.topk(torch.ones(3), 3).indices.tolist() == [0, 2, -1]
    index.update(ids(1), torch.ones(1, 3))
    assert index.topk(torch.ones(3), 3).indices.tolist() == [1, 0, 2]


def test_workspace_of_no_call() -> None:
    index = sf.CatalogueIndex(torch.eye(3))
    assert index.workspace_bytes(0, 1) >= 0
    for B, k, message in ((-1, 1, "B must be at least 0, got -1"), (1, 0, "k must be at least 1, got 0")):
        with pytest.raises(ValueError, match=f"^CatalogueIndex.workspace_bytes: {message}$"):
            index.workspace_bytes(B, k)
    with pytest.raises(TypeError, match="CatalogueIndex.workspace_bytes: k must be an int, got float"):
        index.workspace_bytes(1, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="catalogue_topk: k must be at least 1, got 0"):
        sf.workspace_bytes("catalogue_topk", torch.zeros(1, 3), torch.eye(3), 0)


def test_copies_are_independent() -> None:
    items = torch.randn(5, 3)
    index = sf.CatalogueIndex(items)
    index.remove(ids(1))
    bias = torch.zeros(5)
    bias[1] = -INFINITY
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index)), index.to("cpu")):
        other.remove(ids(0))
        assert_same(index, items, bias)
        other.update(ids(0, 1), items[:2])
        assert_same(other, items, None)


# Telling.


def test_size_and_description() -> None:
    index = sf.CatalogueIndex(torch.randn(10, 4, dtype=torch.float64), torch.zeros(10).double())
    assert index.nbytes == 10 * 4 * 8 + 10 * 8
    assert repr(index) == "CatalogueIndex(10 items of width 4, float64, cpu)"
    index.remove(ids(1, 2))
    assert repr(index) == "CatalogueIndex(10 items of width 4, 2 removed, float64, cpu)"
    assert index.device == torch.device("cpu")
    expected = sf.workspace_bytes(
        "catalogue_topk", torch.zeros(7, 4).double(), torch.zeros(10, 4).double(), 3, bias=torch.zeros(10)
    )
    assert index.workspace_bytes(7, 3) == expected


# Threads.


def test_a_search_sees_whole_rows_only() -> None:
    """Writers fill every row with one number at a time; a score of two halves would be neither."""
    width, values = 512, (1.0, 2.0)
    index = sf.CatalogueIndex(torch.full((64, width), values[0]))
    query, stop, seen = torch.ones(1, width), threading.Event(), set()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            index.update(torch.arange(64), torch.full((64, width), values[turn % 2]))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            seen |= set(index.topk(query, 64).values.flatten().tolist())
    finally:
        stop.set()
        writer.join()
    assert seen == {width * value for value in values}


def test_lock_lets_readers_in_together_and_writers_in_alone() -> None:
    lock, inside, most, order = _ReadWriteLock(), [], [0], []

    def read(gate: threading.Barrier) -> None:
        with lock.reading():
            inside.append(1)
            gate.wait(5)  # both readers are inside at once
            most[0] = max(most[0], len(inside))
            time.sleep(0.05)
            inside.pop()

    def write() -> None:
        with lock.writing():
            order.append(("writer", len(inside)))

    gate = threading.Barrier(2)
    threads = [threading.Thread(target=read, args=(gate,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(inside) < 2:
        time.sleep(0.001)
    threads.append(threading.Thread(target=write))
    threads[-1].start()
    for thread in threads:
        thread.join(5)
    assert most == [2]
    assert order == [("writer", 0)]


# Messages.

ITEMS = torch.zeros(3, 2)
MAKE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"items": [1.0]}, TypeError, "items must be a tensor, got list"),
    ({"items": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "items must be float16, bfloat16, float32 or float64, got torch.int64"),
    ({"items": torch.zeros(3)}, ValueError, r"items must have shape \[I, d\], got \(3,\)"),
    ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    ({"bias": torch.zeros(3).double()}, TypeError, r"bias must have the index's dtype \(torch.float32\), got torch.float64"),
    ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \[I\] = \(3,\), got \(2,\)"),
    ({"bias": torch.zeros(3, device="meta")}, ValueError, r"bias must be on the index's device \(cpu\), got meta"),
    ({"items": torch.zeros(3, 2).to_sparse()}, TypeError, "items must be a dense tensor, got layout torch.sparse_coo"),
    ({"items": torch.nested.nested_tensor([torch.zeros(2)])}, TypeError, "items must be a dense tensor, got a nested tensor"),
    ({"bias": torch.zeros(3).to_sparse()}, TypeError, "bias must be a dense tensor, got layout torch.sparse_coo"),
    ({"first_pass": "fp8"}, ValueError, "first_pass must be one of auto, fp32, bf16, int8, got 'fp8'"),
]  # fmt: skip
CALLS: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("topk", ([1.0], 1), TypeError, ": query must be a tensor, got list"),
    ("topk", (torch.zeros(2).half(), 1), TypeError, r": query must have the index's dtype \(torch.float32\), got torch.float16"),
    ("topk", (torch.zeros(3), 1), ValueError, r": query must have shape \[..., 2\], got \(3,\)"),
    ("rank", (torch.zeros(2, device="meta"), torch.tensor(0)), ValueError, r": query must be on the index's device \(cpu\), got meta"),
    ("update", (torch.zeros(1), torch.zeros(1, 2)), TypeError, ": ids must be an int64 or int32 tensor, got torch.float32"),
    ("update", ([0], torch.zeros(1, 2)), TypeError, ": ids must be an int64 or int32 tensor, got list"),
    ("update", (torch.tensor([[0]]), torch.zeros(1, 2)), ValueError, r": ids must have shape \[n\], got \(1, 1\)"),
    ("update", (torch.tensor([1, 0, 1]), torch.zeros(3, 2)), ValueError, ".update: ids must all be different, got 1 twice"),
    ("update", (torch.tensor([3]), torch.ones(1, 2)), IndexError, ": ids must hold item ids in 0…2, got 3"),
    ("update", (torch.tensor([0]), torch.zeros(2, 2)), ValueError, r": rows must have shape \[n, d\] = \(1, 2\), got \(2, 2\)"),
    ("update", (torch.tensor([0]), torch.zeros(1, 2).double()), TypeError, r": rows must have the index's dtype \(torch.float32\), got torch.float64"),
    ("update", (torch.tensor([0]), torch.zeros(1, 2), torch.zeros(2)), ValueError, r": bias must have shape \[n\] = \(1,\), got \(2,\)"),
    ("add", ("rows",), TypeError, ": rows must be a tensor, got str"),
    ("add", (torch.zeros(2),), ValueError, r": rows must have shape \[n, d\] = \(0, 2\), got \(2,\)"),
    ("add", (torch.zeros(1, 3),), ValueError, r": rows must have shape \[n, d\] = \(1, 2\), got \(1, 3\)"),
    ("add", (torch.zeros(1, 2), torch.zeros(2)), ValueError, r": bias must have shape \[n\] = \(1,\), got \(2,\)"),
    ("remove", (torch.tensor([0, -1]),), IndexError, ": ids must hold item ids in 0…2, got -1"),
    ("topk", (torch.zeros(1, 2).to_sparse(), 1), TypeError, ": query must be a dense tensor, got layout torch.sparse_coo"),
    ("update", (torch.tensor([0]).to_sparse(), torch.zeros(1, 2)), TypeError, ": ids must be a dense tensor, got layout torch.sparse_coo"),
    ("update", (torch.tensor([0]), torch.zeros(1, 2).to_sparse_csr()), TypeError, ": rows must be a dense tensor, got layout torch.sparse_csr"),
    ("add", (torch.nested.nested_tensor([torch.zeros(2)]),), TypeError, ": rows must be a dense tensor, got a nested tensor"),
    ("add", (torch.zeros(1, 2), torch.zeros(1).to_sparse()), TypeError, ": bias must be a dense tensor, got layout torch.sparse_coo"),
    ("remove", (torch.tensor([0]).to_sparse(),), TypeError, ": ids must be a dense tensor, got layout torch.sparse_coo"),
    ("remove", (3,), TypeError, ": ids must be an int64 or int32 tensor, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), MAKE)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^CatalogueIndex: {message}$"):
        sf.CatalogueIndex(**({"items": ITEMS} | change))


@pytest.mark.parametrize(("method", "args", "error", "message"), CALLS)
def test_bad_calls_change_nothing(method: str, args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    items = torch.randn(3, 2)
    index = sf.CatalogueIndex(items)
    with pytest.raises(error, match=f"^CatalogueIndex{message}$"):
        getattr(index, method)(*args)
    assert_same(index, items, None)
