"""``load``: interactions from a file of any common form."""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path

from .files import load_interactions
from .interactions import DataError, Interactions
from .tables import TABLE_FORMATS, column_role, load_table
from .text import load_pairs, load_sequences, looks_like_pairs

FORMATS = ("auto", "pairs", "sequences", *TABLE_FORMATS, "npz")
_HEAD_BYTES = 1 << 16


def load(
    path: str | PathLike[str],
    format: str = "auto",
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
) -> Interactions:
    """Read interactions from a file.

    ============= ======================================================================================
    format        the file
    ============= ======================================================================================
    ``pairs``     ``user item`` a line, oldest first within a user (SASRec's ml-1m.txt)
    ``sequences`` one user a line, then all its items, oldest first (S3-Rec's Beauty.txt)
    ``inter``     RecBole: tab-separated, typed header ``user_id:token  item_id:token  timestamp:float``
    ``session``   tab-separated ``SessionId ItemId Time`` (GRU4Rec)
    ``csv``       comma-separated with a header
    ``tsv``       tab-separated with a header
    ``parquet``   a Parquet file
    ``npz``       what ``Interactions.save`` wrote
    ============= ======================================================================================

    ``auto`` goes by the first bytes, the header and the ending. A plain text is ``pairs`` when more than half of its
    first lines have exactly two fields, else ``sequences``. Ids may be any integers or strings; a column in which
    each value is a plain integer (no leading zero, at most 18 digits) gives int64 ids, any other gives str. Within a
    user the order is (time, place in the file); without a time column, the place in the file.

    Args:
        path: the file.
        format: one of the above.
        user: name of the user (or session) column of a table; None looks for a usual one (user_id, userId, SessionId…).
        item: name of the item column; None looks for a usual one (item_id, movieId, asin…).
        time: name of the time column; None looks for a usual one (timestamp, time…) and does without if there is none.

    Returns:
        ``Interactions``; ``source`` is the file's name, ``sha256`` that of its bytes.

    Raises:
        FileNotFoundError: no such file.
        DataError: (a ValueError) the file is empty, or a line, column or value is unusable; the message names it.
        ValueError: an unknown format, or column names for a format without columns.
        ImportError: a table is read without polars (extra ``train``).

    Complexity: O(N log N) time, O(file) memory; a million text lines take about a second.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.txt"
        >>> _ = path.write_text("10 5\\n10 7\\n11 5\\n")
        >>> data = load(path)
        >>> data.num_users, data.num_items, data.user_ids.tolist(), data.histories[0].tolist()
        (2, 2, [10, 11], [0, 1])
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not path.exists():
        raise FileNotFoundError(f"no such data file: {path}")
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    names = (user, item, time)
    if format == "auto":
        format = detect_format(path, named=any(name is not None for name in names))
    if format not in TABLE_FORMATS and any(name is not None for name in names):
        raise ValueError(f"user=, item= and time= name the columns of a table, and format {format!r} has none ({path})")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    if format == "npz":
        return load_interactions(path)
    if format in TABLE_FORMATS:
        return load_table(path, format, names, _sha256(path))
    raw = path.read_bytes()
    read = load_pairs if format == "pairs" else load_sequences
    return read(path, raw, hashlib.sha256(raw).hexdigest())


def detect_format(path: Path, named: bool = False) -> str:
    """What ``load(format="auto")`` takes the file for; ``named``: the caller named columns, so it is a table."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"PK\x03\x04") and path.suffix == ".npz":
        return "npz"
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")):
        raise DataError(f"{path} is compressed: unpack it first")
    first = head.split(b"\n", 1)[0].decode(errors="replace").removeprefix("\ufeff").strip()
    by_ending = {
        ".inter": "inter",
        ".csv": "csv",
        ".tsv": "tsv",
        ".parquet": "parquet",
        ".pq": "parquet",
        ".npz": "npz",
    }
    if ":token" in first:
        return "inter"
    tabbed = [name.strip().lower() for name in first.split("\t")]
    if "sessionid" in tabbed and "itemid" in tabbed:
        return "session"
    if path.suffix.lower() in by_ending:
        return by_ending[path.suffix.lower()]
    for format, separator in (("tsv", "\t"), ("csv", ",")):
        roles = {column_role(name) for name in first.split(separator)}
        if {"user", "item"} <= roles:
            return format
    if named:
        return "tsv" if "\t" in first else "csv"
    if len(head) == _HEAD_BYTES:
        head = head[: head.rfind(b"\n") + 1] or head  # a line cut in two would count wrongly
    return "pairs" if looks_like_pairs(head) else "sequences"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
