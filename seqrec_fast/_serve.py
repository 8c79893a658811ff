"""Recommendations for the command line and the demo: from ids as people write them to rows that can be printed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor

from seqrec_fast._report import (
    MEANING,
    Attended,
    Reason,
    attended,
    attention_line,
    present,
    reasons,
    recommendation_table,
)
from seqrec_fast.data import Interactions
from seqrec_fast.training.run import Run


@dataclass(frozen=True)
class Asked:
    """Someone to recommend for: a name to print, and the history as item numbers, oldest first."""

    name: str
    history: list[int]


@dataclass(frozen=True)
class Answer:
    """A list of items, best first, with the original ids; ``why`` and ``attended`` are empty when nothing is explained.

    Printed with rich, it is the title, the table, and what explains the table.
    """

    asked: str
    history_length: int
    items: list[Any]
    scores: list[float]
    why: list[list[Reason]]
    attended: list[Attended]
    num_items: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # the title is no part of the table: a long history would be cut or widen it
        yield Text(f"{self.asked}, history of {self.history_length} item{'s' * (self.history_length != 1)}")
        yield recommendation_table(self.items, self.scores, self.why)
        if self.why:
            yield Text(MEANING)
        if line := attention_line(self.attended, self.num_items):
            yield Text(line)

    def as_dict(self) -> dict[str, Any]:
        """As values JSON can hold; explanations only where there are some."""
        answer: dict[str, Any] = {"for": self.asked, "items": self.items, "scores": self.scores}
        if self.why:
            answer.update(why=self.why, attended=self.attended)
        return answer


def histories_of(data: Interactions, users: Sequence[str], histories: Sequence[str]) -> list[Asked]:
    """Look up users, and read histories typed as ``"1,5,9"``.

    Raises:
        KeyError: a user or item that is not in the data.
        ValueError: a history that holds nothing.
    """
    asked = []
    for user in users:
        (number,) = data.encode_users([_typed(user, data.user_ids)])
        asked.append(Asked(f"user {user}", data.histories[int(number)].tolist()))
    for text in histories:
        items = [part.strip() for part in text.split(",") if part.strip()]
        if not items:
            raise ValueError(f"a history must name items, separated by commas, got {text!r}")
        numbers = data.encode_items([_typed(item, data.item_ids) for item in items])
        asked.append(Asked(f"history {','.join(items)}", numbers.tolist()))
    return asked


def recommend(
    run: Run, asked: Sequence[Asked], k: int, *, exclude_seen: bool = True, explain: bool = False
) -> Iterator[Answer]:
    """An answer for each of ``asked``, in order.

    All that a history holds is left out by ``exclude_seen``, also what is older than the model looks at.
    """
    longest = int(run.record["settings"]["max_length"])
    for someone in asked:
        # one at a time: padding to the longest history of a mixed list would cost more than a batch saves
        ids, lengths = as_batch([someone.history], longest)
        old = set(someone.history[:-longest]) - set(someone.history[-longest:]) if exclude_seen else set()
        best = run.model.recommend(ids, lengths, k + len(old), exclude_seen=exclude_seen)
        places = [place for place in present(best, 0) if int(best.items[0, place]) not in old][:k]
        numbers = best.items[0, places].tolist()
        why: list[list[Reason]] = []
        weights: list[Attended] = []
        if explain and places:
            # an explanation costs a backward pass per item: only as far down as the list goes
            found = run.model.explain(ids, lengths, places[-1] + 1, exclude_seen=exclude_seen)
            seen = run.data.decode_items(someone.history[-longest:]).tolist()
            lines = reasons(found, 0, seen)
            why, weights = [lines[place] for place in places], attended(found, 0, run.data.item_ids.tolist())
        yield Answer(
            someone.name,
            len(someone.history),
            run.data.decode_items(numbers).tolist(),
            best.scores[0, places].tolist(),
            why,
            weights,
            run.data.num_items,
        )


def as_batch(histories: Sequence[Sequence[int]], max_length: int) -> tuple[Tensor, Tensor]:
    """Histories of item numbers → ids [B, T], padded with 0, and lengths [B]; the newest items of a longer one."""
    cut = [list(history)[-max_length:] for history in histories]
    width = max((len(history) for history in cut), default=0)
    ids = torch.tensor([[*history, *[0] * (width - len(history))] for history in cut], dtype=torch.int64)
    return ids.reshape(len(cut), width), torch.tensor([len(history) for history in cut])


def _typed(text: str, ids: Any) -> Any:
    """An id as the data holds it: an integer where the data's are."""
    if ids.dtype.kind == "i":
        try:
            return int(text)
        except ValueError:
            return text  # which the data does not hold, and encode says so
    return text
