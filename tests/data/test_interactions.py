"""The container: numbering, order, the maps back, saving."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqrec_fast.data import DataError, Histories, Interactions, load


def test_equal_timestamps_keep_the_order_of_the_arrays() -> None:
    data = Interactions.from_arrays([1, 2, 1, 1, 2, 1], [30, 10, 20, 10, 30, 40], [5, 1, 5, 2, 1, 5])
    assert data.item_ids.tolist() == [10, 20, 30, 40]
    assert [data.decode_items(row).tolist() for row in data.histories] == [[10, 30, 20, 40], [10, 30]]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-(2**40), 2**40), st.integers(0, 3)), min_size=1, max_size=60))
def test_grouping_is_pythons_stable_sort(events: list[tuple[int, int, int]]) -> None:
    users, items, times = zip(*events, strict=True)
    data = Interactions.from_arrays(users, items, times)
    expected: dict[int, list[int]] = {}
    for user, item, _ in sorted(events, key=lambda event: (event[0], event[2])):
        expected.setdefault(user, []).append(item)
    assert data.user_ids.tolist() == sorted(set(users))
    assert data.item_ids.tolist() == sorted(set(items))
    found = {
        user: data.decode_items(row).tolist() for user, row in zip(data.user_ids.tolist(), data.histories, strict=True)
    }
    assert found == expected


def test_ids_far_apart_and_negative_ids() -> None:
    data = Interactions.from_arrays([-(2**62), 2**62, 0], [7, 7, 2**63 - 1])
    assert data.user_ids.tolist() == [-(2**62), 0, 2**62]
    assert data.item_ids.tolist() == [7, 2**63 - 1]
    assert data.histories.items.tolist() == [0, 1, 0]


def test_text_ids_and_the_maps_both_ways() -> None:
    data = Interactions.from_arrays(["zoe", "adam", "zoe"], ["b", "a", "ü"])
    assert data.user_ids.tolist() == ["adam", "zoe"]
    assert data.encode_items(["ü", "a"]).tolist() == [2, 0]
    assert data.encode_users(["zoe"]).tolist() == [1]
    assert data.decode_items(np.array([[2, 1]])).tolist() == [["ü", "b"]]
    assert data.decode_users([0]).tolist() == ["adam"]
    with pytest.raises(KeyError, match="item id 'x' is not in the data"):
        data.encode_items(["x"])
    with pytest.raises(IndexError, match=r"item number 3 is out of range 0…2"):
        data.decode_items([3])
    with pytest.raises(IndexError, match="user number -1"):
        data.decode_users([-1])


def test_counts_and_summary() -> None:
    data = Interactions.from_arrays([1, 1, 2], [5, 5, 6], source="mine")
    assert (data.num_users, data.num_items, data.num_interactions) == (2, 2, 3)
    assert data.summary().startswith("mine: 2 users, 2 items, 3 interactions, history length 1.5 mean")
    assert len(data.sha256) == 64
    assert data.sha256 != Interactions.from_arrays([1, 1, 2], [5, 6, 6]).sha256


@pytest.mark.parametrize(
    ("users", "items", "times", "message"),
    [
        ([], [], None, "users and items are empty"),
        ([1, 2], [1], None, "users and items must have the same length, got 2 and 1"),
        ([1, 2], [1, 2], [1.0], r"times must have the same length as users \(2\), got 1"),
        ([1, 2], [1, 2], [1.0, float("nan")], r"times\[1\] is not a finite number"),
        ([1, 2], [1, 2], ["1", "2"], "times must be numbers or datetimes"),
        ([1, 2], [1, 2], [float("inf"), 1.0], r"times\[0\] is not a finite number"),
        ([1.0, float("nan")], [1, 2], None, r"users\[1\] is nan"),
        ([1, 2], [1.5, 2.0], None, r"items\[0\] is 1.5: an id must be an integer or a string"),
        ([1, 2], ["a", None], None, r"items\[1\] is None"),
        (["a", "nan"], [1, 2], None, r"users\[1\] is 'nan'"),
        ([[1], [2]], [1, 2], None, "users must be one-dimensional"),
        ([True, False], [1, 2], None, "users must hold integers or strings, got bool"),
        (np.array([2**64 - 1], dtype=np.uint64), [1], None, "does not fit 64 signed bits"),
    ],
)
def test_bad_arrays(users: object, items: object, times: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Interactions.from_arrays(users, items, times)  # type: ignore[arg-type]


def test_whole_floats_and_python_integers_are_integers() -> None:
    data = Interactions.from_arrays([2.0, 1.0], np.array([7, 8], dtype=object))
    assert data.user_ids.tolist() == [1, 2]
    assert data.item_ids.dtype == np.int64


def test_datetimes_order() -> None:
    times = np.array([datetime.datetime(2024, 5, 2), datetime.datetime(2024, 5, 1)], dtype="datetime64[us]")
    assert Interactions.from_arrays([1, 1], [8, 9], times).histories[0].tolist() == [1, 0]
    with pytest.raises(DataError, match=r"times\[1\]"):
        Interactions.from_arrays([1, 1], [8, 9], np.array(["2024-05-02", "NaT"], dtype="datetime64[s]"))


def test_nanosecond_times_keep_their_last_digit() -> None:
    start = 1_700_000_000_000_000_000  # beyond 2⁵³: equal to the next integer as a double
    assert Interactions.from_arrays([1, 1], [8, 9], [start + 1, start]).histories[0].tolist() == [1, 0]


def test_histories() -> None:
    rows = Histories.from_lists([[4, 5], [], [6]])
    assert rows.select([2, 0]).items.tolist() == [6, 4, 5]
    assert rows.select([2, 0]).offsets.tolist() == [0, 1, 3]
    assert rows.select([]).offsets.tolist() == [0]
    assert rows.rows.tolist() == [0, 0, 2]
    assert rows[-1].tolist() == [6]
    with pytest.raises(IndexError, match="row 3 is out of range for 3"):
        rows[3]
    with pytest.raises(ValueError, match="offsets must ascend from 0 to len"):
        Histories(np.arange(3), np.array([0, 2, 1, 3]))
    with pytest.raises(ValueError, match="items must be a 1-D int64 numpy array, got int32"):
        Histories(np.arange(3, dtype=np.int32), np.array([0, 3]))


def test_item_numbers_outside_the_catalogue() -> None:
    with pytest.raises(ValueError, match="histories must hold item numbers 0…1"):
        Interactions(Histories.from_lists([[0, 2]]), np.array([1]), np.array([1, 2]))
    with pytest.raises(ValueError, match="user_ids must have one id per history"):
        Interactions(Histories.from_lists([[0, 1]]), np.array([1, 2]), np.array([1, 2]))


@pytest.mark.parametrize("items", [[5, 6, 5], ["a\nb", "é", ""[:0] + "x"]])
def test_save_and_load(tmp_path: Path, items: list[object]) -> None:
    data = Interactions.from_arrays(["u", "v", "u"], items, source="somewhere")
    data.save(tmp_path / "saved.npz")
    back = load(tmp_path / "saved.npz")
    assert back.histories.items.tolist() == data.histories.items.tolist()
    assert back.histories.offsets.tolist() == data.histories.offsets.tolist()
    assert back.item_ids.tolist() == data.item_ids.tolist()
    assert back.item_ids.dtype == data.item_ids.dtype
    assert back.user_ids.tolist() == ["u", "v"]
    assert (back.source, back.sha256) == (data.source, data.sha256)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "saved.npz"
    data = Interactions.from_arrays([1, 2], [3, 4])
    data.save(path)
    before = path.read_bytes()

    def half(file: Path, **arrays: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="disk full"):
        data.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved.npz"]


def test_saving_under_another_ending(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'path must end in "\.npz"'):
        Interactions.from_arrays([1], [1]).save(tmp_path / "saved.bin")


def test_a_broken_saved_file(tmp_path: Path) -> None:
    path = tmp_path / "saved.npz"
    Interactions.from_arrays([1, 2], [3, 4]).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="not a complete file written by Interactions.save"):
        load(path)
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(DataError, match="saved.npz: not a complete file"):
        load(path)
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match="saved.npz: not a"):
        load(path)
