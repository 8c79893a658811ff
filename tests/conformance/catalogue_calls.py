"""The calls of the catalogue half of the conformance suite: operator × option × size × data, built for any dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import seqrec_fast as sf
from seqrec_fast._dispatch import Spec

from . import catalogue as suite

Keywords = dict[str, Any]
INFINITY = float("inf")
DIFFERENTIABLE = ("query", "items", "keys", "values", "scale", "bias")


@dataclass(frozen=True)
class Case:
    """One call. Options that an operator does not have are not given to it."""

    operator: str
    name: str
    rows: int = 5
    items: int = 37
    width: int = 8
    options: tuple[str, ...] = ()  # names in OPTIONS
    table: str = "gaussian"  # a name in suite.TABLES
    query: str = "normal"
    heads: int = 1
    values: int = 0  # d_v, 0: the keys
    targets: str = "single"
    smoothing: str = ""
    negatives: str = ""
    k: int = 7
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    @property
    def id(self) -> str:
        return f"{self.operator.removeprefix('catalogue_')}-{self.name}"


class _Numbers:
    """The same numbers for every dtype, but for their rounding."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(sum(map(ord, case.id)))
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def ids(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def chance(self, share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share


def _dead_bias(numbers: _Numbers, case: Case) -> Tensor:
    return numbers.normal(case.items).masked_fill(numbers.chance(0.3, case.items), -INFINITY)


def _some_rows_lose_everything(numbers: _Numbers, case: Case) -> Tensor:
    lists = torch.full((case.rows, case.items), -1)
    lists[::2] = torch.arange(case.items).flip(0)
    return lists


OPTIONS: dict[str, Callable[[_Numbers, Case], Keywords]] = {
    "scale": lambda n, c: {"scale": -0.625},
    "row_scale": lambda n, c: {"scale": n.normal(c.rows)},
    "bias": lambda n, c: {"bias": n.normal(c.items)},
    "dead_items": lambda n, c: {"bias": _dead_bias(n, c)},
    "all_dead": lambda n, c: {"bias": torch.full((c.items,), -INFINITY, dtype=n.dtype)},
    "exclude": lambda n, c: {"exclude": n.ids(-1, c.items, c.rows, 6)},
    "exclude_int32": lambda n, c: {"exclude": n.ids(-1, c.items, c.rows, 6).int()},
    "exclude_shared": lambda n, c: {"exclude": n.ids(-1, c.items, 6)},
    "exclude_csr": lambda n, c: {"exclude": n.chance(0.3, c.rows, c.items).double().to_sparse_csr()},
    "exclude_all": lambda n, c: {"exclude": torch.arange(c.items)},
    "exclude_all_of_some": lambda n, c: {"exclude": _some_rows_lose_everything(n, c)},
}
QUERIES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda q: q,
    "equal": lambda q: q[:1].expand(q.shape),
    "huge_and_tiny": lambda q: torch.cat([q[::2] * 64, q[1::2] * 2**-10]),
    "zero": torch.zeros_like,
    "one_of_nan": lambda q: q.index_fill(0, torch.tensor([1]), float("nan")),
    "strided": lambda q: q.t().contiguous().t(),
}


def build(case: Case, dtype: torch.dtype) -> Keywords:
    """The keywords of a public call."""
    numbers = _Numbers(case, dtype)
    query = QUERIES[case.query](numbers.normal(case.rows, case.width))
    items = suite.TABLES[case.table](numbers.normal(case.items, case.width), query)
    attention = case.operator == "catalogue_attention"
    keywords: Keywords = {"query": query, "keys" if attention else "items": items}
    for option in case.options:
        keywords |= OPTIONS[option](numbers, case)
    if attention:
        keywords["num_heads"] = case.heads
        keywords["values"] = numbers.normal(case.items, case.values) if case.values else None
    elif case.operator == "catalogue_topk":
        keywords["k"] = case.k
    else:
        keywords |= _targets(numbers, case)
    return keywords


def _targets(numbers: _Numbers, case: Case) -> Keywords:
    if case.targets == "single":
        target = numbers.ids(0, case.items, case.rows)
        target[3::4] = -100
        if case.items == 0:
            target[:] = -100
        found: Keywords = {"target": target}
    elif case.targets.startswith("csr"):
        chosen = numbers.chance(0.2, case.rows, case.items)
        chosen[3::4] = False
        found = {"target": chosen.double().to_sparse_csr()}
        if case.targets == "csr_weighted":
            found["target_weights"] = numbers.normal(int(chosen.sum())).abs()
    else:
        target = numbers.ids(-1, case.items, case.rows, 3)
        target[3::4] = -1
        target[::2, 2] = target[::2, 0]  # twice
        found = {"target": target}
        if case.targets == "weighted":
            found["target_weights"] = numbers.normal(case.rows, 3).abs()
    if case.smoothing:
        found["label_smoothing"] = 0.25
    if case.smoothing == "prior":
        found["smoothing_prior"] = numbers.normal(case.items).abs().masked_fill(numbers.chance(0.3, case.items), 0.0)
    if case.negatives:
        lead = (case.rows,) if "own" in case.negatives else ()
        found["negatives"] = numbers.ids(-1, case.items, *lead, 9)
        if "corrected" in case.negatives:
            found["negatives_log_q"] = numbers.normal(*lead, 9)
    return found


def cast(keywords: Keywords, dtype: torch.dtype) -> Keywords:
    """The floating tensors in another dtype (the values of a sparse matrix mean nothing)."""
    return {
        name: value.to(dtype)
        if isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
        else value
        for name, value in keywords.items()
    }


def spec_of(case: Case, dtype: torch.dtype, *, backward: bool = False) -> Spec:
    """What the dispatch is asked for this call."""
    keywords = build(case, torch.float64)
    options = {"row_scale"} if isinstance(keywords.get("scale"), Tensor) else set()
    options |= {"bias"} if "bias" in keywords else set()
    exclude = keywords.get("exclude")
    operator = f"{case.operator}_backward" if backward else case.operator
    if exclude is not None and operator != "catalogue_topk_backward":
        options |= {"exclude_csr" if exclude.layout == torch.sparse_csr else "exclude"}
    if case.operator == "catalogue_attention":
        options |= ({"values"} if case.values else set()) | ({"heads"} if case.heads > 1 else set())
    if case.operator == "catalogue_cross_entropy":
        options |= {"targets"} if case.targets in ("several", "weighted") else set()
        options |= {"target_csr"} if case.targets.startswith("csr") else set()
        if case.negatives:
            operator = operator.replace("catalogue_", "catalogue_sampled_")
            options |= {"own_negatives"} if "own" in case.negatives else set()
            options |= {"negatives_log_q"} if "corrected" in case.negatives else set()
        else:
            options |= {"label_smoothing"} if case.smoothing else set()
            options |= {"smoothing_prior"} if case.smoothing == "prior" else set()
    return Spec(operator, "cpu", dtype, (case.width,), frozenset(options))


# What is run: floating results, and ids. The truth takes the same keywords.


def _attention(**keywords: Any) -> tuple[Tensor, ...]:
    context, lse = sf.catalogue_attention(**keywords, return_lse=True)
    return context, lse.reshape(*context.shape[:-1], keywords["num_heads"])


def _cross_entropy(**keywords: Any) -> tuple[Tensor, ...]:
    loss, lse = sf.catalogue_cross_entropy(**keywords, reduction="none", return_lse=True)
    return loss, lse


PUBLIC: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "catalogue_attention": _attention,
    "catalogue_cross_entropy": _cross_entropy,
    "catalogue_topk": lambda **keywords: tuple(sf.catalogue_topk(**keywords)),
    "catalogue_rank": lambda **keywords: (sf.catalogue_rank(**keywords),),
}
NAIVE: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "catalogue_attention": suite.naive_attention,
    "catalogue_cross_entropy": suite.naive_cross_entropy,
    "catalogue_topk": suite.naive_topk,
    "catalogue_rank": lambda **keywords: (suite.naive_rank(**keywords),),
}


def reversed_sums(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The same function, whose products are summed from the other end."""

    def run(query: Tensor, num_heads: int = 1, **keywords: Any) -> tuple[Tensor, ...]:
        def flip(tensor: Tensor) -> Tensor:
            return tensor.unflatten(-1, (num_heads, -1)).flip(-1).flatten(-2) if tensor.numel() else tensor

        name = "keys" if "keys" in keywords else "items"
        given = keywords | {name: flip(keywords[name])}
        if name == "keys":
            given |= {"num_heads": num_heads}
            if keywords["values"] is None:
                given["values"] = keywords["keys"]
        return function(query=flip(query), **given)

    return run


def results_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], keywords: Keywords
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The results, and the gradient of Σ result·seed for every floating tensor.

    The seeds are eighths, which every dtype can hold.
    """
    leaves = {
        name: keywords[name].detach().clone().requires_grad_()
        for name in DIFFERENTIABLE
        if isinstance(keywords.get(name), Tensor)
    }
    results = function(**keywords | leaves)
    generator = torch.Generator().manual_seed(7)
    pairs = []
    for result in results:
        seed = torch.randint(-8, 9, result.shape, generator=generator) / 8
        if result.requires_grad:
            pairs.append((result, seed.to(result.dtype)))
    if not pairs:
        return results, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    outputs, seeds = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), seeds, allow_unused=True, materialize_grads=True)
    return tuple(result.detach() for result in results), dict(zip(leaves, found, strict=True))


# The cases. Sizes cross the edges of vectors and tiles: 0, 1, a prime, 12 ± 1, 16 ± 1, 64 ± 1, 256 + 1.

SIZES = [(0, 5), (3, 0), (1, 1), (1, 257), (15, 13), (16, 12), (17, 11), (2, 64), (3, 63), (4, 65)]
WIDTHS = [1, 7, 16, 33, 64]
EVERYTHING = ("row_scale", "dead_items", "exclude")
NASTY_TABLES = [name for name in suite.TABLES if name != "gaussian"]


def _shared_cases(operator: str) -> list[Case]:
    cases = [Case(operator, "plain")]
    cases += [Case(operator, option, options=(option,)) for option in OPTIONS]
    cases += [Case(operator, "everything", options=EVERYTHING)]
    cases += [Case(operator, "everything_csr", options=("scale", "dead_items", "exclude_csr"))]
    for sizes in [(rows, items, 8) for rows, items in SIZES] + [(3, 41, width) for width in WIDTHS]:
        name = "x".join(map(str, sizes))
        cases.append(Case(operator, name, *sizes, dtypes=(torch.float32, torch.bfloat16)))
        cases.append(Case(operator, f"{name}_everything", *sizes, options=EVERYTHING, dtypes=(torch.float32,)))
    cases += [Case(operator, table, table=table) for table in NASTY_TABLES]
    cases += [Case(operator, f"{table}_everything", table=table, options=EVERYTHING) for table in NASTY_TABLES]
    cases += [Case(operator, f"query_{query}", query=query) for query in QUERIES if query != "normal"]
    return cases


ATTENTION = [
    *_shared_cases("catalogue_attention"),
    Case("catalogue_attention", "values", values=5),
    Case("catalogue_attention", "values_everything", values=17, options=EVERYTHING),
    Case("catalogue_attention", "heads", heads=4),
    Case("catalogue_attention", "heads_values_everything", heads=2, values=6, options=EVERYTHING),
    Case("catalogue_attention", "heads_of_width_1", heads=8, values=8),
]
LISTS = ("several", "weighted", "csr", "csr_weighted")
NEGATIVES = ("shared", "own", "shared_corrected", "own_corrected")
CROSS_ENTROPY = [
    *_shared_cases("catalogue_cross_entropy"),
    *(Case("catalogue_cross_entropy", targets, targets=targets) for targets in LISTS),
    *(Case("catalogue_cross_entropy", f"{targets}_everything", targets=targets, options=EVERYTHING) for targets in LISTS),
    *(Case("catalogue_cross_entropy", f"smoothing_{kind}", smoothing=kind) for kind in ("uniform", "prior")),
    Case("catalogue_cross_entropy", "smoothing_prior_everything", smoothing="prior", options=EVERYTHING),
    Case("catalogue_cross_entropy", "smoothing_several", smoothing="uniform", targets="several", options=("exclude_csr",)),
    Case("catalogue_cross_entropy", "smoothing_shared", smoothing="prior", options=("exclude_shared",)),
    *(Case("catalogue_cross_entropy", f"negatives_{kind}", negatives=kind) for kind in NEGATIVES),
    *(Case("catalogue_cross_entropy", f"negatives_{kind}_everything", negatives=kind, options=EVERYTHING) for kind in NEGATIVES),
    Case("catalogue_cross_entropy", "negatives_smoothing", negatives="own", smoothing="prior", targets="weighted"),
    Case("catalogue_cross_entropy", "negatives_csr", negatives="shared", targets="csr", options=("exclude_csr",)),
    Case("catalogue_cross_entropy", "negatives_duplicated", negatives="own", table="duplicated"),
    Case("catalogue_cross_entropy", "negatives_huge_and_tiny", negatives="shared", table="huge_and_tiny"),
]  # fmt: skip
TOPK = [
    *_shared_cases("catalogue_topk"),
    *(Case("catalogue_topk", f"k_{k}", k=k, options=EVERYTHING) for k in (1, 36, 37, 64)),
    Case("catalogue_topk", "k_257_of_257", rows=2, items=257, k=257, table="few_values"),
]
RANK = _shared_cases("catalogue_rank")
CASES = [*ATTENTION, *CROSS_ENTROPY, *TOPK, *RANK]
