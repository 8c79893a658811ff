"""The demo: train, compare with stock torch, measure quality, recommend and explain. No download, about two minutes.

    python examples/demo.py                 # everything
    python examples/demo.py --epochs 2      # a quick look

Writes a picture and a folder that `seqrec-fast recommend` can serve from.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import seqrec_fast
from seqrec_fast import data
from seqrec_fast._report import quality_table
from seqrec_fast._serve import Asked, recommend
from seqrec_fast.info import info
from seqrec_fast.training import TrainingInterrupted, run
from seqrec_fast.training.comparison import Comparison, compare_with_stock
from seqrec_fast.training.settings import RunSettings

# Small enough for two cores, large enough that a sequence model beats the floors.
SETTINGS = {"learning_rate": 3e-3, "max_epochs": 10, "patience": 3, "schedule": "cosine", "warmup_steps": 20}
MOST_SECONDS_COMPARED = 40  # a slow or busy machine compares fewer steps


def main() -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the picture and the model")
    parser.add_argument("--epochs", type=int, default=SETTINGS["max_epochs"], help="at most")
    parser.add_argument("--users", type=int, default=5000)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument(
        "--steps", type=int, default=40, help="steps of the comparison; 40 are one epoch of the default"
    )
    chosen = parser.parse_args()
    console = Console()
    begin = time.perf_counter()
    try:
        demo(chosen, console)
    except TrainingInterrupted as stop:
        console.print(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    console.print(f"done in {time.perf_counter() - begin:.0f} s")
    return 0


def demo(chosen: argparse.Namespace, console: Console) -> None:
    """All parts, in order."""
    facts = info()
    console.rule("seqrec_fast demo", align="left")
    say(
        console, f"seqrec_fast {seqrec_fast.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    say(console, f"{facts['cpu']}, {torch.get_num_threads()} threads, native library {facts['native_library']}")

    interactions = data.synthetic(chosen.users, chosen.items)
    say(console, interactions.summary())
    folder = chosen.out / "run"
    settings = run.start(folder, interactions, {**SETTINGS, "max_epochs": chosen.epochs}, overwrite=True)

    console.rule("1. the same model from stock torch, step by step", align="left")
    compared = compare(interactions, settings, chosen.steps, console)
    console.print(comparison_table(compared, interactions, settings))

    console.rule("2. training", align="left")
    begin = time.perf_counter()
    _, quality = run.train(folder, interactions, settings, console=console)
    say(console, f"trained and tested in {time.perf_counter() - begin:.0f} s")

    console.rule("3. quality on the last item of every user", align="left")
    console.print(quality_table(quality))
    if warning := run.below_floors(quality):
        say(console, warning)

    console.rule("4. recommendations, and why", align="left")
    opened = run.open_run(folder)
    users = [Asked(f"user {number}", interactions.histories[number].tolist()) for number in three_users(interactions)]
    for answer in recommend(opened, users, 10, explain=True):
        console.print(answer)

    history = run.read_history(folder)
    path = chosen.out / "comparison.png"
    with console.status("drawing"):
        from picture import draw

        draw(path, compared, history, quality)
    console.rule("5. to keep", align="left")
    say(console, f"picture: {path}")
    say(console, f"more: seqrec-fast recommend {folder} --user 42 --explain")


def compare(interactions: data.Interactions, settings: RunSettings, steps: int, console: Console) -> Comparison:
    """Train both for some steps of the first epoch."""
    split = data.leave_one_out(interactions)
    loader = data.train_loader(
        split, batch_size=settings.loader.batch_size, max_length=settings.loader.max_length, seed=settings.fit.seed
    )
    batches = [batch for _, batch in zip(range(steps), loader, strict=False)]
    if len(batches) < steps:
        say(console, f"an epoch has {len(batches)} batches, so {len(batches)} steps are compared, not {steps}")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("both models, in turn; then memory", total=len(batches))
        return compare_with_stock(
            settings.model,
            batches,
            learning_rate=settings.fit.optimizer.learning_rate,
            device="cuda" if torch.cuda.is_available() else "cpu",
            max_seconds=MOST_SECONDS_COMPARED,
            on_step=lambda done: progress.update(task, completed=done),
        )


def comparison_table(compared: Comparison, interactions: data.Interactions, settings: RunSettings) -> Table:
    """Loss, time and memory of both, and the ratio, whoever wins."""
    ours, stock = compared.ours, compared.stock
    steps = len(ours.losses)
    epoch = -(-interactions.num_users // settings.loader.batch_size)
    table = Table(
        title=f"same weights, same {steps} batches, dropout off, fp32; {sum(compared.positions):,} positions x "
        f"{interactions.num_items:,} items",
        title_justify="left",
        caption=f"largest relative difference of the losses at a step: {compared.largest_loss_gap:.1e}",
        caption_justify="left",
    )
    table.add_column("")
    for name in ("seqrec_fast", "stock torch", "stock / ours"):
        table.add_column(name, justify="right")
    table.add_row("loss of the first step", f"{ours.losses[0]:.6f}", f"{stock.losses[0]:.6f}", "")
    table.add_row(f"loss of step {steps}", f"{ours.losses[-1]:.6f}", f"{stock.losses[-1]:.6f}", "")
    table.add_row(
        "a step, median", f"{ours.step * 1e3:.0f} ms", f"{stock.step * 1e3:.0f} ms", ratio(compared.time_ratio)
    )
    # of a part of an epoch the median says more than the sum, in which one interrupted step counts for many
    whole = steps == epoch
    seconds = [side.total if whole else side.step * epoch for side in (ours, stock)]
    table.add_row(
        f"an epoch of {epoch} steps" + ("" if whole else " (from the median)"),
        *(f"{value:.1f} s" for value in seconds),
        ratio(seconds[1] / seconds[0] if whole else compared.time_ratio),
    )
    table.add_row(
        "extra memory of a step, peak",
        megabytes(ours.peak_bytes),
        megabytes(stock.peak_bytes),
        ratio(compared.memory_ratio),
    )
    return table


def three_users(interactions: data.Interactions) -> list[int]:
    """A short, a middling and a long history."""
    order = interactions.histories.lengths.argsort(kind="stable").tolist()
    return [order[len(order) // 10], order[len(order) // 2], order[-len(order) // 10]]


def megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"


def ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"[{'green' if value >= 1 else 'red'}]{value:.2f}x[/]"


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
