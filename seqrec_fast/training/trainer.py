"""``fit``: training, validation, early stopping, best weights and resumption, by Lightning."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console
from safetensors.torch import load_file

from seqrec_fast._files import read_json, written_beside
from seqrec_fast.models._checkpoint import SavedModule

from ._lightning import quiet_lightning
from ._loader import BatchLoader
from .callbacks import BestModel, History, InterruptFlag, RandomState, ResumePoint, RichProgress, TrainingInterrupted
from .module import RecommenderModule, check_same_model
from .options import CHECKPOINT, HISTORY, MODEL, FitOptions

Model = TypeVar("Model", bound=SavedModule)


@dataclass(frozen=True)
class FitResult:
    """What came of a training: one record an epoch (as in ``history.json``), the best epoch and its value, the files."""

    history: list[dict[str, Any]]
    best_epoch: int
    best_value: float
    model_file: Path
    checkpoint: Path


class _WholeFiles(TorchCheckpointIO):
    """Checkpoints written beside and renamed: a crash or a full disk leaves the last good one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with written_beside(path) as part:
            torch.save(checkpoint, part)


def fit(
    model: Model,
    train: BatchLoader,
    validation: BatchLoader,
    out: str | os.PathLike[str],
    options: FitOptions | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> FitResult:
    """Train a model; on return it holds the weights of its best validation, which are also in ``out``.

    ``out`` gets ``model.safetensors`` (the best weights, by ``model.save``), ``checkpoint.ckpt`` (all that resuming
    needs, after every epoch and on an interrupt) and ``history.json`` (one record an epoch). Every file appears whole.

    Ctrl-C or SIGTERM lets the running step end, saves, and raises ``TrainingInterrupted``. A resumed run goes on at the
    next batch with the same shuffling and dropout masks: on the CPU it ends with the weights that an uninterrupted
    run of the same options would have.

    Args:
        model: with ``loss(ids, lengths, target)``, ``save``, and what :func:`target_ranks` needs.
        train: training batches (:func:`seqrec_fast.data.train_loader`).
        validation: evaluation batches (:func:`seqrec_fast.data.evaluation_loader`).
        out: folder for the files; made if missing.
        options: see :class:`FitOptions`.
        resume: go on from ``out/checkpoint.ckpt``.
        console: where progress is shown; None: standard error.

    Raises:
        FileNotFoundError: ``resume`` without a checkpoint.
        ValueError: a checkpoint of another model, an option out of range, or no batch to train on.
        TrainingInterrupted: after an interrupt; its ``checkpoint`` is where to resume from.
    """
    options = options or FitOptions()
    out = Path(out)
    console = console or Console(stderr=True)
    if len(train) == 0:
        raise ValueError("the training loader is empty")
    checkpoint = out / CHECKPOINT
    state = read_checkpoint(checkpoint, model) if resume else None
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in (CHECKPOINT, MODEL, HISTORY):  # of an earlier run, and soon misleading
            (out / name).unlink(missing_ok=True)

    interrupt = InterruptFlag()
    keeper = BestModel(out / MODEL, options.monitor)
    callbacks: list[Callback] = [RandomState(), keeper, History(out / HISTORY, keeper, console), RichProgress(console)]
    if options.patience:
        callbacks.append(EarlyStopping(options.monitor, mode="max", patience=options.patience))
    callbacks.append(ResumePoint(checkpoint, interrupt))

    with quiet_lightning(), interrupt.installed():
        seed_everything(options.seed, verbose=False)
        trainer = _trainer(options, out, callbacks)
        module = RecommenderModule(model, train, validation, options.optimizer, ks=(options.cutoff,))
        if state is None or not _finished(state, options):
            _run(trainer, module, checkpoint if resume else None, checkpoint)
    if interrupt.signal_number is not None:  # asked for during the very last steps: all is saved, and all is done
        raise TrainingInterrupted(checkpoint, interrupt.signal_number)
    model.to("cpu")
    model.load_state_dict(load_file(out / MODEL))
    model.eval()
    # from the files and not from the callbacks: some strategies train in other processes
    records = read_json(out / HISTORY)
    best = next(record for record in reversed(records) if record["best"])
    return FitResult(records, best["epoch"], best[options.monitor], out / MODEL, checkpoint)


def _trainer(options: FitOptions, out: Path, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        max_epochs=options.max_epochs,
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=options.strategy,
        precision=options.precision,
        gradient_clip_val=options.optimizer.gradient_clip or None,
        callbacks=callbacks,
        plugins=[_WholeFiles()],
        default_root_dir=out,
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # SharedLoader deals the batches out
    )


def check_devices(options: FitOptions) -> None:
    """Check that this machine can train as the options say, without writing or training anything.

    Raises:
        ValueError: naming accelerator, devices, strategy and precision, with Lightning's reason.
    """
    with quiet_lightning():
        try:
            _trainer(options, Path(), [RichProgress(Console(stderr=True)), ResumePoint(Path(), InterruptFlag())])
        except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"cannot train with accelerator={options.accelerator}, devices={options.devices}, "
                f"strategy={options.strategy}, precision={options.precision}: {str(error).splitlines()[0]}"
            ) from error


def _run(trainer: Trainer, module: RecommenderModule, state: Path | None, checkpoint: Path) -> None:
    with warnings.catch_warnings():
        # RandomState and SharedLoader hold what would otherwise make a resumption inexact
        warnings.filterwarnings("ignore", message=r".*resuming from a checkpoint that ended before.*")
        try:
            trainer.fit(module, ckpt_path=state, weights_only=True)
        except SystemExit as error:
            # a second Ctrl-C is a KeyboardInterrupt, which Lightning turns into an exit of its own
            raise TrainingInterrupted(checkpoint if checkpoint.exists() else None) from error


def read_checkpoint(path: Path, model: SavedModule) -> Mapping[str, Any]:
    """A checkpoint of this very model, as plain values and tensors.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is no checkpoint, or one of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path} to resume from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or "loops" not in state:
        raise ValueError(f"{path} is not a training checkpoint")
    check_same_model(state, model, path)
    return state


def _callback_state(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a callback saved; {} when it was not there."""
    for key, value in state.get("callbacks", {}).items():
        if key.startswith(name):
            return dict(value)
    return {}


def _finished(state: Mapping[str, Any], options: FitOptions) -> bool:
    """Whether a resumed run has nothing left to do: all epochs done, or stopped early with the same patience."""
    epochs = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    waited = _callback_state(state, "EarlyStopping").get("wait_count", 0)
    return bool(epochs >= options.max_epochs or (options.patience and waited >= options.patience))
