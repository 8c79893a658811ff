"""Whole sequences by matrix tiles (AMX), emulated, against the same by lanes: forward and backward, LSTM and GRU."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
FLAGS = ["-O1", "-std=c++20", "-ffp-contract=off", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
TIERS = {"amx": [*AVX512, "-mavx512bf16", "-DSEQREC_EMULATED_TILES"], "avx512": AVX512}
# Of the largest number of a result. 16-bit results are rounded on both sides, and what is rounded enters the next step.
BOUND = {"highest": 3e-6, "high": 5e-5, "medium": 3e-2, "bf16": 3e-2, "fp16": 4e-3}


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
def test_tiles_agree_with_lanes(tmp_path: Path) -> None:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("the conversions to bf16 need a processor with avx512_bf16")
    objects = [tmp_path / f"{tier}.o" for tier in TIERS]
    source = ROOT / "csrc" / "recurrent" / "tier_sequence.cpp"
    compilers = [
        subprocess.Popen(
            [str(COMPILER), *FLAGS, *flags, f"-DSEQREC_TIER=tier_{tier}", "-c", str(source), "-o", str(to)]
        )
        for (tier, flags), to in zip(TIERS.items(), objects, strict=True)
    ]
    assert [compiler.wait() for compiler in compilers] == [0, 0]
    program = tmp_path / "sequence_tiles"
    main = Path(__file__).with_name("sequence_tiles.cpp")
    subprocess.run([str(COMPILER), *FLAGS, "-mf16c", str(main), *map(str, objects), "-o", str(program)], check=True)

    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 24 * len(BOUND)
    for line in lines:
        arithmetic, *differences, rows = line.split()
        assert max(map(float, differences)) < BOUND[arithmetic], line
        assert rows == "alike", line  # a row's bits do not depend on the rows beside it
    # The three precisions are three: fewer products differ more.
    named = [line.split() for line in lines]
    highest, high, medium = (
        sorted(float(line[1]) for line in named if line[0] == name)[12] for name in list(BOUND)[:3]
    )
    assert highest < high / 5 < medium / 500
