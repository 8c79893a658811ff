"""What every Triton kernel needs from the machine, and the reasons to give when it is not there."""

from __future__ import annotations

import os
import shutil

import torch
import triton

from ..._dispatch import Spec

# Read by triton.jit when it decorates a kernel, so what counts is its value when the kernels were imported.
INTERPRETING = bool(triton.knobs.runtime.interpret)


def unavailable(spec: Spec, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why Triton cannot run ``spec`` here with kernels written for ``dtypes``, or None."""
    if spec.dtype not in dtypes:
        return f"the Triton kernel takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {spec.dtype}"
    if INTERPRETING:
        if spec.dtype == torch.bfloat16:
            return "Triton's interpreter computes wrong bfloat16 results"
        return None
    if spec.device == "cpu":
        return "Triton kernels run on the CPU only in its interpreter: set TRITON_INTERPRET=1 before the first import"
    if spec.device != "cuda":
        return f"the Triton kernels were not written for device type {spec.device!r}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the Triton kernels need a GPU of compute capability 8.0 or later"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "Triton compiles its launchers with a C compiler, and none was found (cc, gcc or clang)"
    return None
