"""Tables with named columns (CSV, TSV, RecBole ``.inter``, session TSV, Parquet), read by polars.

polars reads fast and says little about a bad line. So the fast path only notices that something is wrong; a slow
path then walks the file record by record and names the first line that is at fault.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from .interactions import MISSING, DataError, Interactions

TABLE_FORMATS = ("inter", "session", "csv", "tsv", "parquet")

_USUAL_NAMES = {
    "user": ("userid", "user", "sessionid", "session", "uid", "visitorid", "reviewerid", "customerid"),
    "item": ("itemid", "item", "movieid", "productid", "parentasin", "asin", "iid", "articleid", "trackid"),
    "time": ("timestamp", "time", "ts", "unixreviewtime", "datetime", "date"),
}
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"


@dataclass(frozen=True)
class Text:
    """How a text table is written."""

    separator: str
    quoted: bool


_TEXTS = {
    "csv": Text(",", quoted=True),
    "tsv": Text("\t", quoted=True),
    "session": Text("\t", quoted=False),
    "inter": Text("\t", quoted=False),
}


@dataclass(frozen=True)
class Columns:
    """The columns of the table that are used, by their full names."""

    user: str
    item: str
    time: str | None

    def names(self) -> list[str]:
        return [name for name in (self.user, self.item, self.time) if name is not None]


def column_role(name: str) -> str | None:
    """ "user", "item" or "time" when a column of this name is usually that."""
    plain = _plain(name)
    return next((role for role, names in _USUAL_NAMES.items() if plain in names), None)


def load_table(path: Path, format: str, names: Sequence[str | None], sha256: str) -> Interactions:
    """Read the columns called ``names`` = (user, item, time), or their usual names where None."""
    polars = _polars(format)
    if format == "parquet":
        table, columns = _read_parquet(path, names, polars)
        place = f"{path}, row"
    else:
        table, columns = _read_text(path, format, names, polars)
        place = f"{path}, data line"
    if table.height == 0:
        raise DataError(f"{path}: the table has a header and no rows")
    users = _ids(table[columns.user], place)
    items = _ids(table[columns.item], place)
    times = None if columns.time is None else _times(table[columns.time], place, polars)
    return Interactions.from_arrays(users, items, times, source=path.name, sha256=sha256)


def choose_columns(path: Path, available: Sequence[str], names: Sequence[str | None], typed: bool = False) -> Columns:
    """Find the user, item and time columns; DataError naming what is missing and what there is.

    ``typed``: names carry RecBole's type (``user_id:token``), which the caller may leave out.
    """
    bare = {name: name.rsplit(":", 1)[0] if typed else name for name in available}
    found: dict[str, str | None] = {}
    for role, wanted in zip(("user", "item", "time"), names, strict=True):
        if wanted is not None:
            matches = [name for name in available if wanted in (name, bare[name], bare[name].strip())]
            if not matches:
                raise DataError(f"{path}: no column {wanted!r} ({role}=), the columns are {', '.join(bare.values())}")
        else:
            usual = _USUAL_NAMES[role]
            matches = [name for name in available if _plain(bare[name]) in usual]
            matches.sort(key=lambda name: usual.index(_plain(bare[name])))
            if not matches and role != "time":
                raise DataError(
                    f"{path}: none of the columns {', '.join(bare.values())} is known to hold {role}s: name it by {role}="
                )
        found[role] = matches[0] if matches else None
    user, item, time = str(found["user"]), str(found["item"]), found["time"]
    if len({user, item, time}) < 3:
        raise DataError(f"{path}: user=, item= and time= must be three different columns, got {user}, {item}, {time}")
    return Columns(user, item, time)


def _read_text(path: Path, format: str, names: Sequence[str | None], polars: Any) -> tuple[Any, Columns]:
    text = _TEXTS[format]
    _, header = next(_records(path, text), (0, []))
    if not header:
        raise DataError(f"{path}, line 1: expected a header with column names, got a blank line")
    if len(set(header)) < len(header):
        twice = next(name for place, name in enumerate(header) if name in header[:place])
        raise DataError(f"{path}, line 1: the column {twice!r} occurs twice")
    if format == "inter":
        _check_typed_header(path, header)
    columns = choose_columns(path, header, names, typed=format == "inter")
    if format == "inter":
        _check_types(path, columns)
    wanted = list(dict.fromkeys([*columns.names(), header[-1]]))  # an empty last column tells of a short line
    try:
        table = polars.read_csv(
            path,
            columns=wanted,
            separator=text.separator,
            quote_char='"' if text.quoted else None,
            infer_schema=False,
        )
    except polars.exceptions.PolarsError as error:
        _walk(path, text, header, columns)
        raise DataError(f"{path}: not a readable {format} file ({str(error).splitlines()[0]})") from error
    table = table.with_columns(polars.all().str.strip_chars())
    suspect = polars.any_horizontal(polars.all().is_null() | polars.all().is_in(sorted(MISSING)))
    if table.select(suspect.any()).item():
        blank = _walk(path, text, header, columns)
        table = table.with_row_index("__row").filter(~polars.col("__row").is_in(blank)) if blank else table
    if columns.time is not None and not table.select(_finite(polars, columns.time).all()).item():
        _walk(path, text, header, columns)
        raise DataError(f"{path}: column {columns.time!r} holds something that is not a number")
    return table, columns


def _read_parquet(path: Path, names: Sequence[str | None], polars: Any) -> tuple[Any, Columns]:
    try:
        columns = choose_columns(path, list(polars.read_parquet_schema(path)), names)
        table = polars.read_parquet(path, columns=columns.names())
    except polars.exceptions.PolarsError as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    for name in columns.names():
        missing = table[name].is_null()
        if missing.any():
            raise DataError(f"{path}, row {missing.arg_max() + 1}: no value in column {name!r}")
    return table, columns


def _ids(column: Any, place: str) -> NDArray[Any]:
    """An id column as int64, or as str in an object array."""
    kind = column.dtype
    if kind.is_integer():
        array: NDArray[Any] = column.to_numpy()
        return array
    if kind.is_float():
        bad = ~(column.is_finite() & (column == column.floor()))
        if bad.any():
            row = bad.arg_max()
            raise DataError(f"{place} {row + 1}: {column[row]} in column {column.name!r} is not an integer or a string")
        return np.asarray(column.to_numpy(), dtype=np.int64)
    if str(kind).split("(")[0] not in ("String", "Categorical", "Enum"):
        raise DataError(f"{place}s: column {column.name!r} holds {kind}, ids must be integers or strings")
    column = column.cast(_polars("ids").String)
    if column.str.contains(_INTEGER).all():
        return np.asarray(column.cast(_polars("ids").Int64).to_numpy(), dtype=np.int64)
    missing = column.is_in(sorted(MISSING))
    if missing.any():
        row = missing.arg_max()
        raise DataError(f"{place} {row + 1}: {column[row]!r} in column {column.name!r} is not an id")
    values = np.empty(len(column), dtype=object)
    values[:] = column.to_list()
    return values


def _times(column: Any, place: str, polars: Any) -> NDArray[Any]:
    """A time column as finite numbers: int64 where they are whole, so that nanoseconds keep every digit."""
    kind = column.dtype
    if kind.is_integer() or kind in (polars.Date,) or isinstance(kind, polars.Datetime):
        return np.asarray(column.cast(polars.Int64).to_numpy())
    if kind == polars.String:
        whole = column.cast(polars.Int64, strict=False)
        if whole.null_count() == 0:
            return np.asarray(whole.to_numpy())
        numbers = column.cast(polars.Float64, strict=False)
    elif kind.is_numeric():
        numbers = column.cast(polars.Float64)
    else:
        raise DataError(f"{place}s: column {column.name!r} holds {kind}, times must be numbers or datetimes")
    bad = numbers.is_null() | ~numbers.is_finite().fill_null(False)
    if bad.any():
        row = bad.arg_max()
        raise DataError(f"{place} {row + 1}: time {column[row]!r} in column {column.name!r} is not a finite number")
    return np.asarray(numbers.to_numpy())


def _finite(polars: Any, name: str) -> Any:
    return polars.col(name).cast(polars.Float64, strict=False).is_finite().fill_null(False)


def _walk(path: Path, text: Text, header: list[str], columns: Columns) -> list[int]:
    """Read every record in Python: DataError for the first bad one; returns the numbers of the blank rows."""
    places = [(name, header.index(name)) for name in columns.names()]
    blank = []
    for row, (line, record) in enumerate(_records(path, text), start=-1):
        if row < 0:
            continue
        if not record:
            blank.append(row)
            continue
        if len(record) != len(header):
            shown = text.separator.join(record)
            _refuse(path, line, f"expected {len(header)} fields, got {len(record)} ({_short(shown)!r})")
        for name, place in places:
            value = record[place].strip()
            if value in MISSING:
                _refuse(path, line, f"no value in column {name!r}" + (f" (it reads {value!r})" if value else ""))
            if any("\udc80" <= letter <= "\udcff" for letter in value):  # what surrogateescape makes of a bad byte
                _refuse(path, line, f"column {name!r} is not UTF-8 text")
            if name == columns.time and not _is_number(value):
                _refuse(path, line, f"time {_short(value)!r} in column {name!r} is not a finite number")
    return blank


def _records(path: Path, text: Text) -> Iterator[tuple[int, list[str]]]:
    """(first line number, fields) of every record; a blank line is an empty record."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if text.quoted else csv.QUOTE_NONE
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=text.separator, quoting=quoting, strict=True)
        line = 1
        try:
            for record in reader:
                yield line, record
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: {error}") from None


def _check_typed_header(path: Path, header: list[str]) -> None:
    for name in header:
        if ":" not in name:
            raise DataError(
                f"{path}, line 1: {name!r} has no type; a RecBole header reads like "
                "'user_id:token<tab>item_id:token<tab>timestamp:float'"
            )


def _check_types(path: Path, columns: Columns) -> None:
    for name in columns.names():
        if name.endswith("_seq"):
            raise DataError(f"{path}, line 1: {name!r} holds lists; a user, item or time is one value (token or float)")


def _refuse(path: Path, line: int, what: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {what}")


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value)) and "_" not in value
    except ValueError:
        return False


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "").replace(" ", "").replace("-", "")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def _polars(format: str) -> Any:
    try:
        import polars
    except ImportError as error:
        raise ImportError(
            f'reading {format} files needs polars, which the extra "train" installs: pip install "seqrec_fast[train]"'
        ) from error
    return polars
