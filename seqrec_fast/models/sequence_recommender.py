"""The model of this package: a recurrent (or causal CNN) encoder, attention over the catalogue, an association layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from seqrec_fast.nn import GRU, LSTM
from seqrec_fast.ops.catalogue_cross_entropy import catalogue_cross_entropy
from seqrec_fast.ops.catalogue_rank import catalogue_rank
from seqrec_fast.ops.catalogue_topk import catalogue_topk

from ._checkpoint import SavedModule
from ._histories import IGNORE, Histories, at_last, check_histories, items_to_hide, next_items
from ._ranking import Recommendations, evaluating
from .config import RecommenderConfig, RecommenderOptions
from .layers import AdditiveAttention, Association, CausalCNN, ProductAttention

Positions = Literal["all", "last"]


@dataclass(frozen=True)
class Explanation:
    """Why a model recommends what it recommends.

    Attributes:
        items, scores: the recommended items and their scores, [B, k].
        attended_items, attention_weights: the catalogue items with the largest attention weight in g = Σ aᵢ vᵢ, and that
            weight, [B, heads, k]; None for a model without attention.
        steps: for each recommended item the steps of the history that moved its score most, [B, k, n], most first; −1
            where the history is shorter.
        contributions: embedding · gradient of the score at those steps, [B, k, n]: > 0 spoke for the item, < 0 against.
    """

    items: Tensor
    scores: Tensor
    attended_items: Tensor | None
    attention_weights: Tensor | None
    steps: Tensor
    contributions: Tensor


class SequenceRecommender(SavedModule):
    """Next-item recommender: embedding → encoder → attention over the catalogue → association layer → scores.

    With x₁…x_T the item embeddings of a history, h_t = encoder(x₁…x_t) and g_t = Σᵢ softmaxᵢ(At(h_t, vᵢ))·vᵢ over all items
    of the catalogue, the user vector is p_t = σ(W·[h_t; g_t] + b) and item i scores p_t·wᵢ + biasᵢ, where wᵢ = vᵢ is the item
    embedding unless ``tie_weights=False``. Nothing of size positions × items is held, in training or in serving.

    Ids are 0…num_items−1; there is no padding row, and what stands beyond a length is never looked at.

    Args:
        num_items: items in the catalogue, I.
        options: see :class:`RecommenderConfig`.

    Raises:
        ValueError, TypeError: an option out of range, or unknown.

    Example:
        >>> import torch
        >>> model = SequenceRecommender(100, embedding_dim=16, encoder="gru")
        >>> ids = torch.tensor([[3, 14, 15, 92], [65, 35, -1, -1]])
        >>> lengths, target = torch.tensor([4, 2]), torch.tensor([89, 79])
        >>> model.loss(ids, lengths, target).backward()
        >>> items, scores = model.recommend(ids, lengths, k=5)
        >>> items.shape, scores.shape
        (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    encoder: LSTM | GRU | CausalCNN
    attention: ProductAttention | AdditiveAttention | None

    def __init__(self, num_items: int, **options: Unpack[RecommenderOptions]) -> None:
        super().__init__()
        self.config = config = RecommenderConfig(num_items, **options)
        width = config.embedding_dim
        self.embedding = nn.Embedding(num_items, width)
        self.embedding_dropout = nn.Dropout(
            config.dropout if config.embedding_dropout is None else config.embedding_dropout
        )
        between_layers = config.dropout if config.num_layers > 1 else 0.0
        if config.encoder == "cnn":
            self.encoder = CausalCNN(width, config.width, config.num_layers, config.kernel_size, config.dropout)
        else:
            recurrent = LSTM if config.encoder == "lstm" else GRU
            self.encoder = recurrent(width, config.width, config.num_layers, batch_first=True, dropout=between_layers)
        self.projection = nn.Linear(config.width, width) if config.width != width else None
        self.norm = nn.LayerNorm(width) if config.layer_norm else None
        if config.attention is None:
            self.attention = None
        elif config.attention == "additive":
            self.attention = AdditiveAttention(width, config.num_heads)
        else:
            self.attention = ProductAttention(config.attention, width, config.num_heads)
        self.association = Association(width, config.activation, with_context=self.attention is not None)
        self.output_dropout = nn.Dropout(config.dropout)
        self.output = None if config.tie_weights else nn.Embedding(num_items, width)
        self.item_bias = nn.Parameter(torch.empty(num_items)) if config.item_bias else None
        self._initialise()

    @classmethod
    def from_config(cls, config: RecommenderConfig) -> SequenceRecommender:
        """The model that ``config`` describes, with new weights."""
        return cls(**config.to_dict())

    def config_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    @classmethod
    def from_config_dict(cls, config: Mapping[str, Any]) -> SequenceRecommender:
        return cls.from_config(RecommenderConfig.from_dict(config))

    def _initialise(self) -> None:
        """Where torch's own start is left: item vectors of unit length on average (torch: √d, far too sure of itself
        with tied weights), an association layer that passes h on, zero biases."""
        std = 1 / math.sqrt(self.config.embedding_dim)
        for table in (self.embedding, self.output):
            if table is not None:
                nn.init.normal_(table.weight, std=std)
        if self.attention is not None:
            self.attention.reset_parameters()
        self.association.reset_parameters()
        if self.item_bias is not None:
            nn.init.zeros_(self.item_bias)

    @property
    def num_items(self) -> int:
        return self.config.num_items

    @property
    def item_vectors(self) -> Tensor:
        """The table [I, d] whose products with a user vector are the scores."""
        return self.embedding.weight if self.output is None else self.output.weight

    # --- the model, part by part ---------------------------------------------------------------------------------

    def _states(self, embedded: Tensor, histories: Histories, *, last_only: bool) -> Tensor:
        """h of every step [B, T, d], or of the last valid one [B, d], for embedded histories [B, T, d]."""
        lengths = histories.lengths if histories.ragged else None
        states: Tensor
        if isinstance(self.encoder, CausalCNN):
            states = self.encoder(embedded)  # [B, T, H]
            states = at_last(states, histories.lengths) if last_only else states
        elif last_only:
            final = self.encoder(embedded, lengths=lengths, last_only=True)[1]
            states = (final[0] if isinstance(final, tuple) else final)[-1]  # [B, H] of the topmost layer
        else:
            states = self.encoder(embedded, lengths=lengths)[0]  # [B, T, H]
        if self.projection is not None:
            states = self.projection(states)
        if self.config.residual:
            states = states + (at_last(embedded, histories.lengths) if last_only else embedded)
        return states if self.norm is None else self.norm(states)

    def _user_vectors(self, states: Tensor) -> Tensor:
        """p for states [..., d]."""
        context = None if self.attention is None else self.attention(states, self.embedding.weight)
        user: Tensor = self.output_dropout(self.association(states, context))
        return user

    def _embed(self, histories: Histories) -> Tensor:
        embedded: Tensor = self.embedding_dropout(self.embedding(histories.ids))  # [B, T, d]
        return embedded

    def _encode(self, histories: Histories, *, all_positions: bool = False) -> Tensor:
        """p of the last valid step [B, d], or of every step [B, T, d]."""
        return self._user_vectors(self._states(self._embed(histories), histories, last_only=not all_positions))

    # --- what users call -----------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, lengths: Tensor | None = None, *, all_positions: bool = False) -> Tensor:
        """User vectors p of the last valid step, or of every step.

        Args:
            ids: [B, T] int64 or int32; anything beyond a row's length.
            lengths: [B] int64 or int32; None: every history is T long. A history of length 0 has state 0.
            all_positions: give all steps; what is given beyond a length has no meaning.

        Returns:
            [B, d], or [B, T, d] with ``all_positions``.

        Raises:
            TypeError: ids or lengths not integer tensors.
            ValueError: a wrong shape, a length outside 0…T, ``all_positions`` with additive attention.
            IndexError: an id outside 0…I−1 (values are looked at on the CPU, outside compiled graphs).
        """
        if all_positions:
            self._refuse_additive("all_positions=True")
        return self._encode(check_histories(ids, lengths, self.num_items), all_positions=all_positions)

    def encode(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The user vector after each history, [B, d]: item i scores ``encode(...) @ item_vectors[i] + item_bias[i]``.

        Takes and raises what :meth:`forward` does; differentiable; dropout acts in training mode.
        """
        return self(ids, lengths)  # type: ignore[no-any-return]

    def logits(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores of every item after each history, [B, I]: for blending, and for code that wants them all."""
        user = self.encode(ids, lengths)
        return nn.functional.linear(user, self.item_vectors.to(user.dtype), self._bias_as(user.dtype))

    def loss(
        self,
        ids: Tensor,
        lengths: Tensor | None = None,
        target: Tensor | None = None,
        *,
        positions: Positions | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy over the whole catalogue, on every position by default.

        With ``negatives`` in its configuration a model in training mode compares with so many drawn items instead.

        Args:
            ids, lengths: as in :meth:`forward`.
            target: int64 [B]: the item after each history (the targets of earlier positions are read off the history);
                [B, T]: the item after each position, −100 for none; None: the history predicts its own next items.
            positions: ``"all"``; ``"last"``: only the item after the history; None: ``"last"`` for additive attention and
                ``"all"`` otherwise.
            reduction: ``"mean"`` over the positions that have a target, ``"sum"``, or ``"none"`` (one value for each such
                position, in order of row and step).

        Returns:
            A scalar, or [positions] for ``"none"``. Without a single target the mean is 0.

        Raises:
            TypeError, ValueError, IndexError: as :meth:`forward`; for a target of another dtype or shape, or no item; for
                ``positions="last"`` without a target, ``positions="all"`` with additive attention.
        """
        if positions is None:
            positions = "last" if isinstance(self.attention, AdditiveAttention) else "all"
        if positions not in ("all", "last"):
            raise ValueError(f"positions must be 'all' or 'last', got {positions!r}")
        histories = check_histories(ids, lengths, self.num_items)
        if positions == "last" and target is None:
            raise ValueError("target is needed with positions='last': the history ends before it")
        wanted = next_items(histories, target, self.num_items)  # [B, T]
        if positions == "all":
            self._refuse_additive("positions='all'")
            states = self._states(self._embed(histories), histories, last_only=False).flatten(0, 1)  # [B·T, d]
            wanted = wanted.flatten()
        else:
            states = self._states(self._embed(histories), histories, last_only=True)  # [B, d]
            wanted = at_last(wanted, histories.lengths).masked_fill(histories.lengths == 0, IGNORE)
        if not torch.compiler.is_compiling():
            # padding costs nothing after this; a traced graph leaves the rows in and the operator ignores them
            rows = (wanted != IGNORE).nonzero()[:, 0]
            states, wanted = states.index_select(0, rows), wanted.index_select(0, rows)
        negatives, log_q = self._draw() if self.training and self.config.negatives else (None, None)
        return catalogue_cross_entropy(
            self._user_vectors(states),
            self.item_vectors,
            wanted,
            bias=self.item_bias,
            ignore_index=IGNORE,
            label_smoothing=self.config.label_smoothing,
            reduction=reduction,
            negatives=negatives,
            negatives_log_q=log_q,
        )

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Items for every row alike, and the logarithm of how often each is expected among them; [negatives]."""
        table, count = self.item_vectors, self.config.negatives
        items = torch.randint(self.num_items, (count,), device=table.device)
        return items, table.new_full((count,), math.log(count / self.num_items))

    @torch.no_grad()
    def recommend(
        self,
        ids: Tensor,
        lengths: Tensor | None = None,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        exclude: Tensor | None = None,
    ) -> Recommendations:
        """The k best items after each history, best first, exactly and without a [B, I] array.

        Args:
            ids, lengths: as in :meth:`forward`.
            k: how many, at least 1. Where fewer items are left: item −1 with score −∞.
            exclude_seen: leave out the items of the history.
            exclude: more items to leave out, [B, n] padded with −1.

        Returns:
            ``items`` [B, k] int64 and ``scores`` [B, k]. Dropout is off, whatever the mode.
        """
        histories = check_histories(ids, lengths, self.num_items)
        with evaluating(self):
            user = self._encode(histories)
        return self._best(user, items_to_hide(histories, exclude_seen, exclude, self.num_items), k)

    @torch.no_grad()
    def rank(
        self,
        ids: Tensor,
        lengths: Tensor | None,
        target: Tensor,
        *,
        exclude_seen: bool = True,
        exclude: Tensor | None = None,
    ) -> Tensor:
        """The target's 0-based place in the full ranking, int64 [B]; −1 where ``target`` [B] is −100.

        The target itself is never excluded. Dropout is off, whatever the mode.
        """
        histories = check_histories(ids, lengths, self.num_items)
        with evaluating(self):
            user = self._encode(histories)
        hidden = items_to_hide(histories, exclude_seen, exclude, self.num_items)
        table, bias = self._scoring_tables()
        return catalogue_rank(user.to(table.dtype), table, target, bias=bias, exclude=hidden, ignore_index=IGNORE)

    def explain(
        self,
        ids: Tensor,
        lengths: Tensor | None = None,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        exclude: Tensor | None = None,
        num_steps: int = 3,
    ) -> Explanation:
        """The recommended items, what the catalogue attention looked at, and which steps of the history decided.

        A step's contribution to an item's score is embedding · gradient of the score with respect to it (gradient × input,
        Shrikumar et al. 2016), over all paths from the history to the user vector. Costs k backward passes.

        Args:
            ids, lengths, k, exclude_seen, exclude: as in :meth:`recommend`.
            num_steps: steps named for each item.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        # a backward pass is needed even if the caller serves under no_grad or inference_mode
        with evaluating(self), torch.inference_mode(False), torch.enable_grad():
            histories = check_histories(ids.clone(), None if lengths is None else lengths.clone(), self.num_items)
            embedded = self._embed(histories).detach().requires_grad_()
            states = self._states(embedded, histories, last_only=True)
            user = self._user_vectors(states)
            hidden = items_to_hide(histories, exclude_seen, exclude, self.num_items)
            best = self._best(user.detach(), hidden, k)
            found = self.item_vectors.detach()[best.items.clamp(min=0)].to(user.dtype)  # [B, k, d]
            contributions = []
            for place in range(k):
                # the rows of a batch do not meet, so one backward serves all of them
                score = (user * found[:, place]).sum()
                (gradient,) = torch.autograd.grad(score, embedded, retain_graph=True)
                contributions.append((embedded.detach() * gradient).sum(-1))
        by_step = torch.stack(contributions, 1)  # [B, k, T]
        offered = histories.valid[:, None] & (best.items >= 0)[..., None]
        steps, strength = _largest_steps(by_step, offered, num_steps)
        attended = weights = None
        if self.attention is not None:
            with torch.no_grad(), evaluating(self):
                attended, weights = self.attention.largest_weights(
                    states.detach(), self.embedding.weight.to(states.dtype), min(k, self.num_items)
                )
        return Explanation(best.items, best.scores, attended, weights, steps, strength)

    # --- helpers -------------------------------------------------------------------------------------------------

    def _refuse_additive(self, asked: str) -> None:
        if isinstance(self.attention, AdditiveAttention):
            raise ValueError(f"additive attention is computed for the last state only, so {asked} is not possible")

    def _bias_as(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.item_bias is None else self.item_bias.to(dtype)

    def _scoring_tables(self) -> tuple[Tensor, Tensor | None]:
        table = self.item_vectors.detach()
        return table, None if self.item_bias is None else self.item_bias.detach()

    def _best(self, user: Tensor, seen: Tensor | None, k: int) -> Recommendations:
        table, bias = self._scoring_tables()
        # top-k is not cast by autocast: a user vector of lower precision goes back to the table's dtype
        values, items = catalogue_topk(user.to(table.dtype), table, k, bias=bias, exclude=seen)
        return Recommendations(items, values)


def _largest_steps(contributions: Tensor, offered: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """The steps [B, k, n] with the largest |contribution| among the offered ones; −1 and 0 where there are fewer."""
    strength = contributions.abs().masked_fill(~offered, -1.0)
    n = min(num_steps, strength.shape[-1])
    top = strength.topk(n, sorted=True)
    missing = top.values < 0
    steps = top.indices.masked_fill(missing, -1)
    values = contributions.gather(-1, top.indices).masked_fill(missing, 0)
    pad = (0, num_steps - n)
    return nn.functional.pad(steps, pad, value=-1), nn.functional.pad(values, pad)
