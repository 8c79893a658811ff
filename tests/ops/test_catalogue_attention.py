"""``sf.catalogue_attention``: meaning, gradients, transforms, tracing, memory and messages. Backends: tests/conformance."""

from __future__ import annotations

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
    logit_spec,
    normal,
    record_gradients,
    with_leaves,
)
from conformance import catalogue as suite
from memory import LargestTemporary
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast.backends.reference import _attention_derivatives as derivatives
from seqrec_fast.backends.reference import _scan
from seqrec_fast.backends.reference import catalogue_attention as reference
from seqrec_fast.ops import catalogue_attention as ops

pytestmark = pytest.mark.usefixtures("one_thread")

# name: (d, d_v or None for values = keys, heads)
TABLES = {
    "shared": (4, None, 1),
    "values": (4, 3, 1),
    "heads": (6, None, 3),
    "heads_values": (4, 6, 2),
    "width_0": (0, 2, 1),
    "narrow": (2, None, 1),
    "narrow_heads": (2, 2, 2),
}
SHAPES = [(0, 7), (5, 0), (1, 1), (7, 23)]


def arguments(rows: int, items: int, table: str = "shared", logits: str = "plain") -> dict[str, Any]:
    width, value_width, heads = TABLES[table]
    values = None if value_width is None else normal(items, value_width)
    return {
        "query": normal(rows, width),
        "keys": normal(items, width),
        "values": values,
        "num_heads": heads,
        **LOGITS[logits](rows, items),
    }


def attend(**keywords: Any) -> tuple[Tensor, Tensor]:
    context, lse = sf.catalogue_attention(**keywords, return_lse=True)
    return context, lse[..., None] if keywords.get("num_heads", 1) == 1 else lse


def assert_equals_naive(keywords: dict[str, Any]) -> None:
    torch.testing.assert_close(attend(**keywords), suite.naive_attention(**keywords))
    torch.testing.assert_close(gradients(attend, keywords), gradients(suite.naive_attention, keywords))


@pytest.mark.parametrize("table", ["shared", "values", "heads", "heads_values", "width_0"])
@pytest.mark.parametrize("logits", LOGITS)
def test_values_and_gradients(logits: str, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in SHAPES:
        keywords = arguments(*shape, table, logits)
        assert_equals_naive(keywords)
    expected = suite.naive_attention(**keywords)
    of_expected = gradients(suite.naive_attention, keywords)
    for cut in CUTS:
        cut_small(monkeypatch, **cut)
        torch.testing.assert_close(attend(**keywords), expected)
        torch.testing.assert_close(gradients(attend, keywords), of_expected)


def test_agrees_with_scaled_dot_product_attention() -> None:
    query, keys, values = normal(5, 4), normal(13, 4), normal(13, 3)
    stock = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    torch.testing.assert_close(sf.catalogue_attention(query, keys, values, scale=0.5), stock)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    query, keys = normal(*lead, 4), normal(9, 4)
    keywords = {"scale": normal(*lead), "exclude": torch.randint(-1, 9, (*lead, 2)), "num_heads": 2}
    context, lse = sf.catalogue_attention(query, keys, **keywords, return_lse=True)
    expected = suite.naive_attention(query, keys, **keywords)
    torch.testing.assert_close((context, lse), expected)
    keywords["num_heads"] = 1
    torch.testing.assert_close(
        sf.catalogue_attention(query, keys, **keywords, return_lse=True)[1],
        suite.naive_attention(query, keys, **keywords)[1][..., 0],
    )
    if not lead:
        return
    matrix = (torch.rand(query[..., 0].numel(), 9) < 0.5).float().to_sparse_csr()
    torch.testing.assert_close(
        sf.catalogue_attention(query, keys, exclude=matrix), suite.naive_attention(query, keys, exclude=matrix)[0]
    )


def test_a_row_without_items_has_context_0_and_gradients_0() -> None:
    keywords = arguments(3, 7, "values")
    keywords["exclude"] = torch.tensor([[-1] * 7, list(range(7)), [0, 0, 0, 1, 1, 2, 2]])
    keywords, leaves = with_leaves(keywords)
    context, lse = sf.catalogue_attention(**keywords, return_lse=True)
    assert context[1].eq(0).all()
    assert lse[1] == -INFINITY
    (context[1].sum() + lse[1]).backward()
    for leaf in leaves.values():
        assert leaf.grad is not None and leaf.grad.eq(0).all()


def test_nan_spoils_what_it_touches_and_no_more() -> None:
    query, keys, bias = normal(5, 4), normal(9, 4), normal(9)
    exclude = torch.tensor([[3], [-1], [3], [3], [3]])
    keys[3, 1], query[2, 0] = NAN, NAN
    context, lse = sf.catalogue_attention(query, keys, bias=bias, exclude=exclude, return_lse=True)
    assert context.isnan().all(1).tolist() == lse.isnan().tolist() == [False, True, True, False, False]
    bias[3] = -INFINITY  # removed for everyone, whatever its vector holds
    context, lse = sf.catalogue_attention(query, keys, bias=bias, return_lse=True)
    assert context.isnan().all(1).tolist() == lse.isnan().tolist() == [False, False, True, False, False]


def test_nan_in_the_values_of_an_excluded_item_is_not_seen() -> None:
    keywords = arguments(5, 9, "values")
    keywords["exclude"] = torch.tensor([[3]] * 5)
    expected, of_expected = suite.naive_attention(**keywords), gradients(suite.naive_attention, keywords)
    keywords["values"][3] = NAN
    keywords["keys"][3] = INFINITY
    torch.testing.assert_close(attend(**keywords), expected)
    found = gradients(attend, keywords)
    for name in found:
        torch.testing.assert_close(found[name], of_expected[name])


def test_a_score_of_minus_infinity_has_no_probability() -> None:
    query, keys = normal(4, 3).abs(), normal(9, 3)
    keys[2, 0] = -INFINITY
    assert_equals_naive({"query": query, "keys": keys})
    context, _ = attend(query=query, keys=keys)
    assert context.isfinite().all()


def test_scores_far_apart_and_rising(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk's largest score is no shift for the later ones here."""
    query, keys = torch.ones(3, 1, dtype=torch.float64), torch.linspace(-3000, 3000, 61, dtype=torch.float64)[:, None]
    for cut in CUTS:
        cut_small(monkeypatch, **cut)
        for direction in (keys, keys.flip(0)):
            assert_equals_naive({"query": query, "keys": direction})
    exclude = torch.arange(10)  # and here it has none
    assert_equals_naive({"query": query, "keys": keys, "exclude": exclude})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results_and_gradients(dtype: torch.dtype) -> None:
    keywords = arguments(3, 7, "values", "everything")
    keywords = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in keywords.items()}
    context, lse = sf.catalogue_attention(**keywords, return_lse=True)
    assert context.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = gradients(attend, keywords)
    assert {name: gradient.dtype for name, gradient in found.items()} == dict.fromkeys(found, dtype)


def test_autocast_casts_the_matrices_and_keeps_lse_wide() -> None:
    keywords = arguments(5, 9, "values", "everything")
    keywords = {n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in keywords.items()}
    keywords, leaves = with_leaves(keywords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context, lse = sf.catalogue_attention(**keywords, return_lse=True)
        assert context.dtype == torch.bfloat16
        assert lse.dtype == torch.float32
        (context.float().sum() + lse[lse.isfinite()].sum()).backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    cast = {**keywords, **{n: keywords[n].detach().bfloat16() for n in ("query", "keys", "values")}}
    wide = {n: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in cast.items()}
    expected = suite.naive_attention(**wide)
    torch.testing.assert_close(lse.double()[:, None], expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(context.double(), expected[0], rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sf.catalogue_attention(normal(2, 3), normal(4, 3)).dtype == torch.float64


CHECKED = [("narrow", "everything"), ("narrow_heads", "row_scale")]


@pytest.mark.parametrize(("table", "logits"), CHECKED)
def test_gradcheck(table: str, logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, rows=1, scores=2)
    keywords, leaves = with_leaves(arguments(2, 3, table, logits))
    if "bias" in leaves:  # a bias or lse of −∞ has no difference quotient
        leaves["bias"] = normal(3).requires_grad_()
        keywords["exclude"] = torch.tensor([[0, 1], [-1, -1]])

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return attend(**{**keywords, **dict(zip(leaves, tensors, strict=True))})

    inputs = tuple(leaves.values())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("wanted", ["query", "keys", "values", "scale", "bias"])
def test_only_the_gradient_asked_for_is_computed(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords = arguments(3, 5, "values", "everything")
    expected = gradients(suite.naive_attention, keywords)[wanted]
    computed = record_gradients(monkeypatch, ops.CATALOGUE_ATTENTION_BACKWARD)
    leaf = keywords[wanted].clone().requires_grad_()
    results = attend(**{**keywords, wanted: leaf})
    generator = torch.Generator().manual_seed(3)
    seeds = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    (gradient,) = torch.autograd.grad(results, leaf, seeds)
    torch.testing.assert_close(gradient, expected)
    assert computed == [[name == wanted for name in ("query", "keys", "values", "scale", "bias")]]


def test_vmap_over_queries_and_over_catalogues() -> None:
    queries, keys, exclude = normal(3, 4, 5), normal(7, 5), torch.randint(-1, 7, (3, 4, 2))
    together = torch.vmap(lambda q, e: sf.catalogue_attention(q, keys, exclude=e))(queries, exclude)
    torch.testing.assert_close(together, sf.catalogue_attention(queries, keys, exclude=exclude))
    catalogues, bias = normal(3, 7, 5), normal(7)
    one_by_one = torch.stack([sf.catalogue_attention(queries[0], k, bias=bias) for k in catalogues])
    torch.testing.assert_close(
        torch.vmap(lambda k: sf.catalogue_attention(queries[0], k, bias=bias))(catalogues), one_by_one
    )
    shared = torch.randint(-1, 7, (3, 2))  # a list for every row, another in each member
    expected = torch.stack([sf.catalogue_attention(queries[0], keys, exclude=e) for e in shared])
    torch.testing.assert_close(
        torch.vmap(lambda e: sf.catalogue_attention(queries[0], keys, exclude=e))(shared), expected
    )


def test_per_sample_gradients() -> None:
    query, keys, bias = normal(4, 5), normal(7, 5), normal(7)

    def loss(keys: Tensor, bias: Tensor, query: Tensor) -> Tensor:
        context, lse = sf.catalogue_attention(query, keys, bias=bias, return_lse=True)
        return context.sin().sum() + lse.square().sum()

    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(keys, bias, query)
    for row in range(4):
        alone = [keys.clone().requires_grad_(), bias.clone().requires_grad_()]
        torch.testing.assert_close(
            tuple(g[row] for g in per_sample), torch.autograd.grad(loss(*alone, query[row]), alone)
        )


def test_transforms_nest() -> None:
    query, keys = normal(3, 4), normal(5, 4)

    def loss(query: Tensor) -> Tensor:
        return sf.catalogue_attention(query, keys).sin().sum()

    def stock(query: Tensor) -> Tensor:
        return (torch.softmax(query @ keys.t(), -1) @ keys).sin().sum()

    for transform in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f)), torch.func.jacfwd):
        torch.testing.assert_close(transform(loss)(query), transform(stock)(query))


@pytest.mark.parametrize(("table", "logits"), CHECKED)
def test_opcheck(table: str, logits: str) -> None:
    keywords, _ = with_leaves(arguments(4, 7, table, logits))
    raw = logit_spec(keywords)
    tensors = (keywords["query"], keywords["keys"], keywords["values"], keywords["num_heads"], *raw.args())
    torch.library.opcheck(torch.ops.seqrec_fast.catalogue_attention.default, (*tensors, 0))
    with torch.no_grad():
        results = torch.ops.seqrec_fast.catalogue_attention(*tensors, 0)
    incoming = [torch.randn_like(r) for r in results]
    mask = [True, True, keywords["values"] is not None, raw.row_scale is not None, raw.bias is not None]
    for wanted, checks in ((mask, EVERY_CHECK[:3]), ([False, True, False, False, False], EVERY_CHECK[:1])):
        arguments_ = (*incoming, *results, *tensors, wanted, 0)
        torch.library.opcheck(torch.ops.seqrec_fast.catalogue_attention_backward.default, arguments_, test_utils=checks)


@pytest.mark.parametrize(("table", "logits"), [("shared", "plain"), ("heads_values", "everything")])
def test_compiled_with_dynamic_sizes(table: str, logits: str) -> None:
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, items in ((3, 7), (6, 11)):
        keywords = arguments(rows, items, table, logits)
        torch.testing.assert_close(compiled(**keywords), attend(**keywords))
        torch.testing.assert_close(gradients(compiled, keywords), gradients(attend, keywords))


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys = torch.nn.Parameter(normal(13, 4))
        self.bias = torch.nn.Parameter(normal(13))

    def forward(self, query: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
        return sf.catalogue_attention(query, self.keys, bias=self.bias, exclude=exclude, return_lse=True)


def test_export_with_dynamic_rows() -> None:
    module, rows = Module(), torch.export.Dim("rows")
    program = torch.export.export(
        module, (normal(3, 4), torch.zeros(3, 2, dtype=torch.int64)), dynamic_shapes=({0: rows}, {0: rows})
    )
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "seqrec_fast.catalogue_attention.default" in targets
    other = normal(11, 4), torch.randint(-1, 13, (11, 2))
    torch.testing.assert_close(program.module()(*other), module(*other))


@pytest.mark.parametrize("logits", ["plain", "everything", "everything_csr"])
def test_memory_does_not_grow_with_rows_times_items(logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, items, width = 90, 2000, 8
    cut_small(monkeypatch, rows=32, scores=1 << 14)
    keywords = {"query": normal(rows, width), "keys": normal(items, width), **LOGITS[logits](rows, items)}
    if "exclude" in keywords and keywords["exclude"].layout == torch.sparse_csr:
        keywords["exclude"] = torch.sparse_csr_tensor(
            torch.arange(rows + 1) * 3, torch.randint(0, items, (3 * rows,)), torch.ones(3 * rows), (rows, items),
            check_invariants=False,
        )  # fmt: skip
    spec = logit_spec(keywords)
    raw = (keywords["query"], keywords["keys"], None, 1, *spec.args())
    mask = [True, True, False, spec.row_scale is not None, spec.bias is not None]
    bound = _scan.SCORES + 1
    assert rows * items > 5 * bound
    with LargestTemporary() as forward:
        context, lse = reference.forward(*raw, 0)
    with LargestTemporary() as backward:
        reference.backward(torch.randn_like(context), torch.randn_like(lse), context, lse, *raw, mask, 0)
    with LargestTemporary() as second:
        incoming = {"grad_context": context, "grad_lse": lse, "context": context, "lse": lse}
        formula = derivatives.make(*raw[:4], spec, **incoming)
        formula.pullback(
            {name: formula.by_row[name] for name in ("query", "row_scale") if name in formula.by_row}, formula.by_item
        )
    assert 0 < forward.elements <= bound
    assert 0 < backward.elements <= bound
    assert 0 < second.elements <= bound


def test_views_are_read_as_what_they_show() -> None:
    query, keys = normal(5, 8)[:, ::2], normal(4, 9).t()
    torch.testing.assert_close(
        sf.catalogue_attention(query, keys), sf.catalogue_attention(query.contiguous(), keys.contiguous())
    )
    expanded = normal(1, 4).expand(5, 4)
    assert_equals_naive({"query": expanded, "keys": keys})


OK: dict[str, Any] = {"query": torch.zeros(2, 4), "keys": torch.zeros(3, 4)}
IDS = torch.zeros(2, 1, dtype=torch.int64)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
    ({"keys": None}, TypeError, "keys must be a tensor, got NoneType"),
    ({"keys": 3}, TypeError, "keys must be a tensor, got int"),
    ({"values": "x"}, TypeError, "values must be a tensor, got str"),
    ({"query": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "query must be float16, bfloat16, float32 or float64, got torch.int64"),
    ({"keys": torch.zeros(3, 4).double()}, TypeError, r"keys must have the dtype of query \(torch.float32\), got torch.float64"),
    ({"values": torch.zeros(3, 4).half()}, TypeError, r"values must have the dtype of query \(torch.float32\), got torch.float16"),
    ({"keys": torch.zeros(3, 4, device="meta")}, ValueError, r"keys must be on the device of query \(cpu\), got meta"),
    ({"query": torch.zeros(())}, ValueError, r"query must have shape \[..., d\], got a scalar"),
    ({"keys": torch.zeros(3)}, ValueError, r"keys must have shape \[I, d\], got \(3,\)"),
    ({"keys": torch.zeros(3, 5)}, ValueError, r"keys must have the query's width d = 4, got \(3, 5\)"),
    ({"values": torch.zeros(2, 4)}, ValueError, r"values must have shape \[I, d_v\] with I = 3, got \(2, 4\)"),
    ({"values": torch.zeros(3)}, ValueError, r"values must have shape \[I, d_v\] with I = 3, got \(3,\)"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ({"num_heads": 3}, ValueError, "the width of query, 4, must be a multiple of num_heads = 3"),
    ({"num_heads": 2, "values": torch.zeros(3, 5)}, ValueError, "the width of values, 5, must be a multiple of num_heads = 2"),
    ({"num_heads": 1.0}, TypeError, "num_heads must be an int, got float"),
    ({"num_heads": True}, TypeError, "num_heads must be an int, got bool"),
    ({"scale": "a"}, TypeError, "scale must be a float or a tensor, got str"),
    ({"scale": True}, TypeError, "scale must be a float or a tensor, got bool"),
    ({"scale": torch.ones(3)}, ValueError, r"a tensor scale must have the shape of the query's leading dimensions \(2,\), got \(3,\)"),
    ({"scale": torch.ones(2).double()}, TypeError, r"scale must have the query's dtype \(torch.float32\), got torch.float64"),
    ({"scale": torch.ones(2, device="meta")}, ValueError, r"scale must be on the query's device \(cpu\), got meta"),
    ({"bias": [0.0]}, TypeError, "bias must be a tensor, got list"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[I\] = \(3,\), got \(4,\)"),
    ({"bias": torch.zeros(3).half()}, TypeError, r"bias must have the query's dtype \(torch.float32\), got torch.float16"),
    ({"exclude": [0]}, TypeError, "exclude must be a tensor of item ids, got list"),
    ({"exclude": IDS.float()}, TypeError, "exclude must be int64 or int32, got torch.float32"),
    ({"exclude": IDS.to("meta")}, ValueError, r"exclude must be on the query's device \(cpu\), got meta"),
    ({"exclude": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"exclude must have shape \[n\], or \[..., n\] with the query's leading dimensions \(2,\), got \(3, 1\)"),
    ({"exclude": torch.zeros(2, 2).to_sparse_csr()}, ValueError, r"exclude as sparse_csr must have shape \[B, I\] = \(2, 3\), got \(2, 2\)"),
    ({"exclude": IDS + 3}, IndexError, "exclude must hold item ids in 0…2, or -1 for padding, got 3"),
    ({"exclude": IDS - 2}, IndexError, "exclude must hold item ids in 0…2, or -1 for padding, got -2"),
    ({"exclude": torch.tensor([5])}, IndexError, "exclude must hold item ids in 0…2, or -1 for padding, got 5"),
    ({"keys": torch.zeros(0, 4), "exclude": IDS}, IndexError, "exclude must hold item ids in an empty catalogue, which has none, or -1 for padding, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^catalogue_attention: {message}$"):
        sf.catalogue_attention(**(OK | change))


def test_a_backend_that_cannot_run_says_why() -> None:
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in OK.items()}
    why = "no native library|computes in fp32, so not for float64|source tree|compiled library"
    with sf.use_backend("native"), pytest.raises(sf.BackendUnavailable, match=why):
        sf.catalogue_attention(**wide)
    with sf.use_backend("triton"), pytest.raises(sf.BackendUnavailable, match="there is no triton implementation"):
        sf.catalogue_attention(**OK)
