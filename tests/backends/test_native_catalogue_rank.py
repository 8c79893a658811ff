"""The native CPU ``catalogue_rank`` against its definition, in every CPU tier this processor can run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rank_cases import IGNORE, Case, check, random_case
from ranking_cases import CATALOGUES, SHAPES, column, exclusion_lists, nasty, near_ties, options

from seqrec_fast import _native

if _native.MISSING is not None:
    pytest.skip(f"no native library: {_native.MISSING}", allow_module_level=True)

native = torch.ops.seqrec_fast_native
HIGHEST_TIER = native.highest_cpu_tier.default()
CHOSEN_TIER = _native.TIERS.index(_native.CPU_TIER or "default")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape: tuple[int, int, int], dtype: torch.dtype, tier: int) -> None:
    case = random_case(*shape, dtype)
    check(case)
    check(options(case))


@pytest.mark.parametrize("name", CATALOGUES)
def test_nasty_catalogues(name: str, tier: int) -> None:
    for case in nasty(random_case(41, 509, 21), name):
        check(case)


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
    case, by_row = exclusion_lists(random_case(23, 307, 19, dtype), 61, id_dtype)
    padded = case.exclude
    assert padded is not None
    padded[8, 7] = case.target[8]
    by_row = replace(by_row, target=case.target)
    check(case)
    check(by_row)

    shared = replace(case, exclude=padded[0])
    check(shared)
    same = replace(case, exclude=padded[:1].expand(23, -1))
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
    no_items = Case(torch.randn(2, 4), torch.randn(0, 4), target=torch.full((2,), IGNORE))
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
    check(Case(torch.randn(5, 8).half(), items, target=torch.tensor([0, 1, 2, 2, 1])))


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
