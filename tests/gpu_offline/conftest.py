"""The emulator of CUDA kernels, built once for all tests."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

from . import emulator as builder


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """The module seqrec_fast_emulator. In a process that was started for it, the build with the sanitizers."""
    if builder.compiler() is None:
        pytest.skip("the emulator needs g++ (or CXX), and none was found")
    return builder.load(builder.build(os.environ.get("SEQREC_FAST_EMULATOR", "plain")))
