"""A weighted sum of the scores of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checkpoint import SavedModule
from ._histories import IGNORE
from ._ranking import DenseRecommender, LogitModel

Normalise = Literal["none", "softmax", "log_softmax"]


class Blend(DenseRecommender):
    """r(x) = Σ w_m · M_m(x) over any number of models that score the same catalogue.

    Args:
        models: modules with ``logits(ids, lengths) -> [B, I]`` (:class:`LogitModel`), at least one; or, for :meth:`forward`
            alone, any modules whose call gives logits.
        weights: one number a model, used as given (they need not sum to 1); None: 1/M each; ``"learned"``: the softmax of
            parameters, which start equal.
        normalise: what becomes of each model's scores first, so that models of different scale can be mixed:
            ``"softmax"`` makes them probabilities (a mixture: one model that is sure is enough), ``"log_softmax"``
            log-probabilities (a product of powers: every model has a veto; a Markov model's scores are such already),
            ``"none"`` leaves them.

    Raises:
        TypeError: something that is not a module, or an unknown kind of weights.
        ValueError: no model, another number of weights than models, models with different numbers of items.

    Example:
        >>> import numpy as np, torch
        >>> from seqrec_fast.models import Markov, Popularity
        >>> histories = [np.array([0, 1, 2]), np.array([3, 1, 2, 0])]
        >>> blend = Blend([Markov(4).fit(histories), Popularity(4).fit(histories)], weights=[0.9, 0.1])
        >>> blend.recommend(torch.tensor([[3, 1]]), k=1).items
        tensor([[2]])
    """

    fixed_weights: Tensor | None
    weight_logits: nn.Parameter | None

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Sequence[float] | Literal["learned"] | None = None,
        *,
        normalise: Normalise = "none",
    ) -> None:
        super().__init__()
        if len(models) == 0:
            raise ValueError("models must hold at least one model, got none")
        for place, model in enumerate(models):
            if not isinstance(model, nn.Module):
                raise TypeError(f"models[{place}] must be an nn.Module, got {type(model).__name__}")
        if normalise not in get_args(Normalise):
            raise ValueError(f"normalise must be 'none', 'softmax' or 'log_softmax', got {normalise!r}")
        sizes = [getattr(model, "num_items", None) for model in models]
        known = {size for size in sizes if size is not None}
        if len(known) > 1:
            raise ValueError(f"models must score the same catalogue, got num_items {sizes}")
        self._num_items: int | None = known.pop() if known else None
        self.models = nn.ModuleList(models)
        self.normalise = normalise
        if isinstance(weights, str):
            if weights != "learned":
                raise TypeError(f"weights must be numbers, None or 'learned', got {weights!r}")
            self.weight_logits = nn.Parameter(torch.zeros(len(models)))
            self.register_buffer("fixed_weights", None)
        else:
            values = [1 / len(models)] * len(models) if weights is None else [float(weight) for weight in weights]
            if len(values) != len(models):
                raise ValueError(
                    f"weights must hold one number for each of the {len(models)} models, got {len(values)}"
                )
            self.register_parameter("weight_logits", None)
            self.register_buffer("fixed_weights", torch.tensor(values))

    @property
    def num_items(self) -> int:
        """I, as the blended models say.

        Raises:
            ValueError: none of them does.
        """
        if self._num_items is None:
            raise ValueError("none of the blended models says how many items it scores (num_items)")
        return self._num_items

    @property
    def weights(self) -> Tensor:
        """w [M]."""
        if self.weight_logits is not None:
            return torch.softmax(self.weight_logits, 0)
        return cast(Tensor, self.fixed_weights)

    def _sum(self, scores: Sequence[Tensor]) -> Tensor:
        if self.normalise != "none":
            function = F.softmax if self.normalise == "softmax" else F.log_softmax
            scores = [function(part, -1, dtype=torch.promote_types(part.dtype, torch.float32)) for part in scores]
        blended = self.weights[0] * scores[0]
        for weight, part in zip(self.weights[1:], scores[1:], strict=True):
            blended = blended + weight * part
        return blended

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """Σ w_m · M_m(inputs), with ``M.logits`` where a model has it and its plain call where not."""
        return self._sum(
            [
                model.logits(*inputs, **keywords) if isinstance(model, LogitModel) else model(*inputs, **keywords)
                for model in self.models
            ]
        )

    def logits(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Blended scores of every item after each history: [B, T] ids, [B] lengths → [B, I]."""
        return self(ids, lengths)  # type: ignore[no-any-return]

    def loss(self, ids: Tensor, lengths: Tensor | None, target: Tensor) -> Tensor:
        """Mean cross-entropy of the item after each history, ``target`` int64 [B]: to learn the weights.

        The distribution is the softmax of the blended scores; blended probabilities (``normalise="softmax"``) are one
        already, once divided by their sum. −100 is ignored. Holds the [B, I] scores of every model, so keep the batch
        small; O(M·B·I).
        """
        if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != ids.shape[:1]:
            raise ValueError(f"target must be an int64 tensor of shape [B] = {tuple(ids.shape[:1])}")
        scores = self.logits(ids, lengths)
        if self.normalise == "softmax":
            scores = scores.log()  # the softmax of a logarithm divides by the sum
        return F.cross_entropy(scores, target, ignore_index=IGNORE)

    def config_dict(self) -> dict[str, Any]:
        parts = []
        for place, model in enumerate(self.models):
            if not isinstance(model, SavedModule):
                raise TypeError(f"models[{place}] is a {type(model).__name__}, which cannot be saved in a Blend's file")
            parts.append({"kind": type(model).__name__, "config": model.config_dict()})
        learned = self.weight_logits is not None
        return {"models": parts, "learned": learned, "normalise": self.normalise}

    @classmethod
    def from_config_dict(cls, config: Mapping[str, Any]) -> Blend:
        models = []
        for part in config["models"]:
            if part["kind"] not in SavedModule.registry:
                raise ValueError(f"a Blend holds a {part['kind']}, which this version of seqrec_fast does not know")
            models.append(SavedModule.registry[part["kind"]].from_config_dict(part["config"]))
        return cls(models, "learned" if config["learned"] else None, normalise=config["normalise"])
