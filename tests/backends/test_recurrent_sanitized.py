"""The recurrent kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in every CPU tier this processor can run."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
TIERS = {"default": [], "avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}
# -O0 compiles in a quarter of the time, and the accesses are the same.
FLAGS = [
    "-O0",
    "-g1",
    "-std=c++20",
    "-ffp-contract=off",
    "-Wno-psabi",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
@pytest.mark.parametrize("tier", list(TIERS))
def test_kernels_stay_within_their_arrays(tier: str, tmp_path: Path) -> None:
    capability = {"AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
    if list(TIERS).index(tier) > capability or (tier != "default" and platform.machine() not in ("x86_64", "AMD64")):
        pytest.skip(f"this processor does not run {tier}")
    program = tmp_path / "sanitized"
    kernels = sorted((ROOT / "csrc" / "recurrent").glob("tier*.cpp"))
    sources = [*kernels, Path(__file__).with_name("recurrent_sanitized.cpp")]
    defines = [f"-DSEQREC_TIER=tier_{tier}", f"-I{ROOT / 'csrc'}"]
    command = [str(COMPILER), *FLAGS, *TIERS[tier], *defines, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)

    clean = subprocess.run([str(program)], capture_output=True, text=True)
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "544\n", "")

    planted = subprocess.run([str(program), "one value short"], capture_output=True, text=True)
    assert planted.returncode != 0
    assert "AddressSanitizer" in planted.stderr
