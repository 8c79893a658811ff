"""``sf.catalogue_rank``: meaning, transforms, tracing, memory and messages, by the reference and by what ``auto`` takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue_cases import (
    CUTS,
    INFINITY,
    LOGITS,
    NAN,
    cut_small,
    ids_below,
    logit_spec,
    normal,
)
from conformance import catalogue as suite
from memory import LargestTemporary
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast.backends.reference import _exact, _scan
from seqrec_fast.backends.reference import catalogue_rank as reference

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
both_backends = pytest.mark.parametrize("backend", ["auto", "reference"])


def cast(keywords: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and n != "exclude" else v
        for n, v in keywords.items()
    }


def arguments(rows: int, items: int, logits: str = "plain", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    target = torch.randint(0, max(items, 1), (rows,))
    target[1::4] = -100
    if items == 0:
        target[:] = -100
    return cast(
        {"query": normal(rows, 4), "items": normal(items, 4), "target": target, **LOGITS[logits](rows, items)}, dtype
    )


def assert_is_naive(**keywords: Any) -> None:
    assert sf.catalogue_rank(**keywords).equal(suite.naive_rank(**keywords))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
def test_reference(logits: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with sf.use_backend("reference"):
        for rows, items in ((0, 5), (3, 0), (1, 1), (9, 31)):
            keywords = arguments(rows, items, logits, dtype)
            assert_is_naive(**keywords)
        for cut in CUTS:
            cut_small(monkeypatch, **cut)
            assert_is_naive(**keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", suite.TABLES)
def test_reference_on_nasty_data(table: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with sf.use_backend("reference"):
        for logits in ("plain", "everything"):
            keywords = arguments(7, 53, logits, dtype)
            keywords["items"] = suite.TABLES[table](keywords["items"], keywords["query"])
            assert_is_naive(**keywords)
            with monkeypatch.context() as patch:
                cut_small(patch, scores=64)
                assert_is_naive(**keywords)
                patch.setattr(_exact, "DENSE_SHARE", 0.0)  # sum whole buffers in order
                assert_is_naive(**keywords)
                patch.setattr(_exact, "DENSE_SHARE", 1.0)
                patch.setattr(_exact, "GATHERED_NUMBERS", 16)  # gather four pairs at a time
                assert_is_naive(**keywords)


@both_backends
def test_is_the_place_in_the_whole_top_k(backend: str) -> None:
    keywords = arguments(9, 31, "everything", torch.float32) | {"target": torch.randint(0, 31, (9,))}
    listed = sf.catalogue_topk(
        keywords["query"], keywords["items"], 31, **{n: keywords[n] for n in ("scale", "bias", "exclude")}
    )
    with sf.use_backend(backend):
        ranks = sf.catalogue_rank(**keywords)
    for row, rank in enumerate(ranks.tolist()):
        target = int(keywords["target"][row])
        if target in listed.indices[row].tolist():  # neither excluded nor dead
            assert listed.indices[row, rank] == target


@both_backends
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0)])
def test_leading_dimensions(lead: tuple[int, ...], backend: str) -> None:
    keywords = {
        "query": normal(*lead, 4),
        "items": normal(9, 4),
        "target": torch.randint(0, 9, lead),
        "scale": normal(*lead),
        "exclude": torch.randint(-1, 9, (*lead, 2)),
    }
    with sf.use_backend(backend):
        assert_is_naive(**keywords)


@both_backends
def test_rules(backend: str) -> None:
    query = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    items = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0], [2.0, 0.0], [NAN, -1.0], [-INFINITY, 0.0], [2.0, 5.0]])
    target = torch.tensor([2, 6, 4, 5, -3, 3])
    # Ties by id and −0 = +0; a NaN or −∞ target after all five ranked items, whichever ids they have; ignored.
    with sf.use_backend(backend):
        assert sf.catalogue_rank(query, items, target, ignore_index=-3).tolist() == [4, 1, 5, 5, -1, 0]
        # The target is not excluded from its own row, the others are, each once.
        exclude = torch.tensor([[3, 3, 6, -1]]).expand(6, 4)
        assert sf.catalogue_rank(query, items, target, ignore_index=-3, exclude=exclude).tolist() == [2, 0, 3, 3, -1, 0]
        assert sf.catalogue_rank(query, items, target, ignore_index=-3, exclude=torch.arange(7)).tolist() == [0] * 4 + [
            -1,
            0,
        ]
        # A dead item ranks for nobody; as a target it comes last.
        bias = torch.tensor([0.0] * 3 + [-INFINITY] + [0.0] * 3)
        assert sf.catalogue_rank(query, items, target, ignore_index=-3, bias=bias).tolist() == [3, 0, 4, 4, -1, 4]


@both_backends
def test_a_query_of_nan_ranks_nothing(backend: str) -> None:
    query = torch.full((2, 3), NAN)
    with sf.use_backend(backend):
        assert sf.catalogue_rank(query, normal(5, 3).float(), torch.tensor([0, 4])).tolist() == [0, 0]


@both_backends
@pytest.mark.parametrize("scale", [INFINITY, -INFINITY, NAN, 1e308, torch.tensor([INFINITY, NAN, 1.0, 0.0])], ids=str)
def test_the_scale_multiplies_the_sum_and_not_the_query(backend: str, scale: float | Tensor) -> None:
    """∞·(a + b) where ∞·a + ∞·b would be NaN; 1e308·(a + b) where 1e308·a would overflow."""
    with sf.use_backend(backend):
        for width in (0, 9):
            query, items = normal(4, width).float() * 10, normal(7, width).float() * 10
            for target in range(7):
                assert_is_naive(query=query, items=items, target=torch.full((4,), target), scale=scale)


@both_backends
def test_autocast_does_not_cast(backend: str) -> None:
    keywords = arguments(9, 101, "plain", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), sf.use_backend(backend):
        assert_is_naive(**keywords)


def test_has_no_gradient() -> None:
    keywords = arguments(3, 7)
    ranks = sf.catalogue_rank(**keywords | {"query": keywords["query"].requires_grad_()})
    assert not ranks.requires_grad
    _, tangent = torch.func.jvp(
        lambda q: sf.catalogue_rank(**keywords | {"query": q}).double() * 0 + q.sum(),
        (keywords["query"].detach(),),
        (torch.ones(3, 4).double(),),
    )
    assert tangent.eq(12).all()


@both_backends
def test_vmap(backend: str) -> None:
    query, items, target, exclude = normal(3, 4, 5), normal(7, 5), torch.randint(0, 7, (3, 4)), ids_below(7, 3, 4, 2)
    catalogues = normal(3, 7, 5)
    with sf.use_backend(backend):
        together = torch.vmap(lambda q, t, e: sf.catalogue_rank(q, items, t, exclude=e))(query, target, exclude)
        assert together.equal(sf.catalogue_rank(query, items, target, exclude=exclude))
        over_tables = torch.vmap(lambda v: sf.catalogue_rank(query[0], v, target[0]))(catalogues)
        assert over_tables.equal(torch.stack([sf.catalogue_rank(query[0], v, target[0]) for v in catalogues]))


@pytest.mark.parametrize("logits", ["plain", "everything", "exclude_csr"])
def test_opcheck(logits: str) -> None:
    keywords = arguments(4, 9, logits)
    args = (
        keywords["query"].requires_grad_(),
        keywords["items"],
        keywords["target"],
        *logit_spec(keywords).args(),
        -100,
    )
    torch.library.opcheck(
        torch.ops.seqrec_fast.catalogue_rank.default,
        args,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiled_with_dynamic_sizes() -> None:
    call = lambda **keywords: sf.catalogue_rank(**keywords)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, items in ((3, 7), (6, 11)):
        keywords = arguments(rows, items, "everything")
        assert compiled(**keywords).equal(call(**keywords))


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = torch.nn.Parameter(normal(13, 4))

    def forward(self, query: Tensor, target: Tensor, exclude: Tensor) -> Tensor:
        return sf.catalogue_rank(query, self.items, target, exclude=exclude)


def test_export_with_dynamic_rows() -> None:
    module, rows = Module(), torch.export.Dim("rows")
    ids = torch.zeros(3, dtype=torch.int64)
    program = torch.export.export(module, (normal(3, 4), ids, ids[:, None]), dynamic_shapes=({0: rows},) * 3)
    other = normal(11, 4), torch.randint(0, 13, (11,)), ids_below(13, 11, 1)
    assert program.module()(*other).equal(module(*other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_does_not_grow_with_rows_times_items(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, rows=32, scores=1 << 14)
    keywords = arguments(90, 2000, "everything", dtype)
    bound = _scan.SCORES + 1
    assert 5 * bound < 90 * 2000
    with LargestTemporary() as watch:
        reference.forward(keywords["query"], keywords["items"], keywords["target"], *logit_spec(keywords).args(), -100)
    assert 0 < watch.elements <= bound


def unchecked_csr(crow: list[int], columns: list[int]) -> Tensor:
    """What torch.sparse_csr_tensor makes of bad indices when it does not look."""
    return torch.sparse_csr_tensor(
        torch.tensor(crow), torch.tensor(columns), torch.ones(len(columns)), size=(2, 3), check_invariants=False
    )


ROWS = r"exclude is not a valid sparse_csr matrix: its row pointers must rise from 0 to 2"
OK: dict[str, Any] = {"query": torch.zeros(2, 4), "items": torch.zeros(3, 4), "target": torch.tensor([0, 1])}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": 1}, TypeError, "query must be a tensor, got int"),
    ({"items": None}, TypeError, "items must be a tensor, got NoneType"),
    ({"items": torch.zeros(3, 4).double()}, TypeError, r"items must have the dtype of query \(torch.float32\), got torch.float64"),
    ({"items": torch.zeros(3, 5)}, ValueError, r"items must have the query's width d = 4, got \(3, 5\)"),
    ({"target": [0, 1]}, TypeError, "target must be a tensor of item ids, got list"),
    ({"target": torch.tensor([0, 1]).int()}, TypeError, "target must be int64, got torch.int32"),
    ({"target": torch.tensor([0])}, ValueError, r"target must have the shape of the query's leading dimensions \(2,\), got \(1,\)"),
    ({"target": torch.tensor([0, 1], device="meta")}, ValueError, r"target must be on the query's device \(cpu\), got meta"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    ({"scale": [1.0]}, TypeError, "scale must be a float or a tensor, got list"),
    ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \[I\] = \(3,\), got \(2,\)"),
    ({"exclude": torch.zeros(3, 3).to_sparse_csr()}, ValueError, r"exclude as sparse_csr must have shape \[B, I\] = \(2, 3\), got \(3, 3\)"),
    ({"exclude": unchecked_csr([0, 2], [0, 1])}, ValueError, r"exclude as sparse_csr must have B \+ 1 = 3 row pointers, got \(2,\)"),
    ({"exclude": unchecked_csr([0, 2, 1], [0, 1])}, ValueError, ROWS),
    ({"exclude": unchecked_csr([1, 1, 2], [0, 1])}, ValueError, ROWS),
    ({"exclude": unchecked_csr([0, 1, 1], [0, 1])}, ValueError, ROWS),
    ({"exclude": unchecked_csr([0, 1, 300], [0, 1])}, ValueError, ROWS),
    ({"exclude": unchecked_csr([0, -5, 2], [0, 1])}, ValueError, ROWS),
    ({"target": torch.tensor([0, 3])}, IndexError, "target must hold item ids in 0…2, got 3"),
    ({"target": torch.tensor([-5, 0])}, IndexError, "target must hold item ids in 0…2, got -5"),
    ({"items": torch.zeros(0, 4)}, IndexError, "target must hold item ids in an empty catalogue, which has none, got 1"),
    ({"exclude": torch.tensor([3])}, IndexError, "exclude must hold item ids in 0…2, or -1 for padding, got 3"),
    ({"exclude": torch.tensor([[0], [-7]])}, IndexError, "exclude must hold item ids in 0…2, or -1 for padding, got -7"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with sf.use_backend("reference"), pytest.raises(error, match=f"^catalogue_rank: {message}$"):
        sf.catalogue_rank(**(OK | change))


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_of_what_auto_takes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """The same exception; ids are looked at by the backend, in words of its own."""
    with pytest.raises(error, match="^catalogue_rank: " + (message.split(" ")[0] if error is IndexError else message)):
        sf.catalogue_rank(**(OK | change))
