"""Guards on the compiled library: what it may need from torch, and what its CPU tiers may share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqrec_fast import _native, _schema

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(_native.MISSING is not None, reason=f"no native library: {_native.MISSING}"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed"),
]


def nm(*arguments: str) -> list[str]:
    return subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def library() -> Path:
    (path,) = (ROOT / "seqrec_fast").glob("_C*.so")
    return path


def test_file_name_is_abi3(library: Path) -> None:
    assert library.name == "_C.abi3.so"


def test_no_unstable_torch_symbol_is_needed(library: Path) -> None:
    undefined = [line.split(maxsplit=1)[-1] for line in nm("-DC", "--undefined-only", str(library))]
    unstable = [name for name in undefined if "at::" in name or "c10::" in name or "torch::" in name]
    assert unstable == []
    # what is left of torch is its C interface
    assert any("aoti_torch" in name or "torch_library_impl" in name for name in undefined)


def test_python_symbols_are_of_the_limited_api(library: Path) -> None:
    undefined = {line.split()[-1] for line in nm("-D", "--undefined-only", str(library))}
    assert {name for name in undefined if name.startswith("Py")} <= {"PyModule_Create2"}


def test_only_the_module_is_exported_of_ours(library: Path) -> None:
    exported = [line.split(maxsplit=2)[-1] for line in nm("-DC", "--defined-only", str(library))]
    assert [name for name in exported if "seqrec_fast" in name] == []
    assert "PyInit__C" in exported


@pytest.mark.parametrize("family", ["recurrent", "catalogue"])
def test_cpu_tiers_share_no_weak_symbol(family: str) -> None:
    """A weak symbol in two tiers is merged by the linker: the AVX-512 body of a helper could then run on an old processor."""
    objects = sorted((ROOT / "build").glob(f"temp.*/tiers/{family}_tier*.o"))
    if not objects:
        pytest.skip("the tier objects are not here (built elsewhere)")
    weak: dict[str, set[str]] = {}
    for path in objects:
        tier = path.stem.rsplit("_", 1)[-1]  # several files may belong to one
        for line in nm("-C", str(path)):
            kind, name = line[17:18], line[19:]
            if kind in "WVu":
                weak.setdefault(name, set()).add(tier)
    shared = {name: tiers for name, tiers in weak.items() if len(tiers) > 1}
    assert shared == {}


def test_tier_follows_torch() -> None:
    assert _native.CPU_TIER is not None
    capability = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX2": ("avx2",), "AVX512": ("avx512", "avx512_bf16", "amx")}.get(capability, ("default",))
    assert _native.CPU_TIER in expected


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_tier_can_be_lowered(capability: str) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has one tier only")
    code = "from seqrec_fast import _native; print(_native.CPU_TIER)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == capability


@pytest.mark.parametrize("tier", [-1, 4, 99])
def test_a_tier_the_processor_lacks_is_refused(tier: int) -> None:
    with pytest.raises(ValueError, match="tier must be in"):
        torch.ops.seqrec_fast_native.set_cpu_tier.default(tier)


def test_every_native_kernel_has_a_schema() -> None:
    """A kernel registered under a name that Python does not define would never be called."""
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("seqrec_fast_native::")
    }
    assert registered == {*_schema.SCHEMAS, *_schema.NATIVE_ONLY}
