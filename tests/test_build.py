"""Installing without a compiled library: asked for, or because there is no compiler. Both must leave a working package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SMOKE = """
import json, sys, torch
# an editable install of this environment would lend its library to a package that lacks one
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
import seqrec_fast as sf
from seqrec_fast.info import info
with torch.no_grad():
    h, c = sf.LSTMCell(4, 4)(torch.randn(2, 4))
    ranks = sf.catalogue_rank(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 4]))
assert h.shape == (2, 4) and ((0 <= ranks) & (ranks < 5)).all()
try:
    with sf.use_backend("native"):
        sf.LSTMCell(4, 4)(torch.randn(2, 4))
    raise SystemExit("native ran without a library")
except sf.BackendUnavailable as error:
    print(json.dumps({"info": info(), "error": str(error), "file": sf.__file__}))
"""


def source_tree(folder: Path) -> Path:
    """The files that a source distribution needs, without what earlier builds left in the working tree."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    left_out = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    shutil.copytree(ROOT / "seqrec_fast", folder / "seqrec_fast", ignore=left_out)
    return folder


def install(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target"]
    return subprocess.run(
        [*command, str(target), str(source)], capture_output=True, text=True, env={**os.environ, **environment}
    )


def smoke(target: Path) -> dict[str, object]:
    import json

    done = subprocess.run(
        [sys.executable, "-c", SMOKE],
        capture_output=True,
        text=True,
        cwd=target,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    assert Path(str(result["file"])).is_relative_to(target)
    return result


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """An environment in which no C++ compiler is found."""
    empty = tmp_path / "bin"
    empty.mkdir()
    return {"PATH": str(empty), "CXX": "no-such-compiler", "CUDA_HOME": ""}


def test_build_none_is_a_working_package(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    done = install(source_tree(source), target, SEQREC_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    told = smoke(target)
    assert "SEQREC_FAST_BUILD=none" in str(told["error"])
    assert not list(target.rglob("*.so"))
    assert (target / "seqrec_fast/py.typed").exists()
    # started in the source tree, Python takes that and not what was installed: it must not claim a library it lacks
    assert not (source / "seqrec_fast/_build_info.py").exists()


def test_an_inplace_build_records_itself_in_the_tree(tmp_path: Path) -> None:
    source = source_tree(tmp_path)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=source,
        env={**os.environ, "SEQREC_FAST_BUILD": "none"},
        check=True,
    )
    assert "SEQREC_FAST_BUILD=none" in (source / "seqrec_fast/_build_info.py").read_text()


@pytest.mark.parametrize("recorded", [None, {"native": True, "reason": None, "tiers": [], "cuda": None}])
def test_a_source_tree_without_its_library_says_what_to_do(tmp_path: Path, recorded: dict[str, object] | None) -> None:
    source = source_tree(tmp_path)
    if recorded is not None:
        (source / "seqrec_fast/_build_info.py").write_text(f"BUILD_INFO = {recorded}")
    error = str(smoke(source)["error"])
    assert f"the source tree at {source} has no compiled library: run `make build` there" in error
    assert "leave that folder to use the installed package" in error
    (source / "setup.py").unlink()
    assert f"missing from {source / 'seqrec_fast'}: install the package again" in str(smoke(source)["error"])


def test_without_a_compiler_auto_falls_back_and_says_so(tmp_path: Path, no_compiler: dict[str, str]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    done = install(source_tree(source), target, SEQREC_FAST_BUILD="auto", **no_compiler)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in str(smoke(target)["error"])


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_without_a_compiler_an_explicit_build_fails(tmp_path: Path, no_compiler: dict[str, str], mode: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    done = install(source_tree(source), target, SEQREC_FAST_BUILD=mode, **no_compiler)
    assert done.returncode != 0
    assert f"SEQREC_FAST_BUILD={mode}: no C++ compiler was found" in done.stderr + done.stdout
    assert not target.exists() or not list(target.rglob("seqrec_fast"))


def test_unknown_mode(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    done = install(source_tree(source), target, SEQREC_FAST_BUILD="gpu")
    assert done.returncode != 0
    assert "SEQREC_FAST_BUILD must be auto, cpu, cuda or none, got 'gpu'" in done.stderr + done.stdout
