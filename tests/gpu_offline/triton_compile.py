"""Compiles a Triton kernel for a GPU that is not here, and reads back what ptxas made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory a block may have, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTION = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma")


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int
    shared: int
    matrix_instructions: frozenset[str]


def compile_for(
    kernel: triton.JITFunction,
    arch: int,
    signature: dict[str, str],
    constants: dict[str, object],
    *,
    num_warps: int,
    num_stages: int,
) -> Compiled:
    """``signature``: argument → Triton type ("*fp32", "i32"); pointers are taken as 16-byte aligned, as torch allocates them."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {
        (position,): [["tt.divisibility", 16]] for position, name in enumerate(names) if types[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(
        registers, stack, compiled.metadata.shared, frozenset(MATRIX_INSTRUCTION.findall(compiled.asm["ptx"]))
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) a thread, by the cuobjdump inside the Triton wheel. A spill is a stack that is not 0."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout + report.stderr)
    assert found, report.stdout + report.stderr
    return int(found.group(1)), int(found.group(2))
