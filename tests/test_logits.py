"""LogitSpec: what the keywords scale, bias and exclude become. The messages are tested with the operators."""

from __future__ import annotations

import pytest
import torch

from seqrec_fast._logits import LogitSpec, check_exclusion, check_ids, take_csr_rows, wide_dtype

QUERY, ITEMS = torch.randn(2, 3, 4), torch.randn(5, 4)


def build(**options: object) -> LogitSpec:
    return LogitSpec.build("test", QUERY, ITEMS, **options)  # type: ignore[arg-type]


def test_defaults() -> None:
    assert build().args() == (1.0, None, None, None, None)


def test_scale() -> None:
    assert build(scale=2).args()[:2] == (2.0, None)
    assert isinstance(build(scale=2).scale, float)
    rows = torch.randn(2, 3)
    spec = build(scale=rows)
    assert spec.scale == 1.0
    assert spec.row_scale is not None and spec.row_scale.equal(rows.flatten())


def test_a_single_row_takes_a_scalar_scale() -> None:
    spec = LogitSpec.build("test", torch.randn(4), ITEMS, scale=torch.tensor(3.0))
    assert spec.row_scale is not None and spec.row_scale.tolist() == [3.0]


def test_exclude_in_every_form() -> None:
    padded = torch.randint(-1, 5, (2, 3, 2))
    spec = build(exclude=padded)
    assert spec.exclude is not None and spec.exclude.equal(padded.view(6, 2))
    shared = torch.tensor([1, 2], dtype=torch.int32)
    assert build(exclude=shared).exclude is shared
    matrix = torch.tensor([[1.0, 0, 0, 0, 1]] + [[0.0] * 5] * 4 + [[0, 0, 1.0, 0, 0]]).to_sparse_csr()
    spec = build(exclude=matrix)
    assert spec.exclude is not None and spec.exclude.tolist() == [0, 4, 2]
    assert spec.exclude_crow is not None and spec.exclude_crow.tolist() == [0, 2, 2, 2, 2, 2, 3]


def test_a_list_of_one_row_is_that_of_every_row() -> None:
    ids = torch.tensor([1, 2])
    assert LogitSpec.build("test", torch.randn(4), ITEMS, exclude=ids).exclude is ids


def test_bias_may_be_wide_where_allowed() -> None:
    bias = torch.zeros(5)
    spec = LogitSpec.build(
        "test", QUERY.bfloat16(), ITEMS.bfloat16(), bias=bias, float_dtypes=(torch.bfloat16, torch.float32)
    )
    assert spec.bias is bias


@pytest.mark.parametrize("form", ["padded", "shared", "csr"])
def test_take_rows(form: str) -> None:
    rows = torch.tensor([0, 5])
    matrix = (torch.rand(6, 5) < 0.5).float()
    exclude = {
        "padded": torch.randint(-1, 5, (2, 3, 2)),
        "shared": torch.tensor([1, 2]),
        "csr": matrix.to_sparse_csr(),
    }[form]
    scale = torch.randn(2, 3)
    taken = build(scale=scale, exclude=exclude).take_rows(rows)
    assert taken.row_scale is not None and taken.row_scale.equal(scale.flatten()[rows])
    assert taken.exclude is not None
    if form == "csr":
        assert taken.exclude_crow is not None
        values = torch.ones(len(taken.exclude))
        dense = torch.sparse_csr_tensor(
            taken.exclude_crow, taken.exclude, values, (2, 5), check_invariants=True
        ).to_dense()
        assert dense.equal(matrix[rows])
    else:
        assert taken.exclude.equal(exclude.view(6, 2)[rows] if form == "padded" else exclude)
        assert taken.exclude_crow is None


def test_take_csr_rows_takes_all_data_along() -> None:
    crow = torch.tensor([0, 2, 2, 5])
    ids, weights, taken = take_csr_rows(crow, torch.tensor([1, 2]), torch.arange(5), torch.arange(5) * 10)
    assert ids.tolist() == [2, 3, 4]
    assert weights.tolist() == [20, 30, 40]
    assert taken.tolist() == [0, 0, 3]


def test_ids_are_checked_by_value() -> None:
    check_ids("test", "ids", torch.empty(0, dtype=torch.int64), 0, padding=False)
    check_ids("test", "ids", torch.tensor([-1, 4]), 5, padding=True)
    for ids, wrong in (([-1], -1), ([0, 5], 5), ([-3, 9], -3)):
        with pytest.raises(IndexError, match=f"test: ids must hold item ids in 0…4, got {wrong}"):
            check_ids("test", "ids", torch.tensor(ids), 5, padding=False)


def test_column_ids_of_a_sparse_matrix_are_no_padding() -> None:
    spec = LogitSpec(exclude=torch.tensor([-1]), exclude_crow=torch.tensor([0, 1]))
    with pytest.raises(IndexError, match="test: exclude must hold item ids in 0…4, got -1"):
        check_exclusion("test", spec, 5)
    check_exclusion("test", LogitSpec(exclude=torch.tensor([-1])), 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_wide_dtype(dtype: torch.dtype) -> None:
    assert wide_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)
