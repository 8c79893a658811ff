"""The picture of the demo: four panels, drawn with matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from seqrec_fast._files import written_beside
from seqrec_fast.training import Quality
from seqrec_fast.training.comparison import Comparison

OURS, STOCK, FLOOR = "#0b6e4f", "#c8553d", "#6b7280"


def draw(
    path: Path, compared: Comparison, history: Sequence[Mapping[str, float]], quality: Mapping[str, Quality]
) -> None:
    """Loss, time and memory beside stock torch, and quality beside the floors; the file appears whole."""
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlesize": 11,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, panels = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
        first = quality["SequenceRecommender"]
        figure.suptitle(
            f"SequenceRecommender: seqrec_fast and stock torch  ({first.num_items:,} items, {first.num_users:,} users)",
            x=0.01,
            ha="left",
            fontsize=13,
        )
        figure.get_layout_engine().set(rect=(0, 0, 0.99, 1), hspace=0.06, wspace=0.06)
        _losses(panels[0, 0], compared)
        _times(panels[0, 1], compared)
        _memory(panels[1, 0], compared)
        _quality(panels[1, 1], history, quality)
        with written_beside(path) as part:
            figure.savefig(part, dpi=130)
        plt.close(figure)


def _losses(axes: Any, compared: Comparison) -> None:
    steps = range(1, len(compared.ours.losses) + 1)
    axes.plot(steps, compared.stock.losses, color=STOCK, linewidth=5, alpha=0.35, label="stock torch")
    axes.plot(steps, compared.ours.losses, color=OURS, linewidth=1.5, label="seqrec_fast")
    axes.set_title("Same weights, same batches: the same loss")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy over the catalogue")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(axes)
    gap = f"largest relative difference at a step: {compared.largest_loss_gap:.1e}"
    axes.text(0.02, 0.04, gap, transform=axes.transAxes, color=FLOOR)


def _times(axes: Any, compared: Comparison) -> None:
    for name, side, colour in (("stock torch", compared.stock, STOCK), ("seqrec_fast", compared.ours, OURS)):
        thousands = [positions / 1e3 for positions in compared.positions]
        label = f"{name}: median {1e3 * side.step:.0f} ms"
        axes.plot(thousands, [1e3 * seconds for seconds in side.seconds], "o", color=colour, alpha=0.7, label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title(f"A training step: {_worded(compared.time_ratio, 'faster', 'slower')}")
    axes.set_xlabel("positions in the batch, thousands")
    axes.set_ylabel("ms")
    _legend_above(axes)


def _memory(axes: Any, compared: Comparison) -> None:
    peaks = [compared.stock.peak_bytes, compared.ours.peak_bytes]
    axes.set_xlabel("MiB above the model and its optimiser")
    if None in peaks or compared.memory_ratio is None:
        axes.set_title("Memory of a step: not known on this system")
        axes.set_yticks([])
        return
    sizes = [peak / 2**20 for peak in peaks if peak is not None]
    bars = axes.barh(["stock torch", "seqrec_fast"], sizes, color=[STOCK, OURS], height=0.5)
    axes.bar_label(bars, [f" {size:,.0f} MiB" for size in sizes])
    axes.set_xlim(right=1.18 * max(sizes))
    axes.set_ylim(-0.6, 1.6)
    axes.set_title(f"Extra memory of a step, peak: {_worded(compared.memory_ratio, 'less', 'more')}")


def _quality(axes: Any, history: Sequence[Mapping[str, float]], quality: Mapping[str, Quality]) -> None:
    metric = "NDCG@10"
    epochs = [int(record["epoch"]) + 1 for record in history]
    values = [record[metric] for record in history]
    test = quality["SequenceRecommender"][metric]
    axes.plot(epochs, values, "o-", color=OURS, markersize=4, label="validation targets")
    best = epochs[values.index(max(values))]
    axes.plot([best], [test], "*", color=OURS, markersize=14, label=f"test targets, best epoch: {test:.3f}")
    axes.set_xlim(0.5, epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name in ("Markov", "Popularity"):
        floor = quality[name][metric]
        axes.axhline(floor, color=FLOOR, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name}, test {floor:.3f}", (1, floor), (-2, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="bottom", color=FLOOR,
        )  # fmt: skip
    axes.set_ylim(0, 1.12 * max(test, *values, *(quality[name][metric] for name in ("Markov", "Popularity"))))
    axes.set_title(f"{metric}, full ranking, seen items filtered")
    axes.set_xlabel("epoch")
    _legend_above(axes)


def _legend_above(axes: Any) -> None:
    """In a strip of its own over the data."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.3 * (top - bottom))
    axes.legend(loc="upper left")


def _worded(ratio: float, better: str, worse: str) -> str:
    """``2.1 x faster``, ``1.4 x slower``: the true direction."""
    if 0.98 < ratio < 1.02:
        return "equal"
    return f"{ratio:.2f} x {better}" if ratio >= 1 else f"{1 / ratio:.2f} x {worse}"
