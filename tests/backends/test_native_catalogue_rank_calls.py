"""The native CPU ``catalogue_rank``: bad input, and what takes a process of its own (tiers chosen by torch, memory)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from processes import run
from rank_cases import IGNORE, Case, random_case

from seqrec_fast import _native

if _native.MISSING is not None:
    pytest.skip(f"no native library: {_native.MISSING}", allow_module_level=True)

HIGHEST_TIER = torch.ops.seqrec_fast_native.highest_cpu_tier.default()


# Errors: before any work, as the built-in types.


@pytest.mark.parametrize("target", [-1, 50, -(2**40), 2**40])
def test_target_out_of_range(target: int) -> None:
    case = random_case(4, 50, 6)
    ids = case.target.clone()
    ids[2] = target
    with pytest.raises(IndexError, match=rf"target must hold item ids in 0…49, got {target}"):
        replace(case, target=ids).native()


def test_target_in_an_empty_catalogue() -> None:
    with pytest.raises(IndexError, match="target must hold item ids in an empty catalogue"):
        Case(torch.randn(2, 4), torch.randn(0, 4), target=torch.zeros(2, dtype=torch.int64)).native()


@pytest.mark.parametrize("wrong", [-2, 50, -(2**40), 2**33])
@pytest.mark.parametrize("row", [1, 2])
def test_excluded_out_of_range(wrong: int, row: int) -> None:
    case = random_case(4, 50, 6)
    target = case.target.clone()
    target[2] = IGNORE  # ids of a row that is not ranked are checked too
    exclude = torch.full((4, 30), -1)
    exclude[row, 17] = wrong
    message = rf"exclude must hold item ids in 0…49, or -1 for padding, got {wrong}"
    with pytest.raises(IndexError, match=message):
        replace(case, target=target, exclude=exclude).native()
    with pytest.raises(IndexError, match=message):
        replace(case, exclude=exclude[row]).native()
    crow = torch.tensor([0, 0, 1, 2, 2])
    columns = torch.tensor([wrong, 3] if row == 1 else [3, wrong])
    with pytest.raises(IndexError, match=rf"exclude must hold item ids in 0…49, got {wrong}"):
        replace(case, target=target, exclude=columns, crow=crow).native()


def test_padding_is_not_an_id_in_csr() -> None:
    case = replace(random_case(2, 50, 6), exclude=torch.tensor([-1]), crow=torch.tensor([0, 1, 1]))
    with pytest.raises(IndexError, match="got -1"):
        case.native()


def test_shapes_and_types() -> None:
    case = random_case(4, 50, 6)
    wrong = [
        replace(case, query=case.query[:, :5]),
        replace(case, target=case.target[:3]),
        replace(case, target=case.target.int()),
        replace(case, items=case.items.double()),
        replace(case, bias=torch.zeros(49)),
        replace(case, row_scale=torch.zeros(5)),
        replace(case, exclude=torch.zeros(3, 2, dtype=torch.int64)),
        replace(case, exclude=torch.zeros(4, 2)),
        replace(case, exclude=torch.tensor([1]), crow=torch.tensor([0, 1])),
        replace(case, exclude=torch.tensor([1]), crow=torch.tensor([0, 1, 0, 1, 1])),
        replace(case, exclude=torch.tensor([1]), crow=torch.tensor([0, 1, 1, 1, 2])),
        replace(case, query=case.query.long(), items=case.items.long()),
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match="catalogue_rank: "):
            bad.native()


# In processes of their own.

# numpy's generator: torch's normal numbers depend on the CPU tier.
FINGERPRINT = """
import hashlib
import numpy, torch
from seqrec_fast import _native
draw = numpy.random.default_rng(1)
normal = lambda *shape: torch.from_numpy(draw.standard_normal(shape, dtype=numpy.float32))
items = normal(4001, 48)
items[2000:4000] = items[:2000] * torch.from_numpy(1 + 2.0**-23 * draw.integers(-1, 2, (2000, 1)))
arguments = normal(77, 48), items, torch.from_numpy(draw.integers(0, 4001, 77)), 1.25, normal(77), normal(4001)
exclude = torch.from_numpy(draw.integers(-1, 4001, (77, 40)))
rank = torch.ops.seqrec_fast_native.catalogue_rank(*arguments, exclude, None, -100)
digest = hashlib.sha256(rank.numpy().tobytes()).hexdigest()
print(_native.CPU_TIER, torch.get_num_threads(), digest)
"""


def test_same_ranks_in_every_tier_and_thread_count() -> None:
    here: dict[str, str] = {}
    exec(FINGERPRINT, here)
    for tier, capability in (("default", "default"), ("avx2", "avx2")):
        if _native.TIERS.index(tier) <= HIGHEST_TIER:
            found = run(FINGERPRINT, ATEN_CPU_CAPABILITY=capability, OMP_NUM_THREADS="2")
            assert found == [tier, "2", here["digest"]]


def test_memory_does_not_grow_with_the_catalogue() -> None:
    """512 × 10⁵ scores would be 200 MB in fp32."""
    code = """
import resource, torch
from seqrec_fast import _native
query, items, target = torch.randn(512, 32), torch.randn(100_000, 32), torch.zeros(512, dtype=torch.int64)
rank = torch.ops.seqrec_fast_native.catalogue_rank
options = 1.0, None, None, torch.zeros(512, 20, dtype=torch.int64), None, -100
rank(query[:2], items[:10], target[:2], 1.0, None, None, None, None, -100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rank(query, items, target, *options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(run(code)[0]) < 16 << 10  # KiB
