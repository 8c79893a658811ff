"""Tables: CSV, TSV, session TSV, RecBole .inter and Parquet."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from seqrec_fast.data import DataError, load
from seqrec_fast.data.loaders import detect_format

from .test_text import rows, write

polars = pytest.importorskip("polars")


@pytest.mark.parametrize(
    ("name", "format", "content", "expected"),
    [
        ("a.csv", "csv", "user_id,item_id,timestamp\n1,5,30\n1,6,20\n2,5,1\n", {1: [6, 5], 2: [5]}),
        ("a.csv", "csv", "rating,userId,movieId\n3,1,5\n,1,6\n1,2,5\n", {1: [5, 6], 2: [5]}),  # no time: file order
        ("a.csv", "csv", 'user,item,note\n"a, b",5,"two\nlines"\n"a, b",7,x\n', {"a, b": [5, 7]}),
        ("a.tsv", "tsv", "user\titem\ttime\n1\tx\t2.5\n1\ty\t2.25\n", {1: ["y", "x"]}),
        ("a.dat", "csv", "User_ID, Item_ID\n1, 5\n1, 6\n", {1: [5, 6]}),  # spaces round the fields
        ("a.txt", "tsv", "user\titem\n1\t5\n1\t6\n", {1: [5, 6]}),
        ("a.txt", "session", "SessionId\tItemId\tTime\n7\t5\t1.5e9\n7\t4\t1.4e9\n8\t4\t3\n", {7: [4, 5], 8: [4]}),
        ("a.inter", "inter", "user_id:token\titem_id:token\trating:float\n1\t5\t3\n1\t6\t\n", {1: [5, 6]}),
        (
            "a.inter",
            "inter",
            'user_id:token\titem_id:token\ttimestamp:float\nx\t"q\t2\nx\t05\t1\n',
            {"x": ["05", '"q']},
        ),
        ("a.csv", "csv", "user,item\n1,5\n\n1,6\n\n", {1: [5, 6]}),  # blank lines
        ("a.csv", "csv", "user,item\r\n1,5\r\n1,6\r\n", {1: [5, 6]}),
        ("a.csv", "csv", "\ufeffuser,item\n1,5\n1,6\n", {1: [5, 6]}),
    ],
)
def test_text_tables(
    tmp_path: Path, name: str, format: str, content: str, expected: dict[object, list[object]]
) -> None:
    path = write(tmp_path, content, name)
    assert detect_format(path) == format
    assert rows(load(path)) == expected


def test_equal_timestamps_keep_the_files_order(tmp_path: Path) -> None:
    lines = [f"{user},{item},{item % 2}" for item in range(40) for user in (2, 1)]
    path = write(tmp_path, "user,item,time\n" + "\n".join(lines), "a.csv")
    order = [*range(0, 40, 2), *range(1, 40, 2)]
    assert rows(load(path)) == {1: order, 2: order}


def test_named_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "who,what,when,timestamp\n1,5,30,1\n1,6,20,2\n", "a.csv")
    assert rows(load(path, user="who", item="what", time="when")) == {1: [6, 5]}
    assert rows(load(path, user="who", item="what")) == {1: [5, 6]}
    path = write(tmp_path, "who,what\n1,5\n1,6\n", "a.txt")
    assert rows(load(path, user="who", item="what")) == {1: [5, 6]}
    path = write(tmp_path, "user_id:token\tbook:token\tgenre:token\n1\t5\t8\n1\t6\t8\n", "a.inter")
    assert rows(load(path, item="genre")) == {1: [8, 8]}
    assert rows(load(path, item="book:token")) == {1: [5, 6]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: the file is empty"),
        ("a.csv", "user,item\n", "the table has a header and no rows"),
        ("a.csv", "\n1,2\n", "line 1: expected a header with column names"),
        ("a.csv", "user,user,item\n1,2,3\n", "line 1: the column 'user' occurs twice"),
        ("a.csv", "who,item\n1,2\n", "none of the columns who, item is known to hold users: name it by user="),
        ("a.csv", "user,what\n1,2\n", "none of the columns user, what is known to hold items: name it by item="),
        ("a.csv", "user,item,r\n1,2,3\n1,2\n1\n", r"line 3: expected 3 fields, got 2 \('1,2'\)"),
        ("a.csv", "user,item\n1,2\n\n1,2,9\n", r"line 4: expected 2 fields, got 3 \('1,2,9'\)"),
        ("a.csv", "user,item\n1,2\n,3\n", "line 3: no value in column 'user'"),
        ("a.csv", "user,item\n1,2\n1,NaN\n", r"line 3: no value in column 'item' \(it reads 'NaN'\)"),
        ("a.csv", 'user,item,note\n1,2,"a\nb"\n1,,x\n', "line 4: no value in column 'item'"),
        ("a.csv", "user,item,time\n1,2,3\n1,3,soon\n", "line 3: time 'soon' in column 'time' is not a finite number"),
        ("a.csv", "user,item,time\n1,2,3\n1,3,inf\n", "line 3: time 'inf' in column 'time' is not a finite number"),
        ("a.csv", "user,item,time\n1,2,3\n1,3,1_0\n", "line 3: time '1_0'"),
        ("a.csv", "user,item,time\n1,2,\n1,3,4\n", "line 2: no value in column 'time'"),
        ("a.csv", b"user,item\n1,2\n1,\xff\n", "line 3: column 'item' is not UTF-8 text"),
        ("a.csv", 'user,item\n1,2\n1,"3\n1,4\n', "line 3: unexpected end of data"),
        ("a.inter", "user_id\titem_id\n1\t2\n", "line 1: 'user_id' has no type; a RecBole header reads like"),
        ("a.inter", "user_id:token\titem_id:token_seq\n1\t2 3\n", "line 1: 'item_id:token_seq' holds lists"),
        ("a.inter", "user_id:token\titem_id:token\n1\t2\n1\n", "line 3: expected 2 fields, got 1"),
        ("a.tsv", "SessionId\tItemId\tTime\n1\t2\t3\n1\t2\tx\n", "line 3: time 'x' in column 'Time'"),
        ("a.parquet", "not parquet", "a.parquet: not a readable Parquet file"),
    ],
)
def test_bad_tables(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(write(tmp_path, content, name))
    assert "\n" not in str(caught.value)


def test_unknown_columns_are_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item,time\n1,2,3\n", "a.csv")
    with pytest.raises(DataError, match=r"no column 'x' \(item=\), the columns are user, item, time"):
        load(path, item="x")
    with pytest.raises(DataError, match="must be three different columns, got user, user, time"):
        load(path, item="user")
    path = tmp_path / "a.parquet"
    polars.DataFrame({"user": [1], "item": [2]}).write_parquet(path)
    with pytest.raises(DataError, match=r"no column 't' \(time=\), the columns are user, item"):
        load(path, time="t")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data"  # known by its first bytes
    times = [datetime(2024, 1, 2), datetime(2024, 1, 1), datetime(2024, 1, 1)]
    frame = polars.DataFrame({"user": ["b", "b", "a"], "item": [7, 8, 7], "time": times})
    frame.write_parquet(path)
    assert detect_format(path) == "parquet"
    assert rows(load(path)) == {"a": [7], "b": [8, 7]}
    frame.with_columns(
        polars.col("user").cast(polars.Categorical),
        polars.col("item").cast(polars.Float64),
        polars.Series("time", [3, 2, 1]),
    ).write_parquet(path)
    assert rows(load(path)) == {"a": [7], "b": [8, 7]}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", [1, None], "row 2: no value in column 'user'"),
        ("item", [1.0, float("nan")], "row 2: nan in column 'item' is not an integer or a string"),
        ("item", [1.5, 1.0], "row 1: 1.5 in column 'item'"),
        ("item", ["x", "nan"], "row 2: 'nan' in column 'item' is not an id"),
        ("item", [[1], [2]], r"column 'item' holds List\(Int64\), ids must be integers or strings"),
        ("item", [True, False], "column 'item' holds Boolean"),
        ("time", [1.0, float("nan")], "row 2: time nan in column 'time' is not a finite number"),
        ("time", ["3", "x"], "row 2: time 'x' in column 'time' is not a finite number"),
        ("time", [True, False], "column 'time' holds Boolean, times must be numbers or datetimes"),
        ("time", [2, None], "row 2: no value in column 'time'"),
    ],
)
def test_bad_parquet(tmp_path: Path, column: str, values: list[object], message: str) -> None:
    path = tmp_path / "a.parquet"
    polars.DataFrame({"user": [1, 2], "item": [1, 2], "time": [1, 2], column: values}).write_parquet(path)
    with pytest.raises(DataError, match=message):
        load(path)


def test_an_empty_parquet_table(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    polars.DataFrame({"user": [], "item": []}, schema={"user": polars.Int64, "item": polars.Int64}).write_parquet(path)
    with pytest.raises(DataError, match="a header and no rows"):
        load(path)


def test_without_polars(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item\n1,2\n", "a.csv")
    text = write(tmp_path, "1 2\n", "a.txt")
    code = f"""
import sys
sys.modules["polars"] = sys.modules["lightning"] = None
from seqrec_fast.data import load
load({str(text)!r})
try:
    load({str(path)!r})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'reading csv files needs polars, which the extra "train" installs' in done.stdout


def test_importing_the_package_imports_neither_polars_nor_lightning() -> None:
    code = "import sys, seqrec_fast.data; print([name for name in ('polars', 'lightning') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
