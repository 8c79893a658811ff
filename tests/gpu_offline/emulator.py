"""Builds the module that runs CUDA kernels on the CPU, and calls it with torch tensors.

Three builds share one Ninja file under build/emulator: plain; sanitized (AddressSanitizer and UBSan, for a process started with
their libraries preloaded); and mutants of the LSTM step, whose text was changed to hold a defect.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pybind11
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulator"
NAME = "seqrec_fast_emulator"
SCHEDULES = ("lock_step", "greedy", "random")

FLAGS = [
    "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}",
]  # fmt: skip
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _ninja(edges: list[tuple[str, str, list[str], list[str]]], name: str) -> None:
    """Builds edges (rule, output, inputs, flags); only what changed."""
    lines = [
        "rule cxx",
        f"  command = {compiler()} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} -shared $flags $in -o $out",
        "",
    ]
    for rule, output, inputs, flags in edges:
        lines += [f"build {output}: {rule} {' '.join(inputs)}", f"  flags = {' '.join(flags)}", ""]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.ninja").write_text("\n".join(lines))
    command = [sys.executable, "-m", "ninja", "-C", str(FOLDER), "-f", f"{name}.ninja"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulator does not build:\n{done.stdout}\n{done.stderr}")


def _objects(folder: str, flags: list[str], sources: Path) -> list[tuple[str, str, list[str], list[str]]]:
    files = ("machine", "selftest", "recurrent")
    where = sources / "emulator"
    return [
        ("cxx", f"{folder}/{file}.o", [str(where / f"{file}.cpp")], [*FLAGS, f"-I{sources}", *flags]) for file in files
    ]


def build(kind: str) -> Path:
    """The plain or the sanitized module."""
    flags = SANITIZE if kind == "sanitized" else []
    objects = _objects(kind, flags, ROOT / "csrc")
    # The binding code is the same in every build: it is slow to compile, and none of it is under test.
    binding = ("cxx", "module.o", [str(ROOT / "csrc/emulator/module.cpp")], [*FLAGS, f"-I{ROOT / 'csrc'}"])
    module = f"{kind}/{NAME}.so"
    _ninja([binding, *objects, ("link", module, ["module.o", *(edge[1] for edge in objects)], flags)], kind)
    return FOLDER / module


MUTANT = """
#include "emulator/launch.h"
#include "emulator/run.h"
#include "recurrent/choose.cuh"
namespace seqrec_fast::emulator {
void run_lstm_step(const std::string&, const std::string&, const StepArrays& a, const Options& options) {
  using T = bf16;
  const LstmStepArguments<T> arguments{a.batch, a.input, a.projected, a.hidden, (const T*)a.x, (const T*)a.h,
    (const T*)a.c, (const T*)a.w_ih, (const T*)a.w_hh, (const T*)a.b_ih, (const T*)a.b_hh, (T*)a.h_next, (T*)a.c_next, (T*)a.gates};
  launch_tiled<Bf16Product, SmallTile>(arguments, EmulatorLaunch(options));
}
void run_lstm_step_gate_gradients(const std::string&, const GradientArrays&, const Options&) {}
}
"""


def build_mutant(name: str, file: str, text: str, replacement: str) -> Path:
    """A module whose bfloat16 small tile was compiled from sources in which ``text`` of ``file`` became ``replacement``."""
    sources = FOLDER / name / "csrc"
    for part in ("common", "emulator", "recurrent"):
        shutil.copytree(ROOT / "csrc" / part, sources / part, dirs_exist_ok=True)
    original = (sources / file).read_text()
    assert original.count(text) == 1, f"{file} has {original.count(text)} places to put the defect {name}"
    (sources / file).write_text(original.replace(text, replacement))
    (sources / "mutant.cpp").write_text(MUTANT)
    module = f"{name}/{NAME}.so"
    parts = ["module.o", "plain/machine.o", "plain/selftest.o"]
    _ninja(
        [
            ("cxx", f"{name}/mutant.o", [str(sources / "mutant.cpp")], [*FLAGS, f"-I{sources}"]),
            ("link", module, [*parts, f"{name}/mutant.o"], []),
        ],
        name,
    )
    return FOLDER / module


def load(path: Path) -> ModuleType:
    # A name of its own for every build: pybind11 keeps one module a name.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{NAME}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitized_environment() -> dict[str, str]:
    """What a process needs in its environment to import the sanitized module."""
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        done = subprocess.run([str(compiler()), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        libraries.append(done.stdout.strip())
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SEQREC_FAST_EMULATOR": "sanitized",
    }


def array(tensor: Tensor | None) -> np.ndarray | None:
    """A tensor's memory as numpy sees it; 16-bit types as integers, since numpy has no bfloat16."""
    if tensor is None:
        return None
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()


@dataclass(frozen=True)
class Step:
    """The arguments of lstm_step."""

    x: Tensor  # [B, I]
    h: Tensor  # [B, P]
    c: Tensor  # [B, H]
    w_ih: Tensor  # [4H, I]
    w_hh: Tensor  # [4H, P]
    b_ih: Tensor | None  # [4H]
    b_hh: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.x.shape[0], self.x.shape[1], self.h.shape[1], self.c.shape[1]

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.h, self.c, self.w_ih, self.w_hh, self.b_ih, self.b_hh

    def to(self, dtype: torch.dtype) -> Step:
        return Step(*(None if t is None else t.to(dtype) for t in self.tensors()))


@dataclass(frozen=True)
class Run:
    """How a kernel is run."""

    product: str
    form: str = "auto"
    schedule: str = "greedy"
    seed: int = 0
    save_gates: bool = True


def lstm_step(module: ModuleType, step: Step, how: Run) -> tuple[Tensor, Tensor, Tensor | None]:
    """h', c' and gates (None unless saved), filled with NaN before, so that nothing unwritten passes."""
    h_next, c_next = torch.full_like(step.c, torch.nan), torch.full_like(step.c, torch.nan)
    gates = step.c.new_full((step.c.shape[0], 4 * step.c.shape[1]), torch.nan) if how.save_gates else None
    arrays = [array(t) for t in (*step.tensors(), h_next, c_next, gates)]
    module.lstm_step(
        how.product, step.sizes, module.StepTensors(*arrays), form=how.form, schedule=how.schedule, seed=how.seed
    )
    return h_next, c_next, gates


def gate_gradients(
    module: ModuleType, dtype: str, tensors: list[Tensor], schedule: str, seed: int
) -> tuple[Tensor, Tensor]:
    """(dz [B, 4H], dc [B, H]) from grad_h, grad_c, c, c_next [B, H] and gates [B, 4H]."""
    dz, dc = torch.full_like(tensors[4], torch.nan), torch.full_like(tensors[0], torch.nan)
    arrays = [array(t) for t in (*tensors, dz, dc)]
    rows, hidden = tensors[0].shape
    module.lstm_step_gate_gradients(dtype, rows, hidden, module.GradientTensors(*arrays), schedule=schedule, seed=seed)
    return dz, dc
