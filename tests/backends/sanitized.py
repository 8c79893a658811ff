"""Programs of kernels under AddressSanitizer and UndefinedBehaviorSanitizer, one for each CPU tier this processor runs."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from seqrec_fast import _native

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
TIERS = {"default": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"]}
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


def runs_here(tier: str) -> bool:
    if tier == "default":
        return True
    if _native.MISSING is None:
        highest = torch.ops.seqrec_fast_native.highest_cpu_tier.default()
        return platform.machine() in ("x86_64", "AMD64") and _native.TIERS.index(tier) <= highest
    return False


def build(folder: Path, kernels: list[Path], main: str) -> dict[str, Path]:
    """The program of every tier that runs here, compiled side by side: each may take a minute."""
    if COMPILER is None:
        pytest.skip("g++ is not installed")
    built = {tier: folder / tier for tier in TIERS if runs_here(tier)}
    sources = [str(source) for source in (*kernels, Path(__file__).with_name(main))]
    compilers = []
    for tier, program in built.items():
        defines = [f"-DSEQREC_TIER=tier_{tier}", f"-I{ROOT / 'csrc'}"]
        compilers.append(subprocess.Popen([COMPILER, *FLAGS, *TIERS[tier], *defines, *sources, "-o", str(program)]))
    assert [compiler.wait() for compiler in compilers] == [0] * len(compilers)
    return built


def check(tier: str, programs: dict[str, Path], calls: int) -> None:
    """The program makes its calls without a word; with an array a value short it is stopped."""
    if tier not in programs:
        pytest.skip(f"this processor does not run {tier}")
    program = str(programs[tier])
    clean = subprocess.run([program], capture_output=True, text=True)
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, f"{calls}\n", "")

    planted = subprocess.run([program, "one value short"], capture_output=True, text=True)
    assert planted.returncode != 0
    assert "AddressSanitizer" in planted.stderr
