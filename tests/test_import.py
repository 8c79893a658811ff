"""Importing the package is quick and quiet, and pulls in nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "triton",
    "lightning",
    "pytorch_lightning",
    "polars",
    "pandas",
    "matplotlib",
    "typer",
    "rich",
    "torch._dynamo",
    "torch._inductor",
)


def run(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def test_import_prints_nothing_and_loads_nothing_heavy() -> None:
    before = set(run("import torch, sys; print(*sys.modules)").stdout.split())
    done = run("import torch, seqrec_fast, sys; print(*sys.modules)")
    added = set(done.stdout.split()) - before
    assert not added & set(HEAVY)
    assert done.stderr == ""
    assert run("import seqrec_fast").stdout == ""


def test_import_adds_less_than_150_ms(tmp_path: Path) -> None:
    # With compiled bytecode, as after an installation, wherever this interpreter was told to write none. The least of several:
    # the machine is shared, and nothing makes an import faster than it is.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    code = "import torch, time; t = time.perf_counter(); import seqrec_fast; print(time.perf_counter() - t)"
    best = min(float(run(code, environment).stdout) for _ in range(5))
    assert best < 0.150


@pytest.mark.parametrize("name", ["models", "data", "training", "nn"])
def test_subpackages_are_attributes(name: str) -> None:
    run(f"import seqrec_fast as sf; sf.{name}; assert '{name}' in dir(sf)")


def test_unknown_attribute_is_an_attribute_error() -> None:
    import seqrec_fast as sf

    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        sf.no_such_thing  # noqa: B018
