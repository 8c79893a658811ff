"""``sf.workspace_bytes`` against what the reference operators really allocate, and against their growth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory import PeakMemory
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast import _native
from seqrec_fast._logits import LogitSpec
from seqrec_fast._measure import extra_peak_bytes, in_fresh_process
from seqrec_fast.backends.reference import _scan
from seqrec_fast.backends.reference import catalogue_attention as attention
from seqrec_fast.backends.reference import catalogue_cross_entropy as cross_entropy
from seqrec_fast.backends.reference import catalogue_rank as rank
from seqrec_fast.backends.reference import catalogue_sampled_cross_entropy as sampled
from seqrec_fast.backends.reference import catalogue_topk as topk

pytestmark = pytest.mark.usefixtures("one_thread", "smaller_buffers")

MIB = 1 << 20
SHAPES = [(200, 1500, 16), (8, 10000, 16), (700, 100, 32), (1, 1, 1)]
Run = tuple[int, int]  # (bytes taken, of which results)


@pytest.fixture
def smaller_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the usual, so that small problems fill them."""
    monkeypatch.setattr(_scan, "SCORES", 1 << 16)
    monkeypatch.setattr(_scan, "ROW_BLOCK", 128)
    monkeypatch.setattr(_scan, "CHUNK_NUMBERS", 1 << 18)


def size_of(results: tuple[Tensor, ...] | Tensor) -> int:
    results = (results,) if isinstance(results, Tensor) else results
    return sum(result.untyped_storage().nbytes() for result in results)


def measured(function: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    with PeakMemory() as watch:
        results = function(*args)
    return watch.bytes - size_of(results), results


def keywords_for(rows: int, items: int, width: int, dtype: torch.dtype, options: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"query": torch.randn(rows, width).to(dtype), "items": torch.randn(items, width).to(dtype)}
    if options:
        found |= {"bias": torch.randn(items).to(dtype), "exclude": torch.randint(-1, items, (rows, 20))}
    return found


def run(operator: str, keywords: dict[str, Any]) -> tuple[int, int]:
    """(bytes of the forward, bytes of the backward), without their results."""
    query, items = keywords["query"], keywords["items"]
    options = {name: keywords[name] for name in ("bias", "exclude") if name in keywords}
    raw = LogitSpec.build("test", query, items, **options).args()
    bias = raw[2] is not None
    if operator == "catalogue_rank":
        return measured(rank.forward, query, items, keywords["target"], *raw, -100)[0], 0
    if operator == "catalogue_topk":
        forward, (values, ids) = measured(topk.forward, query, items, keywords["k"], *raw)
        args = (values, ids, query, items, 1.0, None, raw[2], [True, True, False, bias])
        return forward, measured(topk.backward, *args)[0]
    if operator == "catalogue_attention":
        forward, saved = measured(attention.forward, query, items, None, 1, *raw, 0)
        args = (*saved, *saved, query, items, None, 1, *raw, [True, True, False, False, bias], 0)
        return forward, measured(attention.backward, *args)[0]
    if "negatives" in keywords:
        lists = (keywords["target"], None, None, keywords["negatives"], None)
        forward, (loss, lse) = measured(sampled.forward, query, items, *lists, *raw, -100, 0.0, None, False, 0)
        args = (loss, lse, query, items, *lists, *raw, -100, 0.0, None, [True, True, False, bias], 0)
        return forward, measured(sampled.backward, *args)[0]
    lists = (keywords["target"], None, None)
    smoothing = keywords.get("label_smoothing", 0.0)
    forward, (loss, *kept) = measured(
        cross_entropy.forward, query, items, *lists, *raw, -100, smoothing, None, 0.0, None, False, True, 0
    )
    args = (loss, loss, *kept, query, items, *lists, *raw, -100, smoothing, None, 0.0, [True, True, False, bias], 0)
    return forward + size_of(tuple(kept)), measured(cross_entropy.backward, *args)[0]


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "operator", ["catalogue_attention", "catalogue_cross_entropy", "catalogue_rank", "catalogue_topk", "negatives", "own_negatives", "smoothed"]
)  # fmt: skip
def test_is_a_bound_and_not_a_wild_one(operator: str, dtype: torch.dtype, options: bool) -> None:
    for rows, items, width in SHAPES:
        keywords = keywords_for(rows, items, width, dtype, options)
        name = operator if operator.startswith("catalogue") else "catalogue_cross_entropy"
        if name in ("catalogue_rank", "catalogue_cross_entropy"):
            keywords["target"] = torch.randint(0, items, (rows,))
        if operator == "catalogue_topk":
            keywords["k"] = 10
        if operator == "smoothed":
            keywords["label_smoothing"] = 0.1
        if "negatives" in operator:
            keywords["negatives"] = torch.randint(0, items, (rows, 50) if operator.startswith("own") else (300,))
        given = {("keys" if name == "catalogue_attention" and n == "items" else n): v for n, v in keywords.items()}
        with sf.use_backend("reference"):
            told = sf.workspace_bytes(name, **given)
            given["query"] = given["query"].clone().requires_grad_()
            told_with_gradient = sf.workspace_bytes(name, **given)
        forward, backward = run(name, keywords)
        assert forward <= told <= 12 * forward + MIB // 8
        if name != "catalogue_rank":
            # With negatives the sums over touched items are made outside of what is measured here.
            extra = items * (2 * width + 1) * 4 if "negatives" in operator and dtype == torch.bfloat16 else 0
            most = max(forward, backward) + extra
            assert most - extra <= told_with_gradient <= 12 * most + MIB // 8


@pytest.mark.parametrize("operator", ["catalogue_topk", "catalogue_rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_bound_where_all_scores_are_equal(operator: str, dtype: torch.dtype) -> None:
    keywords = keywords_for(300, 1000, 4, dtype, False) | {"target": torch.full((300,), 999), "k": 5}
    keywords["items"] = torch.ones_like(keywords["items"])
    last = "k" if operator == "catalogue_topk" else "target"
    with sf.use_backend("reference"):
        told = sf.workspace_bytes(operator, keywords["query"], keywords["items"], keywords[last])
    assert run(operator, keywords)[0] <= told


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_does_not_grow_with_rows_times_items(backend: str) -> None:
    calls: dict[str, Callable[[int, int], tuple[Any, ...]]] = {
        "catalogue_attention": lambda b, i: (meta(b, 64), meta(i, 64)),
        "catalogue_cross_entropy": lambda b, i: (meta(b, 64), meta(i, 64), meta(b, dtype=torch.int64)),
        "catalogue_rank": lambda b, i: (meta(b, 64), meta(i, 64), meta(b, dtype=torch.int64)),
        "catalogue_topk": lambda b, i: (meta(b, 64), meta(i, 64), 100),
    }
    with sf.use_backend(backend):
        for name, arguments in calls.items():
            small = sf.workspace_bytes(name, *arguments(4096, 10**6))
            assert sf.workspace_bytes(name, *arguments(4096, 10**8)) == small < 200 * MIB
            assert sf.workspace_bytes(name, *arguments(8192, 10**6)) <= 2 * small


@pytest.mark.parametrize("operator", ["catalogue_rank", "catalogue_topk"])
def test_native_rankings_take_a_scratch_a_thread(operator: str) -> None:
    if _native.MISSING is not None:
        pytest.skip(_native.MISSING)
    last = 100 if operator == "catalogue_topk" else meta(4096, dtype=torch.int64)
    arguments = (operator, meta(4096, 64), meta(10**6, 64), last)
    torch.set_num_threads(1)
    one = sf.workspace_bytes(*arguments)
    torch.set_num_threads(2)
    assert one < sf.workspace_bytes(*arguments) < 2 * one
    with sf.use_backend("reference"):
        assert sf.workspace_bytes(*arguments) > one


def _measured_and_told(rows: int, items: int, k: int, dtype: torch.dtype, seen: int) -> tuple[int | None, int]:
    torch.set_num_threads(2)
    query, table = torch.randn(rows, 16).to(dtype), torch.randn(items, 16).to(dtype)
    exclude = torch.randint(0, items, (rows, seen)) if seen else None
    sf.catalogue_topk(query[:2], table[:9], 1)
    results = rows * k * (8 + (8 if dtype == torch.float64 else 4))
    peak = extra_peak_bytes(lambda: sf.catalogue_topk(query, table, k, exclude=exclude))
    return peak and peak - results, sf.workspace_bytes("catalogue_topk", query, table, k, exclude=exclude)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 40_000, 1000, 0), (2000, 20_000, 20, 300), (3, 300_000, 200_000, 0)], ids=str)
def test_native_topk_keeps_within_it(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    if _native.MISSING is not None:
        pytest.skip(_native.MISSING)
    rows, items, k, seen = shape
    measured, told = in_fresh_process(_measured_and_told, rows, items, k, dtype, seen)
    if measured is None:
        pytest.skip("the kernel does not tell the peak of a process")
    assert measured <= told + MIB
    assert told <= 12 * measured + MIB


def _softmax_measured_and_told(operator: str, rows: int, items: int, dtype: torch.dtype) -> tuple[int | None, int]:
    torch.set_num_threads(2)
    query, table = torch.randn(rows, 64).to(dtype).requires_grad_(), torch.randn(items, 64).to(dtype).requires_grad_()
    target = torch.randint(0, items, (rows,))
    last: tuple[Tensor, ...] = (target,) if operator == "catalogue_cross_entropy" else ()

    def run() -> None:
        getattr(sf, operator)(query, table, *last).sum().backward()

    getattr(sf, operator)(query[:2], table[:9], *(t[:2] % 9 for t in last)).sum().backward()
    query.grad = table.grad = None
    peak = extra_peak_bytes(run)
    results = query.nbytes + table.nbytes + rows * 64 * 4  # the gradients, and a context
    return peak and peak - results, sf.workspace_bytes(operator, query, table, *last)


@pytest.mark.parametrize("operator", ["catalogue_attention", "catalogue_cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_softmax_keeps_within_it(operator: str, dtype: torch.dtype) -> None:
    if _native.MISSING is not None:
        pytest.skip(_native.MISSING)
    measured, told = in_fresh_process(_softmax_measured_and_told, operator, 2000, 20_000, dtype)
    if measured is None:
        pytest.skip("the kernel does not tell the peak of a process")
    assert measured <= told + MIB
    assert told <= 32 * MIB


def test_shapes_are_enough() -> None:
    real = sf.workspace_bytes("catalogue_topk", torch.randn(2, 3, 8), torch.randn(100, 8), k=7)
    assert sf.workspace_bytes("catalogue_topk", meta(6, 8), meta(100, 8), 7) == real


def test_bad_input() -> None:
    with pytest.raises(
        ValueError, match="workspace_bytes: unknown operator 'lstm'; known are catalogue_attention, catalogue"
    ):
        sf.workspace_bytes("lstm", torch.zeros(1))
    with pytest.raises(TypeError, match="catalogue_topk: missing a required argument: 'k'"):
        sf.workspace_bytes("catalogue_topk", torch.zeros(1, 2), torch.zeros(3, 2))
