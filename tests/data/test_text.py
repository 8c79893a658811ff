"""Plain-text files: what they mean, which format they are taken for, and what is said about a bad line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from seqrec_fast.data import DataError, Interactions, load
from seqrec_fast.data.loaders import detect_format


def rows(data: Interactions) -> dict[object, list[object]]:
    """{user id: item ids, oldest first}."""
    return {
        user: data.decode_items(row).tolist() for user, row in zip(data.user_ids.tolist(), data.histories, strict=True)
    }


def write(folder: Path, content: str | bytes, name: str = "data.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("1 5\n1 7\n2 5\n", {1: [5, 7], 2: [5]}),
        ("2 5\n1 7\n2 3", {1: [7], 2: [5, 3]}),  # users mixed, no newline at the end
        ("1\t5\r\n\r\n1\t7\r\n", {1: [5, 7]}),  # tabs, Windows line ends, a blank line
        ("\ufeff1 5\n1 5\n", {1: [5, 5]}),  # byte order mark, a repeated item
        ("-3 0\n-3 12\n", {-3: [0, 12]}),
        ("ann 5\nbob 7\nann 6\n", {"ann": [5, 6], "bob": [7]}),  # text users, integer items
        ("1 007\n1 7\n", {1: ["007", "7"]}),  # a leading zero makes the column text
        ("1 é\n1 b\n", {1: ["é", "b"]}),
        ("1 123456789012345678901\n1 2\n", {1: ["123456789012345678901", "2"]}),  # beyond 64 bits: text
        ("1 1-2\n1 -\n", {1: ["1-2", "-"]}),
    ],
)
def test_pairs(tmp_path: Path, content: str, expected: dict[object, list[object]]) -> None:
    path = write(tmp_path, content)
    assert detect_format(path) == "pairs"
    assert rows(load(path)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("1 5 7 5\n2 7 5 9\n", {1: [5, 7, 5], 2: [7, 5, 9]}),
        ("2 5 7 1\n1 5\n3 5 8 7", {1: [5], 2: [5, 7, 1], 3: [5, 8, 7]}),
        ("ann x y\n\nbob y z w\n", {"ann": ["x", "y"], "bob": ["y", "z", "w"]}),
        ("ann 1 2\nbob 3 4 5\n", {"ann": [1, 2], "bob": [3, 4, 5]}),
    ],
)
def test_sequences(tmp_path: Path, content: str, expected: dict[object, list[object]]) -> None:
    path = write(tmp_path, content)
    assert detect_format(path) == "sequences"
    assert rows(load(path)) == expected


def test_a_long_field_does_not_widen_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, f"1 {'x' * 100_000}\n" + "1 y\n" * 2000)
    assert load(path).histories[0].tolist() == [0] + [1] * 2000


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    import hashlib

    path = write(tmp_path, "1 5\n1 7\n")
    assert load(path).sha256 == hashlib.sha256(b"1 5\n1 7\n").hexdigest()
    assert load(path).source == "data.txt"


@pytest.mark.parametrize("bad", [1, 2, 700])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("17", r"expected 'user item', got 1 field \('17'\)"),
        ("17 3 9", r"expected 'user item', got 3 fields \('17 3 9'\); .*format=\"sequences\""),
        ("17 nan", r"'nan' is not an id \('17 nan'\)"),
        ("NULL 4", "'NULL' is not an id"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path: Path, bad: int, line: str, message: str) -> None:
    lines = [f"{number % 50} {number}" for number in range(1000)]
    lines[bad - 1] = lines[900] = line
    with pytest.raises(DataError, match=rf"data.txt, line {bad}: {message}"):
        load(write(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.txt: the file is empty"),
        (" \n\n", "data.txt: the file is empty"),
        ("user item\n1 2\n1 3\n", "line 1: 'user item' looks like a header"),
        (b"1 2\n1 3\n1 \xff\n", "line 3: not UTF-8 text"),
        (b"1 2\n1 3\n\x00\xfe 4\n1 \xff\n", "line 3: not UTF-8 text"),
        (b"\x1f\x8b1 2 3", "data.txt is compressed: unpack it first"),
    ],
)
def test_bad_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 5 7\n2\n", r"line 2: a user without items \('2'\)$"),
        ("1,5\n1,7\n", r"line 1: a user without items \('1,5'\); fields are parted by white space here"),
        (
            "1 5 7\n\n2 5 9\n1 8 9\n",
            "line 4: user 1 was on line 1 already; .* columns of user, item and time want a header",
        ),
        ("1 5 7\n2 null 9\n", "line 2: 'null' is not an id"),
    ],
)
def test_bad_sequences(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, content), format="sequences")


def test_an_interrupted_line_at_the_end_of_the_head(tmp_path: Path) -> None:
    # one line longer than what is looked at to detect the format
    path = write(tmp_path, "1 " + " ".join(map(str, range(50_000))) + "\n2 5\n")
    assert load(path).histories.lengths.tolist() == [50_000, 1]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such data file: .*nowhere.txt"):
        load(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="is not a file"):
        load(tmp_path)


def test_arguments(tmp_path: Path) -> None:
    path = write(tmp_path, "1 5\n1 7\n")
    with pytest.raises(ValueError, match="format must be one of auto, pairs, .* got 'xml'"):
        load(path, format="xml")
    with pytest.raises(ValueError, match="name the columns of a table, and format 'pairs' has none"):
        load(path, format="pairs", user="u")


@pytest.mark.parametrize(
    ("name", "users", "items", "interactions", "sha256"),
    [
        ("ml-1m.txt", 6040, 3416, 999_611, "b725f3acb3986fe3"),
        ("beauty_bert4rec.txt", 40_226, 54_542, 353_962, ""),
        ("S3Rec_LastFM.txt", 1090, 3646, 52_551, ""),
        ("S3Rec_Beauty.txt", 22_363, 12_101, 198_502, ""),
        ("ml-100k.inter", 943, 1682, 100_000, ""),
    ],
)
def test_real_files(real_data: Path, name: str, users: int, items: int, interactions: int, sha256: str) -> None:
    if not (real_data / name).exists():
        pytest.skip(f"{name} is not in {real_data}")
    if name.endswith(".inter"):
        pytest.importorskip("polars")
    data = load(real_data / name)
    assert (data.num_users, data.num_items, data.num_interactions) == (users, items, interactions)
    assert data.sha256.startswith(sha256)


def test_a_real_file_reads_as_python_reads_it(real_data: Path) -> None:
    path = real_data / "ml-1m.txt"
    if not path.exists():
        pytest.skip(f"ml-1m.txt is not in {real_data}")
    data = load(path)
    expected: dict[int, list[int]] = {}
    with path.open() as file:
        for line in file:
            user, item = line.split()
            expected.setdefault(int(user), []).append(int(item))
    for user in (1, 2, 3021, 6040):
        assert data.decode_items(data.histories[int(data.encode_users([user])[0])]).tolist() == expected[user]
    assert np.array_equal(data.histories.lengths, [len(expected[user]) for user in data.user_ids.tolist()])
