"""The public operators: argument checks, fake implementations for tracing, and gradients. The only caller of torch.ops."""

from __future__ import annotations

import importlib
import pkgutil


def define_all() -> None:
    """Import every operator, which defines it for torch and the dispatch: ``import seqrec_fast`` leaves that to first use."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
