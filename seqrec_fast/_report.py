"""What commands and the demo print: rich tables of quality, recommendations and explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from seqrec_fast.models import Explanation, Recommendations
from seqrec_fast.training.metrics import Quality


def quality_table(quality: Mapping[str, Quality]) -> Table:
    """One row a model; the caption says how the numbers were taken."""
    first = next(iter(quality.values()))
    table = Table(
        title=f"Full ranking over {first.num_items:,} items, {first.num_users:,} users",
        title_justify="left",
        caption="floors counted on everything before the test target" if "Markov" in quality else None,
        caption_justify="left",
    )
    table.add_column("model")
    table.add_column("seen items")
    for name in first:
        table.add_column(name, justify="right")
    for model, found in quality.items():
        label = model.removesuffix(", seen items kept")
        filtered = "filtered" if found.seen_filter else "kept"
        table.add_row(label, filtered, *(f"{value:.4f}" for value in found.values()))
    return table


def recommendation_table(title: str, items: Sequence[Any], scores: Sequence[float], why: Sequence[str]) -> Table:
    """Best first; ``why`` is empty when nothing is explained."""
    table = Table(title=title, title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("item", justify="right")
    table.add_column("score", justify="right")
    if why:
        table.add_column("moved most by (place from the history's end)")
    for place, (item, score) in enumerate(zip(items, scores, strict=True), start=1):
        table.add_row(str(place), str(item), f"{score:.3f}", *([why[place - 1]] if why else []))
    return table


def present(best: Recommendations | Explanation, row: int) -> list[int]:
    """Places of one user's list that hold an item (fewer than k may have been left)."""
    return [place for place, item in enumerate(best.items[row].tolist()) if item >= 0]


def reasons(found: Explanation, row: int, history: Sequence[Any]) -> list[str]:
    """For each recommended item of one user, the deciding steps: ``17 (-1) +0.42``: the last item, 17, spoke for it.

    Args:
        found: of ``SequenceRecommender.explain``.
        row: the user's row in it.
        history: the ids to print, oldest first, of the steps that the model saw.
    """
    lines = []
    for place in present(found, row):
        steps, strength = found.steps[row, place].tolist(), found.contributions[row, place].tolist()
        parts = [
            f"{history[step]} ({step - len(history)}) {value:+.2f}"
            for step, value in zip(steps, strength, strict=True)
            if step >= 0
        ]
        lines.append(",  ".join(parts))
    return lines


def attended(found: Explanation, row: int, ids: Sequence[Any], limit: int = 5) -> str:
    """The catalogue items with the largest attention weight: ``17 (12.3 %), 4 (9.8 %)``, averaged over the heads."""
    if found.attended_items is None or found.attention_weights is None:
        return ""
    weights: dict[int, float] = {}
    for items, shares in zip(found.attended_items[row].tolist(), found.attention_weights[row].tolist(), strict=True):
        for item, share in zip(items, shares, strict=True):
            weights[item] = weights.get(item, 0.0) + share / found.attended_items.shape[1]
    largest = sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]
    return ", ".join(f"{ids[item]} ({100 * share:.1f} %)" for item, share in largest)


def info_tables(found: Mapping[str, Any]) -> list[Table]:
    """What ``seqrec_fast.info.info`` found: the installation, and each operator × backend."""
    about = Table(show_header=False, title="seqrec_fast " + str(found["seqrec_fast"]), title_justify="left")
    about.add_column()
    about.add_column(overflow="fold")
    for name, value in found.items():
        if name in ("operators", "seqrec_fast"):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
        about.add_row(name.replace("_", " "), _plain(value))
    operators = Table(title="operators", title_justify="left", caption="✓ available", caption_justify="left")
    operators.add_column("operator")
    operators.add_column("device")
    backends = list(dict.fromkeys(b for by in found["operators"].values() for why in by.values() for b in why))
    for backend in backends:
        operators.add_column(backend, overflow="fold")
    for name, by_device in found["operators"].items():
        for device, why in by_device.items():
            cells = ["✓" if why.get(backend, "") is None else why.get(backend, "–") for backend in backends]
            operators.add_row(name, device, *cells)
    return [about, operators]


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
