"""Lightning, asked for only when training starts, and kept quiet."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


def require_lightning() -> None:
    """Check that Lightning can be imported, without importing it.

    Raises:
        MissingExtra: naming the extra to install.
    """
    if importlib.util.find_spec("lightning") is None:
        raise MissingExtra(
            "training needs Lightning, which is not installed: pip install 'seqrec_fast[train]' "
            "(train_epoch and evaluate work without it)"
        )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out Lightning's tips, device lines and guesses about workers; its errors and the model's warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # the filter looks at the module that is said to have warned; a warning of ours, or of torch for
            # something our model did, names another one
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
