"""Compiles CUDA kernels for GPUs that are not here, and reads back what nvcc made of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "nvcc"

# Per multiprocessor: CUDA C++ Programming Guide, compute capabilities.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}  # a block
REGISTERS = 65536


def nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc") if home is None else str(Path(home) / "bin" / "nvcc")
    return Path(found) if found and Path(found).exists() else None


def binary_tool(name: str) -> Path | None:
    """cuobjdump or nvdisasm: on PATH, or inside the Triton wheel."""
    found = shutil.which(name)
    if found:
        return Path(found)
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return bundled if bundled.exists() else None


@lru_cache(maxsize=1)
def release() -> str:
    """nvcc's version, "13.0"."""
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    assert found, text
    return found.group(1)


@dataclass
class Kernel:
    """What ptxas says about a kernel, and its machine code."""

    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0  # static
    code: str = ""


def template_id(mangled: str) -> str:
    """``lstm_step_tiled<Bf16Product, StepTile<16, 16, 16, 4, 4>>`` from a mangled kernel name."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = text.removeprefix("void ").replace("seqrec_fast::", "")
    text = text[: text.rindex("(")] if "(" in text else text
    return text.replace("> >", ">>")


def compile_to(form: str, arch: str, source: Path) -> tuple[Path, str]:
    """A cubin or PTX of ``source`` and what ptxas reported. ``form`` is "cubin" or "ptx"."""
    output = FOLDER / f"{source.stem}.{arch}.{form}"
    command = [
        str(nvcc()), "-O3", "-std=c++20", f"-arch={arch}", f"-I{ROOT / 'csrc'}", f"-{form}", "-o", str(output), str(source)
    ]  # fmt: skip
    if form == "cubin":
        command += ["-Xptxas", "-v"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done.stderr


def assemble(ptx: Path, arch: str) -> str:
    """What ptxas reports when it makes ``arch`` code of a PTX file, as the driver does on a GPU newer than our binaries."""
    ptxas = Path(subprocess.run([str(nvcc()), "-dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
                                capture_output=True, text=True).stderr.split("#$ TOP=")[1].splitlines()[0]) / "bin" / "ptxas"  # fmt: skip
    done = subprocess.run(
        [str(ptxas), "-O3", f"-arch={arch}", "-v", "-o", os.devnull, str(ptx)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def read_report(report: str) -> dict[str, Kernel]:
    """By template id. From the lines of ``-Xptxas -v``."""
    kernels: dict[str, Kernel] = {}
    current = Kernel()
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            current = kernels.setdefault(template_id(found.group(1)), Kernel())
        if found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack, current.spills = int(found.group(1)), int(found.group(2)) + int(found.group(3))
        if found := re.search(r"Used (\d+) registers", line):
            current.registers = int(found.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared.group(1)) if shared else 0
    return kernels


def read_code(cubin: Path) -> dict[str, str]:
    """The SASS of every kernel of a cubin, by template id."""
    text = subprocess.run(
        [str(binary_tool("nvdisasm")), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", text, flags=re.MULTILINE)
    return {template_id(name): code for name, code in zip(sections[1::2], sections[2::2], strict=True)}


def resources_of_library(library: Path, arch: str) -> dict[str, int]:
    """Registers of every kernel in a built library, by template id."""
    command = [str(binary_tool("cuobjdump")), "-res-usage", "-arch", arch, str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\S+?):\s*REG:(\d+)", text.stdout + text.stderr)
    return {template_id(name): int(registers) for name, registers in found}
