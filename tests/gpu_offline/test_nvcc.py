"""Every CUDA kernel compiles for every architecture of the wheel, without a spill, within its registers and shared memory, and
into the instructions that were promised."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import nvcc as cuda
from .nvcc import REGISTERS, SHARED_LIMIT, Kernel

pytestmark = [
    pytest.mark.skipif(cuda.nvcc() is None, reason="nvcc was not found (on PATH, or under CUDA_HOME)"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="binutils' c++filt was not found"),
]

TABLE_RELEASE = "13.0"  # of nvcc, with which the registers below were read


@dataclass(frozen=True)
class Promise:
    registers: dict[str, int]  # at most, a thread; read with nvcc of TABLE_RELEASE
    instructions: tuple[str, ...]  # the code has each
    threads: int = 128  # a block
    blocks: int = 1  # whose registers must fit a multiprocessor together
    shared: int = 0  # dynamic, a block


SMALL, MEDIUM, LARGE = "16, 16, 16, 4, 4", "64, 32, 64, 3, 2", "128, 32, 64, 3, 2"
# 16 bytes of global memory go to shared memory without a register.
PIPELINE = ("LDGSTS.E.BYPASS.128", "LDGDEPBAR")


def tiled(product: str, tile: str, sm_80: int, sm_90a: int) -> tuple[str, Promise]:
    multiply = {
        "Bf16Product": ("HMMA.16816.F32.BF16", "LDSM.16.M88.4"),
        "F16Product": ("HMMA.16816.F32", "LDSM.16.M88.4"),
        "Tf32Product": ("HMMA.1688.F32.TF32", "LDSM.16.M88.4"),
        "F32Product": ("FFMA", "LDS.128"),
    }[product]
    rows, units, warp_rows, stages, blocks = map(int, tile.split(", "))
    return f"lstm_step_tiled<{product}, StepTile<{tile}>>", Promise(
        {"sm_80": sm_80, "sm_90a": sm_90a},
        (*multiply, *PIPELINE),
        threads=32 * (units // 8) * (rows // warp_rows),
        blocks=blocks,
        shared=stages * (rows + 4 * units) * 128,
    )


def streamed(element: str, rows: int, sm_80: int, sm_90a: int) -> tuple[str, Promise]:
    # Four blocks of four warps a multiprocessor keep the bytes in flight that the memory's latency asks for.
    promise = Promise({"sm_80": sm_80, "sm_90a": sm_90a}, ("LDG.E.128", "SHFL.BFLY"), blocks=4)
    return f"lstm_step_streamed<{element}, {rows}>", promise


def gradients(element: str, vector: int, sm_80: int, sm_90a: int) -> tuple[str, Promise]:
    width = {("float", 4): ".128", ("float", 1): "", ("f16", 4): ".64", ("bf16", 4): ".64"}.get(
        (element, vector), ".U16"
    )
    promise = Promise({"sm_80": sm_80, "sm_90a": sm_90a}, (f"LDG.E{width}", f"STG.E{width}"), threads=256, blocks=6)
    return f"lstm_step_gate_gradients<{element}, {vector}>", promise


# Every instance of csrc/recurrent/kernels.cuh that csrc/recurrent/choose.cuh can choose. nvcc says nothing about a template that
# nobody instantiates.
INSTANCES = dict(
    [
        tiled("Bf16Product", SMALL, 76, 76),
        tiled("Bf16Product", MEDIUM, 141, 139),
        tiled("Bf16Product", LARGE, 127, 127),
        tiled("F16Product", SMALL, 76, 76),
        tiled("F16Product", MEDIUM, 141, 139),
        tiled("F16Product", LARGE, 127, 127),
        tiled("Tf32Product", SMALL, 74, 85),
        tiled("Tf32Product", MEDIUM, 126, 133),
        tiled("Tf32Product", LARGE, 128, 128),
        tiled("F32Product", SMALL, 80, 83),
        tiled("F32Product", MEDIUM, 152, 168),
        tiled("F32Product", LARGE, 128, 128),
        streamed("float", 1, 64, 64),
        streamed("float", 4, 88, 80),
        streamed("float", 16, 119, 119),
        streamed("f16", 1, 72, 72),
        streamed("f16", 4, 96, 96),
        streamed("f16", 16, 127, 127),
        streamed("bf16", 1, 72, 72),
        streamed("bf16", 4, 96, 96),
        streamed("bf16", 16, 127, 128),
        gradients("float", 1, 27, 28),
        gradients("float", 4, 40, 40),
        gradients("f16", 1, 26, 26),
        gradients("f16", 4, 34, 32),
        gradients("bf16", 1, 24, 22),
        gradients("bf16", 4, 32, 32),
    ]
)
ARCHITECTURES = sorted(SHARED_LIMIT)


def instance_source() -> str:
    """Explicit instantiations of everything in INSTANCES."""
    lines = ['#include "recurrent/choose.cuh"', "using namespace seqrec_fast;"]
    for name in INSTANCES:
        family, first = re.match(r"(\w+)<(\w+)", name).groups()  # type: ignore[union-attr]
        element = f"{first}::Element" if family == "lstm_step_tiled" else first
        arguments = "LstmStepBackwardArguments" if family == "lstm_step_gate_gradients" else "LstmStepArguments"
        lines.append(f"template __global__ void seqrec_fast::{name}({arguments}<{element}>);")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def source() -> Path:
    cuda.FOLDER.mkdir(parents=True, exist_ok=True)
    path = cuda.FOLDER / "lstm_step_instances.cu"
    path.write_text(instance_source())
    return path


@pytest.fixture(scope="module")
def built(source: Path) -> dict[str, dict[str, Kernel]]:
    """By architecture and template id: every kernel's report and, where nvdisasm is at hand, its machine code."""
    with ThreadPoolExecutor(2) as pool:
        made = dict(
            zip(ARCHITECTURES, pool.map(lambda a: cuda.compile_to("cubin", a, source), ARCHITECTURES), strict=True)
        )
    result = {}
    for arch, (cubin, report) in made.items():
        result[arch] = cuda.read_report(report)
        if cuda.binary_tool("nvdisasm"):
            for name, code in cuda.read_code(cubin).items():
                result[arch][name].code = code
    return result


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_instance_was_compiled(built: dict[str, dict[str, Kernel]], arch: str) -> None:
    assert set(built[arch]) == set(INSTANCES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", INSTANCES)
def test_resources(built: dict[str, dict[str, Kernel]], name: str, arch: str) -> None:
    kernel, promise = built[arch][name], INSTANCES[name]
    assert kernel.stack == 0
    assert kernel.spills == 0
    assert kernel.shared == 0  # all shared memory is dynamic
    assert promise.shared <= SHARED_LIMIT[arch]
    # Registers are dealt out by eights to a thread.
    assert -(-kernel.registers // 8) * 8 * promise.threads * promise.blocks <= REGISTERS
    if cuda.release() == TABLE_RELEASE:
        assert kernel.registers <= promise.registers[arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", INSTANCES)
def test_instructions(built: dict[str, dict[str, Kernel]], name: str, arch: str) -> None:
    if cuda.binary_tool("nvdisasm") is None:
        pytest.skip("nvdisasm was not found (on PATH, or in the Triton wheel)")
    found = set(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", built[arch][name].code))
    missing = [wanted for wanted in INSTANCES[name].instructions if wanted not in found]
    assert not missing, f"of {sorted(found)}"
    assert not [op for op in found if op.startswith(("LDL", "STL"))]  # local memory
    if "F32Product" in name:
        assert not [op for op in found if op.startswith("HMMA")]


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_ptx_serves_newer_gpus(source: Path, arch: str) -> None:
    """The compute_80 PTX of the wheel is what the driver compiles for a GPU that has no code of its own in it."""
    ptx, _ = cuda.compile_to("ptx", "compute_80", source)
    assert ".target sm_80" in ptx.read_text()
    kernels = cuda.read_report(cuda.assemble(ptx, arch))
    assert set(kernels) == set(INSTANCES)
    assert {
        name: (kernel.stack, kernel.spills) for name, kernel in kernels.items() if kernel.stack or kernel.spills
    } == {}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_library_holds_these_kernels_and_no_other(arch: str) -> None:
    libraries = list((cuda.ROOT / "seqrec_fast").glob("_C*.so"))
    if cuda.binary_tool("cuobjdump") is None:
        pytest.skip("cuobjdump was not found (on PATH, or in the Triton wheel)")
    kernels = cuda.resources_of_library(libraries[0], arch) if libraries else {}
    if not kernels:
        pytest.skip("the library was not built, or without CUDA")
    assert {name for name in kernels if name.startswith("lstm_step")} == set(INSTANCES)
