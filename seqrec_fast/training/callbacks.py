"""What happens round the training steps: progress, best weights, the resume point, and a calm end on Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from seqrec_fast._files import write_json


class TrainingInterrupted(Exception):
    """Training was stopped by a signal, after its state was saved.

    Attributes:
        checkpoint: file to resume from; None when not one epoch or batch had been saved.
        exit_code: what a command should end with: 128 + the signal's number, 130 for Ctrl-C.
    """

    def __init__(self, checkpoint: Path | None, signal_number: int = signal.SIGINT) -> None:
        self.checkpoint = checkpoint
        self.exit_code = 128 + signal_number
        where = f"its last saved state is in {checkpoint}" if checkpoint else "nothing had been saved yet"
        super().__init__(f"training was interrupted; {where}")


class InterruptFlag:
    """Turns the first Ctrl-C (or SIGTERM) into a flag that is read between steps; the second one stops at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Listen inside the block. Does nothing outside the main thread, where Python allows no handler."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number


class ResumePoint(Checkpoint):
    """Saves the whole training state after every epoch, and at the step where an interrupt was asked for.

    A Lightning ``Checkpoint``, so that it runs after the callbacks whose state it saves.
    """

    def __init__(self, path: Path, interrupt: InterruptFlag) -> None:
        self.path = path
        self.interrupt = interrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        self._stop_if_asked(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The last batch's interrupt waits for validation and the end of the epoch: resuming between the two would
        # validate weights that the uninterrupted run never validated alone.
        if not self._asked(trainer) or trainer.is_last_batch:
            return
        trainer.save_checkpoint(self.path)
        self._stop_if_asked(trainer)

    def _asked(self, trainer: Trainer) -> bool:
        asked = self.interrupt.signal_number is not None
        if trainer.world_size > 1:  # all stop at the same step, or the others wait for ever
            return bool(trainer.strategy.reduce_boolean_decision(asked, all=False))
        return asked

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._asked(trainer):
            raise TrainingInterrupted(self.path, self.interrupt.signal_number or signal.SIGINT)


class BestModel(Callback):
    """Keeps the weights of the best validation so far in a file, through ``model.save``."""

    def __init__(self, path: Path, monitor: str) -> None:
        self.path = path
        self.monitor = monitor
        self.value = -math.inf
        self.epoch = -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = float(trainer.callback_metrics[self.monitor])
        # NaN is kept only while there is nothing better: a run of NaNs still ends with a file
        if value > self.value or self.epoch < 0:
            self.value, self.epoch = (-math.inf if math.isnan(value) else value), trainer.current_epoch
            if trainer.is_global_zero:
                pl_module.model.save(self.path)  # type: ignore[operator, union-attr]

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.path.exists():  # otherwise the next validation writes it anew
            self.value, self.epoch = state_dict["value"], state_dict["epoch"]


class History(Callback):
    """One line on the console and one record in ``history.json`` per epoch."""

    def __init__(self, path: Path, best: BestModel, console: Console) -> None:
        self.path = path
        self.best = best
        self.console = console
        self.records: list[dict[str, Any]] = []
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()  # an epoch resumed half-way has no start of its own

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = time.perf_counter() - self._start
        metrics = {name: round(float(value), 7) for name, value in trainer.callback_metrics.items()}
        loss = pl_module.mean_loss()  # type: ignore[operator]
        is_best = self.best.epoch == trainer.current_epoch
        record = {
            "epoch": trainer.current_epoch,
            "loss": loss,
            **metrics,
            "seconds": round(seconds, 3),
            "best": is_best,
        }
        self.records = [old for old in self.records if old["epoch"] < trainer.current_epoch] + [record]
        if not trainer.is_global_zero:
            return
        write_json(self.path, self.records)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        mark = "  [green]best so far[/]" if is_best else ""
        place = f"{trainer.current_epoch + 1:>3}/{trainer.max_epochs}"
        line = f"epoch {place}  loss {loss:.4f}  {shown}  {seconds:.1f} s{mark}"
        self.console.print(line, highlight=False, soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = list(state_dict["records"])


class RichProgress(ProgressBar):
    """Lightning's progress interface drawn with rich, on the console that the rest of the command uses.

    Drawn only on a terminal: in a log file the line per epoch says enough.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None

    def disable(self) -> None:
        self.progress.disable = True

    def enable(self) -> None:
        self.progress.disable = False

    def _begin(self, description: str, total: float, completed: int = 0) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        finite = None if math.isinf(total) else int(total)
        self.task = self.progress.add_task(description, total=finite, completed=completed, note="")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.task is None:
            name = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._begin(name, self.total_train_batches, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.task is not None and not self.progress.disable:
            self.progress.update(self.task, completed=batch_idx + 1)
            if batch_idx % 20 == 0:  # reading the loss waits for the device
                loss = outputs["loss"] if isinstance(outputs, dict) else outputs
                self.progress.update(self.task, note=f"loss {float(loss):.4f}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("validation", self.total_val_batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def _end(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.progress.stop()


class RandomState(Callback):
    """Puts the random generators into the checkpoint, so that a resumed run draws the same dropout masks."""

    def __init__(self) -> None:
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # here, and not when it is loaded: setting the loaders up in between may draw numbers
        if self._saved:
            torch.set_rng_state(self._saved["cpu"])
            if self._saved["cuda"] and torch.cuda.is_initialized():
                torch.cuda.set_rng_state_all(self._saved["cuda"])
            self._saved = {}
