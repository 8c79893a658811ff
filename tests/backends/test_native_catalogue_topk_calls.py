"""The native CPU ``catalogue_topk``: bad input, and what takes a process of its own (tiers chosen by torch, memory)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from processes import run
from topk_cases import random_case

from seqrec_fast import _native

if _native.MISSING is not None:
    pytest.skip(f"no native library: {_native.MISSING}", allow_module_level=True)

HIGHEST_TIER = torch.ops.seqrec_fast_native.highest_cpu_tier.default()


# Errors: before any work, as the built-in types.


@pytest.mark.parametrize("wrong", [-2, 50, -(2**40), 2**33])
@pytest.mark.parametrize("row", [1, 2])
def test_excluded_out_of_range(wrong: int, row: int) -> None:
    case = random_case(4, 50, 6, 3)
    exclude = torch.full((4, 30), -1)
    exclude[row, 17] = wrong
    message = rf"catalogue_topk: exclude must hold item ids in 0…49, or -1 for padding, got {wrong}"
    with pytest.raises(IndexError, match=message):
        replace(case, exclude=exclude).native()
    with pytest.raises(IndexError, match=message):
        replace(case, exclude=exclude[row]).native()
    crow = torch.tensor([0, 0, 1, 2, 2])
    columns = torch.tensor([wrong, 3] if row == 1 else [3, wrong])
    with pytest.raises(IndexError, match=rf"exclude must hold item ids in 0…49, got {wrong}"):
        replace(case, exclude=columns, crow=crow).native()


def test_excluded_from_an_empty_catalogue() -> None:
    case = random_case(2, 0, 6, 3)
    with pytest.raises(IndexError, match="exclude must hold item ids in an empty catalogue"):
        replace(case, exclude=torch.zeros(2, 1, dtype=torch.int64)).native()


def test_padding_is_not_an_id_in_csr() -> None:
    case = replace(random_case(2, 50, 6, 3), exclude=torch.tensor([-1]), crow=torch.tensor([0, 1, 1]))
    with pytest.raises(IndexError, match="got -1"):
        case.native()


def test_shapes_and_types() -> None:
    case = random_case(4, 50, 6, 3)
    wrong = [
        replace(case, query=case.query[:, :5]),
        replace(case, k=0),
        replace(case, k=-1),
        replace(case, items=case.items.double()),
        replace(case, bias=torch.zeros(49)),
        replace(case, bias=torch.zeros(50).double()),
        replace(case, row_scale=torch.zeros(5)),
        replace(case, exclude=torch.zeros(3, 2, dtype=torch.int64)),
        replace(case, exclude=torch.zeros(4, 2)),
        replace(case, exclude=torch.tensor([1]), crow=torch.tensor([0, 1])),
        replace(case, exclude=torch.tensor([1]), crow=torch.tensor([0, 1, 0, 1, 1])),
        replace(case, exclude=torch.tensor([1]), crow=torch.tensor([0, 1, 1, 1, 2])),
        replace(case, query=case.query.long(), items=case.items.long()),
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match="catalogue_topk: "):
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
arguments = normal(77, 48), items, 60, 1.25, normal(77), normal(4001)
exclude = torch.from_numpy(draw.integers(-1, 4001, (77, 40)))
best = torch.ops.seqrec_fast_native.catalogue_topk(*arguments, exclude, None)
digest = hashlib.sha256(b"".join(result.numpy().tobytes() for result in best)).hexdigest()
print(_native.CPU_TIER, torch.get_num_threads(), digest)
"""


def test_same_results_in_every_tier_and_thread_count() -> None:
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
query, items = torch.randn(512, 32), torch.randn(100_000, 32)
topk = torch.ops.seqrec_fast_native.catalogue_topk
options = 1.0, None, None, torch.zeros(512, 20, dtype=torch.int64), None
topk(query[:2], items[:10], 2, 1.0, None, None, None, None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
topk(query, items, 100, *options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(run(code)[0]) < 16 << 10  # KiB
