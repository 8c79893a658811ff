"""The masks of csrc/common/philox.h, bit for bit those of the reference, in every CPU tier this processor can run."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from seqrec_fast.backends.reference._philox import dropped

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
TIERS = {"default": ([], 0), "avx2": (AVX2, 1), "avx512": (AVX512, 2)}


@pytest.fixture(scope="module", params=list(TIERS))
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("g++ is not installed")
    flags, needed = TIERS[request.param]
    capability = {"AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
    if needed > capability or (flags and platform.machine() not in ("x86_64", "AMD64")):
        pytest.skip(f"this processor does not run {request.param}")
    path = tmp_path_factory.mktemp("philox") / request.param
    source = str(Path(__file__).with_name("philox.cpp"))
    command = [COMPILER, "-O2", "-std=c++20", "-Wno-psabi", f"-I{ROOT / 'csrc'}", *flags, source, "-o", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize(
    ("seed", "stream", "below", "row", "block", "units"),
    [
        (0, 0, 32768, 0, 0, 1),
        (0x1234_5678_9ABC_DEF0, 24, 19661, 3, 1, 37),
        (2**63 - 1, 7, 1, 2**31 - 1, 12345, 700),  # rare drops, all bits of the key
        (-1, 2, 65535, 250, 2**32 - 1, 33),
        (-(2**63), 9, 65536, 1, 0, 64),  # everything drops
        (42, 9, 0, 1, 0, 64),  # nothing does
    ],
)
def test_masks_are_the_references(
    program: Path, seed: int, stream: int, below: int, row: int, block: int, units: int
) -> None:
    arguments = (seed % 2**64, stream, below, row, block, units)
    printed = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
    expected = dropped(torch.tensor(seed), stream, below / 65536, torch.tensor([row]), block, 1, units)[:, 0]  # [8, U]
    bits = (expected.long() << torch.arange(8)[:, None]).sum(0)
    assert list(bytes.fromhex(printed)) == bits.tolist()
