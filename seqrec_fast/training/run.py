"""A training run in a folder: data, settings, weights, quality; started, continued, and read back for serving."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from rich.console import Console
from torch.utils.data import DataLoader

import seqrec_fast
from seqrec_fast._files import read_json, write_json
from seqrec_fast.data import (
    Batch,
    EvaluationBatch,
    Interactions,
    Split,
    evaluation_loader,
    leave_one_out,
    load,
    train_loader,
)
from seqrec_fast.models import Markov, Popularity, SequenceRecommender
from seqrec_fast.models import load as load_model

from ._lightning import require_lightning
from .loop import evaluate
from .metrics import Quality
from .options import CHECKPOINT, HISTORY, MODEL
from .settings import FREE_ON_RESUME, RunSettings

RUN, DATA = "run.json", "data.npz"  # and the files that `fit` writes
FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A folder with a trained (or half-trained) model.

    Attributes:
        folder: where the files are.
        data: users, items and histories, with the ids of the file they came from.
        model: with the best weights.
        record: what ``run.json`` holds: data, settings, quality, versions.
    """

    folder: Path
    data: Interactions
    model: SequenceRecommender
    record: dict[str, Any]


def check(
    folder: str | os.PathLike[str], chosen: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> None:
    """All of :func:`start` that can be checked before the data is read, which may take long; raises what that raises."""
    require_lightning()
    from .trainer import check_devices

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a run needs a folder")
    if resume:
        if not (folder / CHECKPOINT).is_file():
            raise FileNotFoundError(f"there is no run to continue in {folder}: {CHECKPOINT} is missing")
        record = read_record(folder)
        settings = _continued(folder, record["settings"], chosen, record["data"]["items"])
    else:
        begun = any((folder / name).exists() for name in (CHECKPOINT, MODEL))
        if begun and not overwrite:
            raise FileExistsError(
                f"{folder} holds a run already: continue it with --resume, or replace it with --overwrite"
            )
        settings = RunSettings.from_flat(1, chosen)  # the number of items decides about no setting
    check_devices(settings.fit)


def _continued(folder: Path, saved: Mapping[str, Any], chosen: Mapping[str, Any], num_items: int) -> RunSettings:
    """The run's own settings, with what may change chosen anew."""
    settings = RunSettings.from_flat(num_items, {**saved, **chosen})
    for name, value in settings.to_flat().items():
        if name not in FREE_ON_RESUME and saved.get(name) != value:
            raise ValueError(f"the run in {folder} was started with {name}={saved.get(name)}, got {name}={value}")
    return settings


def start(
    folder: str | os.PathLike[str],
    data: Interactions,
    chosen: Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> RunSettings:
    """Prepare a folder for a run, or check that the run in it can be continued with this data and these settings.

    Args:
        folder: made if missing.
        data: what will be trained on.
        chosen: settings by name. When continuing, those that are not named are the run's own.
        resume: continue the run in the folder.
        overwrite: replace the run in the folder.

    Raises:
        FileExistsError: a run is there, and neither ``resume`` nor ``overwrite`` is asked for.
        FileNotFoundError: nothing to continue.
        ValueError: other data, another value of a setting that decides what is computed, a bad setting, nothing to learn
            from, or a device that is not there.
        MissingExtra: without Lightning.
    """
    check(folder, chosen, resume=resume, overwrite=overwrite)
    folder = Path(folder)
    record_file = folder / RUN
    if resume:
        record = read_record(folder)
        if record["data"]["sha256"] != data.sha256:
            raise ValueError(
                f"the run in {folder} was started on other data ({record['data']['source']}, not {data.source})"
            )
        settings = _continued(folder, record["settings"], chosen, data.num_items)
    else:
        settings = RunSettings.from_flat(data.num_items, chosen)
        record = {}
    # all that can be wrong is found before anything is written
    _batches(leave_one_out(data), settings)
    if not resume:
        data.save(folder / DATA)
    origin = {"source": data.source, "sha256": data.sha256, "users": data.num_users, "items": data.num_items}
    versions = {"seqrec_fast": seqrec_fast.__version__, "torch": torch.__version__}
    write_json(
        record_file,
        {
            "format": FORMAT,
            "data": origin,
            "settings": settings.to_flat(),
            "versions": versions,
            "quality": record.get("quality", {}),
        },
    )
    return settings


class _OfProcess(Protocol):
    """Lightning keeps the number of the process on a decorator."""

    rank: int


def train(
    folder: str | os.PathLike[str],
    data: Interactions,
    settings: RunSettings,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> tuple[SequenceRecommender, dict[str, Quality]]:
    """Train what :func:`start` prepared, test it, and add the quality to ``run.json``.

    Returns:
        The model with the best weights, and the quality on the test targets by the name of the model and the filter
        (empty in all but the first process of a multi-device training).

    Raises:
        MissingExtra: without Lightning.
        TrainingInterrupted: after Ctrl-C; the checkpoint is saved.
    """
    require_lightning()
    from lightning.pytorch.utilities import rank_zero_only

    from .trainer import fit

    console = console or Console(stderr=True)
    folder = Path(folder)
    split = leave_one_out(data)
    console.print(split.summary(), highlight=False, soft_wrap=True)
    torch.manual_seed(settings.fit.seed)
    model = SequenceRecommender.from_config(settings.model)
    console.print(f"{describe_model(model)}", highlight=False, soft_wrap=True)
    batches, validation = _batches(split, settings)
    fit(model, batches, validation, folder, settings.fit, resume=resume, console=console)
    number = cast(_OfProcess, rank_zero_only).rank
    if number:  # the other processes of a multi-device training leave the rest to the first
        return model, {}
    with console.status("ranking the test targets"):
        quality = measure_quality(model, split, max_length=settings.loader.max_length)
    record = read_record(folder)
    record["quality"] = {
        name: {**found, "users": found.num_users, "items": found.num_items, "seen_filter": found.seen_filter}
        for name, found in quality.items()
    }
    write_json(folder / RUN, record)
    return model, quality


def _batches(split: Split, settings: RunSettings) -> tuple[DataLoader[Batch], DataLoader[EvaluationBatch]]:
    """Training and validation batches."""
    loader = settings.loader
    batches = train_loader(
        split,
        batch_size=loader.batch_size,
        max_length=loader.max_length,
        seed=settings.fit.seed,
        windows=loader.windows,
    )
    return batches, evaluation_loader(split, "validation", max_length=loader.max_length)


def measure_quality(model: SequenceRecommender, split: Split, *, max_length: int = 200) -> dict[str, Quality]:
    """Full-ranking quality on the test targets: the model with and without the seen filter, and the two floors with it.

    The floors (popularity, first-order Markov) count everything before the test target, the validation item included,
    which the model was not trained on: one item a user more than the model had.
    """
    filtered = evaluation_loader(split, "test", max_length=max_length)
    plain = evaluation_loader(split, "test", max_length=max_length, exclude_seen=False)
    histories = split.test.histories
    return {
        "SequenceRecommender": evaluate(model, filtered),
        "Markov": evaluate(Markov(split.num_items).fit(histories), filtered),
        "Popularity": evaluate(Popularity(split.num_items).fit(histories), filtered),
        "SequenceRecommender, seen items kept": evaluate(model, plain),
    }


def below_floors(quality: Mapping[str, Quality], metric: str = "NDCG@10") -> str | None:
    """A sentence where the model ranks below a floor, which takes no training: it is not ready for use."""
    model = quality["SequenceRecommender"][metric]
    floors = {name: quality[name][metric] for name in ("Markov", "Popularity")}
    name = max(floors, key=floors.__getitem__)
    if model >= floors[name]:
        return None
    return (
        f"the model ranks below {name} ({metric} {model:.4f} against {floors[name]:.4f}): "
        "train longer (--epochs), with another --learning-rate, or on more data"
    )


def read_record(folder: Path) -> dict[str, Any]:
    """What ``run.json`` holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not written by this version.
    """
    path = folder / RUN
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: {RUN} is missing")
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this version of seqrec_fast")
    return record


def read_history(folder: Path) -> list[dict[str, float]]:
    """The epoch records of a run: epoch, loss, validation metrics, seconds."""
    records: list[dict[str, float]] = read_json(folder / HISTORY)
    return records


def open_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run for serving.

    Raises:
        FileNotFoundError, NotADirectoryError: a file is missing, or given in place of its folder.
        ValueError: a file that is damaged or belongs to another run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file: give the folder of the run, {folder.parent}")
        raise FileNotFoundError(f"there is no folder {folder}")
    record = read_record(folder)
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(f"the run in {folder} has no weights yet: {MODEL} is missing")
    model = load_model(folder / MODEL)
    if not isinstance(model, SequenceRecommender):
        raise ValueError(f"{folder / MODEL} holds a {type(model).__name__}, not a SequenceRecommender")
    data = load(folder / DATA)
    if data.num_items != model.num_items or data.sha256 != record["data"]["sha256"]:
        raise ValueError(
            f"the files in {folder} belong to different runs: {MODEL} has {model.num_items} items, "
            f"{DATA} has {data.num_items} ({data.source})"
        )
    return Run(folder, data, model, record)


def describe_model(model: SequenceRecommender) -> str:
    """One line for people."""
    config = model.config
    size = sum(parameter.numel() for parameter in model.parameters())
    attention = f"{config.attention} attention" if config.attention else "no attention"
    return (
        f"SequenceRecommender: {config.encoder}, {config.num_layers} layer{'s' * (config.num_layers != 1)}, "
        f"width {config.embedding_dim}, {attention}, {size:,} parameters"
    )
