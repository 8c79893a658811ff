"""``sf.catalogue_topk``: order, padding, gradients, transforms, tracing, memory and messages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from catalogue_cases import (
    CUTS,
    EVERY_CHECK,
    INFINITY,
    LOGITS,
    NAN,
    cut_small,
    gradients,
    ids_below,
    logit_spec,
    normal,
    record_gradients,
    with_leaves,
)
from conformance import catalogue as suite
from memory import LargestTemporary
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast.backends.reference import _exact, _scan
from seqrec_fast.backends.reference import catalogue_topk as reference
from seqrec_fast.ops import catalogue_topk as ops

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def assert_is_naive(k: int, **keywords: Any) -> None:
    """The same ids, and the same bits of the values."""
    values, ids = sf.catalogue_topk(k=k, **keywords)
    wanted_values, wanted_ids = suite.naive_topk(k=k, **keywords)
    assert ids.equal(wanted_ids)
    assert values.dtype == wanted_values.dtype
    assert values.equal(wanted_values)


def cast(keywords: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and n != "exclude" else v
        for n, v in keywords.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
def test_order(logits: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, items in ((0, 5), (3, 0), (1, 1), (9, 31)):
        keywords = cast({"query": normal(rows, 4), "items": normal(items, 4), **LOGITS[logits](rows, items)}, dtype)
        for k in (1, 5, 40):
            assert_is_naive(k, **keywords)
    for cut in CUTS:
        cut_small(monkeypatch, **cut)
        for k in (1, 5, 40):
            assert_is_naive(k, **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", suite.TABLES)
@pytest.mark.parametrize("logits", ["plain", "everything"])
def test_order_on_nasty_data(table: str, dtype: torch.dtype, logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords = cast({"query": normal(5, 6), "items": normal(53, 6), **LOGITS[logits](5, 53)}, dtype)
    keywords["items"] = suite.TABLES[table](keywords["items"], keywords["query"])
    assert_is_naive(7, **keywords)
    cut_small(monkeypatch, scores=64)
    assert_is_naive(7, **keywords)
    monkeypatch.setattr(_exact, "DENSE_SHARE", 0.0)  # sum whole buffers in order
    assert_is_naive(7, **keywords)
    monkeypatch.setattr(_exact, "DENSE_SHARE", 1.0)
    monkeypatch.setattr(_exact, "GATHERED_NUMBERS", 24)  # gather four pairs at a time
    assert_is_naive(7, **keywords)


def test_ties_go_by_id_and_minus_zero_is_zero() -> None:
    query = torch.tensor([[1.0, 0.0]])
    items = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0], [2.0, 0.0], [-0.0, -1.0], [2.0, 5.0]])
    values, ids = sf.catalogue_topk(query, items, 6)
    assert ids.tolist() == [[3, 5, 0, 1, 2, 4]]
    assert torch.signbit(values).any().item() is False


def test_nan_and_minus_infinity_never_rank() -> None:
    query = torch.tensor([[1.0], [NAN], [INFINITY], [0.0]])
    items = torch.tensor([[1.0], [NAN], [INFINITY], [-INFINITY], [-1.0]])
    values, ids = sf.catalogue_topk(query, items, 5)
    assert ids.tolist() == [[2, 0, 4, -1, -1], [-1] * 5, [0, 2, -1, -1, -1], [0, 4, -1, -1, -1]]
    assert values[0].tolist() == [INFINITY, 1.0, -1.0, -INFINITY, -INFINITY]
    assert values[1].tolist() == [-INFINITY] * 5


def test_a_dead_item_stays_dead_whatever_its_vector_holds() -> None:
    items = torch.tensor([[INFINITY], [NAN], [1.0]])
    bias = torch.tensor([-INFINITY, -INFINITY, 0.0])
    assert sf.catalogue_topk(torch.ones(1, 1), items, 3, bias=bias).indices.tolist() == [[2, -1, -1]]


def test_scores_are_rounded_once() -> None:
    """A sum in fp32 would tie these, or order them the other way round."""
    query = torch.tensor([[1.0, 1.0, 1.0]])
    items = torch.tensor([[1e8, 1.0, -1e8], [1e8, 2.0, -1e8], [1e8, -1e8, 0.5]])
    values, ids = sf.catalogue_topk(query, items, 3)
    assert ids.tolist() == [[1, 0, 2]]
    assert values.tolist() == [[2.0, 1.0, 0.5]]


def test_more_than_there_are_is_padded() -> None:
    values, ids = sf.catalogue_topk(
        torch.ones(2, 1), torch.tensor([[1.0], [2.0]]), 4, exclude=torch.tensor([[1], [-1]])
    )
    assert ids.tolist() == [[0, -1, -1, -1], [1, 0, -1, -1]]
    assert values.tolist() == [[1.0] + [-math.inf] * 3, [2.0, 1.0] + [-math.inf] * 2]


def test_returns_what_torch_topk_returns() -> None:
    query, items = normal(3, 4), normal(9, 4)
    result = sf.catalogue_topk(query, items, 3)
    assert isinstance(result, torch.return_types.topk)
    stock = torch.topk(query @ items.t(), 3)
    assert result.indices.equal(stock.indices)
    torch.testing.assert_close(result.values, stock.values)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    query, items = normal(*lead, 4), normal(9, 4)
    assert_is_naive(5, query=query, items=items, scale=normal(*lead), exclude=torch.randint(-1, 9, (*lead, 2)))


def test_a_row_is_the_same_alone_and_on_any_thread_count() -> None:
    query, items = normal(70, 8, dtype=torch.float32), normal(3001, 8, dtype=torch.float32)
    together = sf.catalogue_topk(query, items, 10)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (slice(0, 1), slice(10, 50)):
            alone = sf.catalogue_topk(query[rows], items, 10)
            assert alone.indices.equal(together.indices[rows])
            assert alone.values.equal(together.values[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_cast(dtype: torch.dtype) -> None:
    query, items = normal(5, 8, dtype=torch.float32), normal(50, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        assert_is_naive(7, query=query, items=items)


# Gradients.


def values_of(k: int = 3, **keywords: Any) -> tuple[Tensor]:
    return (sf.catalogue_topk(k=k, **keywords).values,)


def gathered(k: int = 3, **keywords: Any) -> tuple[Tensor]:
    """The values as a plain formula of the k rows."""
    query, items, scale, bias = (keywords.get(name) for name in ("query", "items", "scale", "bias"))
    ids = sf.catalogue_topk(k=k, **{n: v.detach() if isinstance(v, Tensor) else v for n, v in keywords.items()}).indices
    scores = torch.zeros(*ids.shape, dtype=torch.float64)
    for row in range(len(ids)):
        for place, id_ in enumerate(ids[row].tolist()):
            if id_ >= 0:
                score = query[row] @ items[id_] * (1.0 if scale is None else suite.scale_of(scale, row))
                scores[row, place] = score if bias is None else score + bias[id_]
    return (scores,)


@pytest.mark.parametrize("logits", LOGITS)
def test_gradients_of_the_values(logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords = {"query": normal(5, 4), "items": normal(9, 4), **LOGITS[logits](5, 9)}
    expected = gradients(gathered, keywords)
    torch.testing.assert_close(gradients(values_of, keywords), expected)
    monkeypatch.setattr(reference, "PAIRS", 6)  # two rows at a time
    torch.testing.assert_close(gradients(values_of, keywords), expected)
    everything = lambda **kw: values_of(12, **kw)  # noqa: E731
    torch.testing.assert_close(gradients(everything, keywords), gradients(lambda **kw: gathered(12, **kw), keywords))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_gradients(dtype: torch.dtype) -> None:
    keywords = cast({"query": normal(5, 4), "items": normal(9, 4), **LOGITS["everything"](5, 9)}, dtype)
    found = gradients(values_of, keywords)
    assert {name: gradient.dtype for name, gradient in found.items()} == dict.fromkeys(found, dtype)


@pytest.mark.parametrize("logits", ["plain", "everything"])
def test_gradcheck(logits: str) -> None:
    keywords, leaves = with_leaves({"query": normal(2, 3), "items": normal(6, 3), **LOGITS[logits](2, 6)})
    if "bias" in leaves:
        leaves["bias"] = normal(6).requires_grad_()

    def function(*tensors: Tensor) -> Tensor:
        values = sf.catalogue_topk(k=3, **{**keywords, **dict(zip(leaves, tensors, strict=True))}).values
        return torch.where(values == -INFINITY, 0.0, values)

    inputs = tuple(leaves.values())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("wanted", ["query", "items", "scale", "bias"])
def test_only_the_gradient_asked_for_is_computed(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords = {"query": normal(5, 4), "items": normal(9, 4), **LOGITS["everything"](5, 9)}
    computed = record_gradients(monkeypatch, ops.CATALOGUE_TOPK_BACKWARD)
    leaf = keywords[wanted].clone().requires_grad_()
    sf.catalogue_topk(k=3, **{**keywords, wanted: leaf}).values.nan_to_num(neginf=0.0).sum().backward()
    assert computed == [[name == wanted for name in ("query", "items", "scale", "bias")]]


def test_nan_in_an_item_that_is_not_listed_spoils_no_gradient() -> None:
    keywords = {"query": normal(3, 4), "items": normal(9, 4)}
    keywords["items"][4] = NAN
    found = gradients(values_of, keywords)
    assert found["query"].isfinite().all()
    assert found["items"].isfinite().all()


def test_vmap_and_per_sample_gradients() -> None:
    queries, items, exclude = normal(3, 4, 5), normal(9, 5), ids_below(9, 3, 4, 2)
    together = torch.vmap(lambda q, e: tuple(sf.catalogue_topk(q, items, 3, exclude=e)))(queries, exclude)
    torch.testing.assert_close(together, tuple(sf.catalogue_topk(queries, items, 3, exclude=exclude)))
    catalogues = normal(3, 9, 5)
    expected = torch.stack([sf.catalogue_topk(queries[0], table, 3).values for table in catalogues])
    torch.testing.assert_close(torch.vmap(lambda v: sf.catalogue_topk(queries[0], v, 3).values)(catalogues), expected)

    def loss(items: Tensor, query: Tensor) -> Tensor:
        return sf.catalogue_topk(query, items, 3).values.sin().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(items, queries[0])
    for row in range(4):
        alone = items.clone().requires_grad_()
        torch.testing.assert_close(per_sample[row], torch.autograd.grad(loss(alone, queries[0, row]), alone)[0])


# Graphs.


@pytest.mark.parametrize("logits", ["plain", "everything", "exclude_csr"])
def test_opcheck(logits: str) -> None:
    keywords, _ = with_leaves({"query": normal(4, 3), "items": normal(9, 3), **LOGITS[logits](4, 9)})
    spec = logit_spec(keywords)
    args = (keywords["query"], keywords["items"], 3, *spec.args())
    checks = EVERY_CHECK if logits == "everything" else EVERY_CHECK[:3]
    torch.library.opcheck(torch.ops.seqrec_fast.catalogue_topk.default, args, test_utils=checks)
    ids = sf.catalogue_topk(k=3, **keywords).indices
    mask = [True, True, spec.row_scale is not None, spec.bias is not None]
    for wanted in (mask, [False, True, False, False]):
        arguments = (
            normal(4, 3),
            ids,
            keywords["query"],
            keywords["items"],
            spec.scale,
            spec.row_scale,
            spec.bias,
            wanted,
        )
        torch.library.opcheck(
            torch.ops.seqrec_fast.catalogue_topk_backward.default, arguments, test_utils=EVERY_CHECK[:3]
        )


def test_compiled_with_dynamic_sizes() -> None:
    def call(k: int, **keywords: Any) -> tuple[Tensor, Tensor]:
        values, ids = sf.catalogue_topk(k=k, **keywords)
        return values, ids

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, items, k in ((3, 7, 2), (6, 11, 5)):
        keywords = {"query": normal(rows, 4), "items": normal(items, 4), **LOGITS["everything"](rows, items)}
        torch.testing.assert_close(compiled(k, **keywords), call(k, **keywords))
        found = gradients(lambda **kw: compiled(k, **kw), keywords)  # noqa: B023
        torch.testing.assert_close(found, gradients(lambda **kw: call(k, **kw), keywords))  # noqa: B023


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = torch.nn.Parameter(normal(13, 4))

    def forward(self, query: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = sf.catalogue_topk(query, self.items, 3, exclude=exclude)
        return values, ids


def test_export_with_dynamic_rows() -> None:
    module, rows = Module(), torch.export.Dim("rows")
    example = normal(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    program = torch.export.export(module, example, dynamic_shapes=({0: rows}, {0: rows}))
    other = normal(11, 4), ids_below(13, 11, 2)
    torch.testing.assert_close(program.module()(*other), module(*other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_does_not_grow_with_rows_times_items(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, items = 90, 2000
    cut_small(monkeypatch, rows=32, scores=1 << 14)
    keywords = cast({"query": normal(rows, 8), "items": normal(items, 8), **LOGITS["everything"](rows, items)}, dtype)
    bound = _scan.SCORES + 1
    assert rows * items > 5 * bound
    with LargestTemporary() as watch:
        values, ids = reference.forward(keywords["query"], keywords["items"], 10, *logit_spec(keywords).args())
        reference.backward(
            values, ids, keywords["query"], keywords["items"], 1.0, None, None, [True, True, False, False]
        )
    assert 0 < watch.elements <= bound


# Messages.

OK: dict[str, Any] = {"query": torch.zeros(2, 4), "items": torch.zeros(3, 4), "k": 2}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
    ({"items": [1.0]}, TypeError, "items must be a tensor, got list"),
    ({"items": torch.zeros(3, 4).double()}, TypeError, r"items must have the dtype of query \(torch.float32\), got torch.float64"),
    ({"items": torch.zeros(3, 5)}, ValueError, r"items must have the query's width d = 4, got \(3, 5\)"),
    ({"items": torch.zeros(4)}, ValueError, r"items must have shape \[I, d\], got \(4,\)"),
    ({"k": 0}, ValueError, "k must be at least 1, got 0"),
    ({"k": -3}, ValueError, "k must be at least 1, got -3"),
    ({"k": 2.0}, TypeError, "k must be an int, got float"),
    ({"k": True}, TypeError, "k must be an int, got bool"),
    ({"scale": None}, TypeError, "scale must be a float or a tensor, got NoneType"),
    ({"scale": torch.ones(3)}, ValueError, r"a tensor scale must have the shape of the query's leading dimensions \(2,\), got \(3,\)"),
    ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \[I\] = \(3,\), got \(2,\)"),
    ({"exclude": torch.tensor([[0.0], [1.0]])}, TypeError, "exclude must be int64 or int32, got torch.float32"),
    ({"exclude": torch.tensor([3])}, IndexError, "exclude must hold item ids in 0…2, or -1 for padding, got 3"),
    ({"exclude": torch.tensor([[0], [-7]])}, IndexError, "exclude must hold item ids in 0…2, or -1 for padding, got -7"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^catalogue_topk: {message}$"):
        sf.catalogue_topk(**(OK | change))
