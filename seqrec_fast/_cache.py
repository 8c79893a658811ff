"""Forget what was derived from earlier calls."""

from __future__ import annotations

from collections.abc import Callable

from . import _dispatch

_FORGETTERS: list[Callable[[], None]] = []


def on_clear(forget: Callable[[], None]) -> None:
    """Have ``forget`` called by :func:`clear_cache`."""
    _FORGETTERS.append(forget)


def clear_cache() -> None:
    """Drop everything kept between calls: remembered backend choices, weights packed for a kernel, projected embedding tables.

    Packed weights are keyed by (address, version counter, precision). Edits through ``.data`` do not move the version counter:
    call this after them. Results never depend on it otherwise.

    Example:
        >>> import seqrec_fast as sf
        >>> sf.clear_cache()
    """
    _dispatch._choose.cache_clear()
    for forget in _FORGETTERS:
        forget()
