"""Bad input of ``sf.catalogue_cross_entropy``: one sentence that names the argument, what it got and what it expects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import seqrec_fast as sf
from seqrec_fast import _native

OK: dict[str, Any] = {"query": torch.zeros(2, 4), "items": torch.zeros(3, 4), "target": torch.tensor([0, 1])}
IDS = torch.zeros(2, 2, dtype=torch.int64)
CSR = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).to_sparse_csr()
FLOAT = torch.zeros(2, 2)
BAD_CSR = torch.sparse_csr_tensor(torch.tensor([0, 2, 1]), torch.tensor([0, 1]), torch.ones(2), (2, 3), check_invariants=False)  # fmt: skip
BAD_ROWS = "is not a valid sparse_csr matrix: its row pointers must rise from 0 to 2"

TYPES: list[tuple[dict[str, Any], str]] = [
    ({"query": None}, "query must be a tensor, got NoneType"),
    ({"query": [0.0]}, "query must be a tensor, got list"),
    ({"items": 1.0}, "items must be a tensor, got float"),
    ({"items": torch.zeros(3, 4).half()}, r"items must have the dtype of query \(torch.float32\), got torch.float16"),
    ({"target": [0, 1]}, "target must be a tensor of item ids, got list"),
    ({"target": torch.tensor([0, 1]).int()}, "target must be int64, got torch.int32"),
    ({"target": torch.zeros(2)}, "target must be int64, got torch.float32"),
    ({"target": IDS, "target_weights": [1.0]}, "target_weights must be a tensor, got list"),
    ({"target": IDS, "target_weights": FLOAT.double()}, r"target_weights must have the query's dtype \(torch.float32\), got torch.float64"),
    ({"scale": "x"}, "scale must be a float or a tensor, got str"),
    ({"ignore_index": 1.0}, "ignore_index must be an int, got float"),
    ({"label_smoothing": "x"}, "label_smoothing must be a float, got str"),
    ({"label_smoothing": True}, "label_smoothing must be a float, got bool"),
    ({"skip_mass": None}, "skip_mass must be a float, got NoneType"),
    ({"smoothing_prior": 1.0}, "smoothing_prior must be a tensor, got float"),
    ({"smoothing_prior": torch.ones(3).half()}, r"smoothing_prior must have the query's dtype \(torch.float32\), got torch.float16"),
    ({"negatives": [0]}, "negatives must be a tensor of item ids, got list"),
    ({"negatives": IDS.int()}, "negatives must be int64, got torch.int32"),
    ({"negatives": IDS, "negatives_log_q": 0.0}, "negatives_log_q must be a tensor, got float"),
    ({"negatives": IDS, "negatives_log_q": FLOAT.double()}, r"negatives_log_q must have the query's dtype \(torch.float32\), got torch.float64"),
]  # fmt: skip
VALUES: list[tuple[dict[str, Any], str]] = [
    ({"query": torch.zeros(())}, r"query must have shape \[..., d\], got a scalar"),
    ({"items": torch.zeros(3, 5)}, r"items must have the query's width d = 4, got \(3, 5\)"),
    ({"items": torch.zeros(3, 4, device="meta")}, r"items must be on the device of query \(cpu\), got meta"),
    ({"target": torch.tensor([0])}, r"target must have shape \[...\] or \[..., P\] with the query's leading dimensions \(2,\), got \(1,\)"),
    ({"target": torch.zeros(3, 2).long()}, r"target must have shape \[...\] or \[..., P\] with the query's leading dimensions \(2,\), got \(3, 2\)"),
    ({"target": torch.tensor([0, 1], device="meta")}, r"target must be on the query's device \(cpu\), got meta"),
    ({"target": torch.eye(2).to_sparse_csr()}, r"target as sparse_csr must have shape \[B, I\] = \(2, 3\), got \(2, 2\)"),
    ({"target": BAD_CSR}, f"target {BAD_ROWS}"),
    ({"target": BAD_CSR, "negatives": IDS}, f"target {BAD_ROWS}"),
    ({"exclude": BAD_CSR}, f"exclude {BAD_ROWS}"),
    ({"exclude": BAD_CSR, "negatives": IDS}, f"exclude {BAD_ROWS}"),
    ({"target_weights": torch.ones(2)}, r"target_weights needs several targets a row, target \[..., P\]; got target \(2,\). Row weights: use reduction=\"none\""),
    ({"target": IDS, "target_weights": torch.ones(2)}, r"target_weights must have the shape of the targets \(2, 2\), got \(2,\)"),
    ({"target": CSR, "target_weights": torch.ones(2)}, r"target_weights must have the shape of the targets \(3,\), got \(2,\)"),
    ({"reduction": "avg"}, "reduction must be one of mean, sum, none, got 'avg'"),
    ({"label_smoothing": 1.5}, "label_smoothing must be between 0 and 1, got 1.5"),
    ({"label_smoothing": float("nan")}, "label_smoothing must be between 0 and 1, got nan"),
    ({"skip_mass": -0.1}, "skip_mass must be between 0 and 1, got -0.1"),
    ({"smoothing_prior": torch.ones(4)}, r"smoothing_prior must have shape \[I\] = \(3,\), got \(4,\)"),
    ({"label_smoothing": 0.1, "smoothing_prior": torch.tensor([1.0, -2.0, 0.0])}, "smoothing_prior must not be negative, got -2.0"),
    ({"label_smoothing": 0.1, "smoothing_prior": torch.tensor([1.0, -2.0, 0.0]), "negatives": IDS}, "smoothing_prior must not be negative, got -2.0"),
    ({"negatives": torch.zeros(3, 2).long()}, r"negatives must have shape \[n\], or \[..., n\] with the query's leading dimensions \(2,\), got \(3, 2\)"),
    ({"negatives": torch.tensor(1)}, r"negatives must have shape \[n\], or \[..., n\] with the query's leading dimensions \(2,\), got \(\)"),
    ({"negatives_log_q": torch.zeros(2)}, "negatives_log_q was given without negatives"),
    ({"negatives": IDS, "negatives_log_q": torch.zeros(2)}, r"negatives_log_q must have the shape of negatives \(2, 2\), got \(2,\)"),
    ({"bias": torch.zeros(2)}, r"bias must have shape \[I\] = \(3,\), got \(2,\)"),
    ({"exclude": torch.zeros(1, 1).long()}, r"exclude must have shape \[n\], or \[..., n\] with the query's leading dimensions \(2,\), got \(1, 1\)"),
    ({"target": IDS, "target_weights": FLOAT.clone().requires_grad_()}, r"target_weights has no gradient; pass target_weights.detach\(\)"),
    ({"smoothing_prior": torch.ones(3).requires_grad_()}, r"smoothing_prior has no gradient; pass smoothing_prior.detach\(\)"),
    ({"negatives": IDS, "negatives_log_q": FLOAT.clone().requires_grad_()}, r"negatives_log_q has no gradient; pass negatives_log_q.detach\(\)"),
]  # fmt: skip
IN_RANGE = "must hold item ids in 0…2"
FIRST_WRONG = 0 if _native.MISSING is None else 1
INDICES: list[tuple[dict[str, Any], str]] = [
    ({"target": torch.tensor([0, 3])}, f"target {IN_RANGE}, got 3"),
    ({"target": torch.tensor([-1, 0])}, f"target {IN_RANGE}, got -1"),
    ({"target": torch.tensor([-100, 0]), "ignore_index": -1}, f"target {IN_RANGE}, got -100"),
    ({"target": torch.tensor([[0, -2], [0, 0]])}, f"target {IN_RANGE}, or -1 for padding, got -2"),
    ({"target": torch.tensor([[0, 3], [0, 0]])}, f"target {IN_RANGE}, or -1 for padding, got 3"),
    ({"exclude": IDS + 3}, f"exclude {IN_RANGE}, or -1 for padding, got 3"),
    ({"negatives": torch.tensor([3])}, f"negatives {IN_RANGE}, or -1 for padding, got 3"),
    ({"negatives": torch.tensor([-2])}, f"negatives {IN_RANGE}, or -1 for padding, got -2"),
    ({"negatives": IDS, "target": torch.tensor([0, 3])}, f"target {IN_RANGE}, got 3"),
    ({"negatives": IDS, "exclude": IDS + 3}, f"exclude {IN_RANGE}, or -1 for padding, got 3"),
    # the compiled kernel names the first target, the reference the largest
    (
        {"items": torch.zeros(0, 4)},
        f"target must hold item ids in an empty catalogue, which has none, got {FIRST_WRONG}",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [(change, error, message) for error, table in ((TypeError, TYPES), (ValueError, VALUES), (IndexError, INDICES)) for change, message in table],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^catalogue_cross_entropy: ({message})$"):
        sf.catalogue_cross_entropy(**(OK | change))


@pytest.mark.parametrize("option", ["sparse_grad", "return_skipped"])
def test_options_without_a_compiled_form(option: str) -> None:
    """A whole graph is refused; without that wish the call runs in eager mode."""
    torch.compiler.reset()  # a frame that was given up once is not tried again
    call = lambda **keywords: sf.catalogue_cross_entropy(**keywords)  # noqa: E731
    with pytest.raises(Exception, match=f"catalogue_cross_entropy: {option}=True has no compiled form"):
        torch.compile(call, backend="eager", fullgraph=True)(**OK, **{option: True})
    expected = sf.catalogue_cross_entropy(**OK, **{option: True})
    torch.testing.assert_close(torch.compile(call, backend="eager")(**OK, **{option: True}), expected)


def test_a_constant_that_requires_a_gradient_is_taken_where_none_is_recorded() -> None:
    with torch.no_grad():
        sf.catalogue_cross_entropy(**OK, smoothing_prior=torch.ones(3, requires_grad=True))


def test_bad_ids_are_found_by_a_compiled_call_too() -> None:
    compiled = torch.compile(lambda **kw: sf.catalogue_cross_entropy(**kw), backend="eager", fullgraph=True)
    with pytest.raises(IndexError, match=r"target must hold item ids in 0…2, got 3"):
        compiled(**OK | {"target": torch.tensor([0, 3])})
