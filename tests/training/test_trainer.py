"""fit: what it writes, that it stops and resumes exactly, and what it refuses."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from seqrec_fast.data import Split, evaluation_loader, leave_one_out, synthetic, train_loader
from seqrec_fast.models import SequenceRecommender
from seqrec_fast.training import FitOptions, FitResult, OptimizerOptions, TrainingInterrupted, evaluate, fit


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small work on a busy machine is fastest so; the thread count is put back after every test."""
    torch.set_num_threads(1)


ITEMS = 60


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(synthetic(num_users=96, num_items=ITEMS, mean_length=10, seed=3))


def new_model(**options: Any) -> SequenceRecommender:
    torch.manual_seed(1)
    return SequenceRecommender(ITEMS, **{"embedding_dim": 8, "encoder": "gru", "dropout": 0.3, **options})


def options(**changes: Any) -> FitOptions:
    defaults: dict[str, Any] = {"max_epochs": 3, "patience": 0, "optimizer": OptimizerOptions(learning_rate=0.02)}
    return FitOptions(accelerator="cpu", **{**defaults, **changes})


class Signalling:
    """A loader that sends this process a signal just before it gives a certain batch (counted over all epochs)."""

    def __init__(self, loader: Any, at: int, number: int = signal.SIGINT) -> None:
        self.loader, self.at, self.number, self.count = loader, at, number, 0
        self.twice = False

    @property
    def sampler(self) -> Any:
        return self.loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self._batches(iter(self.loader))

    def _batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if self.count == self.at or (self.twice and self.count == self.at + 1):
                os.kill(os.getpid(), self.number)
            self.count += 1
            yield batch


def run(
    split: Split,
    out: Path,
    model: SequenceRecommender | None = None,
    train: Any = None,
    validation: Any = None,
    console: Console | None = None,
    resume: bool = False,
    **changes: Any,
) -> tuple[SequenceRecommender, FitResult]:
    model = model or new_model()
    train = train or train_loader(split, batch_size=16, seed=5)
    validation = validation or evaluation_loader(split, batch_size=32)
    quiet = console or Console(file=io.StringIO(), width=200)
    return model, fit(model, train, validation, out, options(**changes), resume=resume, console=quiet)


def same_weights(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(out / "checkpoint.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.fixture(scope="module")
def whole_run(split: Split, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SequenceRecommender, FitResult]:
    out = tmp_path_factory.mktemp("whole")
    return out, *run(split, out)


def test_it_learns_and_keeps_the_best_weights_exactly(
    split: Split, whole_run: tuple[Path, SequenceRecommender, FitResult]
) -> None:
    out, model, result = whole_run
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < losses[0] < math.log(ITEMS) + 0.5
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.ckpt", "history.json", "model.safetensors"]
    loaded = SequenceRecommender.load(out / "model.safetensors")
    assert same_weights(loaded, model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load_file(result.model_file).items())
    assert not model.training
    best = max(result.history, key=lambda record: record["NDCG@10"])
    assert (result.best_epoch, result.best_value) == (best["epoch"], best["NDCG@10"])
    quality = evaluate(model, evaluation_loader(split))
    assert quality["NDCG@10"] == pytest.approx(result.best_value, abs=1e-6)
    assert json.loads((out / "history.json").read_text()) == result.history


def test_the_epoch_lines_and_nothing_else_is_shown(
    split: Split, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    text = io.StringIO()
    run(split, tmp_path, console=Console(file=text, width=200), max_epochs=2)
    lines = text.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch   1/2  loss 4.")
    assert "NDCG@10 0." in lines[0]
    assert lines[0].endswith("best so far")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert [str(warning.message) for warning in recwarn] == []


# 6 batches an epoch. The signal comes while the given batch is fetched; the run stops after its step, and after the last
# batch of an epoch only once validation is over.
@pytest.mark.parametrize("at", [0, 2, 5, 6, 13])
def test_interrupted_and_resumed_is_as_never_interrupted(
    split: Split, tmp_path: Path, whole_run: tuple[Path, SequenceRecommender, FitResult], at: int
) -> None:
    out, model, result = whole_run
    with pytest.raises(TrainingInterrupted) as stopped:
        run(split, tmp_path, train=Signalling(train_loader(split, batch_size=16, seed=5), at))
    assert stopped.value.exit_code == 130
    assert stopped.value.checkpoint == tmp_path / "checkpoint.ckpt"
    assert str(tmp_path) in str(stopped.value)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # put back
    torch.manual_seed(99)  # what happened in between must not matter
    model_again, resumed = run(split, tmp_path, resume=True)
    ours, theirs = final_weights(tmp_path), final_weights(out)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert same_weights(model_again, model)
    untimed = [{k: v for k, v in record.items() if k != "seconds"} for record in resumed.history]
    expected = [{k: v for k, v in record.items() if k != "seconds"} for record in result.history]
    assert untimed == expected


def test_an_interrupt_in_validation_lets_it_end(split: Split, tmp_path: Path) -> None:
    validation = Signalling(evaluation_loader(split, batch_size=32), 1)
    with pytest.raises(TrainingInterrupted):
        run(split, tmp_path, validation=validation)
    records = json.loads((tmp_path / "history.json").read_text())
    assert [record["epoch"] for record in records] == [0]
    assert validation.count == len(validation)


def test_sigterm_counts_as_an_interrupt(split: Split, tmp_path: Path) -> None:
    train = Signalling(train_loader(split, batch_size=16, seed=5), 3, signal.SIGTERM)
    with pytest.raises(TrainingInterrupted) as stopped:
        run(split, tmp_path, train=train)
    assert stopped.value.exit_code == 143
    assert (tmp_path / "checkpoint.ckpt").exists()


def test_a_second_interrupt_stops_at_once_and_keeps_the_last_state(split: Split, tmp_path: Path) -> None:
    validation = Signalling(evaluation_loader(split, batch_size=32), 4)  # in the second validation
    validation.twice = True
    with pytest.raises(TrainingInterrupted) as stopped:
        run(split, tmp_path, validation=validation)
    assert stopped.value.checkpoint == tmp_path / "checkpoint.ckpt"
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [record["epoch"] for record in json.loads((tmp_path / "history.json").read_text())] == [0]
    assert validation.count == 5
    run(split, tmp_path, resume=True)


def test_more_epochs_continue_a_finished_run(
    split: Split, tmp_path: Path, whole_run: tuple[Path, SequenceRecommender, FitResult]
) -> None:
    out, _, _ = whole_run
    run(split, tmp_path, max_epochs=2)
    _, result = run(split, tmp_path, max_epochs=3, resume=True)
    assert [record["epoch"] for record in result.history] == [0, 1, 2]
    ours, theirs = final_weights(tmp_path), final_weights(out)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resuming_a_finished_run_changes_nothing(
    split: Split, tmp_path: Path, whole_run: tuple[Path, SequenceRecommender, FitResult]
) -> None:
    _, first = run(split, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model, again = run(split, tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert again == first
    assert same_weights(model, whole_run[1])


def test_early_stopping_stops_and_stays_stopped(split: Split, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"patience": 1, "max_epochs": 40, "optimizer": OptimizerOptions(learning_rate=0.3)}
    _, result = run(split, tmp_path, **changes)
    assert len(result.history) < 40
    assert result.best_epoch == len(result.history) - 2
    _, again = run(split, tmp_path, resume=True, **changes)
    assert again.history == result.history


def test_mixed_precision_trains_in_bfloat16(split: Split, tmp_path: Path) -> None:
    model, result = run(split, tmp_path, precision="bf16-mixed", max_epochs=2)
    assert result.history[1]["loss"] < result.history[0]["loss"]
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_warm_up_and_cosine() -> None:
    schedule = OptimizerOptions(warmup_steps=4, schedule="cosine")
    factors = [schedule.rate_at(step, 104) for step in range(105)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[54] == pytest.approx(0.505)
    assert factors[104] == pytest.approx(0.01)
    assert [OptimizerOptions().rate_at(step, 10) for step in (0, 9)] == [1.0, 1.0]


def test_another_models_checkpoint_is_refused(split: Split, tmp_path: Path) -> None:
    run(split, tmp_path, max_epochs=1)
    before = (tmp_path / "checkpoint.ckpt").read_bytes()
    with pytest.raises(ValueError, match="checkpoint of another model: its embedding_dim is 8, here it is 12"):
        run(split, tmp_path, model=new_model(embedding_dim=12), resume=True)
    assert (tmp_path / "checkpoint.ckpt").read_bytes() == before
    (tmp_path / "checkpoint.ckpt").write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        run(split, tmp_path, resume=True)
    torch.save({"x": torch.zeros(1)}, tmp_path / "checkpoint.ckpt")
    with pytest.raises(ValueError, match="is not a training checkpoint"):
        run(split, tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run(split, tmp_path / "elsewhere", resume=True)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FitOptions(max_epochs=0), "max_epochs must be at least 1, got 0"),
        (lambda: FitOptions(patience=-1), "patience must not be negative"),
        (lambda: FitOptions(precision="half"), "precision must be '32-true'"),  # type: ignore[arg-type]
        (lambda: FitOptions(monitor="accuracy").cutoff, "monitor must be HR@k"),
        (lambda: OptimizerOptions(learning_rate=0.0), "learning_rate must be a positive number"),
        (lambda: OptimizerOptions(learning_rate=float("nan")), "learning_rate must be a positive number"),
        (lambda: OptimizerOptions(gradient_clip=-1.0), "gradient_clip must not be negative"),
        (lambda: OptimizerOptions(schedule="linear"), "schedule must be"),  # type: ignore[arg-type]
    ],
)
def test_options_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_failing_model_is_not_hidden(split: Split, tmp_path: Path) -> None:
    class Broken(SequenceRecommender):
        def loss(self, *args: Any, **keywords: Any) -> torch.Tensor:
            raise ZeroDivisionError("in the model")

    with pytest.raises(ZeroDivisionError, match="in the model"):
        run(split, tmp_path, model=Broken(ITEMS, embedding_dim=8))
    assert not (tmp_path / "checkpoint.ckpt").exists()


def test_a_full_disk_keeps_the_last_checkpoint(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(split, tmp_path, max_epochs=1)
    before = (tmp_path / "checkpoint.ckpt").read_bytes()

    def fail(checkpoint: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("seqrec_fast.training.trainer.torch.save", fail)
    with pytest.raises(OSError, match="No space left"):
        run(split, tmp_path, max_epochs=2, resume=True)
    assert (tmp_path / "checkpoint.ckpt").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from seqrec_fast.data import evaluation_loader, leave_one_out, synthetic, train_loader
from seqrec_fast.models import SequenceRecommender
from seqrec_fast.training import FitOptions, fit

torch.manual_seed(1)
split = leave_one_out(synthetic(num_users=96, num_items=60, mean_length=10, seed=3))
model = SequenceRecommender(60, embedding_dim=8, encoder="gru")
options = FitOptions(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp")
# five evaluation batches: one process gets three of them
fit(model, train_loader(split, batch_size=16), evaluation_loader(split, batch_size=20), Path(sys.argv[1]), options)
"""


def test_two_processes_train_one_model_and_count_every_user_once(split: Split, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(script), str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("epoch ")]) == 2, done.stderr
    records = json.loads((out / "history.json").read_text())
    model = SequenceRecommender.load(out / "model.safetensors")
    quality = evaluate(model, evaluation_loader(split))
    best = next(record for record in reversed(records) if record["best"])
    for name, value in quality.items():
        assert best[name] == pytest.approx(value, abs=1e-6)
    # 6 batches an epoch, 3 for each process
    assert torch.load(out / "checkpoint.ckpt", weights_only=True)["global_step"] == 6
