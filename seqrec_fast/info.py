"""What this installation can run and why: the library behind ``seqrec-fast info``."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from . import _dispatch, _native
from ._dispatch import Spec
from ._explain import public_operators

# The versions the test suite was run with. Others inside the range of pyproject.toml are expected to work.
TESTED = {"torch": ("2.13.0",), "triton": ("3.7.1",), "python": ("3.11",)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _bf16_hardware() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def info() -> dict[str, Any]:
    """Versions, devices, CPU tier, build facts, and for each operator × device × backend None or the reason it cannot run.

    Returns:
        A dict of plain values (JSON-serialisable).

    Example:
        >>> from seqrec_fast.info import info
        >>> info()["operators"]["lstm_step"]["cpu"]["reference"] is None
        True
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    operators = {
        name: {device: _dispatch.reasons(Spec(name, device, torch.float32)) for device in devices}
        for name in public_operators()
    }
    return {
        "seqrec_fast": _version("seqrec_fast"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": _version("triton"),
        "tested_with": {key: list(value) for key, value in TESTED.items()},
        "cpu": _cpu_model(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_tier": _native.CPU_TIER,
        "cpu_bf16_hardware": _bf16_hardware(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if "cuda" in devices else [],
        "native_library": "loaded" if _native.MISSING is None else f"not available: {_native.MISSING}",
        "build": _native.BUILD_INFO,
        "triton_interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "operators": operators,
    }
