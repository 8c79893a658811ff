"""Every configuration of the Triton lstm_step compiles for every architecture: no spill, shared memory within the limit, and
the matrix instruction that was promised."""

from __future__ import annotations

import pytest
import torch

from seqrec_fast._precision import Precision
from seqrec_fast.backends.triton import lstm_step as kernels
from seqrec_fast.backends.triton._support import INTERPRETING

if INTERPRETING:
    pytest.skip("the interpreter is on: nothing is compiled", allow_module_level=True)

from .triton_compile import SHARED_LIMIT, compile_for

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
FORMS = [
    (torch.float16, Precision.HIGHEST),
    (torch.bfloat16, Precision.HIGHEST),
    (torch.float32, Precision.HIGHEST),
    (torch.float32, Precision.HIGH),
    (torch.float32, Precision.MEDIUM),
]
# A row tile of 16 or 32 is below the 64 rows of wgmma, so Hopper runs those products on mma.sync; of the step they are the
# small-batch classes, which the bytes of the weights bound anyway.
WGMMA_ROWS = 64


def promised(arch: int, block_b: int, dtype: torch.dtype, precision: Precision) -> set[str]:
    if dtype == torch.float32 and precision == Precision.HIGHEST:
        return set()  # IEEE fp32 products are fused multiply-adds
    if arch == 90 and block_b >= WGMMA_ROWS:
        return {"wgmma.mma_async"}
    if arch == 100 and block_b >= WGMMA_ROWS:
        return {"tcgen05.mma"}
    return {"mma.sync"}


@pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))
@pytest.mark.parametrize(("dtype", "precision"), FORMS)
@pytest.mark.parametrize("config", [config for _, config in kernels.CONFIGS], ids=lambda c: f"{c.block_b}x{c.block_h}")
def test_forward_compiles(config: kernels.StepConfig, dtype: torch.dtype, precision: Precision, arch: int) -> None:
    pointer = "*" + NAMES[dtype]
    signature = {name: pointer if name.endswith("_ptr") else "i32" for name in kernels.lstm_step_fwd_kernel.arg_names}
    constants = {
        "HAS_B_IH": True,
        "HAS_B_HH": True,
        "SAVE_GATES": True,
        "BLOCK_B": config.block_b,
        "BLOCK_H": config.block_h,
        "BLOCK_K": config.block_k,
        **kernels.product_form(dtype, precision),
    }
    made = compile_for(
        kernels.lstm_step_fwd_kernel,
        arch,
        signature,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert made.stack == 0
    assert made.shared <= SHARED_LIMIT[arch]
    assert set(made.matrix_instructions) == promised(arch, config.block_b, dtype, precision)


@pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))
@pytest.mark.parametrize("dtype", list(NAMES))
def test_backward_compiles(dtype: torch.dtype, arch: int) -> None:
    names = kernels.lstm_step_bwd_kernel.arg_names
    # int64 size: B·H may pass 2³¹
    signature = {name: "*" + NAMES[dtype] if name.endswith("_ptr") else "i64" for name in names}
    made = compile_for(
        kernels.lstm_step_bwd_kernel, arch, signature, {"BLOCK": kernels.BACKWARD_BLOCK}, num_warps=4, num_stages=3
    )
    assert made.stack == 0
    assert made.registers <= 64  # eight blocks of four warps on a multiprocessor
