"""Training, evaluation and export.

``evaluate``, ``train_epoch`` and the metrics need nothing but torch; ``fit`` needs Lightning (extra ``train``), which is
imported when ``fit`` is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._lightning import MissingExtra, require_lightning
from .loop import evaluate, target_ranks, train_epoch
from .metrics import Quality, RankMetrics, rank_from_scores
from .options import FitOptions, OptimizerOptions

if TYPE_CHECKING:
    from .callbacks import TrainingInterrupted
    from .export import export_encoder, load_encoder
    from .module import RecommenderModule
    from .trainer import FitResult, fit

__all__ = [
    "FitOptions",
    "FitResult",
    "MissingExtra",
    "OptimizerOptions",
    "Quality",
    "RankMetrics",
    "RecommenderModule",
    "TrainingInterrupted",
    "evaluate",
    "export_encoder",
    "fit",
    "load_encoder",
    "rank_from_scores",
    "require_lightning",
    "target_ranks",
    "train_epoch",
]

_LIGHTNING = {
    "FitResult": "trainer",
    "fit": "trainer",
    "RecommenderModule": "module",
    "TrainingInterrupted": "callbacks",
}
_OTHERS = {"export_encoder": "export", "load_encoder": "export"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _LIGHTNING:
        require_lightning()
        return getattr(import_module(f"{__name__}.{_LIGHTNING[name]}"), name)
    if name in _OTHERS:
        return getattr(import_module(f"{__name__}.{_OTHERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
