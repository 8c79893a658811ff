"""Products by matrix tiles (AMX), with the instructions emulated: what the splits into bf16 parts promise, at every edge."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
FLAGS = ["-O1", "-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c"]
# Relative to Σ|a·b|: what is left out, and the roundings of the sum.
BOUND = {1: 2.0**-8, 2: 2.0**-15, 3: 2.0**-23}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("g++ is not installed")
    if platform.machine() not in ("x86_64", "AMD64") or not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("the conversions to bf16 need a processor with avx512_bf16")
    built = tmp_path_factory.mktemp("tiles") / "tiles"
    source = Path(__file__).with_name("tiles.cpp")
    defines = ["-DSEQREC_EMULATED_TILES", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *FLAGS, *AVX512, *defines, str(source), "-o", str(built)], check=True)
    return built


def run(program: Path, *arguments: object) -> tuple[float, int]:
    """(largest relative error, rows whose bits depend on the rows beside them)"""
    text = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=True).stdout
    error, differing = text.split()
    return float(error), int(differing)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 17, 33), (16, 16, 32), (31, 33, 31), (33, 70, 129), (65, 15, 300)])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_error_is_what_the_parts_leave(program: Path, parts: int, size: tuple[int, int, int], layout: str) -> None:
    error, differing = run(program, parts, *size, layout, 1)
    assert error < BOUND[parts]
    assert differing == 0


@pytest.mark.parametrize(("more", "fewer"), [(3, 2), (2, 1)])
def test_more_parts_are_worth_having(program: Path, more: int, fewer: int) -> None:
    size = (33, 70, 129, "rows", 1)
    assert run(program, more, *size)[0] < run(program, fewer, *size)[0] / 20


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "3.4e38", "1e-40", "0"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_special_values_stay_in_their_row(program: Path, parts: int, value: str) -> None:
    """What is not finite, or rounds to an infinite bf16, makes its own results not finite; a denormal number counts as 0."""
    error, differing = run(program, parts, 5, 3, 1, "rows", 1, value)
    assert error < BOUND[parts]
    assert differing == 0


@pytest.mark.parametrize("scale", ["1e-30", "1e30"])
def test_scale_does_not_matter(program: Path, scale: str) -> None:
    assert run(program, 3, 17, 19, 40, "rows", scale)[0] < BOUND[3]
