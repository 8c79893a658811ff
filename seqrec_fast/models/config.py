"""What a :class:`SequenceRecommender` is made of: one frozen record, written into every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict, get_args

EncoderName = Literal["lstm", "gru", "cnn"]
AttentionName = Literal["scaled_dot", "dot", "bilinear", "additive"]
ActivationName = Literal["identity", "tanh", "sigmoid", "relu", "gelu", "silu"]


class RecommenderOptions(TypedDict, total=False):
    """The keywords of :class:`SequenceRecommender`; meanings and defaults are those of :class:`RecommenderConfig`."""

    embedding_dim: int
    hidden_dim: int | None
    encoder: EncoderName
    num_layers: int
    kernel_size: int
    attention: AttentionName | None
    num_heads: int
    activation: ActivationName
    tie_weights: bool
    item_bias: bool
    residual: bool
    layer_norm: bool
    dropout: float
    embedding_dropout: float | None
    label_smoothing: float
    negatives: int


@dataclass(frozen=True)
class RecommenderConfig:
    """Sizes and choices of a :class:`SequenceRecommender`.

    Args:
        num_items: items in the catalogue, I.
        embedding_dim: width of the item vectors and of the user vector, d.
        hidden_dim: width of the encoder; None: ``embedding_dim``. Another width is projected to ``embedding_dim``.
        encoder: ``"lstm"``, ``"gru"`` or ``"cnn"`` (causal, dilated).
        num_layers: layers of the encoder. A CNN sees the last 1 + (kernel_size − 1)(2^num_layers − 1) items.
        kernel_size: steps under one CNN filter; the other encoders do not look at it.
        attention: At(h, vᵢ) of the catalogue attention: ``"scaled_dot"`` h·vᵢ/√(d/heads), ``"dot"`` h·vᵢ, ``"bilinear"``
            h·W·vᵢ, ``"additive"`` w·tanh(W_h·h + W_v·vᵢ) (for the last state of a history only); None: no attention,
            the association layer sees h alone.
        num_heads: heads of that attention; divides ``embedding_dim``.
        activation: of the association layer.
        tie_weights: score with the item embeddings; False: with a table of its own.
        item_bias: add a learned bias per item to the scores.
        residual: add the embedding of the step's item to the encoder's state.
        layer_norm: normalise the encoder's state.
        dropout: probability, on the embeddings, between the encoder's layers, and on the association layer's output.
        embedding_dropout: probability on the embeddings; None: ``dropout``.
        label_smoothing: ε of the training loss.
        negatives: items drawn uniformly for each training batch; its softmax then runs over the target and them, corrected for the
            draw (Bengio & Senécal 2008). 0: the whole catalogue.

    Raises:
        ValueError: a size below 1, a probability outside [0, 1), an unknown name, heads that do not divide the width.

    Example:
        >>> config = RecommenderConfig(num_items=100, encoder="gru", hidden_dim=96)
        >>> RecommenderConfig.from_dict(config.to_dict()) == config
        True
    """

    num_items: int
    embedding_dim: int = 64
    hidden_dim: int | None = None
    encoder: EncoderName = "lstm"
    num_layers: int = 1
    kernel_size: int = 3
    attention: AttentionName | None = "scaled_dot"
    num_heads: int = 1
    activation: ActivationName = "tanh"
    tie_weights: bool = True
    item_bias: bool = True
    residual: bool = False
    layer_norm: bool = False
    dropout: float = 0.2
    embedding_dropout: float | None = None
    label_smoothing: float = 0.0
    negatives: int = 0

    def __post_init__(self) -> None:
        for name in ("num_items", "embedding_dim", "hidden_dim", "num_layers", "kernel_size", "num_heads"):
            size = getattr(self, name)
            if size is None and name == "hidden_dim":
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        if isinstance(self.negatives, bool) or not isinstance(self.negatives, int) or self.negatives < 0:
            raise ValueError(f"negatives must be a whole number of at least 0, got {self.negatives!r}")
        for name in ("dropout", "embedding_dropout", "label_smoothing"):
            probability = getattr(self, name)
            if probability is None and name == "embedding_dropout":
                continue
            if not isinstance(probability, (int, float)) or not 0 <= probability < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {probability!r}")
        for name, allowed in (
            ("encoder", get_args(EncoderName)),
            ("attention", (*get_args(AttentionName), None)),
            ("activation", get_args(ActivationName)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        if self.embedding_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embedding_dim ({self.embedding_dim}), got {self.num_heads}")

    @property
    def width(self) -> int:
        """Width of the encoder."""
        return self.embedding_dim if self.hidden_dim is None else self.hidden_dim

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecommenderConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: an option this version does not know, or no ``num_items``.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown option of SequenceRecommender: {', '.join(unknown)}")
        if "num_items" not in values:
            raise ValueError("num_items is missing from the configuration")
        return cls(**values)
