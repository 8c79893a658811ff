"""Synthetic interactions that need no download and reward a model for what it knows.

What happens at each step of a user's history is drawn from a mixture, so that each kind of model finds its part:

* items differ in popularity by a power law: a popularity model finds that;
* an item leads to its successors (first-order transitions): a Markov model finds those;
* a successor of the item *before* the last may come instead, and users belong to clusters with favourite genres:
  only a model of the whole sequence finds those.

The click-level model follows ETUDE (Kersbergen et al., ICDE 2024: power laws by inverse CDF) with transitions and
clusters added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .interactions import Histories, Int64Array, Interactions, offsets_of

TRIES = 6  # draws for one step before an item seen already is accepted


@dataclass(frozen=True)
class Recipe:
    """How a step is drawn and how large the parts are. The three probabilities leave the rest to global popularity.

    Args:
        follow: probability that a step is a successor of the last item.
        skip: probability that it is a successor of the item before the last.
        taste: probability that it comes from one of the user's favourite genres.
        popularity: exponent of the power law of item popularity.
        clusters: user clusters; each likes ``genres_per_cluster`` genres.
        genres: item genres.
        successors: items an item leads to.
    """

    follow: float = 0.4
    skip: float = 0.2
    taste: float = 0.3
    popularity: float = 1.0
    clusters: int = 16
    genres: int = 32
    genres_per_cluster: int = 3
    successors: int = 5

    def __post_init__(self) -> None:
        for name in ("follow", "skip", "taste", "popularity"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.follow + self.skip + self.taste > 1 + 1e-9:
            raise ValueError(f"follow + skip + taste must be at most 1, got {self.follow + self.skip + self.taste}")
        for name in ("clusters", "genres", "genres_per_cluster", "successors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def synthetic(
    num_users: int = 5000,
    num_items: int = 2000,
    *,
    mean_length: float = 40.0,
    min_length: int = 5,
    max_length: int = 200,
    seed: int = 0,
    recipe: Recipe | None = None,
) -> Interactions:
    """Draw a data set; the same arguments give the same data.

    Args:
        num_users: histories to draw.
        num_items: catalogue size; an item may never occur, and still counts.
        mean_length: mean history length, about (log-normal, cut to ``min_length``…``max_length``).
        min_length: shortest history.
        max_length: longest history; never more than ``num_items``.
        seed: of numpy's PCG64 generator.
        recipe: the mixture; None for the default.

    Returns:
        ``Interactions`` with ids 0…num_users−1 and 0…num_items−1. Hardly any history repeats an item.

    Raises:
        ValueError: an argument out of range.

    Complexity: O(interactions) time; memory O(interactions + users in a block × num_items bytes).

    Example:
        >>> data = synthetic(num_users=20, num_items=50, seed=1)
        >>> data.num_users, data.num_items, data.sha256 == synthetic(num_users=20, num_items=50, seed=1).sha256
        (20, 50, True)
    """
    _check(num_users, num_items, mean_length, min_length, max_length, seed)
    recipe = recipe or Recipe()
    random = np.random.default_rng(seed)
    catalogue = _Catalogue(num_items, recipe, random)
    lengths = _lengths(num_users, mean_length, min_length, min(max_length, num_items), random)
    favourites = catalogue.favourites(num_users, recipe, random)
    # One byte per (user, item) says what was seen; blocks of users keep that at 64 MB.
    block = max(1, (64 << 20) // num_items)
    rows = [
        _histories(lengths[start : start + block], favourites[start : start + block], catalogue, recipe, random)
        for start in range(0, num_users, block)
    ]
    return Interactions(
        Histories(np.concatenate(rows), offsets_of(lengths)),
        np.arange(num_users, dtype=np.int64),
        np.arange(num_items, dtype=np.int64),
        source=f"synthetic(num_users={num_users}, num_items={num_items}, seed={seed})",
    )


class _Catalogue:
    """Popularity, genres and successors of the items, as tables that a whole column of users is drawn from at once."""

    def __init__(self, num_items: int, recipe: Recipe, random: np.random.Generator) -> None:
        weight = (1.0 + np.arange(num_items)) ** -recipe.popularity
        self.weight = random.permutation(weight)  # popularity has nothing to do with the item's number
        self.cumulative = np.cumsum(self.weight)
        num_genres = min(recipe.genres, num_items)
        genre = random.permutation(np.arange(num_items) % num_genres)  # every genre has an item
        self.by_genre = np.argsort(genre, kind="stable")
        self.genre_cumulative = np.cumsum(self.weight[self.by_genre])
        sizes = np.bincount(genre, minlength=num_genres)
        self.genre_stop = np.cumsum(sizes)
        self.genre_start = self.genre_stop - sizes
        self.num_genres = num_genres
        self.successors = self.popular(random.random((num_items, recipe.successors)))  # [I, S]
        share = (1.0 + np.arange(recipe.successors)) ** -1.0
        self.successor_cumulative = np.cumsum(share / share.sum())

    def popular(self, uniform: NDArray[np.float64]) -> Int64Array:
        """Items by global popularity, one for each uniform number."""
        found = np.searchsorted(self.cumulative, uniform * self.cumulative[-1], side="right")
        item: Int64Array = np.minimum(found, len(self.cumulative) - 1)
        return item

    def of_genre(self, genre: Int64Array, uniform: NDArray[np.float64]) -> Int64Array:
        """Items of the given genres by popularity within the genre."""
        first, last = self.genre_start[genre], self.genre_stop[genre] - 1
        low = np.where(first > 0, self.genre_cumulative[first - 1], 0.0)
        at = low + uniform * (self.genre_cumulative[last] - low)
        found: Int64Array = self.by_genre[
            np.clip(np.searchsorted(self.genre_cumulative, at, side="right"), first, last)
        ]
        return found

    def after(self, item: Int64Array, uniform: NDArray[np.float64]) -> Int64Array:
        """A successor of each item, the first ones more often."""
        place = np.searchsorted(self.successor_cumulative, uniform, side="right")
        found: Int64Array = self.successors[item, np.minimum(place, self.successors.shape[1] - 1)]
        return found

    def favourites(self, num_users: int, recipe: Recipe, random: np.random.Generator) -> Int64Array:
        """The favourite genres of each user's cluster: ``[U, genres_per_cluster]``."""
        per_cluster = np.argsort(random.random((recipe.clusters, self.num_genres)), axis=1)
        per_cluster = per_cluster[:, : min(recipe.genres_per_cluster, self.num_genres)]
        found: Int64Array = per_cluster[random.integers(recipe.clusters, size=num_users)].astype(np.int64)
        return found


def _histories(
    lengths: Int64Array, favourites: Int64Array, catalogue: _Catalogue, recipe: Recipe, random: np.random.Generator
) -> Int64Array:
    """The histories of a block of users, laid end to end; all users take a step at once."""
    num_users, longest = len(lengths), int(lengths.max())
    seen = np.zeros((num_users, len(catalogue.weight)), dtype=bool)
    table = np.zeros((num_users, longest), dtype=np.int64)
    for step in range(longest):
        active = np.flatnonzero(lengths > step)
        table[active, step] = _draw(table, step, active, favourites, catalogue, recipe, random)
        for _ in range(TRIES - 1):
            again = active[seen[active, table[active, step]]]
            if len(again) == 0:
                break
            table[again, step] = _draw(table, step, again, favourites, catalogue, recipe, random)
        seen[active, table[active, step]] = True
    history: Int64Array = table[np.arange(longest) < lengths[:, None]]
    return history


def _draw(
    table: Int64Array,
    step: int,
    users: Int64Array,
    favourites: Int64Array,
    catalogue: _Catalogue,
    recipe: Recipe,
    random: np.random.Generator,
) -> Int64Array:
    """One item for each of the users, from the mixture."""
    kind, uniform, which = random.random((3, len(users)))
    last = table[users, max(step - 1, 0)]
    before = table[users, max(step - 2, 0)]
    genre = favourites[users, (which * favourites.shape[1]).astype(np.int64)]
    follow = recipe.follow if step >= 1 else 0.0
    skip = recipe.skip if step >= 2 else 0.0
    return np.select(
        [kind < follow, kind < follow + skip, kind < follow + skip + recipe.taste],
        [catalogue.after(last, uniform), catalogue.after(before, uniform), catalogue.of_genre(genre, uniform)],
        catalogue.popular(uniform),
    )


def _lengths(users: int, mean: float, shortest: int, longest: int, random: np.random.Generator) -> Int64Array:
    spread = 0.6  # of the logarithm; the mean of exp(normal(m, s)) is exp(m + s²/2)
    drawn = random.lognormal(np.log(mean) - spread**2 / 2, spread, size=users)
    return np.clip(np.rint(drawn), min(shortest, longest), longest).astype(np.int64)


def _check(num_users: int, num_items: int, mean_length: float, min_length: int, max_length: int, seed: int) -> None:
    for name, value, least in (
        ("num_users", num_users, 1),
        ("num_items", num_items, 2),
        ("mean_length", mean_length, 1),
        ("min_length", min_length, 1),
        ("max_length", max_length, min_length),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
