"""``sf.catalogue_cross_entropy`` over the whole catalogue: meaning, gradients, transforms, tracing, memory and messages."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from catalogue_cases import (
    CUTS,
    EVERY_CHECK,
    INFINITY,
    LOGITS,
    NAN,
    cross_entropy,
    cross_entropy_arguments,
    cut_small,
    doubly_differentiated,
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
from seqrec_fast.backends.reference import _scan, _targets
from seqrec_fast.backends.reference import catalogue_cross_entropy as reference
from seqrec_fast.ops import _full_cross_entropy as ops

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(0, 7), (1, 1), (7, 23)]
TARGETS = ("single", "several", "weighted", "csr", "csr_weighted")
SMOOTHINGS = ("none", "uniform", "prior")


def arguments(
    rows: int, items: int, targets: str = "single", smoothing: str = "none", logits: str = "plain"
) -> dict[str, Any]:
    return cross_entropy_arguments(rows, items, targets, smoothing, logits)


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(
    ("targets", "smoothing"),
    [
        ("single", "none"),
        ("single", "prior"),
        ("several", "uniform"),
        ("weighted", "none"),
        ("csr", "none"),
        ("csr_weighted", "prior"),
    ],
)
def test_values_and_gradients(logits: str, targets: str, smoothing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in SHAPES:
        keywords = arguments(*shape, targets, smoothing, logits)
        expected = suite.naive_cross_entropy(**keywords)
        of_expected = gradients(suite.naive_cross_entropy, keywords)
        torch.testing.assert_close(cross_entropy(**keywords), expected)
        torch.testing.assert_close(gradients(cross_entropy, keywords), of_expected)
    for cut in CUTS:
        cut_small(monkeypatch, **cut)
        torch.testing.assert_close(cross_entropy(**keywords), expected)
        torch.testing.assert_close(gradients(cross_entropy, keywords), of_expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_agrees_with_torch(reduction: str, label_smoothing: float) -> None:
    query, items, bias, target = normal(6, 4), normal(11, 4), normal(11), torch.tensor([3, -7, 0, 10, -7, 3])
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": -7}
    stock = torch.nn.functional.cross_entropy(query @ items.t() + bias, target, **options)
    torch.testing.assert_close(sf.catalogue_cross_entropy(query, items, target, bias=bias, **options), stock)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("targets", TARGETS)
def test_reductions(reduction: str, targets: str) -> None:
    keywords = arguments(7, 9, targets)
    loss, _ = suite.naive_cross_entropy(**keywords)
    valid = [bool(suite.row_targets(keywords["target"], None, row, -100)[0]) for row in range(7)]
    expected = suite.reduce(loss, torch.tensor(valid), reduction)
    assert not all(valid)
    torch.testing.assert_close(sf.catalogue_cross_entropy(**keywords, reduction=reduction), expected)


def test_mean_over_no_valid_row_is_0_with_gradients_0() -> None:
    for rows in (0, 3):
        keywords, leaves = with_leaves(arguments(rows, 5, logits="bias"))
        keywords["target"] = torch.full((rows,), -100)
        loss = sf.catalogue_cross_entropy(**keywords)
        loss.backward()
        assert loss == 0
        assert all(leaf.grad is not None and leaf.grad.eq(0).all() for leaf in leaves.values())


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    query, items = normal(*lead, 4), normal(9, 4)
    options = {"scale": normal(*lead), "exclude": torch.randint(-1, 9, (*lead, 2))}
    for target in (torch.randint(0, 9, lead), torch.randint(0, 9, (*lead, 3))):
        found = cross_entropy(query=query, items=items, target=target, **options)
        torch.testing.assert_close(found, suite.naive_cross_entropy(query, items, target, **options))
        assert found[0].shape == found[1].shape == lead


def test_empty_catalogue_and_empty_lists() -> None:
    query = normal(3, 2)
    nothing = torch.full((3,), -100)
    assert sf.catalogue_cross_entropy(query, normal(0, 2), nothing) == 0
    several = torch.empty(3, 0, dtype=torch.int64)
    loss, lse = cross_entropy(query=query, items=normal(4, 2), target=several)
    assert loss.eq(0).all()
    assert lse.eq(0).all()


def test_everything_excluded_costs_nothing_and_moves_nothing() -> None:
    keywords, leaves = with_leaves(arguments(4, 7, logits="exclude_all"))
    loss, lse = cross_entropy(**keywords)
    assert loss.eq(0).all()
    torch.testing.assert_close(lse, suite.naive_cross_entropy(**keywords)[1])
    loss.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().max() < 1e-12 for leaf in leaves.values())


def test_a_target_without_probability_costs_infinity() -> None:
    bias = torch.tensor([0.0, -INFINITY, 0.0]).double()
    query, items = normal(2, 3), normal(3, 3)
    loss, _ = cross_entropy(query=query, items=items, bias=bias, target=torch.tensor([1, 2]))
    assert loss[0] == INFINITY
    assert loss[1].isfinite()


def test_ignored_rows_may_hold_anything() -> None:
    keywords = arguments(5, 7, logits="bias")
    keywords["target"] = torch.tensor([2, -100, 3, -100, 0])
    for function in (cross_entropy, doubly_differentiated):
        expected = gradients(function, keywords)
        spoiled = keywords | {"query": keywords["query"].index_fill(0, torch.tensor([1, 3]), NAN)}
        found = gradients(function, spoiled)
        torch.testing.assert_close(found, expected)
        assert found["query"][[1, 3]].eq(0).all()


def test_nan_spoils_what_it_touches_and_no_more() -> None:
    query, items, target = normal(4, 3), normal(9, 3), torch.tensor([0, 1, 2, 5])
    items[5, 1], query[1, 0] = NAN, NAN
    exclude = torch.tensor([[5]] * 4)  # the last row's own target
    loss, lse = cross_entropy(query=query, items=items, target=target, exclude=exclude)
    assert loss.isnan().tolist() == lse.isnan().tolist() == [False, True, False, True]
    assert sf.catalogue_cross_entropy(query, items, target).isnan()


def test_a_confident_row_costs_exactly_nothing() -> None:
    query, items = torch.tensor([[1e4]]), torch.tensor([[1.0], [0.5], [-1.0]])
    assert sf.catalogue_cross_entropy(query, items, torch.tensor([0])) == 0
    assert sf.catalogue_cross_entropy(query, items, torch.tensor([2])) == 2e4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("negatives", [None, torch.tensor([0, 3, 6])])
def test_dtypes_of_results_and_gradients(dtype: torch.dtype, negatives: Tensor | None) -> None:
    keywords = arguments(3, 7, "weighted", "prior", "everything") | {"negatives": negatives}
    keywords = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in keywords.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {r.dtype for r in cross_entropy(**keywords)} == {wide}
    found = gradients(cross_entropy, keywords)
    assert {name: gradient.dtype for name, gradient in found.items()} == dict.fromkeys(found, dtype)


@pytest.mark.parametrize("negatives", [None, torch.tensor([0, 3, 6])])
def test_autocast_casts_the_matrices_and_keeps_the_loss_wide(negatives: Tensor | None) -> None:
    keywords = arguments(5, 9, logits="everything") | {"negatives": negatives}
    keywords = {n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in keywords.items()}
    keywords["bias"] = keywords["bias"].clamp_min(-3)
    keywords, leaves = with_leaves(keywords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, lse = cross_entropy(**keywords)
        assert loss.dtype == lse.dtype == torch.float32
        loss.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    cast = {**keywords, **{n: keywords[n].detach().bfloat16() for n in ("query", "items")}}
    wide = {n: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in cast.items()}
    torch.testing.assert_close(loss.double(), suite.naive_cross_entropy(**wide)[0], rtol=1e-5, atol=1e-5)


CHECKED = [("single", "uniform", "everything"), ("weighted", "prior", "row_scale"), ("csr", "none", "exclude")]


@pytest.mark.parametrize(("targets", "smoothing", "logits"), CHECKED)
def test_gradcheck(targets: str, smoothing: str, logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, rows=2, scores=4)
    keywords, leaves = with_leaves(cross_entropy_arguments(3, 4, targets, smoothing, logits, width=2))
    if "bias" in leaves:
        leaves["bias"] = normal(4).requires_grad_()

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return cross_entropy(**{**keywords, **dict(zip(leaves, tensors, strict=True))})

    inputs = tuple(leaves.values())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("wanted", ["query", "items", "scale", "bias"])
def test_only_the_gradient_asked_for_is_computed(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords = arguments(5, 7, "several", "uniform", "everything")
    expected = gradients(suite.naive_cross_entropy, keywords)[wanted]
    computed = record_gradients(monkeypatch, ops.CATALOGUE_CROSS_ENTROPY_BACKWARD)
    leaf = keywords[wanted].clone().requires_grad_()
    results = cross_entropy(**{**keywords, wanted: leaf})
    generator = torch.Generator().manual_seed(3)
    seeds = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    (gradient,) = torch.autograd.grad(results, leaf, seeds)
    torch.testing.assert_close(gradient, expected)
    assert [call[:-1] for call in computed] == [[name == wanted for name in ("query", "items", "scale", "bias")]]


def test_the_context_is_kept_only_for_a_gradient_of_the_query() -> None:
    query, items, target = normal(3, 4), normal(7, 4), torch.tensor([1, 2, 3])
    raw = (target, None, None, 1.0, None, None, None, None, -100, 0.0, None, 0.0, None, False)
    for save in (False, True):
        results = torch.ops.seqrec_fast.catalogue_cross_entropy(query, items, *raw, save, 0)
        assert [tuple(r.shape) for r in results] == [(3,), (3,), (3, 4) if save else (0,), (0,)]


def test_vmap_and_per_sample_gradients() -> None:
    query, items, bias, target = normal(3, 4, 5), normal(7, 5), normal(7), torch.randint(0, 7, (3, 4))
    expected = sf.catalogue_cross_entropy(query, items, target, bias=bias, reduction="none")
    together = torch.vmap(lambda q, t: sf.catalogue_cross_entropy(q, items, t, bias=bias, reduction="none"))
    torch.testing.assert_close(together(query, target), expected)
    catalogues = normal(3, 7, 5)
    one_by_one = torch.stack([sf.catalogue_cross_entropy(query[0], v, target[0]) for v in catalogues])
    torch.testing.assert_close(
        torch.vmap(lambda v: sf.catalogue_cross_entropy(query[0], v, target[0]))(catalogues), one_by_one
    )

    def loss(items: Tensor, bias: Tensor, query: Tensor, target: Tensor) -> Tensor:
        return sf.catalogue_cross_entropy(query, items, target, bias=bias, label_smoothing=0.1).square()

    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    found = per_sample(items, bias, query[0], target[0])
    for row in range(4):
        alone = [items.clone().requires_grad_(), bias.clone().requires_grad_()]
        wanted = torch.autograd.grad(loss(*alone, query[0, row], target[0, row]), alone)
        torch.testing.assert_close(tuple(g[row] for g in found), wanted)


def test_transforms_nest() -> None:
    query, items, target = normal(3, 4), normal(5, 4), torch.tensor([0, 4, 4])
    ours = lambda q: sf.catalogue_cross_entropy(q, items, target)  # noqa: E731
    stock = lambda q: torch.nn.functional.cross_entropy(q @ items.t(), target)  # noqa: E731
    for transform in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f)), torch.func.jacfwd):
        torch.testing.assert_close(transform(ours)(query), transform(stock)(query))


@pytest.mark.parametrize(("targets", "smoothing", "logits"), CHECKED)
def test_opcheck(targets: str, smoothing: str, logits: str) -> None:
    keywords, _ = with_leaves(arguments(4, 7, targets, smoothing, logits))
    target, crow = keywords["target"], None
    if target.layout == torch.sparse_csr:
        target, crow = target.col_indices(), target.crow_indices()
    options = (-100, keywords["label_smoothing"], keywords["smoothing_prior"])
    lists = (target, keywords["target_weights"], crow, *logit_spec(keywords).args(), *options)
    tensors = (keywords["query"], keywords["items"], *lists)
    # The gradient that opcheck makes of all results is not defined for those kept for the backward.
    torch.library.opcheck(
        torch.ops.seqrec_fast.catalogue_cross_entropy.default,
        (*tensors, 0.0, None, False, True, 0),
        test_utils=EVERY_CHECK,
    )
    with torch.no_grad():
        _, *saved = torch.ops.seqrec_fast.catalogue_cross_entropy(*tensors, 0.0, None, False, True, 0)
    incoming = [torch.randn_like(saved[0]), torch.randn_like(saved[0])]
    spec = logit_spec(keywords)
    mask = [True, True, spec.row_scale is not None, spec.bias is not None]
    for wanted, checks in ((mask, EVERY_CHECK[:3]), ([False, True, False, False], EVERY_CHECK[:1])):
        arguments_ = (*incoming, *saved, *tensors, 0.0, wanted, 0)
        torch.library.opcheck(
            torch.ops.seqrec_fast.catalogue_cross_entropy_backward.default, arguments_, test_utils=checks
        )


@pytest.mark.parametrize(
    ("targets", "smoothing", "logits"), [("single", "none", "plain"), ("weighted", "prior", "everything")]
)
def test_compiled_with_dynamic_sizes(targets: str, smoothing: str, logits: str) -> None:
    compiled = torch.compile(cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, items in ((5, 7), (6, 11)):
        keywords = arguments(rows, items, targets, smoothing, logits)
        torch.testing.assert_close(compiled(**keywords), cross_entropy(**keywords))
        torch.testing.assert_close(gradients(compiled, keywords), gradients(cross_entropy, keywords))


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = torch.nn.Parameter(normal(13, 4))

    def forward(self, query: Tensor, target: Tensor, exclude: Tensor) -> Tensor:
        loss = sf.catalogue_cross_entropy(query, self.items, target, exclude=exclude, label_smoothing=0.1)
        assert isinstance(loss, Tensor)
        return loss


def test_export_with_dynamic_rows() -> None:
    module, rows = Module(), torch.export.Dim("rows")
    ids = torch.zeros(3, dtype=torch.int64)
    program = torch.export.export(module, (normal(3, 4), ids, ids[:, None]), dynamic_shapes=({0: rows},) * 3)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "seqrec_fast.catalogue_cross_entropy.default" in targets
    other = normal(11, 4), torch.randint(0, 13, (11,)), torch.randint(-1, 13, (11, 1))
    torch.testing.assert_close(program.module()(*other), module(*other))


@pytest.mark.parametrize("logits", ["plain", "everything", "exclude_shared"])
def test_memory_does_not_grow_with_rows_times_items(logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, items = 90, 2000
    cut_small(monkeypatch, rows=32, scores=1 << 14)
    keywords = arguments(rows, items, "single", "uniform", logits)
    lists = (keywords["target"], None, None, *logit_spec(keywords).args(), -100, 0.1, None)
    raw = (keywords["query"], keywords["items"], *lists)
    bound = _scan.SCORES + 1
    assert rows * items > 5 * bound
    with LargestTemporary() as forward:
        loss, *saved = reference.forward(*raw, 0.0, None, False, True, 0)
    with LargestTemporary() as backward:
        reference.backward(
            loss, loss, *saved, *raw, 0.0, [True, True, logits == "everything", logits == "everything"], 0
        )
    with LargestTemporary() as second:
        by_row = {"grad_loss": loss, "grad_lse": loss, "lse": saved[0]}
        formula = ops._formula(*raw[:5], logit_spec(keywords), (-100, 0.1, None), **by_row)
        formula.pullback({n: formula.by_row[n] for n in ("query", "row_scale") if n in formula.by_row}, formula.by_item)
    for watch in (forward, backward, second):
        assert 0 < watch.elements <= bound


# Sparse gradients and skipped tiles.


def test_sparse_gradient_equals_the_dense_one() -> None:
    keywords = arguments(5, 7, logits="everything")
    dense = gradients(cross_entropy, keywords)
    found = gradients(cross_entropy, keywords | {"sparse_grad": True})
    assert found["items"].layout == torch.sparse_coo
    assert found["items"].is_coalesced()
    torch.testing.assert_close(found | {"items": found["items"].to_dense()}, dense)


def test_double_backward_of_a_sparse_gradient_is_dense() -> None:
    keywords, leaves = with_leaves(arguments(5, 7))
    loss = sf.catalogue_cross_entropy(**keywords, sparse_grad=True)
    (gradient,) = torch.autograd.grad(loss, leaves["items"], create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaves["items"])
    assert second.layout == torch.strided


def peaked(rows: int = 4, items: int = 40) -> dict[str, Any]:
    """The first ten items have nearly all of the probability."""
    bias = torch.zeros(items, dtype=torch.float64)
    bias[10:] = -6.0
    return {"query": normal(rows, 3) * 0.1, "items": normal(items, 3), "bias": bias, "target": torch.arange(rows) * 11}


@pytest.mark.parametrize("skip_mass", [0.0, 0.05, 0.99, 0.9999])
def test_skipped_tiles(skip_mass: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, rows=4, scores=40)  # four tiles of ten items
    keywords, leaves = with_leaves(peaked())
    loss, skipped = sf.catalogue_cross_entropy(
        **keywords, reduction="sum", skip_mass=skip_mass, return_skipped=True
    )  # fmt: skip
    assert skipped.shape == (4,)
    assert skipped.eq(0).all()
    loss.backward()
    expected = gradients(lambda **kw: (suite.naive_cross_entropy(**kw)[0].sum(),), keywords)
    seed = torch.randn((), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(leaves["query"].grad, expected["query"] / seed)  # exact whatever is skipped
    p = torch.softmax(keywords["query"] @ keywords["items"].t() + keywords["bias"], 1).detach()  # [B, I]
    partial, mass = p.clone(), torch.zeros(4, dtype=torch.float64)
    for tile in partial.split(10, 1):
        if bool((mass + tile.sum(1) <= skip_mass).all()):
            mass += tile.sum(1)
            tile.zero_()
    assert partial.eq(0).any() == (skip_mass > 0)
    torch.testing.assert_close(skipped, mass)
    partial[torch.arange(4), keywords["target"]] -= 1
    torch.testing.assert_close(leaves["items"].grad, partial.t() @ keywords["query"].detach())
    torch.testing.assert_close(leaves["bias"].grad, partial.sum(0))


def test_results_come_in_order() -> None:
    keywords = arguments(2, 5)
    results = sf.catalogue_cross_entropy(**keywords, return_lse=True, return_skipped=True, reduction="none")
    assert len(results) == 3
    torch.testing.assert_close(results[1], suite.naive_cross_entropy(**keywords)[1])
    assert results[2].eq(0).all()


# Label smoothing beside exclusion.


def _excluding(kind: str) -> Tensor:
    if kind == "csr":
        listed = torch.zeros(3, 100)
        listed[:, 50] = 1
        return listed.to_sparse_csr()
    return torch.tensor([50]) if kind == "shared" else torch.tensor([[50, 7, 50], [50, -1, 4], [50, 5, 50]])


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("smoothing", ["uniform", "prior", "huge_prior"])
@pytest.mark.parametrize("kind", ["padded", "csr", "shared"])
@pytest.mark.parametrize("value", [1e17, INFINITY, NAN])
def test_an_excluded_item_is_no_part_of_the_mean(value: float, kind: str, smoothing: str, differentiated: bool) -> None:
    prior = None if smoothing == "uniform" else torch.rand(100) + 0.1
    keywords = {
        "query": normal(3, 8, dtype=torch.float32),
        "items": normal(100, 8, dtype=torch.float32),
        "target": torch.tensor([3, 4, 50]),  # the last row's own target is never excluded from it
        "exclude": _excluding(kind),
        "label_smoothing": 0.1,
        "smoothing_prior": prior,
    }
    target = torch.tensor([3, 4, 5])
    function = doubly_differentiated if differentiated and value == 1e17 else cross_entropy
    found = {}
    for name, held in (("without", 0.0), ("with", value)):
        items = keywords["items"].index_fill(0, torch.tensor([50]), held)
        given = {**keywords, "items": items, "target": target}
        if smoothing == "huge_prior":
            assert prior is not None
            given["smoothing_prior"] = prior.index_fill(0, torch.tensor([50]), 1e17 if name == "with" else 1.0)
        found[name] = (cross_entropy(**given), gradients(function, given))
    torch.testing.assert_close(found["with"], found["without"], rtol=0, atol=0)
    # And where it is a row's target, it is a part of that row alone.
    items = keywords["items"].index_fill(0, torch.tensor([50]), 1e17)
    loss, _ = cross_entropy(**{**keywords, "items": items})
    torch.testing.assert_close(loss[:2], found["without"][0][0][:2])


@pytest.mark.parametrize("logits", ["exclude", "exclude_csr", "everything", "everything_csr"])
@pytest.mark.parametrize("smoothing", ["uniform", "prior"])
def test_as_where_a_look_at_the_lists_would_wait(smoothing: str, logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: every item counts as listed, and no pair is dropped."""
    keywords = arguments(7, 23, "single", smoothing, logits)
    expected = cross_entropy(**keywords), gradients(cross_entropy, keywords)
    monkeypatch.setattr(_targets, "_Listed", functools.partial(_targets._Listed, drop=False))
    for cut in (False, True):
        if cut:
            cut_small(monkeypatch)
        torch.testing.assert_close((cross_entropy(**keywords), gradients(cross_entropy, keywords)), expected)


def test_an_excluded_row_is_no_part_of_an_items_gradient() -> None:
    query, items = normal(3, 4, dtype=torch.float32), normal(20, 4, dtype=torch.float32).requires_grad_()
    exclude = torch.tensor([[5], [6], [-1]])
    gradient = {}
    for size in (1.0, 1e17):
        scaled = query * torch.tensor([size, 1.0, 1.0])[:, None]
        losses = sf.catalogue_cross_entropy(
            scaled, items, torch.tensor([1, 2, 3]), exclude=exclude, label_smoothing=0.1, reduction="none"
        )
        gradient[size] = torch.autograd.grad(losses.sum(), items)[0][5]
    torch.testing.assert_close(gradient[1e17], gradient[1.0])


@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
@pytest.mark.parametrize("kind", ["shared", "padded", "csr", "one_item", "dead"])
def test_a_row_of_nothing_but_its_target_costs_exactly_nothing(kind: str, label_smoothing: float) -> None:
    count = 1 if kind == "one_item" else 100
    query = (normal(2, 8, dtype=torch.float32) * 1e5).requires_grad_()
    items = normal(count, 8, dtype=torch.float32).requires_grad_()
    target = torch.zeros(2, dtype=torch.int64) if kind in ("one_item", "dead") else torch.tensor([3, 4])
    exclude, bias = None, None
    if kind == "shared":
        exclude = torch.arange(count)
    elif kind == "padded":
        exclude = torch.arange(count).expand(2, -1)
    elif kind == "csr":
        exclude = torch.ones(2, count).to_sparse_csr()
    elif kind == "dead":
        bias = torch.full((count,), -INFINITY).index_fill(0, torch.tensor([0]), 0.5).requires_grad_()
    loss, lse = cross_entropy(
        query=query, items=items, target=target, exclude=exclude, bias=bias, label_smoothing=label_smoothing
    )
    assert loss.eq(0).all()
    leaves = [leaf for leaf in (query, items, bias) if leaf is not None]
    found = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    assert all(gradient.eq(0).all() for gradient in found)
    (of_lse,) = torch.autograd.grad(lse.sum(), query, retain_graph=True)
    torch.testing.assert_close(of_lse, items.detach()[target])
    (second,) = torch.autograd.grad(found[0].sum(), query)
    assert second.eq(0).all()
