"""``sf.catalogue_cross_entropy`` over sampled negatives: meaning, gradients, transforms, tracing and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue_cases import (
    EVERY_CHECK,
    LOGITS,
    NAN,
    cross_entropy,
    cross_entropy_arguments,
    doubly_differentiated,
    gradients,
    ids_below,
    logit_spec,
    normal,
    with_leaves,
)
from conformance import catalogue as suite
from memory import LargestTemporary
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast.backends.reference import _sampled
from seqrec_fast.backends.reference import catalogue_sampled_cross_entropy as reference

pytestmark = pytest.mark.usefixtures("one_thread")

# (targets, negatives, smoothing)
LISTS = [
    ("single", "shared", "none"),
    ("single", "own_corrected", "prior"),
    ("several", "shared_corrected", "uniform"),
    ("weighted", "own", "none"),
    ("csr", "own", "uniform"),
    ("csr_weighted", "shared_corrected", "none"),
]


def arguments(
    rows: int,
    items: int,
    targets: str = "single",
    negatives: str = "shared",
    smoothing: str = "none",
    logits: str = "plain",
) -> dict[str, Any]:
    keywords = cross_entropy_arguments(rows, items, targets, smoothing, logits, width=3)
    lead = () if negatives.startswith("shared") else (rows,)
    keywords["negatives"] = ids_below(items, *lead, 6)
    keywords["negatives_log_q"] = normal(*lead, 6) if negatives.endswith("corrected") else None
    return keywords


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(("targets", "negatives", "smoothing"), LISTS)
def test_values_and_gradients(
    logits: str, targets: str, negatives: str, smoothing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows, items in ((0, 3), (1, 1), (7, 13)):
        keywords = arguments(rows, items, targets, negatives, smoothing, logits)
        expected = suite.naive_cross_entropy(**keywords)
        of_expected = gradients(suite.naive_cross_entropy, keywords)
        torch.testing.assert_close(cross_entropy(**keywords), expected)
        torch.testing.assert_close(gradients(cross_entropy, keywords), of_expected)
    monkeypatch.setattr(_sampled, "SCORES", 20)  # two rows a block
    torch.testing.assert_close(cross_entropy(**keywords), expected)
    torch.testing.assert_close(gradients(cross_entropy, keywords), of_expected)


def test_every_other_item_as_negative_is_the_full_softmax() -> None:
    keywords = cross_entropy_arguments(5, 9, "single", "none", "everything")
    sampled = cross_entropy(**keywords, negatives=torch.arange(9))
    torch.testing.assert_close(sampled, cross_entropy(**keywords))


def test_negatives_drawn_twice_count_twice() -> None:
    query, items, target = normal(2, 3), normal(5, 3), torch.tensor([0, 1])
    twice, _ = cross_entropy(query=query, items=items, target=target, negatives=torch.tensor([3, 3]))
    corrected, _ = cross_entropy(
        query=query,
        items=items,
        target=target,
        negatives=torch.tensor([3]),
        negatives_log_q=-torch.ones(1).double().mul(2).log(),
    )
    torch.testing.assert_close(twice, corrected)


def test_leading_dimensions() -> None:
    query, items, target = normal(2, 3, 4), normal(9, 4), torch.randint(0, 9, (2, 3))
    for lead in ((), (2, 3)):
        negatives, log_q = ids_below(9, *lead, 5), normal(*lead, 5)
        options = {"negatives": negatives, "negatives_log_q": log_q}
        found = cross_entropy(query=query, items=items, target=target, **options)
        torch.testing.assert_close(found, suite.naive_cross_entropy(query, items, target, **options))
    one_row = cross_entropy(query=query[0, 0], items=items, target=target[0, 0], negatives=negatives[0, 0])
    torch.testing.assert_close(
        one_row, suite.naive_cross_entropy(query[0, 0], items, target[0, 0], negatives=negatives[0, 0])
    )


def test_without_any_negative_the_loss_is_0() -> None:
    keywords = arguments(5, 9)
    for negatives in (torch.empty(0, dtype=torch.int64), torch.full((5, 2), -1)):
        loss, _ = cross_entropy(**keywords | {"negatives": negatives})
        assert loss.eq(0).all()


def test_nothing_is_skipped() -> None:
    keywords = arguments(5, 9)
    loss, skipped = sf.catalogue_cross_entropy(**keywords, skip_mass=0.5, return_skipped=True)
    torch.testing.assert_close(loss, sf.catalogue_cross_entropy(**keywords))
    assert skipped.tolist() == [0.0] * 5


def test_nan_is_seen_in_what_is_drawn_and_nowhere_else() -> None:
    query, items, target = normal(3, 2), normal(9, 2), torch.tensor([0, 1, 2])
    items[5, 0] = NAN
    negatives = torch.tensor([[3, 4], [3, 5], [5, 3]])
    exclude = torch.tensor([[-1], [-1], [5]])
    loss, lse = cross_entropy(query=query, items=items, target=target, negatives=negatives, exclude=exclude)
    assert loss.isnan().tolist() == lse.isnan().tolist() == [False, True, False]
    keywords = {"query": query, "items": items, "target": target, "negatives": negatives, "exclude": exclude}
    found = gradients(cross_entropy, keywords)
    assert found["query"].isnan().any(1).tolist() == [False, True, False]
    # The same for negatives that all rows share, and for a row of the query.
    keywords["negatives"], keywords["exclude"] = torch.tensor([5, 7]), torch.tensor([[5], [5], [7]])
    loss, _ = cross_entropy(**keywords)
    assert loss.isnan().tolist() == [False, False, True]
    assert gradients(cross_entropy, keywords)["query"].isnan().any(1).tolist() == [False, False, True]
    keywords["items"], keywords["query"] = normal(9, 2), query.index_fill(0, torch.tensor([2]), NAN)
    touched = gradients(cross_entropy, keywords)["items"].isnan().any(1).nonzero()[:, 0]
    assert touched.tolist() == [2, 5]  # its target and the negative that it has


def test_ignored_rows_may_hold_anything() -> None:
    keywords = arguments(5, 7)
    keywords["target"] = torch.tensor([2, -100, 3, -100, 0])
    for function in (cross_entropy, doubly_differentiated):
        expected = gradients(function, keywords)
        spoiled = keywords | {"query": keywords["query"].index_fill(0, torch.tensor([1, 3]), NAN)}
        torch.testing.assert_close(gradients(function, spoiled), expected)


@pytest.mark.parametrize(("targets", "negatives", "smoothing"), LISTS)
def test_sparse_gradient_holds_the_touched_rows(targets: str, negatives: str, smoothing: str) -> None:
    keywords = arguments(5, 40, targets, negatives, smoothing, "bias")
    dense = gradients(cross_entropy, keywords)
    found = gradients(cross_entropy, keywords | {"sparse_grad": True})
    sparse = found["items"]
    assert sparse.is_coalesced()
    target = keywords["target"]
    ids = target.col_indices() if target.layout == torch.sparse_csr else target.flatten()
    touched = torch.cat([ids, keywords["negatives"].flatten()])
    assert sparse.indices()[0].equal(touched[touched >= 0].unique())
    torch.testing.assert_close(found | {"items": sparse.to_dense()}, dense)


CHECKED = [LISTS[1], LISTS[5]]


@pytest.mark.parametrize(("targets", "negatives", "smoothing"), CHECKED)
def test_gradcheck(targets: str, negatives: str, smoothing: str) -> None:
    keywords, leaves = with_leaves(arguments(2, 4, targets, negatives, smoothing, "everything"))
    leaves["bias"] = normal(4).requires_grad_()

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return cross_entropy(**{**keywords, **dict(zip(leaves, tensors, strict=True))})

    inputs = tuple(leaves.values())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_vmap_and_per_sample_gradients() -> None:
    query, items, target = normal(4, 5), normal(9, 5), torch.randint(0, 9, (4,))
    shared, own, exclude = ids_below(9, 3), ids_below(9, 4, 3), ids_below(9, 4, 2)

    def loss(items: Tensor, query: Tensor, target: Tensor, negatives: Tensor, exclude: Tensor) -> Tensor:
        result = sf.catalogue_cross_entropy(query, items, target, negatives=negatives, exclude=exclude)
        assert isinstance(result, Tensor)
        return result

    for negatives, dim in ((shared, None), (own, 0)):
        lists = {"negatives": negatives, "exclude": exclude, "reduction": "none"}
        expected = sf.catalogue_cross_entropy(query, items, target, **lists)
        dims = (None, 0, 0, dim, 0)
        torch.testing.assert_close(torch.vmap(loss, dims)(items, query, target, negatives, exclude), expected)
        per_sample = torch.vmap(torch.func.grad(loss), dims)(items, query, target, negatives, exclude)
        for row in range(4):
            alone = items.clone().requires_grad_()
            mine = negatives if dim is None else negatives[row]
            (wanted,) = torch.autograd.grad(loss(alone, query[row], target[row], mine, exclude[row]), alone)
            torch.testing.assert_close(per_sample[row], wanted)


@pytest.mark.parametrize(("targets", "negatives", "smoothing"), CHECKED)
def test_opcheck(targets: str, negatives: str, smoothing: str) -> None:
    keywords, _ = with_leaves(arguments(4, 7, targets, negatives, smoothing, "everything"))
    target, crow = keywords["target"], None
    if target.layout == torch.sparse_csr:
        target, crow = target.col_indices(), target.crow_indices()
    lists = (target, keywords["target_weights"], crow, keywords["negatives"], keywords["negatives_log_q"])
    options = (*logit_spec(keywords).args(), -100, keywords["label_smoothing"], keywords["smoothing_prior"])
    tensors = (keywords["query"], keywords["items"], *lists, *options)
    operators = torch.ops.seqrec_fast
    checks = EVERY_CHECK if crow is None else EVERY_CHECK[:3]
    torch.library.opcheck(operators.catalogue_sampled_cross_entropy.default, (*tensors, False, 0), test_utils=checks)
    incoming = normal(4), normal(4)
    for mask in ([True] * 4, [False, True, False, False], [False, False, False, True]):
        plain = [t.detach() if isinstance(t, Tensor) else t for t in tensors]
        torch.library.opcheck(
            operators.catalogue_sampled_cross_entropy_backward.default,
            (*incoming, *plain, mask, 0),
            test_utils=EVERY_CHECK[:3],
        )


@pytest.mark.parametrize(("targets", "negatives", "smoothing"), [LISTS[1], LISTS[2]])
def test_compiled_with_dynamic_sizes(targets: str, negatives: str, smoothing: str) -> None:
    compiled = torch.compile(cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, items in ((5, 7), (6, 11)):
        keywords = arguments(rows, items, targets, negatives, smoothing, "everything")
        torch.testing.assert_close(compiled(**keywords), cross_entropy(**keywords))
        torch.testing.assert_close(gradients(compiled, keywords), gradients(cross_entropy, keywords))


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = torch.nn.Parameter(normal(13, 4))

    def forward(self, query: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
        loss = sf.catalogue_cross_entropy(query, self.items, target, negatives=negatives)
        assert isinstance(loss, Tensor)
        return loss


def test_export_with_dynamic_rows() -> None:
    module, rows = Module(), torch.export.Dim("rows")
    ids = torch.zeros(3, dtype=torch.int64)
    program = torch.export.export(module, (normal(3, 4), ids, ids[:, None]), dynamic_shapes=({0: rows},) * 3)
    other = normal(11, 4), torch.randint(0, 13, (11,)), torch.randint(-1, 13, (11, 1))
    torch.testing.assert_close(program.module()(*other), module(*other))


def test_memory_is_that_of_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared negatives: blocks of scores, and nothing as large as rows × negatives × width."""
    monkeypatch.setattr(_sampled, "SCORES", 1 << 10)
    keywords = arguments(100, 3000, "single", "shared") | {"negatives": torch.randint(0, 3000, (200,))}
    raw = (keywords["query"], keywords["items"], keywords["target"], None, None, keywords["negatives"], None)
    options = (*logit_spec(keywords).args(), -100, 0.0, None)
    with LargestTemporary() as watch:
        loss, _ = reference.forward(*raw, *options, False, 0)
        reference.backward(loss, loss, *raw, *options, [True] * 4, 0)
    assert 0 < watch.elements <= max(1 << 10, 300 * 3)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_tangent_goes_through_a_gradient(sparse_grad: bool) -> None:
    query, items = normal(2, 3).requires_grad_(), normal(20, 3).requires_grad_()
    direction = normal(2)
    losses = sf.catalogue_cross_entropy(
        query, items, torch.tensor([3, 4]), negatives=torch.arange(10), reduction="none", sparse_grad=sparse_grad
    )

    def gradient(v: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses, (query, items), v, retain_graph=True)

    values, tangents = torch.func.jvp(gradient, (direction,), (direction,))
    assert tangents[0].abs().max() > 0
    torch.testing.assert_close(tangents, tuple(v.to_dense() for v in values))  # the gradient is linear in v
