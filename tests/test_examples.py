"""Every example runs, and the demo writes its picture and a folder that can be served from and blended."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from seqrec_fast.data import synthetic
from seqrec_fast.training.comparison import Comparison, Side
from seqrec_fast.training.settings import RunSettings


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small work on a busy machine is fastest so; the thread count is put back after every test."""
    torch.set_num_threads(1)


EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_own_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_loop.py", str(tmp_path / "weights.safetensors"), monkeypatch=monkeypatch)
    assert capsys.readouterr().out.count("full ranking over 500 items") == 2
    assert (tmp_path / "weights.safetensors").exists()


def test_drop_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("drop_in.py", monkeypatch=monkeypatch)
    loss, gap, _ = capsys.readouterr().out.splitlines()
    stock, ours = (float(word) for word in loss.replace("(stock)", "").removeprefix("loss: ").split(" and "))
    assert ours == pytest.approx(stock, rel=1e-5)
    assert float(gap.rsplit(maxsplit=1)[1]) < 1e-5


def test_live_session(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("live_session.py", monkeypatch=monkeypatch)
    live, whole, *_ = capsys.readouterr().out.splitlines()
    assert live.split(": ")[1] == whole.split(": ")[1]


def test_the_demo_scales_part_of_an_epoch_by_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed, the one interrupted step of three would make an epoch five times as long."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    demo = runpy.run_path(str(EXAMPLES / "demo.py"), run_name="demo")
    compared = Comparison(Side([3.0] * 3, [0.1, 1.3, 0.1], None), Side([3.0] * 3, [0.2, 0.2, 0.2], None), [5] * 3)
    interactions = synthetic(num_users=100, num_items=20)
    settings = RunSettings.from_flat(20, {"batch_size": 10})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo["comparison_table"](compared, interactions, settings))
    (row,) = [line for line in console.export_text().splitlines() if "an epoch of 10 steps" in line]
    assert "1.0 s" in row
    assert "2.0 s" in row
    assert "2.00x" in row


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--users", "150", "--items", "80", "--steps", "5", "--epochs", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        run("demo.py", *arguments, monkeypatch=monkeypatch)
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    for part in ("stock torch", "an epoch of", "extra memory of a step", "Markov", "Popularity", "history of"):
        assert part in captured.out
    assert captured.out.count("moved most by") == 3
    assert "an epoch has 2 batches, so 2 steps are compared, not 5" in captured.out
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "model.safetensors").exists()
    run("blend.py", str(tmp_path / "run"), monkeypatch=monkeypatch)
    chosen, alone, blended = capsys.readouterr().out.splitlines()[-3:]
    assert chosen.startswith("validation, weight 0.5: NDCG@10")
    assert alone.startswith("test, recommender alone: HR@10")
    assert blended.startswith("test, blend at")
    with pytest.raises(SystemExit, match=r"is not the folder of a trained run: model.safetensors is missing"):
        run("blend.py", str(tmp_path / "none"), monkeypatch=monkeypatch)
    with pytest.raises(SystemExit) as ended:
        run("demo.py", *arguments, "--epochs", "0", monkeypatch=monkeypatch)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "demo: max_epochs must be at least 1, got 0\n"
