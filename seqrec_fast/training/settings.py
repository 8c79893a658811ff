"""The settings of a training run as one flat list of names, for a command line and for the file beside the weights."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from seqrec_fast.models.config import RecommenderConfig

from .options import FitOptions, OptimizerOptions


@dataclass(frozen=True)
class LoaderOptions:
    """How histories become batches.

    Args:
        batch_size: sequences in a training batch.
        max_length: longest input; the newest items of a longer history are kept.
        windows: ``"last"``: one sequence a user; ``"all"``: a longer history is cut into several.

    Raises:
        ValueError: for a number below 1 or another kind of windows.
    """

    batch_size: int = 128
    max_length: int = 200
    windows: Literal["last", "all"] = "last"

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.windows not in ("last", "all"):
            raise ValueError(f"windows must be 'last' or 'all', got {self.windows!r}")


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides what a run computes, given the data."""

    model: RecommenderConfig
    loader: LoaderOptions = field(default_factory=LoaderOptions)
    fit: FitOptions = field(default_factory=FitOptions)

    @classmethod
    def from_flat(cls, num_items: int, chosen: Mapping[str, Any]) -> RunSettings:
        """Settings from names and values; what is not named keeps its default.

        Raises:
            ValueError: an unknown name, or a value of another type or out of range; the message names it.

        Example:
            >>> settings = RunSettings.from_flat(100, {"encoder": "gru", "learning_rate": 0.01, "max_epochs": 3})
            >>> settings.model.encoder, settings.fit.optimizer.learning_rate, settings.fit.max_epochs
            ('gru', 0.01, 3)
        """
        types_of = setting_types()
        unknown = sorted(set(chosen) - set(types_of))
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}; there are {', '.join(sorted(types_of))}")
        for name, value in chosen.items():
            if not _fits(value, types_of[name]):
                raise ValueError(f"{name} must be {describe_type(types_of[name])}, got {value!r}")

        def part(record: type) -> dict[str, Any]:
            return {name: chosen[name] for name in _names(record) if name in chosen}

        optimizer = OptimizerOptions(**part(OptimizerOptions))
        return cls(
            model=RecommenderConfig(num_items, **part(RecommenderConfig)),
            loader=LoaderOptions(**part(LoaderOptions)),
            fit=FitOptions(optimizer=optimizer, **part(FitOptions)),
        )

    def to_flat(self) -> dict[str, Any]:
        """The inverse of :meth:`from_flat`: every name with its value, defaults included."""
        records = (self.model, self.loader, self.fit, self.fit.optimizer)
        return {name: getattr(record, name) for record in records for name in _names(type(record))}


# What may differ when a run is continued: when it ends and where it runs, not what it computes.
FREE_ON_RESUME = frozenset({"max_epochs", "patience", "accelerator", "devices", "strategy"})


def setting_types() -> dict[str, Any]:
    """The type of every setting by its name."""
    found: dict[str, Any] = {}
    for record in (RecommenderConfig, LoaderOptions, FitOptions, OptimizerOptions):
        hints = get_type_hints(record)
        found.update({name: hints[name] for name in _names(record)})
    return found


def default_of(name: str) -> Any:
    """The default of a setting."""
    for record in (RecommenderConfig, LoaderOptions, FitOptions, OptimizerOptions):
        for entry in fields(record):
            if entry.name == name:
                return entry.default
    raise KeyError(name)


def parse_setting(text: str) -> tuple[str, Any]:
    """``"name=value"`` as typed on a command line → name and value of its type.

    Raises:
        ValueError: no "=", an unknown name, or a value that does not fit.

    Example:
        >>> parse_setting("residual=true"), parse_setting("hidden_dim=none"), parse_setting("num_heads=2")
        (('residual', True), ('hidden_dim', None), ('num_heads', 2))
    """
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        raise ValueError(f"a setting reads NAME=VALUE, got {text!r}")
    types_of = setting_types()
    if name not in types_of:
        raise ValueError(f"unknown setting {name!r}; there are {', '.join(sorted(types_of))}")
    for kind in _alternatives(types_of[name]):
        read = _read(value.strip(), kind)
        if read is not _NOT_THAT:
            return name, read
    raise ValueError(f"{name} must be {describe_type(types_of[name])}, got {value.strip()!r}")


def describe_type(kind: Any) -> str:
    """A setting's type in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", types.NoneType: "none"}
    return " or ".join(
        " | ".join(map(str, get_args(part))) if get_origin(part) is Literal else words[part]
        for part in _alternatives(kind)
    )


_NOT_THAT = object()


def _names(record: type) -> list[str]:
    """The fields that are settings: not the catalogue size, which the data decides, and not a nested record."""
    return [entry.name for entry in fields(record) if entry.name not in ("num_items", "optimizer")]


def _alternatives(kind: Any) -> list[Any]:
    """The members of a union, None last: ``int | None`` → [int, NoneType]."""
    members = list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]
    return sorted(members, key=lambda member: member in (types.NoneType, str))


def _fits(value: Any, kind: Any) -> bool:
    for part in _alternatives(kind):
        if get_origin(part) is Literal:
            if value in get_args(part):
                return True
        elif part is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return True
        elif isinstance(value, part) and (part is bool or not isinstance(value, bool)):
            return True
    return False


def _read(value: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else _NOT_THAT
    if kind is types.NoneType:
        return None if value.lower() == "none" else _NOT_THAT
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), _NOT_THAT)
    if kind is str:
        return value
    try:
        return kind(value)
    except ValueError:
        return _NOT_THAT
