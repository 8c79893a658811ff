"""Time and memory, measured so that two things can be compared: interleaved rounds, medians, a peak of its own process."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Another number of torch's threads for a while; None: as many as before."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_threads(number: int, call: Callable[[], object], repeat: int = 1) -> Callable[[], None]:
    """``call``, ``repeat`` times, on so many of torch's threads: one side of an interleaved comparison."""

    def run() -> None:
        torch.set_num_threads(number)
        for _ in range(repeat):
            call()

    return run


def synchronise(device: torch.device) -> None:
    """Wait for a device that works ahead of the program; the CPU does not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each function in each round; the rounds go A B A B …, so that a busy machine hurts all alike.

    Args:
        functions: what to time, by name.
        rounds: timed rounds, at least 1.
        warmup: rounds before them that are not timed.
        device: waited for after every call.

    Example:
        >>> seconds = interleaved({"sum": lambda: sum(range(100)), "max": lambda: max(range(100))}, rounds=3)
        >>> {name: len(times) for name, times in seconds.items()}
        {'sum': 3, 'max': 3}
    """
    device = torch.device(device)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each function's rounds."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def extra_peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """How far a call pushes memory above where it stood, in bytes; call it once before to load what it needs.

    On CUDA what torch's allocator hands out; on the CPU the resident memory of the whole process (Linux; None elsewhere).
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronise(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    if not _reset_peak():
        return None
    resident = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - resident)


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)`` in a new interpreter: memory that this one's allocator keeps would hide a peak there.

    The function and its arguments must be importable and picklable, and the main module guarded.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _reset_peak() -> bool:
    """Make the kernel forget the largest resident memory so far; False where it cannot (not Linux, some containers)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
