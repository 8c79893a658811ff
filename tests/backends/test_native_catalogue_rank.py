"""The native CPU ``catalogue_rank`` against its definition, in every CPU tier this processor can run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rank_cases import IGNORE, Case, check, options, random_case
from torch import Tensor

from seqrec_fast import _native

if _native.MISSING is not None:
    pytest.skip(f"no native library: {_native.MISSING}", allow_module_level=True)

native = torch.ops.seqrec_fast_native
HIGHEST_TIER = native.highest_cpu_tier.default()
CHOSEN_TIER = _native.TIERS.index(_native.CPU_TIER or "default")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# (B, I, d): tiles are 12 or 6 items by 2 or 1 vectors of 16, 8 or 4 rows; chunks 64 KiB of items; groups 512 KiB of queries.
SHAPES = [
    (1, 1, 1),
    (3, 5, 0),
    (2, 13, 3),
    (16, 12, 16),
    (17, 251, 7),
    (33, 253, 64),
    (64, 601, 5),
    (5, 1009, 66),
    (1, 3001, 64),
    (519, 37, 256),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape: tuple[int, int, int], dtype: torch.dtype, tier: int) -> None:
    case = random_case(*shape, dtype)
    check(case)
    check(options(case))


# Data on which a product in fp32 gives wrong places.


def near_ties(table: Tensor, query: Tensor) -> Tensor:
    """Rows whose scores differ in the last places only: one row, with one element moved by a few ulp."""
    near = table[:1].repeat(len(table), 1)
    steps = torch.randint(-3, 4, (len(table),))
    column = torch.randint(0, table.shape[1], (len(table),))
    rows = torch.arange(len(table))
    near[rows, column] *= 1 + steps * 2.0**-23
    return near


def ascending(table: Tensor, query: Tensor) -> Tensor:
    order = (table @ query[0]).argsort()
    return table[order]


def non_finite(table: Tensor, query: Tensor) -> Tensor:
    odd = table.clone()
    odd[::7, 1] = float("inf")
    odd[1::11, 0] = float("-inf")
    odd[2::13, 2] = float("nan")
    odd[3::17, :2] = torch.tensor([float("inf"), float("-inf")])
    return odd


def outliers(table: Tensor, query: Tensor) -> Tensor:
    odd = table.clone()
    odd[::9] *= 1e4
    odd[4::31] *= 1e19
    odd[5::37] *= 1e-25
    return odd


CATALOGUES = {
    "ordinary": lambda table, query: table,
    "one row repeated": lambda table, query: table[:1].expand(len(table), -1),
    "near ties": near_ties,
    "ascending": ascending,
    "descending": lambda table, query: ascending(table, query).flip(0),
    "huge": lambda table, query: table * 3e25,
    "overflowing": lambda table, query: table * 1e38,
    "tiny": lambda table, query: table * 1e-30,
    "denormal": lambda table, query: table * 1e-41,
    "zero": lambda table, query: table * -0.0,
    "not finite": non_finite,
    "outliers": outliers,
    "small whole numbers": lambda table, query: table.mul(2).round(),
}


@pytest.mark.parametrize("name", CATALOGUES)
def test_nasty_catalogues(name: str, tier: int) -> None:
    case = random_case(41, 509, 21)
    query = case.query.clone()
    query[3] = 0.0  # every pair is a tie
    query[4] = float("nan")
    query[5, 0] = float("inf")
    query[6] *= 1e-38
    query[7] *= 1e30
    query[8:12] = 0.0
    case = replace(case, query=query, items=CATALOGUES[name](case.items, case.query))
    check(case)
    check(options(case))
    rounded = options(case)
    assert rounded.bias is not None
    rounded.bias[1::5] = 3e38  # absorbs every product: all scores of these items are equal
    rounded.bias[2::5] = float("nan")
    rounded.bias[3::50] = float("inf")
    check(rounded)


def test_near_ties_are_wrong_in_fp32() -> None:
    """That the data above tells a kernel that decides in fp32 from one that does not."""
    case = random_case(41, 509, 21)
    case = replace(case, items=near_ties(case.items, case.query))
    scores = case.query @ case.items.T
    goal = scores.gather(1, case.target[:, None])
    ids = torch.arange(509)
    naive = ((scores > goal) | ((scores == goal) & (ids < case.target[:, None]))).sum(1)
    assert (naive != case.truth()).sum() > 10
    check(case)


def test_pairs_in_the_band_overflow_their_buffer(tier: int) -> None:
    """Few ties a tile, so that pairs are noted one by one, and thousands of them."""
    case = random_case(64, 2011, 8)
    query = case.query.clone()
    query[::16] = 0.0
    check(replace(case, query=query))


def test_very_wide(tier: int) -> None:
    """Beyond the width for which the error bound of the scan is proven."""
    check(random_case(2, 3, (1 << 18) + 3))


# Exclusion.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
def test_exclusion_lists(id_dtype: torch.dtype, dtype: torch.dtype, tier: int) -> None:
    batch, items = 23, 307
    case = random_case(batch, items, 19, dtype)
    padded = torch.randint(0, items, (batch, 61), dtype=id_dtype)
    padded[:, 20:30] = padded[:, :10]  # duplicates
    padded[:, 7] = case.target.to(id_dtype)
    padded[torch.rand(batch, 61) < 0.3] = -1
    padded[2, :40] = -1
    padded[5] = -1
    padded[6, ::2] = -1
    case = replace(case, exclude=padded)
    check(case)

    lists = [case.excluded(row) for row in range(batch)]
    columns = torch.tensor([id_ for ids in lists for id_ in ids], dtype=id_dtype)
    crow = torch.tensor([0, *np.cumsum([len(ids) for ids in lists])], dtype=id_dtype)
    by_row = replace(case, exclude=columns, crow=crow)
    assert torch.equal(by_row.native(), case.native())

    shared = replace(case, exclude=padded[0])
    check(shared)
    same = replace(case, exclude=padded[:1].expand(batch, -1))
    assert torch.equal(shared.native(), same.native())


@pytest.mark.parametrize("shared", [True, False])
def test_everything_excluded(shared: bool, tier: int) -> None:
    everything = torch.arange(100)
    case = replace(random_case(9, 100, 6), exclude=everything if shared else everything.expand(9, 100))
    assert case.native().tolist() == [0] * 9


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e308])
def test_excluded_items_of_a_score_that_is_nan(scale: float, tier: int) -> None:
    """They rank nowhere, so there is nothing to take off the count. Of width 0, only the scale tells."""
    for width in (0, 5):
        case = replace(random_case(3, 6, width), scale=scale, exclude=torch.randint(0, 6, (3, 4)))
        check(case)
        check(replace(case, scale=1.0, row_scale=torch.tensor([scale, 1.0, 0.0])))
        check(replace(case, query=case.query * 1e3, row_scale=torch.tensor([0.0, 1e-30, 2.0])))


def test_no_exclusion_in_empty_lists(tier: int) -> None:
    case = random_case(4, 50, 6)
    for exclude in (torch.empty(4, 0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)):
        assert torch.equal(replace(case, exclude=exclude).native(), case.truth())
    empty = torch.empty(0, dtype=torch.int64)
    assert torch.equal(replace(case, exclude=empty, crow=torch.zeros(5, dtype=torch.int64)).native(), case.truth())


# Rows.


def test_ignored_rows(tier: int) -> None:
    case = options(random_case(30, 70, 6))
    target = case.target.clone()
    target[::3] = IGNORE
    check(replace(case, target=target))
    check(replace(case, ignore_index=int(case.target[4])))  # an id that exists
    assert replace(case, target=torch.full((30,), IGNORE)).native().tolist() == [-1] * 30


def test_empty() -> None:
    nothing = random_case(0, 7, 4)
    assert nothing.native().shape == (0,)
    assert nothing.native().dtype == torch.int64
    no_items = Case(torch.randn(2, 4), torch.randn(0, 4), torch.full((2,), IGNORE))
    assert no_items.native().tolist() == [-1, -1]


def test_rows_do_not_see_each_other(tier: int) -> None:
    case = random_case(70, 333, 24)
    together = case.native()
    for row in (0, 1, 31, 32, 63, 69):
        alone = replace(case, query=case.query[row : row + 1], target=case.target[row : row + 1])
        assert alone.native().item() == together[row].item()


@pytest.mark.parametrize("batch", [1, 600])
def test_threads(batch: int) -> None:
    case = random_case(batch, 40_000 if batch == 1 else 3_001, 64)
    expected = case.native()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(case.native(), expected)
    if batch > 1:
        check(case)


def test_strides(tier: int) -> None:
    case = options(random_case(19, 131, 10))
    assert case.row_scale is not None
    assert case.bias is not None
    assert case.exclude is not None

    def column(vector: Tensor) -> Tensor:
        return torch.stack([vector, vector], 1)[:, 0]

    views = replace(
        case,
        query=case.query.T.contiguous().T,
        items=torch.cat([case.items, case.items], 1)[:, :10],
        target=column(case.target),
        row_scale=column(case.row_scale),
        bias=column(case.bias),
        exclude=case.exclude.T.contiguous().T,
    )
    assert torch.equal(views.native(), case.truth())
    assert torch.equal(replace(views, items=case.items.T.contiguous().T).native(), case.truth())


def test_offsets_beyond_32_bits() -> None:
    stride = (1 << 30) + 7
    storage = torch.empty(2 * stride + 8, dtype=torch.float16)  # 4 GiB of addresses; only three pages are touched
    items = storage.as_strided((3, 8), (stride, 1))
    items.copy_(torch.randn(3, 8))
    check(Case(torch.randn(5, 8).half(), items, torch.tensor([0, 1, 2, 2, 1])))


def test_flushed_denormals(tier: int) -> None:
    case = random_case(17, 200, 9)
    case = replace(case, query=case.query * 1e-20, items=case.items * 1e-21)
    expected = case.truth()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert torch.equal(case.native(), expected)
        assert float(torch.tensor([1e-30]) * 1e-10) == 0.0  # the caller's setting is as it was
    finally:
        torch.set_flush_denormal(False)
