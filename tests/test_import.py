"""Importing the package is quick and quiet, and pulls in nothing heavy."""

from __future__ import annotations

import subprocess
import sys

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


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_prints_nothing_and_loads_nothing_heavy() -> None:
    before = set(run("import torch, sys; print(*sys.modules)").stdout.split())
    done = run("import torch, seqrec_fast, sys; print(*sys.modules)")
    added = set(done.stdout.split()) - before
    assert not added & set(HEAVY)
    assert done.stderr == ""
    assert run("import seqrec_fast").stdout == ""


def test_import_adds_less_than_150_ms() -> None:
    # The least of several: the machine is shared, and nothing makes an import faster than it is.
    code = "import torch, time; t = time.perf_counter(); import seqrec_fast; print(time.perf_counter() - t)"
    best = min(float(run(code).stdout) for _ in range(5))
    assert best < 0.150


@pytest.mark.parametrize("name", ["models", "data", "training", "nn"])
def test_subpackages_are_attributes(name: str) -> None:
    run(f"import seqrec_fast as sf; sf.{name}; assert '{name}' in dir(sf)")


def test_unknown_attribute_is_an_attribute_error() -> None:
    import seqrec_fast as sf

    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        sf.no_such_thing  # noqa: B018
