"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names of the one block, after it ran."""
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(block, str(README), "exec"), names)
    return names


def test_the_example_scores_the_state_after_each_history(example: dict[str, Any]) -> None:
    # beyond a length the states are zero: a row scored there ties everywhere
    states, lengths = example["states"], example["lengths"]
    assert (lengths < 50).any()
    torch.testing.assert_close(example["user"], states[torch.arange(32), lengths - 1])
    assert (example["user"].abs().sum(1) > 0).all()
    for found in (example["best"].values, example["interest"], example["lse"], example["items"].weight.grad):
        assert found.isfinite().all()
        assert (found != 0).any()
    assert (example["best"].values != 0).all()
    assert (example["best"].values[:, 0] > example["best"].values[:, -1]).all()
    assert ((example["rank"] >= 0) & (example["rank"] < 10_000)).all()
    assert len(example["rank"].unique()) > 16


def test_the_example_counts_no_padding(example: dict[str, Any]) -> None:
    lengths, ids, target = example["lengths"].tolist(), example["ids"], example["target"]
    rows = [(row, step) for row, length in enumerate(lengths) for step in range(length)]
    row, step = torch.tensor(rows).T
    logits = example["states"][row, step] @ example["items"].weight.T
    torch.testing.assert_close(example["loss"], torch.nn.functional.cross_entropy(logits, target[row, step]))
    for best, seen, length in zip(example["best"].indices, ids, lengths, strict=True):
        assert not set(best.tolist()) & set(seen[:length].tolist())


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
