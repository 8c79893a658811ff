"""What commands and the demo print: rich tables of quality, recommendations and explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from seqrec_fast.models import Explanation, Recommendations
from seqrec_fast.training.metrics import Quality

# an attention whose largest weight is below this many times the average one is called uniform, and not shown
TELLING = 3.0
MEANING = "(-1) is the last item of the history; +0.42: without it the score would be 0.42 lower, to first order"


class Reason(TypedDict):
    """An item of the history, its place from the end (-1: the last), and what it changed the score by."""

    item: Any
    place: int
    change: float


class Attended(TypedDict):
    """An item and its weight in the attention over the catalogue."""

    item: Any
    weight: float


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


def recommendation_table(items: Sequence[Any], scores: Sequence[float], why: Sequence[Sequence[Reason]]) -> Table:
    """Best first; ``why`` is empty when nothing is explained."""
    table = Table()
    table.add_column("#", justify="right")
    table.add_column("item", justify="right")
    table.add_column("score", justify="right")
    if why:
        table.add_column("moved most by (place from the history's end)")
    for place, (item, score) in enumerate(zip(items, scores, strict=True), start=1):
        cells = [str(place), escape(str(item)), f"{score:.3f}"]
        if why:
            cells.append(escape(",  ".join(f"{r['item']} ({r['place']}) {r['change']:+.2f}" for r in why[place - 1])))
        table.add_row(*cells)
    return table


def present(best: Recommendations | Explanation, row: int) -> list[int]:
    """Places of one user's list that hold an item (fewer than k may have been left)."""
    return [place for place, item in enumerate(best.items[row].tolist()) if item >= 0]


def reasons(found: Explanation, row: int, history: Sequence[Any]) -> list[list[Reason]]:
    """For each recommended item of one user, the deciding steps, most first.

    Args:
        found: of ``SequenceRecommender.explain``.
        row: the user's row in it.
        history: the ids to print, oldest first, of the steps that the model saw.

    Returns:
        The item of the history, its place (-1: the last), and the change of the score that it made, to first order.
    """
    return [
        [
            {"item": history[step], "place": step - len(history), "change": round(value, 4)}
            for step, value in zip(
                found.steps[row, place].tolist(), found.contributions[row, place].tolist(), strict=True
            )
            if step >= 0
        ]
        for place in present(found, row)
    ]


def attended(found: Explanation, row: int, ids: Sequence[Any], limit: int = 5) -> list[Attended]:
    """The items with the largest weight in the attention over the catalogue, averaged over the heads."""
    if found.attended_items is None or found.attention_weights is None:
        return []
    weights: dict[int, float] = {}
    for items, shares in zip(found.attended_items[row].tolist(), found.attention_weights[row].tolist(), strict=True):
        for item, share in zip(items, shares, strict=True):
            weights[item] = weights.get(item, 0.0) + share / found.attended_items.shape[1]
    largest = sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]
    return [{"item": ids[item], "weight": round(share, 6)} for item, share in largest]


def attention_line(largest: Sequence[Attended], num_items: int) -> str | None:
    """``attention over the catalogue: 17 (12.3 %), 4 (9.8 %)``; None where it says nothing: no attention, or hardly any."""
    if not largest or largest[0]["weight"] < TELLING / num_items:
        return None
    return "attention over the catalogue, largest weights: " + ", ".join(
        f"{one['item']} ({100 * one['weight']:.2g} %)" for one in largest
    )


def info_tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """What ``seqrec_fast.info.info`` found: the installation, each operator × backend, and what its marks mean."""
    about = Table(show_header=False, title="seqrec_fast " + str(found["seqrec_fast"]), title_justify="left")
    about.add_column()
    about.add_column(overflow="fold")
    for name, value in found.items():
        if name in ("operators", "seqrec_fast"):
            continue
        if name == "build":
            value = build_in_words(value)
        elif isinstance(value, Mapping):
            value = ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
        about.add_row(name.replace("_", " "), escape(_plain(value)))
    operators = Table(title="operators", title_justify="left")
    operators.add_column("operator")
    operators.add_column("device")
    backends = list(dict.fromkeys(b for by in found["operators"].values() for why in by.values() for b in why))
    for backend in backends:
        operators.add_column(backend, justify="center")
    marks: dict[str, str] = {}  # a reason → its number, so that 80 columns are enough
    for name, by_device in found["operators"].items():
        for device, why in by_device.items():
            cells = [_mark(why.get(backend, _missing(backend)), backend, marks) for backend in backends]
            operators.add_row(name, device, *cells)
    legend = "\n".join(["✓ available   – not written", *(f"{mark} {reason}" for reason, mark in marks.items())])
    return [about, operators, Text(legend)]


def build_in_words(build: Mapping[str, Any]) -> str:
    """``CPU tiers default, avx2; CUDA 13.0 for sm_80; built with torch 2.13.0``, or why there is no library."""
    if not build["native"]:
        return f"pure Python: {build['reason']}"
    cuda = "no CUDA code"
    if build["cuda"]:
        codes = [str(flag).rsplit("code=", 1)[-1].replace("compute_", "PTX of ") for flag in build.get("gencode", [])]
        cuda = f"{str(build['cuda']).replace('cuda-', 'CUDA ')} for {', '.join(codes)}"
    tiers = ", ".join(str(tier).removeprefix("tier_") for tier in build["tiers"])
    debug = "; with assertions" if build.get("debug") else ""
    return f"CPU tiers {tiers}; {cuda}; built with torch {build.get('torch_built_with', 'unknown')}{debug}"


def _missing(backend: str) -> str:
    return f"there is no {backend} implementation"


def _mark(reason: str | None, backend: str, marks: dict[str, str]) -> str:
    if reason is None:
        return "✓"
    if reason == _missing(backend):
        return "–"
    return marks.setdefault(reason, str(len(marks) + 1))


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
