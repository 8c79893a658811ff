"""The native softmax over the catalogue (attention, cross-entropy) against the reference in fp64, in every CPU tier."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from softmax_cases import Attention, CrossEntropy, Logits, check, lists, options
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast import _native

if _native.MISSING is not None:
    pytest.skip(f"no native library: {_native.MISSING}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, I, d): tiles are 12 or 6 items by 2 or 1 vectors of 16, 8 or 4 rows; chunks at most 192 items, leaves of 2048; groups at
# most 512 rows forward and 256 backward, fewer where they are wide.
SHAPES = [
    (0, 5, 3),
    (3, 0, 4),
    (1, 1, 1),
    (3, 5, 0),
    (16, 12, 16),
    (17, 251, 7),
    (33, 193, 64),
    (5, 9001, 20),
    (1, 4096, 64),
    (530, 97, 8),
    (70, 131, 300),
]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def attention(rows: int, items: int, width: int, dtype: torch.dtype = torch.float32) -> Attention:
    return Attention(
        numbers(rows, width, dtype=dtype), numbers(items, width, dtype=dtype, scale=min(1.0, 4 / (width + 1) ** 0.5))
    )


def cross_entropy(rows: int, items: int, width: int, dtype: torch.dtype = torch.float32) -> CrossEntropy:
    made = attention(rows, items, width, dtype)
    target = torch.randint(0, items, (rows,)) if items else torch.full((rows,), -100)
    target[3::5] = -100
    return CrossEntropy(made.query, made.keys, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype, tier: int) -> None:
    for case in (attention(*shape, dtype), cross_entropy(*shape, dtype)):
        check(case)
        check(replace(case, logits=options(*shape[:2], dtype) if shape[1] else Logits(0.5)))


@pytest.mark.parametrize(("heads", "width", "values"), [(2, 16, None), (3, 12, 9), (1, 8, 40), (1, 40, 1), (4, 4, 0)])
def test_heads_and_values(heads: int, width: int, values: int | None, tier: int) -> None:
    # Where bf16 is multiplied in pairs, ds is rounded to it. Here that shows in one row-scale gradient of 18.5, the sum of terms
    # ds·(q·k) that come to 116 in size: 1.5e-2 of it, where fp32 products leave 0.2e-2.
    in_pairs = _native.TIERS[tier] in ("avx512_bf16", "amx") and (width, values) == (8, 40)
    for dtype in (torch.float32, torch.bfloat16):
        table = None if values is None else numbers(2100, values, dtype=dtype)
        case = replace(attention(37, 2100, width, dtype), heads=heads, values=table, logits=options(37, 2100, dtype))
        check(case, 1.6e-2 if in_pairs and dtype == torch.bfloat16 else None)


def test_several_targets(tier: int) -> None:
    case = replace(cross_entropy(40, 3000, 12), target=lists(40, 3000, 5), logits=options(40, 3000, torch.float32))
    case.target[::2, 4] = case.target[::2, 0]  # twice
    check(case)
    check(replace(case, weights=torch.rand(40, 5), label_smoothing=0.1))
    chosen = (torch.rand(40, 3000) < 0.1).to_sparse_csr()
    # Of 300 targets a row some 20 lie in a chunk; of all of them, more than are put aside at a time.
    every = torch.ones(3, 400).to_sparse_csr()
    check(replace(case, target=chosen.col_indices(), crow=chosen.crow_indices()))
    small = replace(cross_entropy(3, 400, 12), target=every.col_indices(), crow=every.crow_indices())
    check(replace(small, logits=Logits(exclude=lists(3, 400, 300))))
    check(replace(small, logits=Logits(exclude=torch.arange(400))))


def test_exclusion_lists_of_every_kind(tier: int) -> None:
    for case in (attention(21, 5000, 9), cross_entropy(21, 5000, 9)):
        chosen = (torch.rand(21, 5000) < 0.3).to_sparse_csr()
        check(replace(case, logits=Logits(exclude=chosen.col_indices(), crow=chosen.crow_indices())))
        check(replace(case, logits=Logits(exclude=torch.randint(-1, 5000, (900,)))))
        check(replace(case, logits=Logits(exclude=lists(21, 5000, 2000).int())))


def test_only_the_target_is_left(tier: int) -> None:
    case = replace(cross_entropy(19, 300, 33), logits=Logits(1.7, exclude=torch.arange(300)))
    assert not case.native()[0].any()
    query, items = (t.clone().requires_grad_() for t in (case.query, case.items))
    sf.catalogue_cross_entropy(query, items, case.target, scale=1.7, exclude=case.logits.exclude).backward()
    assert query.grad is not None and items.grad is not None
    assert not query.grad.any() and not items.grad.any()


@pytest.mark.parametrize("order", ["ascending", "descending", "far apart", "constant"])
def test_scores_that_move_the_shift(order: str, tier: int) -> None:
    """The largest score comes last, or first, or differs from the others by more than the exponent of a float holds."""
    case = attention(20, 6000, 8)
    scores = case.keys @ case.query[0]
    keys = case.keys[scores.argsort(descending=order == "descending")]
    if order == "far apart":
        keys = keys * torch.linspace(0, 60, 6000)[:, None]
    if order == "constant":
        keys = keys[:1].expand(6000, 8)
    case = replace(case, keys=keys)
    check(case, tolerance=2e-4 if order == "far apart" else None)  # scores of some hundreds, rounded twice
    target = torch.randint(0, 6000, (20,))
    check(CrossEntropy(case.query, keys, target), tolerance=2e-4 if order == "far apart" else None)


# Numbers that are none.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_excluded_may_hold_anything(dtype: torch.dtype, tier: int) -> None:
    for kind in (float("nan"), float("inf"), -float("inf")):
        clean = attention(18, 4500, 10, dtype)
        values = numbers(4500, 6, dtype=dtype)
        broken, broken_values = clean.keys.clone(), values.clone()
        gone = torch.tensor([0, 5, 191, 192, 2047, 2048, 4499])
        broken[gone, 3] = kind
        broken_values[gone, 1] = kind
        dead = torch.zeros(4500, dtype=dtype).index_fill(0, gone, -torch.inf)
        for logits in (Logits(exclude=gone), Logits(bias=dead), Logits(exclude=gone.expand(18, 7).contiguous())):
            for own in (None, values):
                right = replace(clean, values=own, logits=logits).native()
                spoiled = None if own is None else broken_values
                found = replace(clean, keys=broken, values=spoiled, logits=logits).native()
                for one, other in zip(found, right, strict=True):
                    assert one.equal(other)
            target = torch.arange(18) + 10
            right = CrossEntropy(clean.query, clean.keys, target, logits).native()
            found = CrossEntropy(clean.query, broken, target, logits).native()
            for one, other in zip(found, right, strict=True):
                assert one.equal(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_nan_spoils_itself_alone(dtype: torch.dtype, tier: int) -> None:
    case = attention(40, 300, 8, dtype)
    context, lse, d_query, *_ = case.native()
    query = case.query.clone()
    query[17, 2] = float("nan")
    others = torch.arange(40) != 17
    spoiled, spoiled_lse, spoiled_query, *_ = replace(case, query=query).native()
    assert spoiled[17].isnan().all() and spoiled_lse[17].isnan().all() and spoiled_query[17].isnan().all()
    assert spoiled[others].equal(context[others]) and spoiled_lse[others].equal(lse[others])
    assert spoiled_query[others].equal(d_query[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_without_items_takes_no_part_whatever_it_holds(dtype: torch.dtype, tier: int) -> None:
    case = cross_entropy(5, 200, 6, dtype)
    query = case.query.clone()
    query[2] = float("nan")
    target = torch.tensor([1, 2, -100, 4, 5])
    found = replace(case, query=query, target=target).native()
    right = replace(case, target=target).native()
    for one, other in zip(found, right, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("row", [0, 16, 17, 38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_nan_without_items_leaves_its_neighbours(row: int, dtype: torch.dtype, tier: int) -> None:
    """Item gradients hold every other row, whether the row before or behind it is cleared for the products."""
    case = attention(39, 300, 8, dtype)
    gone = torch.full((39, 300), -1)
    gone[row] = torch.arange(300)
    right = replace(case, logits=Logits(exclude=gone)).native()
    query = case.query.clone()
    query[row, 2] = float("nan")
    found = replace(case, query=query, logits=Logits(exclude=gone)).native()
    assert right[3].isfinite().all()
    for one, other in zip(found, right, strict=True):
        assert one.equal(other)
    for kind in (float("nan"), float("inf")):
        row_scale = torch.ones(39, dtype=dtype)
        scaled = replace(case, logits=Logits(exclude=gone, row_scale=row_scale))
        right_items = scaled.native()[3]
        row_scale[row] = kind
        assert scaled.native()[3].equal(right_items)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_items_that_are_not_finite_are_seen(dtype: torch.dtype, tier: int) -> None:
    case = attention(9, 2500, 5, dtype)
    case.keys[2100, 1] = float("nan")
    context, lse, *_ = case.native()
    assert context.isnan().all() and lse.isnan().all()
    case.keys[2100, 1] = float("inf")
    case.keys[2100, 0] = 1.0
    _, lse, *_ = case.native()
    expected = case.query[:, 1] > 0
    assert (lse[expected] == float("inf")).all()
    assert lse[~expected].isfinite().all()


# Bits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_threads_nor_other_rows_change_a_bit(dtype: torch.dtype, tier: int) -> None:
    plain = attention(70, 20000, 16, dtype)
    for case in (plain, replace(plain, values=numbers(20000, 7, dtype=dtype))):
        torch.set_num_threads(1)
        one = case.native()
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for first, second in zip(one, case.native(), strict=True):
                assert first.equal(second)
        for rows in (slice(0, 1), slice(69, 70), slice(3, 20)):
            alone = replace(case, query=case.query[rows].clone())
            context, lse, *_ = alone.native()
            assert context.equal(one[0][rows]) and lse.equal(one[1][rows])
    loss = cross_entropy(70, 20000, 16, dtype)
    torch.set_num_threads(1)
    one = replace(loss, skip_mass=0.5).native()
    torch.set_num_threads(2)
    for first, second in zip(one, replace(loss, skip_mass=0.5).native(), strict=True):
        assert first.equal(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_query_gradient_of_a_row_alone(dtype: torch.dtype, tier: int) -> None:
    case = attention(70, 20000, 16, dtype)
    incoming = (*case.seeds(), *case.native()[:2])

    def gradient(rows: slice) -> Tensor:
        args = (*(t[rows].clone() for t in (*incoming, case.query)), case.keys, None, 1, *case.logits.args())
        return torch.ops.seqrec_fast_native.catalogue_attention_backward.default(*args, [True, *[False] * 4], 0)[0]

    together = gradient(slice(None))
    for rows in (slice(0, 1), slice(69, 70), slice(16, 33)):
        assert gradient(rows).equal(together[rows])


def test_flushed_denormals(tier: int) -> None:
    case = attention(5, 400, 6)
    case.keys.mul_(1e-20)
    case.query.mul_(1e-20)
    right = case.native()
    assert torch.set_flush_denormal(True)
    try:
        found = case.native()
        assert float(torch.tensor([1e-40]) * 0.5) == 0.0  # the caller's setting is as it was
    finally:
        torch.set_flush_denormal(False)
    for one, other in zip(found[:2], right[:2], strict=True):
        assert one.equal(other)


# Layout.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype: torch.dtype, tier: int) -> None:
    case = replace(
        attention(20, 300, 8, dtype), values=numbers(300, 6, dtype=dtype), heads=2, logits=options(20, 300, dtype)
    )
    right = case.native()

    def apart(tensor: Tensor) -> Tensor:
        wide = tensor.new_full((2 * tensor.shape[0] + 1, *(3 * n for n in tensor.shape[1:])), float("nan"))
        view = wide[1::2, ::3] if tensor.dim() == 2 else wide[1::2]
        view.copy_(tensor)
        return view

    assert case.values is not None and case.logits.row_scale is not None and case.logits.bias is not None
    logits = replace(case.logits, row_scale=apart(case.logits.row_scale), bias=apart(case.logits.bias))
    transposed = case.query.t().contiguous().t()
    found = replace(case, query=transposed, keys=apart(case.keys), values=apart(case.values), logits=logits).native()
    for one, other in zip(found, right, strict=True):
        assert one.equal(other)


# Leaving out what hardly matters.


def test_the_mass_skipped_is_kept_to_and_told(tier: int) -> None:
    case = cross_entropy(64, 30000, 16)
    peaked = replace(case, query=case.query * 4)
    exact = peaked.native()
    assert not exact[-1].any()
    for allowed in (1e-3, 0.1, 1.0):
        found = replace(peaked, skip_mass=allowed).native()
        skipped = found[-1]
        assert bool((skipped >= 0).all()) and float(skipped.max()) <= allowed * 1.0001
        assert skipped.any()
        assert found[2].equal(exact[2])  # the query's gradient is exact
        # Each row's share of the items' gradient is off by at most its mass times |q|·|weight|.
        difference = (found[3] - exact[3]).norm(dim=1).sum()
        seeds = torch.Generator().manual_seed(3)
        grad_loss, grad_lse = (torch.randn(64, generator=seeds) for _ in range(2))
        valid = peaked.target != -100
        most = (skipped * (grad_loss + grad_lse).abs() * peaked.query.norm(dim=1))[valid].sum()
        assert difference <= most * 1.001 + 1e-4


# Bad input to the operators themselves: the public functions check more, and say it better.


def test_direct_calls_stay_within_their_arrays() -> None:
    native = torch.ops.seqrec_fast_native
    q, k = torch.randn(3, 4), torch.randn(5, 4)
    plain = (1.0, None, None, None, None)
    for args, match in (
        ((q, torch.randn(5, 3), None, 1, *plain, 0), "matrices of one width"),
        ((q, k, torch.randn(4, 4), 1, *plain, 0), "values must have shape"),
        ((q, k, None, 3, *plain, 0), "multiple of num_heads"),
        ((q, k, None, 0, *plain, 0), "multiple of num_heads"),
        ((q.double(), k.double(), None, 1, *plain, 0), "float64 has no native kernel"),
        ((q, k.bfloat16(), None, 1, *plain, 0), "share one dtype"),
        ((q, k, None, 1, 1.0, torch.randn(2), None, None, None, 0), "scale must have one entry per row"),
        ((q, k, None, 1, 1.0, None, torch.randn(6), None, None, 0), "bias must have one entry per item"),
        ((q, k, None, 1, 1.0, None, None, torch.zeros(2, 1, dtype=torch.int64), None, 0), r"\[B, n\] or \[n\]"),
        ((q, k, None, 1, 1.0, None, None, torch.tensor([0]), torch.tensor([0, 1, 0, 1]), 0), "row pointers must rise"),
    ):
        with pytest.raises(ValueError, match=match):
            native.catalogue_attention.default(*args)
    for wrong in (torch.tensor([[5], [0], [0]]), torch.tensor([[-2], [0], [0]]), torch.tensor([5])):
        with pytest.raises(IndexError, match=r"exclude must hold item ids in 0…4, or -1 for padding, got (5|-2)"):
            native.catalogue_attention.default(q, k, None, 1, 1.0, None, None, wrong, None, 0)
    with pytest.raises(IndexError, match=r"target must hold item ids in 0…4"):
        native.catalogue_softmax.default(q, k, *plain, torch.tensor([0, 5, 1]), None, True)
    with pytest.raises(ValueError, match="one id per row"):
        native.catalogue_softmax.default(q, k, *plain, torch.tensor([0, 1]), None, True)
