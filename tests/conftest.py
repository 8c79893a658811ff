"""Shared by every test: one thread count, fixed seeds, and where the real data lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seqrec_fast import _native

native = torch.ops.seqrec_fast_native
TIERS = _native.TIERS[: native.highest_cpu_tier.default() + 1] if _native.MISSING is None else ()
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """The same random numbers whatever ran before, and torch's global switches as they were."""
    torch.manual_seed(0)
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(_fixed_seed: None) -> None:
    """For tests of many tiny operations, where waking a second thread costs a hundred times the work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real interaction files, which may not be redistributed; tests that want it skip without it."""
    folder = Path(os.environ.get("SEQREC_FAST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data is not here (looked in {folder}; set SEQREC_FAST_DATA)")
    return folder


@pytest.fixture(params=range(len(TIERS)), ids=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[int]:
    """The test runs in this CPU tier of the compiled library, of those that this processor has."""
    native.set_cpu_tier.default(request.param)
    yield request.param
    native.set_cpu_tier.default(_native.TIERS.index(_native.CPU_TIER))
