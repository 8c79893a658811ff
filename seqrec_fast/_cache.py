"""Forget what was derived from earlier calls."""

from __future__ import annotations

from . import _dispatch


def clear_cache() -> None:
    """Drop everything kept between calls: remembered backend choices, and weights packed for a kernel.

    Packed weights are keyed by (address, version counter, precision). Edits through ``.data`` do not move the version counter:
    call this after them. Results never depend on it otherwise.

    Example:
        >>> import seqrec_fast as sf
        >>> sf.clear_cache()
    """
    _dispatch._choose.cache_clear()
