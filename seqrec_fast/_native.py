"""Loads the compiled library, if it was built, and tells it which CPU tier to run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from . import _schema  # the schemas must exist before the library registers implementations

TIERS = ("default", "avx2", "avx512", "avx512_bf16", "amx")


def _build_info() -> dict[str, Any]:
    try:
        return dict(importlib.import_module("seqrec_fast._build_info").BUILD_INFO)
    except ModuleNotFoundError:
        return {"native": False, "reason": _not_there(Path(__file__).parent), "tiers": [], "cuda": None}


def _not_there(package: Path) -> str:
    """What to do about a missing library. Python prefers the source tree it is started in to the installed package."""
    if (package.parent / "setup.py").is_file():
        return (
            f"the source tree at {package.parent} has no compiled library: run `make build` there, "
            "or leave that folder to use the installed package"
        )
    return f"the compiled library is missing from {package}: install the package again"


def _wanted_tier() -> int:
    """At most what torch itself would use here, so that ATEN_CPU_CAPABILITY steers both."""
    capability = torch.backends.cpu.get_cpu_capability()
    tier = {"AVX2": "avx2", "AVX512": "avx512_bf16"}.get(capability, "default")
    # _init_amx asks the operating system for permission to use the tile registers.
    if capability == "AVX512" and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
        tier = "amx"
    return TIERS.index(tier)


def _load() -> tuple[str | None, str | None]:
    """(reason why the library is not there or None, CPU tier or None)."""
    if not BUILD_INFO["native"]:
        return str(BUILD_INFO["reason"]), None
    try:
        importlib.import_module("seqrec_fast._C")
    except ModuleNotFoundError as error:
        if error.name != "seqrec_fast._C":
            raise
        return _not_there(Path(__file__).parent), None
    except ImportError as error:
        return f"the compiled library does not load here: {error}", None
    operators = torch.ops.seqrec_fast_native
    tier = min(_wanted_tier(), operators.highest_cpu_tier.default())
    operators.set_cpu_tier.default(tier)
    return None, TIERS[tier]


BUILD_INFO = _build_info()
MISSING, CPU_TIER = _load()


def has_kernel(operator: str, device: str) -> bool:
    """Whether the library that was built holds ``operator`` for a device type."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    name = f"{_schema.PUBLIC}_native::{operator}"
    return key is not None and bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))
