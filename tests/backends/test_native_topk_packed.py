"""Native top-k from the packed int8 copy against the definition of top-k, in every CPU tier this processor can run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from ranking_cases import CATALOGUES, exclusion_lists, nasty, options
from topk_cases import Case, check, random_case, same
from torch import Tensor

from seqrec_fast import _native

if _native.MISSING is not None:
    pytest.skip(f"no native library: {_native.MISSING}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, I, d): dot products (B <= 4), tiles of one and of two registers of rows, several chunks, groups and registers of k.
SHAPES = [(1, 1, 1), (3, 5, 0), (2, 13, 3), (17, 251, 7), (33, 253, 64), (5, 1009, 66), (1, 3001, 64), (519, 37, 300)]


@dataclass(frozen=True)
class Packed(Case):
    def native(self) -> tuple[Tensor, Tensor]:
        ops = torch.ops.seqrec_fast_native
        codes, facts = ops.catalogue_pack_int8.default(self.items)
        values, ids = ops.catalogue_topk_packed.default(self.query, self.items, codes, facts, self.k, *self.logits())
        return values, ids


def packed(case: Case) -> Packed:
    return Packed(**{name: getattr(case, name) for name in Packed.__dataclass_fields__})


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape: tuple[int, int, int], dtype: torch.dtype, tier: int) -> None:
    items = shape[1]
    for k in sorted({1, 7, items, items + 3}):
        case = packed(random_case(*shape, k, dtype))
        check(case)
        check(options(case))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 41])
@pytest.mark.parametrize("name", CATALOGUES)
def test_nasty_catalogues(name: str, rows: int, tier: int) -> None:
    for k in (5, 300):
        for case in nasty(packed(random_case(41, 509, 21, k)), name):
            for first in range(0, 12, rows) if rows < 41 else (0,):
                part = slice(first, first + rows)
                row_scale = None if case.row_scale is None else case.row_scale[part]
                exclude = None if case.exclude is None else case.exclude[part]
                check(replace(case, query=case.query[part], row_scale=row_scale, exclude=exclude))


@pytest.mark.parametrize("rows", [1, 30])
def test_codes_alone_give_another_order(rows: int, tier: int) -> None:
    """That the certificate and the decision in fp64 are needed: one large element leaves the others few codes."""
    case = packed(random_case(rows, 2003, 33, 20))
    items = case.items.clone()
    items[:, 0] = 40.0
    case = replace(case, items=items)
    codes, facts = torch.ops.seqrec_fast_native.catalogue_pack_int8.default(items)
    approximate = case.query @ (codes[:, :33] * facts[0, :, None]).T
    naive = approximate.sort(dim=1, descending=True, stable=True).indices[:, :20]
    assert (naive != case.truth()[1]).any(1).all()
    check(case)


@pytest.mark.parametrize("shape", [(50, 7), (50, 64), (9, 300), (3, 2000)], ids=str)
@pytest.mark.parametrize("name", CATALOGUES)
def test_facts_bound_the_codes(name: str, shape: tuple[int, int], tier: int) -> None:
    table = CATALOGUES[name](torch.randn(shape), torch.randn(1, shape[1]))
    codes, facts = torch.ops.seqrec_fast_native.catalogue_pack_int8.default(table)
    assert not codes[:, shape[1] :].any()
    scale, error, norm = facts.double()
    truth = table.double()
    rest = truth - codes[:, : shape[1]] * scale[:, None]
    scanned = norm.isfinite()
    assert torch.equal(scanned, truth.square().sum(1) <= 2.0**120)
    assert (rest.square().sum(1).sqrt() <= error)[scanned].all()
    assert (truth.square().sum(1).sqrt() <= norm)[scanned].all()
    usual = scanned & (truth.abs().amax(1) >= 2.0**-100)
    assert (rest.abs().amax(1) <= 0.51 * scale)[usual].all()


@pytest.mark.parametrize("rows", [1, 40])
def test_exclusion(rows: int, tier: int) -> None:
    case = packed(random_case(40, 700, 24, 30))
    for listed in exclusion_lists(case, 60, torch.int64):
        check(listed)
    part = replace(case, query=case.query[:rows])
    check(replace(part, exclude=torch.arange(700)))  # nothing is left
    check(replace(part, exclude=torch.arange(-1, 690, 3)))
    check(replace(part, exclude=torch.arange(700).expand(rows, 700)))


def test_scales(tier: int) -> None:
    """A factor that may not be folded into the query, and those that make it vanish or not finite."""
    for rows in (1, 5):
        case = packed(random_case(rows, 300, 4, 40))
        for scale in (float("inf"), float("nan"), 0.0, 1e-300, 1e-40, 1e30, -1e-3):
            check(replace(case, scale=scale))
    check(replace(case, row_scale=torch.tensor([1e30, float("inf"), 0.0, float("nan"), -1e38])))


def test_extreme_queries_stay_in_int32(tier: int) -> None:
    """Every code at its largest: the sum is just below 2³¹."""
    for rows in (1, 20):
        for width in (300, 517, 4096, 16384):
            items = torch.ones(30, width)
            items[::3] *= -1.0
            items[:, 1] += torch.linspace(0.0, 1e-6, 30)
            check(Packed(torch.ones(rows, width), items, k=30))


def test_views(tier: int) -> None:
    """Items column by column, and codes with room for more behind them."""
    case = packed(random_case(9, 500, 20, 11))
    check(replace(case, items=case.items.T.contiguous().T))
    check(replace(case, items=case.items[::2], query=case.query[:2]))
    ops = torch.ops.seqrec_fast_native
    codes, facts = ops.catalogue_pack_int8.default(case.items)
    few = replace(case, items=case.items[:300])
    got = ops.catalogue_topk_packed.default(few.query, few.items, codes[:300], facts[:, :300], few.k, *few.logits())
    assert same(got, few.truth())


@pytest.mark.parametrize("rows", [1, 70])
def test_threads(rows: int) -> None:
    case = options(packed(random_case(rows, 40_000, 32, 50)))
    wanted = case.truth()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert same(case.native(), wanted)
    torch.set_num_threads(1)


def test_what_has_no_packed_form() -> None:
    ops = torch.ops.seqrec_fast_native
    with pytest.raises(ValueError, match="float64"):
        ops.catalogue_pack_int8.default(torch.randn(3, 4).double())
    with pytest.raises(ValueError, match="width of at most 16384"):
        ops.catalogue_pack_int8.default(torch.randn(1, 16385))
    codes, facts = ops.catalogue_pack_int8.default(torch.randn(3, 4))
    logits = (1.0, None, None, None, None)
    for bad in ((codes[:2], facts), (codes, facts[:2]), (codes[:, :4], facts), (codes.int(), facts)):
        with pytest.raises(ValueError, match=r"codes|facts"):
            ops.catalogue_topk_packed.default(torch.randn(2, 4), torch.randn(3, 4), *bad, 1, *logits)
