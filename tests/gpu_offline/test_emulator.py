"""The emulator itself: right kernels give right results under every schedule, planted defects are caught under at least one."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from . import emulator as builder
from .emulator import ROOT, SCHEDULES, build_mutant, load, sanitized_environment

THREADS = 128
TRIPS = 5


def run(
    module: ModuleType, name: str, schedule: str, *, threads: int = THREADS, shared: int | None = None, seed: int = 0
) -> np.ndarray:
    """A kernel that maps ``threads`` elements (pipeline: TRIPS × threads × 4) to as many (pipeline: × 4)."""
    width = 4 if name.startswith("pipeline") else 1
    data = inputs(name, threads)
    out = np.full(threads * width, np.nan, dtype=np.float32)
    shared = (8 if width == 4 else 1) * threads * 4 if shared is None else shared
    module.selftest(name, data, out, blocks=(1, 1), threads=threads, shared_bytes=shared, schedule=schedule, seed=seed)
    return out


def inputs(name: str, threads: int = THREADS) -> np.ndarray:
    trips = TRIPS * 4 if name.startswith("pipeline") else 1
    return np.random.default_rng(0).standard_normal(trips * threads).astype(np.float32)


def expected(name: str) -> np.ndarray:
    data = inputs(name)
    if name.startswith("reverse"):
        return data[::-1]
    return np.roll(data.reshape(TRIPS, THREADS, 4), -32, axis=1).sum(0).reshape(-1)


def wrong(module: ModuleType, name: str, schedule: str) -> str | None:
    """How a defect shows: what the emulator said, or "values", or None if nobody noticed."""
    for seed in range(4 if schedule == "random" else 1):
        try:
            out = run(module, name, schedule, seed=seed)
        except module.EmulatorError as error:
            return str(error)
        if not np.allclose(out, expected(name), rtol=1e-5, atol=1e-5):
            return "values"
    return None


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["reverse", "pipeline"])
def test_right_kernels_pass(emulator: ModuleType, name: str, schedule: str) -> None:
    assert wrong(emulator, name, schedule) is None


# Lock step sees none of the missing waits, and greedy, whose copies land late, no buffer that is overwritten too early.
@pytest.mark.parametrize(
    ("name", "caught_by"),
    [
        ("reverse_no_barrier", {"lock_step", "greedy", "random"}),
        ("pipeline_no_barrier", {"lock_step", "greedy", "random"}),
        ("pipeline_no_trailing_barrier", {"lock_step", "random"}),
        ("pipeline_no_wait", {"greedy", "random"}),
        ("pipeline_weak_wait", {"greedy", "random"}),
        ("pipeline_in_flight", {"greedy", "random"}),
    ],
)
def test_missing_barriers_and_waits_are_caught(emulator: ModuleType, name: str, caught_by: set[str]) -> None:
    assert {schedule for schedule in SCHEDULES if wrong(emulator, name, schedule) is not None} == caught_by


def test_copies_in_flight_at_the_end_are_named(emulator: ModuleType) -> None:
    with pytest.raises(emulator.EmulatorError, match="left with asynchronous copies in flight"):
        run(emulator, "pipeline_in_flight", "greedy")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier_in_one_warp", "not reached by every thread"),
        ("barriers_of_two_branches", r"different __syncthreads\(\): selftest.cuh:\d+ and selftest.cuh:\d+"),
        ("shuffle_in_half_a_warp", "deadlock in block .* 16 in a warp operation and 16 that left"),
        ("two_warp_operations", "diverged: one is in shuffle_xor, another in load_matrices"),
        ("barrier_after_exit", "not reached by every thread"),
    ],
)
def test_divergence_is_caught_under_every_schedule(
    emulator: ModuleType, name: str, message: str, schedule: str
) -> None:
    with pytest.raises(emulator.EmulatorError, match=message):
        run(emulator, name, schedule)
    assert wrong(emulator, "reverse", schedule) is None  # and the machine is fit for the next launch


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_write_out_of_bounds_is_caught(emulator: ModuleType, schedule: str) -> None:
    with pytest.raises(emulator.EmulatorError, match="beyond the end of shared memory"):
        run(emulator, "reverse_out_of_bounds", schedule)


def test_unwritten_shared_memory_is_poisoned(emulator: ModuleType) -> None:
    out = run(emulator, "read_unwritten", "lock_step")
    assert np.isnan(out).all()


def test_a_misaligned_copy_is_refused(emulator: ModuleType) -> None:
    with pytest.raises(emulator.EmulatorError, match="misaligned"):
        run(emulator, "misaligned_copy", "lock_step", threads=32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_block_of_a_grid_runs_once(emulator: ModuleType, schedule: str) -> None:
    out = np.full(3 * 5 * 2, np.nan, dtype=np.float32)
    emulator.selftest(
        "number_blocks",
        np.zeros(1, np.float32),
        out,
        blocks=(5, 3),
        threads=2,
        shared_bytes=0,
        schedule=schedule,
        seed=0,
    )
    assert out.tolist() == [float(block) for block in range(15) for _ in range(2)]


def test_a_launch_that_no_gpu_takes_is_refused(emulator: ModuleType) -> None:
    data = np.zeros(1, np.float32)
    for blocks, threads in (((1, 1), 1025), ((1, 65536), 1), ((0, 1), 1)):
        with pytest.raises(emulator.EmulatorError, match="threads|blocks"):
            emulator.selftest(
                "number_blocks", data, data, blocks=blocks, threads=threads, shared_bytes=0, schedule="greedy", seed=0
            )


def test_shuffle(emulator: ModuleType) -> None:
    assert np.array_equal(run(emulator, "shuffle", "random", threads=64), inputs("shuffle", 64)[np.arange(64) ^ 4])


@pytest.mark.parametrize(
    ("name", "dtype"), [("multiply_bf16", torch.bfloat16), ("multiply_f16", torch.float16), ("multiply_tf32", None)]
)
def test_matrix_instructions(emulator: ModuleType, name: str, dtype: torch.dtype | None) -> None:
    """out [16, 8] = rows [16, k] · weight [8, k]ᵀ, where 24 rows of 32 bytes are given: k is 16, or 8 for tf32."""
    operands = torch.randn(24, 8 if dtype is None else 16)
    if dtype is None:
        operands = ((operands.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)  # tf32 has 10 bits of fraction
        memory = operands.numpy()
    else:
        operands = operands.to(dtype)
        memory = operands.view(torch.int16).numpy().view(np.float32)
    out = np.full(128, np.nan, dtype=np.float32)
    emulator.selftest(
        name, memory.reshape(-1), out, blocks=(1, 1), threads=32, shared_bytes=24 * 32, schedule="greedy", seed=0
    )
    exact = operands[:16].double() @ operands[16:].double().t()
    assert np.allclose(out.reshape(16, 8), exact.numpy(), rtol=0, atol=1e-5)


# Defects planted in the text of the LSTM step itself.
MUTANTS = {
    "no_barrier": ("recurrent/kernels.cuh", "    __syncthreads();  // this slab", "    // this slab"),
    "no_wait": ("recurrent/kernels.cuh", "    copy_async_wait<Tile::kStages - 2>();\n", ""),
    "weak_wait": ("recurrent/kernels.cuh", "copy_async_wait<Tile::kStages - 2>()", "copy_async_wait<Tile::kStages - 1>()"),
    "one_stage_too_far": ("recurrent/kernels.cuh", "stage == 0 ? Tile::kStages - 1 : stage - 1", "stage"),
    "stage_too_small": ("recurrent/kernels.cuh", "(kRows + kWeightRows) * kSlabBytes", "kWeightRows * kSlabBytes"),
}  # fmt: skip


def spoiled(module: ModuleType, step: builder.Step, right: torch.Tensor, schedule: str, seed: int) -> bool:
    """Whether a run shows a defect."""
    try:
        out, _, _ = builder.lstm_step(module, step, builder.Run("bfloat16", "small", schedule, seed))
    except module.EmulatorError:
        return True
    return not torch.equal(out, right)


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_defects_in_the_lstm_step_are_caught(emulator: ModuleType, name: str) -> None:
    sizes = [(20, 200), (20, 136), (20, 24), (96, 200), (96, 136)]  # six slabs pass through four stages
    step = builder.Step(*(torch.randn(size).bfloat16() for size in sizes), None, None)
    mutant = load(build_mutant(name, *MUTANTS[name]))
    right, _, _ = builder.lstm_step(emulator, step, builder.Run("bfloat16", "small"))
    runs = [("lock_step", 0), ("greedy", 0), ("random", 0), ("random", 1), ("random", 2)]
    assert any(spoiled(mutant, step, right, schedule, seed) for schedule, seed in runs)


SANITIZED = """
import numpy as np
from tests.gpu_offline.emulator import build, load
module = load(build("sanitized"))
data, out = np.ones(128, np.float32), np.zeros(128, np.float32)
module.selftest("reverse{}", data, out, blocks=(1, 1), threads=128, shared_bytes=512, schedule="greedy", seed=0)
print("finished", out.sum())
"""


def in_the_sanitizers(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=sanitized_environment(), capture_output=True, text=True
    )


def test_the_sanitizer_reports_a_write_out_of_bounds(emulator: ModuleType) -> None:
    right = in_the_sanitizers("-c", SANITIZED.format(""))
    assert right.returncode == 0, right.stderr
    assert "finished 128" in right.stdout
    done = in_the_sanitizers("-c", SANITIZED.format("_out_of_bounds"))
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
    assert "selftest.cuh" in done.stderr  # where it was


def test_kernels_pass_the_sanitizers(emulator: ModuleType) -> None:
    """The tests marked for it, in a process of their own with the sanitized build."""
    done = in_the_sanitizers("-m", "pytest", "-x", "-v", "tests/gpu_offline/test_lstm_step_cuda.py", "-k", "sanitized")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
