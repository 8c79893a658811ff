"""The command line: ``seqrec-fast info | train | recommend | bench``, also ``python -m seqrec_fast``.

Results go to standard output, progress and errors to standard error. A bad input gives one sentence and exit code 1 (2 for
a command that cannot be understood); Ctrl-C gives 130, after the checkpoint is saved.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    from seqrec_fast.data import Interactions

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Command = TypeVar("Command", bound=Callable[..., None])


class Failure(Exception):
    """Something the user can put right: shown as one sentence, without a traceback."""


@contextmanager
def explained() -> Iterator[None]:
    """Turn what bad input raises into a ``Failure``. Only round code whose errors are about the input."""
    try:
        yield
    except KeyError as error:
        raise Failure(str(error.args[0]) if error.args else str(error)) from error
    except OSError as error:
        known = error.strerror and error.filename
        raise Failure(f"{error.filename}: {error.strerror}" if known else str(error)) from error
    except (ValueError, IndexError, ImportError) as error:
        raise Failure(str(error)) from error


def command(function: Command) -> Command:
    """Show a ``Failure`` as a sentence, and end with its exit code."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except Failure as failure:
            typer.echo(f"seqrec-fast: {' '.join(str(failure).split())}", err=True)
            raise typer.Exit(1) from failure
        except KeyboardInterrupt as stop:
            typer.echo("seqrec-fast: interrupted", err=True)
            raise typer.Exit(130) from stop

    app.command()(run)
    return function


def _load(path: str, format: str, columns: tuple[str | None, str | None, str | None], console: Console) -> Interactions:
    """Read the data; ``synthetic`` draws the default set."""
    from seqrec_fast import data

    user, item, time = columns
    if path == "synthetic":
        if any(columns) or format != "auto":
            raise Failure("synthetic data has no file format and no columns to name")
        with console.status("drawing synthetic data"):
            found = data.synthetic()
    else:
        with explained(), console.status(f"reading {path}"):
            found = data.load(path, format, user=user, item=item, time=time)
    console.print(found.summary(), highlight=False, soft_wrap=True)
    return found


def _version(asked: bool) -> None:
    if asked:
        import seqrec_fast

        typer.echo(f"seqrec_fast {seqrec_fast.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sequential recommenders with fused operators: train, recommend, measure."""


@command
def info(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Versions, devices, and which backend can run each operator, or why not."""
    from seqrec_fast.info import info as collect

    found = collect()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from seqrec_fast._report import info_tables

    for part in info_tables(found):
        Console().print(part)


@command
def train(
    data: Annotated[str, typer.Argument(help="A file of interactions, or 'synthetic'.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights, the checkpoint and the record of the run.")],
    format: Annotated[
        str, typer.Option(help="auto, pairs, sequences, inter, session, csv, tsv, parquet or npz.")
    ] = "auto",
    user_column: Annotated[str | None, typer.Option(help="Of a table; usual names are found.")] = None,
    item_column: Annotated[str | None, typer.Option(help="Of a table; usual names are found.")] = None,
    time_column: Annotated[str | None, typer.Option(help="Of a table; usual names are found.")] = None,
    encoder: Annotated[str | None, typer.Option(help="lstm, gru or cnn (default lstm).")] = None,
    epochs: Annotated[int | None, typer.Option(help="At most (default 20).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a batch (default 128).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam (default 0.003).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and dropout (default 0).")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, repeatable; a wrong name lists them all."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: as torch chooses).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
) -> None:
    """Train a SequenceRecommender, test it on the last item of every user, and keep the best weights.

    Users' last items are the test targets, the items before them the validation targets. Ctrl-C saves the state;
    the same command with --resume goes on from there.
    """
    from seqrec_fast._measure import cpu_threads
    from seqrec_fast._report import quality_table
    from seqrec_fast.training import require_lightning, run
    from seqrec_fast.training import settings as names
    from seqrec_fast.training.options import MODEL

    # Lightning starts the other processes of a multi-device training with this command, and numbers them
    console = Console(stderr=True, quiet=int(os.environ.get("LOCAL_RANK", "0")) > 0)
    if resume and overwrite:
        raise Failure("--resume and --overwrite exclude each other")
    with explained():
        require_lightning()
        chosen = dict(names.parse_setting(text) for text in settings or [])
    options = {
        "encoder": encoder,
        "max_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    chosen.update({name: value for name, value in options.items() if value is not None})
    with explained():
        run.check(out, chosen, resume=resume, overwrite=overwrite)
    interactions = _load(data, format, (user_column, item_column, time_column), console)
    with explained():
        prepared = run.start(out, interactions, chosen, resume=resume, overwrite=overwrite)
    from seqrec_fast.training import TrainingInterrupted

    try:
        with cpu_threads(threads):
            _, quality = run.train(out, interactions, prepared, resume=resume, console=console)
    except TrainingInterrupted as stop:
        typer.echo(f"seqrec-fast: {stop}; the same command with --resume goes on from there", err=True)
        raise typer.Exit(stop.exit_code) from stop
    except OSError as error:  # a full disk, a folder that went away
        raise Failure(str(error)) from error
    if quality:
        output = Console()
        output.print(quality_table(quality))
        if warning := run.below_floors(quality):
            output.print(warning, highlight=False, soft_wrap=True)
        console.print(f"the weights are in {out / MODEL}", highlight=False, soft_wrap=True)


@command
def recommend(
    folder: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="The --out of a training.")],
    user: Annotated[list[str] | None, typer.Option(help="A user of the data; repeatable.")] = None,
    history: Annotated[
        list[str] | None, typer.Option(help='Items, oldest first: "1,5,9"; repeatable, for people not in the data.')
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="How many items.")] = 10,
    exclude_seen: Annotated[bool, typer.Option(help="Leave out what is in the history.")] = True,
    explain: Annotated[bool, typer.Option("--explain", help="Say which items of the history decided.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, one object a line.")] = False,
) -> None:
    """The best items after a user's history, or after one that is typed in."""
    from seqrec_fast._serve import histories_of
    from seqrec_fast._serve import recommend as serve
    from seqrec_fast.training import run

    if not user and not history:
        raise Failure("say for whom: --user ID or --history ITEM,ITEM,…")
    with explained():
        if k < 1:
            raise ValueError(f"--k must be at least 1, got {k}")
        opened = run.open_run(folder)
        asked = histories_of(opened.data, user or [], history or [])
    output = Console()
    for answer in serve(opened, asked, k, exclude_seen=exclude_seen, explain=explain):
        if as_json:
            typer.echo(json.dumps(answer.as_dict()))
        else:
            output.print(answer)


@command
def bench(
    operators: Annotated[list[str] | None, typer.Argument(help="Which operators; all when none is named.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds, interleaved.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for both sides.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the rows as JSON.")] = None,
) -> None:
    """Each operator beside its form in stock torch, on this machine: medians of interleaved rounds."""
    from seqrec_fast import _bench

    console = Console(stderr=True)
    with explained():
        cases = _bench.choose(operators or [])
    rows = _bench.measure(cases, rounds=rounds, threads=threads, console=console)
    output = Console()
    output.print(rows[0].hardware, highlight=False, soft_wrap=True)
    output.print(_bench.table(rows))
    output.print(_bench.legend(rows), highlight=False, markup=False)
    if out is not None:
        with explained():
            _bench.write(rows, out)
        console.print(f"rows written to {out}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of ``seqrec-fast``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without × or … gets ? instead of a traceback
    app(prog_name="seqrec-fast")


if __name__ == "__main__":
    main()
