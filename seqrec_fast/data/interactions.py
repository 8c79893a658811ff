"""The in-memory form of a data set: user histories as CSR arrays of item numbers, and the maps back to the file's ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64Array = NDArray[np.int64]

# Spellings of "no value" that CSV writers leave behind. Whoever really has a user called "nan" can rename them; a
# whole column of missing ids that silently becomes one very popular item is the worse surprise.
MISSING = frozenset({"", "nan", "NaN", "null", "NULL", "None", "<NA>"})


class DataError(ValueError):
    """A data file or array that cannot be read; the message is one sentence naming the file and line, or the argument."""


@dataclass(frozen=True, eq=False)
class Histories:
    """Ragged item sequences: row ``u`` is ``items[offsets[u]:offsets[u + 1]]``, oldest first.

    Args:
        items: int64 ``[N]``, item numbers.
        offsets: int64 ``[U + 1]``, ascending from 0 to N.

    Raises:
        ValueError: the two arrays do not describe rows.

    Example:
        >>> rows = Histories.from_lists([[3, 1], [], [2]])
        >>> len(rows), rows[0].tolist(), rows.lengths.tolist()
        (3, [3, 1], [2, 0, 1])
    """

    items: Int64Array
    offsets: Int64Array

    def __post_init__(self) -> None:
        for name in ("items", "offsets"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != 1:
                raise ValueError(f"{name} must be a 1-D int64 numpy array, got {_describe(array)}")
        offsets = self.offsets
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(self.items) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets must ascend from 0 to len(items) = {len(self.items)}, got {_describe(offsets)}")

    @classmethod
    def from_lists(cls, rows: Iterable[Sequence[int] | Int64Array]) -> Histories:
        """Histories from one sequence of item numbers per row."""
        arrays = [np.asarray(row, dtype=np.int64) for row in rows]
        lengths = np.fromiter((len(row) for row in arrays), dtype=np.int64, count=len(arrays))
        return cls(np.concatenate(arrays) if arrays else np.empty(0, np.int64), offsets_of(lengths))

    @cached_property
    def lengths(self) -> Int64Array:
        """int64 ``[U]``: how many items each row holds."""
        return np.diff(self.offsets)

    @cached_property
    def rows(self) -> Int64Array:
        """int64 ``[N]``: the row each entry of ``items`` belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def select(self, rows: ArrayLike) -> Histories:
        """The given rows, in the given order, as new histories. Time and memory O(items selected)."""
        index = np.asarray(rows, dtype=np.int64)
        return Histories(
            self.items[slices_of(self.offsets[index], self.lengths[index])], offsets_of(self.lengths[index])
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Int64Array:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} is out of range for {len(self)} histories")
        row %= len(self)
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Int64Array]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"Histories({len(self):,} rows, {len(self.items):,} items)"


@dataclass(frozen=True, eq=False)
class Interactions:
    """A whole data set: who used what, in which order.

    Users and items are numbered 0… in ascending order of their original ids, so the numbering does not depend on
    the order of the file. Within a user the order is (time, file order): equal timestamps keep the file's order.

    Args:
        histories: one row per user.
        user_ids: ``[num_users]`` original ids, int64, or str in an object array.
        item_ids: ``[num_items]`` original ids, likewise.
        source: where the data came from, for people.
        sha256: of the source's bytes (of the arrays, where there is no file).

    Example:
        >>> data = Interactions.from_arrays(users=["b", "a", "a"], items=[7, 9, 7], times=[1, 5, 2])
        >>> data.histories[0].tolist(), data.decode_items([0, 1]).tolist(), data.user_ids.tolist()
        ([0, 1], [7, 9], ['a', 'b'])
    """

    histories: Histories
    user_ids: NDArray[Any]
    item_ids: NDArray[Any]
    source: str = "arrays"
    sha256: str = ""

    def __post_init__(self) -> None:
        if len(self.user_ids) != len(self.histories):
            raise ValueError(
                f"user_ids must have one id per history, got {len(self.user_ids)} for {len(self.histories)}"
            )
        items = self.histories.items
        if len(items) and (items.min() < 0 or items.max() >= len(self.item_ids)):
            raise ValueError(
                f"histories must hold item numbers 0…{len(self.item_ids) - 1} (one per entry of item_ids), "
                f"got {items.min()}…{items.max()}"
            )
        if not self.sha256:
            object.__setattr__(self, "sha256", _sha256_of_arrays(items, self.histories.offsets))

    @classmethod
    def from_arrays(
        cls,
        users: ArrayLike,
        items: ArrayLike,
        times: ArrayLike | None = None,
        *,
        source: str = "arrays",
        sha256: str = "",
    ) -> Interactions:
        """Group one interaction per entry into histories, stably ordered by (user, time, position).

        Args:
            users: ``[N]`` integers or strings.
            items: ``[N]`` integers or strings.
            times: ``[N]`` numbers or datetimes; None keeps the order of the arrays.
            source: shown by ``summary()``.
            sha256: of the source; computed from the arrays when empty.

        Raises:
            DataError: arrays of unequal length, none at all, missing ids, times that are not finite numbers.

        Complexity: O(N log N) time (O(N) without times and with integer ids), O(N) memory.
        """
        user, user_ids = number_ids(users, "users")
        item, item_ids = number_ids(items, "items")
        if len(user) != len(item):
            raise DataError(f"users and items must have the same length, got {len(user)} and {len(item)}")
        if len(user) == 0:
            raise DataError("users and items are empty: there is no interaction to learn from")
        if times is None:
            order = np.argsort(user, kind="stable")
        else:
            time = check_times(times)
            if len(time) != len(user):
                raise DataError(f"times must have the same length as users ({len(user)}), got {len(time)}")
            order = np.lexsort((time, user))  # stable: equal (user, time) stay in file order
        lengths = np.bincount(user, minlength=len(user_ids)).astype(np.int64)
        return cls(Histories(item[order], offsets_of(lengths)), user_ids, item_ids, source, sha256)

    @property
    def num_users(self) -> int:
        return len(self.histories)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_interactions(self) -> int:
        return len(self.histories.items)

    def decode_items(self, numbers: ArrayLike) -> NDArray[Any]:
        """The original ids of item numbers; shape kept. IndexError for a number outside 0…num_items−1."""
        return _decode(numbers, self.item_ids, "item")

    def decode_users(self, numbers: ArrayLike) -> NDArray[Any]:
        """The original ids of user numbers; shape kept. IndexError for a number outside 0…num_users−1."""
        return _decode(numbers, self.user_ids, "user")

    def encode_items(self, ids: Iterable[Any]) -> Int64Array:
        """The item numbers of original ids; KeyError naming the first one that is not in the data."""
        return _encode(ids, self._item_numbers, "item")

    def encode_users(self, ids: Iterable[Any]) -> Int64Array:
        """The user numbers of original ids; KeyError naming the first one that is not in the data."""
        return _encode(ids, self._user_numbers, "user")

    @cached_property
    def _item_numbers(self) -> dict[Any, int]:
        return {value: number for number, value in enumerate(self.item_ids.tolist())}

    @cached_property
    def _user_numbers(self) -> dict[Any, int]:
        return {value: number for number, value in enumerate(self.user_ids.tolist())}

    def summary(self) -> str:
        """One line for people: the counts, the lengths and the source."""
        lengths = self.histories.lengths
        return (
            f"{self.source}: {self.num_users:,} users, {self.num_items:,} items, {self.num_interactions:,} interactions, "
            f"history length {lengths.mean():.1f} mean, {int(np.median(lengths))} median, {lengths.max()} longest, "
            f"sha256 {self.sha256[:12]}"
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to one ``.npz`` file that ``load`` reads back; the file appears whole or not at all."""
        from .files import save_interactions

        save_interactions(self, path)

    def __repr__(self) -> str:
        return f"Interactions({self.summary()})"


def offsets_of(lengths: Int64Array) -> Int64Array:
    """CSR offsets ``[n + 1]`` of rows with the given lengths ``[n]``."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def slices_of(starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """The indices start, start + 1, …, start + length − 1 of every row, one after the other: int64 ``[lengths.sum()]``."""
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) - np.repeat(ends - lengths, lengths)
    within += np.repeat(starts, lengths)
    return within


def number_ids(values: ArrayLike, name: str) -> tuple[Int64Array, NDArray[Any]]:
    """Number ids 0… in ascending order: (numbers int64 ``[N]``, the distinct ids).

    Integers stay int64; text becomes an object array of str. Whole floats (what pandas makes of integers beside a
    missing value) count as integers.

    Raises:
        DataError: a missing, fractional, mixed or otherwise unusable id, with its position.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise DataError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.dtype.kind in "iu":
        return _number_integers(array, name)
    if array.dtype.kind == "f":
        bad = np.flatnonzero(array != np.floor(array))  # NaN is unequal to everything; infinity fails below
        bad = bad if len(bad) else np.flatnonzero(np.abs(array) > 2.0**53)
        if len(bad):
            raise DataError(f"{name}[{bad[0]}] is {array[bad[0]]}: an id must be an integer or a string")
        return _number_integers(array.astype(np.int64), name)
    if array.dtype.kind not in "OUT":
        raise DataError(f"{name} must hold integers or strings, got {array.dtype}")
    plain = array.tolist()
    if plain and all(type(value) is int or isinstance(value, np.integer) for value in plain):
        return number_ids(np.array(plain, dtype=np.int64), name)
    for position, value in enumerate(plain):
        if not isinstance(value, str) or value in MISSING:
            raise DataError(f"{name}[{position}] is {value!r}: an id must be an integer or a string")
    return number_strings(plain)


def number_strings(values: Sequence[str]) -> tuple[Int64Array, NDArray[Any]]:
    """``number_ids`` for text that is known to be well formed."""
    ids = sorted(set(values))
    numbers = {value: number for number, value in enumerate(ids)}
    encoded = np.fromiter(map(numbers.__getitem__, values), dtype=np.int64, count=len(values))
    distinct = np.empty(len(ids), dtype=object)
    distinct[:] = ids
    return encoded, distinct


def check_times(times: ArrayLike) -> NDArray[Any]:
    """Times as a sortable numeric array ``[N]``; DataError naming the first that is missing or not a number."""
    array = np.asarray(times)
    if array.dtype.kind == "M":
        missing = np.isnat(array)
        array = array.astype(np.int64)
    elif array.dtype.kind in "iuf":
        missing = ~np.isfinite(array)
    else:
        raise DataError(f"times must be numbers or datetimes, got {array.dtype}")
    if array.ndim != 1:
        raise DataError(f"times must be one-dimensional, got shape {array.shape}")
    if missing.any():
        raise DataError(f"times[{int(missing.argmax())}] is not a finite number")
    return array


def _number_integers(array: NDArray[Any], name: str) -> tuple[Int64Array, NDArray[Any]]:
    if len(array) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    low, high = int(array.min()), int(array.max())
    if high > np.iinfo(np.int64).max:
        raise DataError(f"{name} holds {high}, which does not fit 64 signed bits: pass such ids as strings")
    array = array.astype(np.int64, copy=False)
    if high - low > 4 * len(array) + 1_000_000:
        ids, encoded = np.unique(array, return_inverse=True)
        return encoded.astype(np.int64, copy=False), ids
    # Ids are mostly dense: a presence table is ten times faster than the sort inside np.unique.
    present = np.zeros(high - low + 1, dtype=bool)
    present[array - low] = True
    numbers = np.cumsum(present, dtype=np.int64) - 1
    return numbers[array - low], np.flatnonzero(present).astype(np.int64) + low


def _decode(numbers: ArrayLike, ids: NDArray[Any], what: str) -> NDArray[Any]:
    index = np.asarray(numbers, dtype=np.int64)
    outside = (index < 0) | (index >= len(ids))
    if outside.any():
        raise IndexError(f"{what} number {index[outside][0]} is out of range 0…{len(ids) - 1}")
    decoded: NDArray[Any] = ids[index]
    return decoded


def _encode(ids: Iterable[Any], numbers: dict[Any, int], what: str) -> Int64Array:
    found = []
    for value in ids:
        if value not in numbers:
            raise KeyError(f"{what} id {value!r} is not in the data")
        found.append(numbers[value])
    return np.array(found, dtype=np.int64)


def _describe(array: object) -> str:
    if isinstance(array, np.ndarray):
        return f"{array.dtype} of shape {array.shape}"
    return type(array).__name__


def _sha256_of_arrays(*arrays: Int64Array) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
