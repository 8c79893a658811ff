"""The command line: what it prints and writes, that it can be interrupted, and one sentence for every bad input."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import seqrec_fast
from seqrec_fast import _bench, _report, _serve
from seqrec_fast.cli import app
from seqrec_fast.data import Interactions, load, synthetic
from seqrec_fast.info import info
from seqrec_fast.models import Popularity, SequenceRecommender
from seqrec_fast.training import Quality, run
from seqrec_fast.training.settings import default_of

Result = Any  # of CliRunner: typer brings its own click, or the real one, by version
SMALL = ["--batch-size", "16", "--set", "embedding_dim=8", "--set", "accelerator=cpu", "--encoder", "gru"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small work on a busy machine is fastest so; the thread count is put back after every test."""
    torch.set_num_threads(1)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def refused(result: Result, message: str) -> None:
    """One sentence on standard error, exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("seqrec-fast: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `user item` file with ids from 101."""
    data = synthetic(num_users=60, num_items=40, mean_length=9, seed=2)
    path = tmp_path_factory.mktemp("data") / "pairs.txt"
    rows = [f"{user + 1} {item + 101}\n" for user, row in enumerate(data.histories) for item in row.tolist()]
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="module")
def trained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, call("train", pairs, "--out", out, "--epochs", 2, "--threads", 1, *SMALL)


def test_train_writes_a_run_and_prints_its_quality(trained: tuple[Path, Result], pairs: Path) -> None:
    out, result = trained
    assert result.exit_code == 0, result.output
    names = ["checkpoint.ckpt", "data.npz", "history.json", "model.safetensors", "run.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "Full ranking over" in result.stdout
    assert "60 users" in result.stdout
    for row in ("SequenceRecommender", "Markov", "Popularity", "filtered", "kept"):
        assert row in result.stdout
    assert "epoch   2/2" in result.stderr
    assert str(out / "model.safetensors") in result.stderr
    record = json.loads((out / "run.json").read_text())
    assert record["data"] == {"source": "pairs.txt", "sha256": load(pairs).sha256, "users": 60, "items": 40}
    assert record["settings"]["encoder"] == "gru"
    assert record["settings"]["batch_size"] == 16
    assert record["quality"]["SequenceRecommender"]["items"] == 40
    assert record["quality"]["SequenceRecommender"]["seen_filter"] is True
    assert 0 <= record["quality"]["Markov"]["NDCG@10"] <= 1


def test_recommend_gives_the_models_own_list_in_the_files_ids(trained: tuple[Path, Result], pairs: Path) -> None:
    out, _ = trained
    data, model = load(pairs), SequenceRecommender.load(out / "model.safetensors")
    result = call("recommend", out, "--user", 7, "-k", 5, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    history = data.histories[6]
    best = model.recommend(torch.from_numpy(history)[None], k=5)
    assert answer["for"] == "user 7"
    assert answer["items"] == data.decode_items(best.items[0].tolist()).tolist()
    assert answer["scores"] == pytest.approx(best.scores[0].tolist(), rel=1e-6)
    assert not set(answer["items"]) & set(data.decode_items(history).tolist())
    kept = json.loads(call("recommend", out, "--user", 7, "-k", 40, "--json", "--no-exclude-seen").stdout)
    assert sorted(kept["items"]) == data.item_ids.tolist()
    # fewer are left than asked for
    few = json.loads(call("recommend", out, "--user", 7, "-k", 100, "--json").stdout)
    assert len(few["items"]) == 40 - len(set(history.tolist()))


def test_recommend_explains(trained: tuple[Path, Result]) -> None:
    out, _ = trained
    result = call("recommend", out, "--history", "101, 105,109", "--history", "110", "--explain", "-k", 3)
    assert result.exit_code == 0, result.output
    assert "history 101,105,109, history of 3 items" in result.stdout
    assert "history 110, history of 1 item" in result.stdout
    assert "(-1) " in result.stdout
    assert result.stdout.count("without it the score would be 0.42 lower") == 2
    (answer,) = [
        json.loads(line)
        for line in call(
            "recommend", out, "--history", "101,105,109", "--explain", "--json", "-k", 3
        ).stdout.splitlines()
    ]
    assert len(answer["why"]) == 3
    for why in answer["why"]:
        assert sorted((step["item"], step["place"]) for step in why) == [(101, -3), (105, -2), (109, -1)]
        assert all(isinstance(step["change"], float) for step in why)
    assert all(101 <= one["item"] <= 140 and 0 < one["weight"] < 1 for one in answer["attended"])


def test_attention_is_shown_only_where_it_tells_something() -> None:
    even = [_report.Attended(item="a", weight=0.011), _report.Attended(item="b", weight=0.0101)]
    assert _report.attention_line(even, 100) is None
    assert _report.attention_line([], 100) is None
    assert "over the catalogue, largest weights: a (50 %)" in str(
        _report.attention_line([{"item": "a", "weight": 0.5}], 100)
    )


def test_ids_and_reasons_are_printed_as_they_are() -> None:
    """``[triton]`` is a style to rich, and was swallowed."""
    console = Console(width=80, record=True, file=io.StringIO())
    why = [_report.Reason(item="[bold]y", place=-1, change=0.5)]
    console.print(_serve.Answer("user [red]", 1, ["[i]x"], [1.0], [why], [], 10))
    reason = "pip install 'seqrec_fast[triton]'"
    operators = {"lstm": {"cpu": {"native": reason, "reference": None}}}
    for part in _report.info_tables({"seqrec_fast": "1", "native_library": reason, "operators": operators}):
        console.print(part)
    text = console.export_text()
    assert text.count(reason) == 2
    for written in ("user [red]", "[i]x", "[bold]y (-1) +0.50"):
        assert written in text


def test_tables_fit_80_columns(trained: tuple[Path, Result]) -> None:
    row = {"dtype": "float32", "ms": 1234.5, "peer_ms": 1234.5, "hardware": "", "versions": {}, "commit": None}
    rows = [
        _bench.Row(operator=case.operator, backend="reference", pass_=name, shape=case.shape, peer=case.peer, **row)
        for case in _bench.CASES
        for name, _ in _bench._passes(case)
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(_bench.table(rows))
    for part in _report.info_tables(info()):
        console.print(part)
    text = console.export_text()
    for case in _bench.CASES:
        assert case.shape in text
        assert case.operator in text
    assert "1234.500" in text
    assert "…" not in text


def test_version() -> None:
    assert call("--version").stdout == f"seqrec_fast {seqrec_fast.__version__}\n"


def test_train_looks_at_its_options_before_the_data(trained: tuple[Path, Result], pairs: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"  # an error about it would mean that it was looked for first
    refused(call("train", missing, "--out", tmp_path / "run", "--epochs", 0), "max_epochs must be at least 1, got 0")
    refused(call("train", missing, "--out", trained[0]), "holds a run already")
    refused(call("train", missing, "--out", pairs), "is a file; a run needs a folder")


def test_a_model_below_the_floors_is_called_so() -> None:
    def quality(value: float) -> Quality:
        return Quality({"NDCG@10": value}, num_items=10, num_users=5, seen_filter=True)

    floors = {"Markov": quality(0.2), "Popularity": quality(0.1)}
    assert run.below_floors({"SequenceRecommender": quality(0.2), **floors}) is None
    said = str(run.below_floors({"SequenceRecommender": quality(0.15), **floors}))
    assert said.startswith("the model ranks below Markov (NDCG@10 0.1500 against 0.2000): train longer")


def test_a_long_history_leaves_out_what_the_model_does_not_see(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("train", pairs, "--out", out, "--epochs", 1, *SMALL, "--set", "max_length=3").exit_code == 0
    history = ",".join(str(item) for item in range(101, 121))
    answer = json.loads(call("recommend", out, "--history", history, "-k", 30, "--explain", "--json").stdout)
    assert sorted(answer["items"]) == list(range(121, 141))
    assert len(answer["why"]) == 20


def test_resume_continues_and_refuses_other_settings_and_other_data(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("train", pairs, "--out", out, "--epochs", 1, *SMALL).exit_code == 0
    refused(call("train", pairs, "--out", out), "holds a run already: continue it with --resume")
    refused(
        call("train", pairs, "--out", out, "--resume", "--encoder", "lstm"),
        "started with encoder=gru, got encoder=lstm",
    )
    refused(call("train", pairs, "--out", out, "--resume", "--overwrite"), "exclude each other")
    other = tmp_path / "other.txt"
    other.write_text(pairs.read_text() + "1 101\n")
    refused(call("train", other, "--out", out, "--resume"), "started on other data")
    result = call("train", pairs, "--out", out, "--resume", "--epochs", 2)  # the other settings are the run's own
    assert result.exit_code == 0, result.output
    assert [record["epoch"] for record in json.loads((out / "history.json").read_text())] == [0, 1]
    whole = tmp_path / "whole"
    assert call("train", pairs, "--out", whole, "--epochs", 2, *SMALL).exit_code == 0
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert call("train", pairs, "--out", out, "--epochs", 1, *SMALL, "--overwrite").exit_code == 0
    assert json.loads((out / "run.json").read_text())["settings"]["max_epochs"] == 1


def test_ctrl_c_saves_says_where_and_resumes(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "seqrec_fast", "train", str(pairs), "--out", str(out), *SMALL]
    environment = {**os.environ, "COLUMNS": "200"}
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--epochs", "100000", "--set", "patience=0"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
        )
        try:
            deadline = time.monotonic() + 120
            while "epoch   2/" not in log.read_text().replace("epoch     2/", "epoch   2/"):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            stdout, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    said = log.read_text()
    assert process.returncode == 130, said
    assert stdout == b""
    assert "Traceback" not in said
    assert f"training was interrupted; its last saved state is in {out / 'checkpoint.ckpt'}" in said.splitlines()[-1]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    done = len(json.loads((out / "history.json").read_text()))
    result = call("train", pairs, "--out", out, "--resume", "--epochs", done + 1)
    assert result.exit_code == 0, result.output
    assert len(json.loads((out / "history.json").read_text())) == done + 1


def test_bad_data_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused(call("train", tmp_path / "none.txt", "--out", out), "no such data file: .*none.txt")
    refused(call("train", tmp_path, "--out", out), "is not a file")
    empty = tmp_path / "empty.txt"
    empty.touch()
    refused(call("train", empty, "--out", out), "empty.txt: the file is empty")
    malformed = tmp_path / "malformed.txt"
    malformed.write_text("1 2\n1 3\n1 4\n1\n1 5\n")
    refused(call("train", malformed, "--out", out), "malformed.txt, line 4")
    table = tmp_path / "table.csv"
    table.write_text("user,item,time\n1,2,3\n1,4,4\n1,5,5\n")
    refused(call("train", table, "--out", out, "--item-column", "product"), "table.csv.*product")
    short = tmp_path / "short.txt"
    short.write_text("1 2\n2 3\n")
    refused(call("train", short, "--out", out, *SMALL), "no user has 3 interactions")
    refused(call("train", empty, "--out", out, "--format", "xml"), "format must be one of .*'xml'")
    refused(call("train", "synthetic", "--out", out, "--format", "csv"), "synthetic data has no file format")
    assert not out.exists()


def test_bad_settings_leave_nothing_behind(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for arguments, message in (
        (["--encoder", "transformer"], r"encoder must be lstm \| gru \| cnn, got 'transformer'"),
        (["--set", "width=3"], "unknown setting 'width'; there are .*embedding_dim"),
        (["--set", "embedding_dim"], "a setting reads NAME=VALUE, got 'embedding_dim'"),
        (["--set", "embedding_dim=wide"], "embedding_dim must be a whole number, got 'wide'"),
        (["--set", "residual=maybe"], "residual must be true or false, got 'maybe'"),
        (["--set", "dropout=1.5"], r"dropout must be a number in \[0, 1\), got 1.5"),
        (["--set", "monitor=HR@x"], "monitor must be HR@k"),
        (["--set", "precision=fp4"], "precision must be .*got 'fp4'"),
        (["--set", "accelerator=abacus"], "cannot train with accelerator=abacus"),
        (["--set", "accelerator=cpu", "--set", "devices=0"], "cannot train with .*devices=0"),
        (["--epochs", "0"], "max_epochs must be at least 1, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--learning-rate", "0"], "learning_rate must be a positive number, got 0"),
        (["--seed", "-1"], "seed must not be negative, got -1"),
        (["--resume"], "no run to continue"),
    ):
        refused(call("train", pairs, "--out", out, *arguments), message)
        assert not out.exists(), arguments
    assert call("train", pairs).exit_code == 2
    assert call("train", pairs, "--out", out, "--epochs", "many").exit_code == 2


def test_recommend_refuses_what_it_does_not_know(trained: tuple[Path, Result], pairs: Path, tmp_path: Path) -> None:
    out, _ = trained
    refused(call("recommend", out), "say for whom")
    refused(call("recommend", out, "--user", 999), "user id 999 is not in the data")
    refused(call("recommend", out, "--user", "ann"), "user id 'ann' is not in the data")
    refused(call("recommend", out, "--history", "101,5"), "item id 5 is not in the data")
    refused(call("recommend", out, "--history", " , "), "must name items")
    refused(call("recommend", out, "--user", 1, "-k", 0), "--k must be at least 1, got 0")
    refused(call("recommend", out / "model.safetensors", "--user", 1), f"give the folder of the run, {out}")
    refused(call("recommend", tmp_path / "none", "--user", 1), "there is no folder .*none")
    refused(call("recommend", pairs.parent, "--user", 1), "is not the folder of a run: run.json is missing")


def test_recommend_refuses_damaged_and_mixed_folders(trained: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = trained
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in out.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:100])
    refused(call("recommend", copy, "--user", 1), "model.safetensors is not a safetensors file")
    Popularity(40).save(copy / "model.safetensors")
    refused(call("recommend", copy, "--user", 1), "holds a Popularity, not a SequenceRecommender")
    SequenceRecommender(41, embedding_dim=8).save(copy / "model.safetensors")
    refused(call("recommend", copy, "--user", 1), "belong to different runs: .*41 items, .*40")
    (copy / "model.safetensors").unlink()
    refused(call("recommend", copy, "--user", 1), "has no weights yet")
    (copy / "model.safetensors").write_bytes(weights)
    (copy / "run.json").write_text("{")
    refused(call("recommend", copy, "--user", 1), "run.json is not a JSON file")
    (copy / "run.json").write_text("{}")
    refused(call("recommend", copy, "--user", 1), "not written by this version")


def test_text_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    users = [user for user in ("ann", "bob", "cy") for _ in range(5)]
    items = ["x", "y", "z", "u", "v", "y", "z", "u", "v", "x", "z", "u", "v", "x", "y"]
    Interactions.from_arrays(users, items).save(tmp_path / "data.npz")
    out = tmp_path / "run"
    result = call("train", tmp_path / "data.npz", "--out", out, "--epochs", 1, *SMALL)
    assert result.exit_code == 0, result.output
    answer = json.loads(call("recommend", out, "--user", "bob", "--json", "--no-exclude-seen").stdout)
    assert sorted(answer["items"]) == ["u", "v", "x", "y", "z"]


def test_training_without_lightning_names_the_extra(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seqrec_fast.training._lightning.importlib.util.find_spec", lambda name: None)
    refused(call("train", pairs, "--out", tmp_path / "run"), r"pip install 'seqrec_fast\[train\]'")
    assert not (tmp_path / "run").exists()


def test_info_prints_what_the_library_says() -> None:
    result = call("info")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.stdout
    assert "lstm_step" in result.stdout
    found = json.loads(call("info", "--json").stdout)
    assert found["torch"] == torch.__version__
    assert found["operators"]["lstm_step"]["cpu"]["reference"] is None


def test_bench_measures_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [_bench._step("lstm_step", 2, 8), _bench._attention(3, 50, 8), _bench._topk(3, 50, 8, k=4, seen=2)]
    monkeypatch.setattr(_bench, "CASES", small)
    result = call("bench", "--rounds", 2, "--threads", 1, "--out", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert "nn.LSTMCell" in result.stdout
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["operator"], row["pass"]) for row in rows] == [
        ("lstm_step", "forward"),
        ("lstm_step", "forward + backward"),
        ("catalogue_attention", "forward"),
        ("catalogue_attention", "forward + backward"),
        ("catalogue_topk", "forward"),
    ]
    assert all(row["ms"] > 0 and row["peer_ms"] > 0 and row["backend"] for row in rows)
    refused(call("bench", "softmax"), "no benchmark of 'softmax'; there are lstm_step, ")


@pytest.mark.parametrize("case", _bench.CASES, ids=lambda case: f"{case.operator} {case.shape}")
def test_the_two_sides_of_a_benchmark_compute_the_same(case: _bench.Case) -> None:
    torch.manual_seed(0)
    ours, theirs, _ = case.make()
    with torch.no_grad():
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)


def test_the_help_states_the_real_defaults() -> None:
    text = re.sub(r"[│\s]+", " ", call("train", "--help").stdout)
    for option, name in (
        ("encoder", "encoder"),
        ("epochs", "max_epochs"),
        ("batch-size", "batch_size"),
        ("learning-rate", "learning_rate"),
        ("seed", "seed"),
    ):
        (stated,) = re.findall(rf"--{option} .*?\(default ([^)]*)\)", text)
        assert stated == str(default_of(name))
