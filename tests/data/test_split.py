"""Leave-one-out: what is held out, and what becomes of users with little to hold out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqrec_fast.data import Histories, Interactions, leave_one_out, load


def dataset(rows: list[list[int]], num_items: int = 10) -> Interactions:
    return Interactions(Histories.from_lists(rows), np.arange(len(rows)) + 100, np.arange(num_items), source="rows")


def test_the_last_two_items_are_held_out() -> None:
    split = leave_one_out(dataset([[1, 2, 3], [4, 5, 6, 7, 8]]))
    assert [row.tolist() for row in split.train] == [[1], [4, 5, 6]]
    assert [row.tolist() for row in split.validation.histories] == [[1], [4, 5, 6]]
    assert [row.tolist() for row in split.test.histories] == [[1, 2], [4, 5, 6, 7]]
    assert split.validation.target.tolist() == [2, 7]
    assert split.test.target.tolist() == [3, 8]
    assert split.test.users.tolist() == [0, 1]
    assert (split.num_items, split.num_users, split.num_short_users) == (10, 2, 0)
    assert split.evaluation("validation") is split.validation
    assert split.evaluation("test") is split.test


@pytest.mark.parametrize(("short_users", "expected"), [("train", [[1], [], [2, 3], [1]]), ("drop", [[], [], [], [1]])])
def test_short_users(short_users: str, expected: list[list[int]]) -> None:
    split = leave_one_out(dataset([[1], [], [2, 3], [1, 2, 3]]), short_users=short_users)  # type: ignore[arg-type]
    assert [row.tolist() for row in split.train] == expected
    assert split.test.users.tolist() == split.validation.users.tolist() == [3]
    assert split.num_short_users == 3
    assert "3 short users in training only" in split.summary()


def test_bad_input() -> None:
    data = dataset([[1, 2, 3], [1], [2]])
    with pytest.raises(ValueError, match=r"rows: user 101 has 1 interaction, leave-one-out needs 3 \(2 such users\)"):
        leave_one_out(data, short_users="error")
    with pytest.raises(ValueError, match='short_users must be "train", "drop" or "error", got \'keep\''):
        leave_one_out(data, short_users="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows: no user has 3 interactions \(the longest history has 2\)"):
        leave_one_out(dataset([[1], [1, 2]]))
    with pytest.raises(ValueError, match='which must be "validation" or "test", got \'train\''):
        leave_one_out(data).evaluation("train")


def test_seen_is_distinct_and_without_the_target() -> None:
    seen = leave_one_out(dataset([[3, 1, 3, 5, 1], [2, 2, 2, 2], [7, 0, 9]])).test.seen
    assert [row.tolist() for row in seen] == [[3, 5], [], [0, 7]]


@given(st.lists(st.lists(st.integers(0, 9), max_size=7), min_size=1, max_size=20))
def test_against_plain_python(rows: list[list[int]]) -> None:
    data = dataset([*rows, [1, 2, 3]])
    split = leave_one_out(data)
    long = [(user, row) for user, row in enumerate([*rows, [1, 2, 3]]) if len(row) >= 3]
    assert split.test.users.tolist() == [user for user, _ in long]
    assert split.test.target.tolist() == [row[-1] for _, row in long]
    assert split.validation.target.tolist() == [row[-2] for _, row in long]
    assert [row.tolist() for row in split.test.histories] == [row[:-1] for _, row in long]
    assert [row.tolist() for row in split.validation.histories] == [row[:-2] for _, row in long]
    assert [row.tolist() for row in split.test.seen] == [sorted(set(row[:-1]) - {row[-1]}) for _, row in long]
    assert [row.tolist() for row in split.train] == [row[:-2] if len(row) >= 3 else row for row in [*rows, [1, 2, 3]]]


def test_real_data(real_data: object) -> None:
    split = leave_one_out(load(f"{real_data}/ml-1m.txt"))
    assert len(split.test) == len(split.validation) == 6040
    assert len(split.train.items) == 999_611 - 2 * 6040
    assert split.num_items == 3416
