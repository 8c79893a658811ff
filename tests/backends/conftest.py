"""Every CPU tier of the compiled library that this processor can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from seqrec_fast import _native

native = torch.ops.seqrec_fast_native
TIERS = _native.TIERS[: native.highest_cpu_tier.default() + 1] if _native.MISSING is None else ()


@pytest.fixture(params=range(len(TIERS)), ids=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[int]:
    """The test runs in this one."""
    native.set_cpu_tier.default(request.param)
    yield request.param
    native.set_cpu_tier.default(_native.TIERS.index(_native.CPU_TIER))
