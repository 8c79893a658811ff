"""The native CPU ``catalogue_topk`` against its definition, in every CPU tier this processor can run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ranking_cases import CATALOGUES, SHAPES, column, exclusion_lists, nasty, near_ties, options
from topk_cases import Case, check, random_case, same

from seqrec_fast import _native

if _native.MISSING is not None:
    pytest.skip(f"no native library: {_native.MISSING}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape: tuple[int, int, int], dtype: torch.dtype, tier: int) -> None:
    items = shape[1]
    for k in sorted({1, 7, items - 1, items, items + 3} - {0}):
        case = random_case(*shape, k, dtype)
        check(case)
        check(options(case))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 41])
@pytest.mark.parametrize("name", CATALOGUES)
def test_nasty_catalogues(name: str, rows: int, tier: int) -> None:
    """k = 5: the candidates are reduced again and again; k = 300: once."""
    for k in (5, 300):
        for case in nasty(random_case(41, 509, 21, k), name):
            for first in range(0, 12, rows) if rows < 41 else (0,):
                part = slice(first, first + rows)
                row_scale = None if case.row_scale is None else case.row_scale[part]
                exclude = None if case.exclude is None else case.exclude[part]
                check(replace(case, query=case.query[part], row_scale=row_scale, exclude=exclude))


@pytest.mark.parametrize("name", CATALOGUES)
def test_nasty_catalogues_as_codes(name: str, tier: int) -> None:
    """So many rows, and so wide, that the items are coded on the way where bytes can be multiplied."""
    for k in (5, 300):
        for case in nasty(random_case(41, 509, 39, k), name):
            check(case)


@pytest.mark.parametrize("misled", [0, 1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_whose_bar_was_guessed_too_high(misled: int, dtype: torch.dtype, tier: int) -> None:
    """The first chunk, which is in every sample, holds many items that some rows score above all others."""
    case = random_case(40, 8000, 256, 100, dtype)
    items, query = case.items.clone(), case.query.clone()
    query[misled:, 0] = -10.0
    query[:misled, 0] = 10.0
    items[:30, 0] = 50.0
    misleading = replace(case, items=items, query=query)
    scores = query @ items.T
    assert ((scores[:, :60].topk(12).values.amin(1) > scores[:, 60:].amax(1)).sum() == misled).item()
    check(misleading)
    check(options(misleading))
    check(replace(misleading, exclude=torch.arange(28).expand(40, 28)))
    # Fewer than k can rank: there is no bar to guess, or one that nothing can fill.
    few = torch.full((8000,), -torch.inf, dtype=dtype)
    few[torch.randperm(8000)[:50]] = 0.0
    check(replace(misleading, bias=few))
    few[:30] = 0.0
    check(replace(misleading, bias=few))


def test_near_ties_are_wrong_in_fp32() -> None:
    """That the data above tells a kernel that decides in fp32 from one that does not."""
    case = random_case(41, 509, 21, 20)
    case = replace(case, items=near_ties(case.items, case.query))
    naive = (case.query @ case.items.T).sort(dim=1, descending=True, stable=True).indices[:, :20]
    assert (naive != case.truth()[1]).any(1).sum() > 30
    check(case)


@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("name", ["one row repeated", "near ties", "ascending", "descending", "zero"])
def test_floods(name: str, rows: int, tier: int) -> None:
    """Many more candidates than a row has room for, with and without a row that has none in the same tile."""
    case = random_case(rows, 6007, 5, 9)
    flooded = CATALOGUES[name](case.items, case.query)
    check(replace(case, items=flooded))
    query = case.query.clone()
    query[::3] = 0.0
    check(replace(case, query=query))
    check(replace(case, query=query, exclude=torch.arange(20).expand(rows, 20)))


def test_the_order_of_the_chunks_leaves_no_trace(tier: int) -> None:
    """Chunks of 64 items, from two to as many as there are."""
    for items in (65, 128, 129, 500, 1409):
        check(random_case(6, items, 256, 11))
        check(random_case(1, items, 256, 11))


def test_infinite_scores_rank_first(tier: int) -> None:
    case = random_case(5, 300, 4, 40)
    bias = torch.zeros(300)
    bias[7::9] = float("inf")
    check(replace(case, bias=bias))
    check(replace(case, query=case.query * 1e30, items=case.items * 1e30))
    check(replace(case, scale=float("inf")))
    check(replace(case, scale=float("nan")))
    check(replace(case, row_scale=torch.tensor([1e30, float("inf"), 0.0, float("nan"), -1e38])))


def test_very_wide(tier: int) -> None:
    """Beyond the width for which the error bound of the scan is proven."""
    check(random_case(2, 3, (1 << 18) + 3, 2))


# Exclusion.


@pytest.mark.parametrize("rows", [4, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
def test_exclusion_lists(id_dtype: torch.dtype, dtype: torch.dtype, rows: int, tier: int) -> None:
    case, by_row = exclusion_lists(random_case(23, 307, 19, 30, dtype), 61, id_dtype)
    assert case.exclude is not None
    check(case)
    check(by_row)
    check(replace(case, query=case.query[:rows], exclude=case.exclude[:rows]))
    for row in (0, 2, 5):
        shared = replace(case, exclude=case.exclude[row])
        check(shared)
        assert same(shared.native(), replace(case, exclude=case.exclude[row : row + 1].expand(23, -1)).native())


def test_the_best_are_excluded(tier: int) -> None:
    """What is excluded must not raise what the others have to reach."""
    case = random_case(20, 2003, 8, 10)
    best = replace(case, k=400).truth()[1]
    check(replace(case, exclude=best))
    check(replace(case, exclude=best[0]))
    check(replace(case, query=case.query[:1], exclude=best[:1]))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("shared", [True, False])
def test_everything_excluded(shared: bool, rows: int, tier: int) -> None:
    everything = torch.arange(700)
    case = random_case(rows, 700, 6, 3)
    values, ids = replace(case, exclude=everything if shared else everything.expand(rows, 700)).native()
    assert (values == float("-inf")).all()
    assert (ids == -1).all()
    check(replace(case, exclude=(everything if shared else everything.expand(rows, 700))[..., 2:]))


def test_a_bias_of_minus_infinity_removes_whatever_the_vector_holds(tier: int) -> None:
    case = random_case(6, 50, 4, 50)
    items = case.items.clone()
    items[::2, 0] = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e38, 0.0]).repeat(5)
    bias = torch.zeros(50)
    bias[::2] = float("-inf")
    case = replace(case, items=items, bias=bias)
    check(case)
    assert set(case.native()[1].flatten().tolist()) == {-1, *range(1, 50, 2)}


def test_no_exclusion_in_empty_lists(tier: int) -> None:
    case = random_case(4, 50, 6, 5)
    for exclude in (torch.empty(4, 0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)):
        assert same(replace(case, exclude=exclude).native(), case.truth())
    empty = torch.empty(0, dtype=torch.int64)
    assert same(replace(case, exclude=empty, crow=torch.zeros(5, dtype=torch.int64)).native(), case.truth())


# Rows, threads, memory layouts.


def test_empty() -> None:
    values, ids = random_case(0, 7, 4, 3).native()
    assert (values.shape, values.dtype, ids.shape, ids.dtype) == ((0, 3), torch.float32, (0, 3), torch.int64)
    check(Case(torch.randn(2, 4), torch.randn(0, 4), k=3))


def test_many_more_places_than_items(tier: int) -> None:
    check(random_case(3, 11, 4, 100_000))


def test_rows_do_not_see_each_other(tier: int) -> None:
    case = random_case(70, 333, 24, 12)
    values, ids = case.native()
    for row in (0, 1, 31, 32, 63, 69):
        alone = replace(case, query=case.query[row : row + 1]).native()
        assert same(alone, (values[row : row + 1], ids[row : row + 1]))


def test_groups_of_few_rows(tier: int) -> None:
    """So many candidates a row that a group holds fewer rows than a tile."""
    case = random_case(5, 900_000, 1, 700_000)
    values, ids = case.native()
    truth = replace(case, query=case.query[3:4]).truth()
    assert same((values[3:4], ids[3:4]), truth)


@pytest.mark.parametrize("batch", [1, 600])
def test_threads(batch: int) -> None:
    case = random_case(batch, 40_000 if batch == 1 else 3_001, 64, 33)
    expected = case.native()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same(case.native(), expected)
    check(case)


def test_strides(tier: int) -> None:
    case = options(random_case(19, 131, 10, 20))
    assert case.row_scale is not None
    assert case.bias is not None
    assert case.exclude is not None
    views = replace(
        case,
        query=case.query.T.contiguous().T,
        items=torch.cat([case.items, case.items], 1)[:, :10],
        row_scale=column(case.row_scale),
        bias=column(case.bias),
        exclude=case.exclude.T.contiguous().T,
    )
    for rows in (3, 19):
        assert views.row_scale is not None
        assert views.exclude is not None
        part = replace(views, query=views.query[:rows], row_scale=views.row_scale[:rows], exclude=views.exclude[:rows])
        check(part)
        check(replace(part, items=case.items.T.contiguous().T))
        check(replace(part, items=case.items.flip(0)[:1].expand(131, -1)))


def test_offsets_beyond_32_bits() -> None:
    stride = (1 << 30) + 7
    storage = torch.empty(2 * stride + 8, dtype=torch.float16)  # 4 GiB of addresses; only three pages are touched
    items = storage.as_strided((3, 8), (stride, 1))
    items.copy_(torch.randn(3, 8))
    check(Case(torch.randn(5, 8).half(), items, k=2))
    check(Case(torch.randn(1, 8).half(), items, k=2))


def test_flushed_denormals(tier: int) -> None:
    case = random_case(17, 200, 9, 30)
    case = replace(case, query=case.query * 1e-20, items=case.items * 1e-21)
    cases = [case, replace(case, query=case.query[:1])]
    expected = [case.truth() for case in cases]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        got = [case.native() for case in cases]
        assert float(torch.tensor([1e-30]) * 1e-10) == 0.0  # the caller's setting is as it was
    finally:
        torch.set_flush_denormal(False)
    for one, wanted in zip(got, expected, strict=True):
        assert same(one, wanted)
