"""Plain-text interactions, read by numpy: ``user item`` lines, or one user and all its items a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .interactions import MISSING, DataError, Int64Array, Interactions, number_ids

_BLANK = np.zeros(256, dtype=bool)
_BLANK[list(b" \t\n\r\x0b\x0c")] = True  # what bytes.split() splits at
_DIGIT = np.zeros(256, dtype=bool)
_DIGIT[list(b"0123456789")] = True
# 18 digits always fit 64 signed bits; longer runs of digits are kept as text
_MAX_DIGITS = 18


@dataclass(frozen=True)
class Fields:
    """The fields of a text: where each begins, how long it is, and the (0-based) line it is on."""

    raw: bytes
    starts: Int64Array
    lengths: Int64Array
    lines: Int64Array
    num_lines: int

    @classmethod
    def of(cls, raw: bytes) -> Fields:
        """Split at white space. O(bytes), vectorised."""
        raw = raw.removeprefix(b"\xef\xbb\xbf")
        text = np.frombuffer(raw, dtype=np.uint8)
        filled = np.zeros(len(text) + 2, dtype=np.int8)  # a blank at either end
        filled[1:-1] = ~_BLANK[text]
        edges = np.diff(filled)
        starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        newlines = np.flatnonzero(text == ord("\n"))
        return cls(raw, starts, stops - starts, np.searchsorted(newlines, starts), len(newlines) + 1)

    def per_line(self) -> Int64Array:
        """int64 ``[num_lines]``: fields on each line."""
        return np.bincount(self.lines, minlength=self.num_lines).astype(np.int64)

    def line(self, number: int) -> str:
        """A (0-based) line for a message, shortened."""
        text = self.raw.split(b"\n", number + 1)[number].decode(errors="replace").strip()
        return text if len(text) <= 60 else text[:57] + "…"

    def separator_hint(self, number: int) -> str:
        """What to add to a message when the line's fields seem to be parted by something else than white space."""
        if any(separator in self.line(number) for separator in (",", ";", "::", "|")):
            return '; fields are parted by white space here, a table with a header is format="csv" or "tsv"'
        return ""

    def integers(self) -> Int64Array | None:
        """All fields as int64 when every one is a plain integer (no leading zero or plus, ≤ 18 digits), else None."""
        text = np.frombuffer(self.raw, dtype=np.uint8)
        first = text[self.starts]
        negative = first == ord("-")
        second = text[np.minimum(self.starts + 1, len(text) - 1)]
        digits = self.lengths - negative
        other = np.count_nonzero(~_DIGIT[text] & ~_BLANK[text])
        leading_zero = ((first == ord("0")) & (self.lengths > 1)) | (negative & (second == ord("0")))
        if (
            other != np.count_nonzero(negative)
            or leading_zero.any()
            or (digits < 1).any()
            or (digits > _MAX_DIGITS).any()
        ):
            return None
        return np.fromstring(self.raw.decode("ascii"), dtype=np.int64, sep=" ")

    def strings(self, path: Path) -> list[str]:
        """All fields as text; DataError naming the line of one that is not UTF-8 or stands for a missing value."""
        try:
            values = [field.decode() for field in self.raw.split()]
        except UnicodeDecodeError:
            bad = next(number for number, line in enumerate(self.raw.split(b"\n")) if not _is_utf8(line))
            raise DataError(f"{path}, line {bad + 1}: not UTF-8 text") from None
        missing = MISSING.intersection(values)
        if missing:
            at = min(values.index(value) for value in missing)
            line = int(self.lines[at])
            raise DataError(f"{path}, line {line + 1}: {values[at]!r} is not an id ({self.line(line)!r})")
        return values


def looks_like_pairs(head: bytes) -> bool:
    """Whether more than half of the lines with text have exactly two fields."""
    counts = [len(line.split()) for line in head.split(b"\n") if line.strip()]
    return 2 * sum(count == 2 for count in counts) > len(counts)


def load_pairs(path: Path, raw: bytes, sha256: str) -> Interactions:
    """``user item`` lines in chronological order."""
    fields = Fields.of(raw)
    counts = fields.per_line()
    bad = np.flatnonzero((counts != 2) & (counts != 0))  # blank lines are passed over
    if len(bad):
        line = int(bad[0])
        hint = (
            '; a file with one user a line is format="sequences"' if counts[line] > 2 else fields.separator_hint(line)
        )
        raise DataError(
            f"{path}, line {line + 1}: expected 'user item', got {counts[line]} "
            f"field{'s' if counts[line] != 1 else ''} ({fields.line(line)!r}){hint}"
        )
    values = _values(fields, path)
    _refuse_header(fields, values, path)
    return _interactions(path, values[0::2], values[1::2], sha256)


def load_sequences(path: Path, raw: bytes, sha256: str) -> Interactions:
    """One user a line: the user, then all its items in chronological order."""
    fields = Fields.of(raw)
    counts = fields.per_line()
    if (counts == 1).any():
        line = int(np.argmax(counts == 1))
        raise DataError(
            f"{path}, line {line + 1}: a user without items ({fields.line(line)!r}){fields.separator_hint(line)}"
        )
    values = _values(fields, path)
    filled = np.flatnonzero(counts)
    heads = np.cumsum(counts[filled]) - counts[filled]  # the place of each line's user among the fields
    users, distinct = number_ids(values[heads], "users")
    if len(distinct) < len(users):
        _, again = np.unique(users, return_index=True)
        second = int(np.setdiff1d(np.arange(len(users)), again)[0])
        first = int(np.flatnonzero(users == users[second])[0])
        raise DataError(
            f"{path}, line {filled[second] + 1}: user {values[heads[second]]} was on line {filled[first] + 1} already; "
            "this format has one user a line, the user first and then its items; columns of user, item and time want a "
            'header line and format="tsv" or "csv"'
        )
    is_item = np.ones(len(values), dtype=bool)
    is_item[heads] = False
    return _interactions(path, np.repeat(values[heads], counts[filled] - 1), values[is_item], sha256)


def _values(fields: Fields, path: Path) -> NDArray[Any]:
    """All fields, as int64 where all are integers, else as str in an object array."""
    if len(fields.starts) == 0:
        raise DataError(f"{path}: the file is empty")
    integers = fields.integers()
    if integers is not None:
        return integers
    text = fields.strings(path)
    values = np.empty(len(text), dtype=object)
    values[:] = text
    return values


def _interactions(path: Path, users: NDArray[Any], items: NDArray[Any], sha256: str) -> Interactions:
    return Interactions.from_arrays(_tidy(users), _tidy(items), source=path.name, sha256=sha256)


def _tidy(ids: NDArray[Any]) -> NDArray[Any]:
    """One column of a mixed file (text users, integer items) as integers where all of that column are."""
    if ids.dtype == np.int64:
        return ids
    column = Fields.of("\n".join(ids.tolist()).encode()).integers()
    return ids if column is None else column


def _refuse_header(fields: Fields, values: NDArray[Any], path: Path) -> None:
    """A first line of two words over nothing but integers is a header, not a user."""
    if values.dtype == np.int64 or len(values) <= 2 or not all(word[0].isalpha() for word in values[:2]):
        return
    rest = Fields.of(fields.raw[int(fields.starts[2]) :])
    if rest.integers() is not None:
        line = int(fields.lines[0])
        raise DataError(
            f"{path}, line {line + 1}: {fields.line(line)!r} looks like a header and this format has none: "
            'remove it, or load with format="csv" or "tsv"'
        )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
