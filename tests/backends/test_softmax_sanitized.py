"""The softmax kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in every CPU tier this processor can run."""

from __future__ import annotations

from pathlib import Path

import pytest
from sanitized import ROOT, TIERS, build, check


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kernels = sorted((ROOT / "csrc" / "catalogue").glob("tier_softmax.cpp"))
    return build(tmp_path_factory.mktemp("sanitized"), kernels, "softmax_sanitized.cpp")


@pytest.mark.parametrize("tier", list(TIERS))
def test_kernels_stay_within_their_arrays(tier: str, programs: dict[str, Path]) -> None:
    check(tier, programs, calls=108)
