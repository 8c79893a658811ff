"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in every CPU tier this processor can run."""

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


# A family of kernels: the files, the program that calls them, and how many calls it makes.
FAMILIES = {
    "recurrent": ("csrc/recurrent/tier*.cpp", "recurrent_sanitized.cpp", 544),
    "softmax": ("csrc/catalogue/tier_softmax.cpp", "softmax_sanitized.cpp", 108),
}


@pytest.fixture(scope="module", params=FAMILIES)
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], int]:
    kernels, main, calls = FAMILIES[request.param]
    return build(tmp_path_factory.mktemp(request.param), sorted(ROOT.glob(kernels)), main), calls


@pytest.mark.parametrize("tier", list(TIERS))
def test_kernels_stay_within_their_arrays(tier: str, programs: tuple[dict[str, Path], int]) -> None:
    """The program makes its calls without a word; with an array a value short it is stopped."""
    built, calls = programs
    if tier not in built:
        pytest.skip(f"this processor does not run {tier}")
    program = str(built[tier])
    clean = subprocess.run([program], capture_output=True, text=True)
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, f"{calls}\n", "")

    planted = subprocess.run([program, "one value short"], capture_output=True, text=True)
    assert planted.returncode != 0
    assert "AddressSanitizer" in planted.stderr
