"""The same model made of stock torch modules: what the operators are compared with, and an oracle for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._histories import IGNORE
from .config import RecommenderConfig
from .layers import ACTIVATIONS, AdditiveAttention, Association, CausalCNN, ProductAttention


class StockRecommender(nn.Module):
    """:class:`SequenceRecommender` as one would write it with torch alone, with the same ``state_dict``.

    ``nn.LSTM`` or ``nn.GRU`` over the padded batch, softmax(h·Vᵀ)·V, and ``F.cross_entropy`` of p·Wᵀ + bias. It holds the
    positions × items scores, several times over. The positions without a target are dropped before the attention, as a
    careful user would: the comparison is with stock torch at its best.

    Args:
        config: what to build.

    Example:
        >>> from seqrec_fast.models import SequenceRecommender
        >>> model = SequenceRecommender(50, embedding_dim=8)
        >>> stock = StockRecommender(model.config)
        >>> stock.load_state_dict(model.state_dict())
        <All keys matched successfully>
    """

    def __init__(self, config: RecommenderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_dim
        self.embedding = nn.Embedding(config.num_items, width)
        self.embedding_dropout = nn.Dropout(
            config.dropout if config.embedding_dropout is None else config.embedding_dropout
        )
        self.encoder: nn.Module
        if config.encoder == "cnn":
            self.encoder = CausalCNN(width, config.width, config.num_layers, config.kernel_size, config.dropout)
        else:
            recurrent = nn.LSTM if config.encoder == "lstm" else nn.GRU
            between_layers = config.dropout if config.num_layers > 1 else 0.0
            self.encoder = recurrent(width, config.width, config.num_layers, batch_first=True, dropout=between_layers)
        self.projection = nn.Linear(config.width, width) if config.width != width else None
        self.norm = nn.LayerNorm(width) if config.layer_norm else None
        self.attention: AdditiveAttention | ProductAttention | None = None
        if config.attention is not None:
            # the modules only lend their parameters: the formulas are written out below
            self.attention = (
                AdditiveAttention(width, config.num_heads)
                if config.attention == "additive"
                else ProductAttention(config.attention, width, config.num_heads)
            )
        self.association = Association(width, config.activation, with_context=self.attention is not None)
        self.output_dropout = nn.Dropout(config.dropout)
        self.output = None if config.tie_weights else nn.Embedding(config.num_items, width)
        self.item_bias = nn.Parameter(torch.zeros(config.num_items)) if config.item_bias else None

    def _states(self, ids: Tensor) -> Tensor:
        """h [B, T, d]: padding stands behind every history, so a causal encoder never lets it in."""
        embedded = self.embedding_dropout(self.embedding(ids))
        states: Tensor = self.encoder(embedded) if self.config.encoder == "cnn" else self.encoder(embedded)[0]
        if self.projection is not None:
            states = self.projection(states)
        if self.config.residual:
            states = states + embedded
        return states if self.norm is None else self.norm(states)

    def _context(self, states: Tensor) -> Tensor | None:
        """g [N, d] for states [N, d], with the [N, heads, I] weights in memory."""
        heads = self.config.num_heads
        items = self.embedding.weight
        values = items.view(len(items), heads, -1)  # [I, heads, d / heads]
        if self.attention is None:
            return None
        if isinstance(self.attention, AdditiveAttention):
            pairs = torch.tanh(self.attention.state(states)[:, None] + self.attention.item(items))  # [N, I, d]
            scores = (pairs.unflatten(-1, (heads, -1)) * self.attention.score).sum(-1).mT  # [N, heads, I]
        else:
            projection = self.attention.projection  # of "bilinear"
            query: Tensor = states if projection is None else projection(states)
            query = query.view(len(states), heads, -1)  # [N, heads, d / heads]
            if self.config.attention == "scaled_dot":
                query = query / query.shape[-1] ** 0.5
            scores = torch.einsum("nhd,ihd->nhi", query, values) if heads > 1 else (query[:, 0] @ items.T)[:, None]
        weights: Tensor = scores.softmax(-1)
        if heads == 1:
            return weights[:, 0] @ items
        contexts: Tensor = torch.einsum("nhi,ihd->nhd", weights, values)  # [N, heads, d / heads]
        return contexts.flatten(1)

    def _scores(self, states: Tensor) -> Tensor:
        context = self._context(states)
        both = states if context is None else torch.cat((states, context), -1)
        user = self.output_dropout(ACTIVATIONS[self.config.activation](self.association.linear(both)))
        table = self.embedding if self.output is None else self.output
        return F.linear(user, table.weight, self.item_bias)  # [N, I]

    def _padded(self, ids: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        steps = torch.arange(ids.shape[1], device=ids.device)
        if lengths is None:
            lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        lengths = lengths.to(ids.device)
        return ids.masked_fill(steps >= lengths[:, None], 0), lengths, steps

    def loss(self, ids: Tensor, lengths: Tensor | None, target: Tensor, *, positions: str = "all") -> Tensor:
        """As :meth:`SequenceRecommender.loss` with ``target`` [B], or [B, T] with −100 for none."""
        ids, lengths, steps = self._padded(ids, lengths)
        final = steps == lengths[:, None] - 1
        wanted = target if target.dim() == 2 else torch.where(final, target[:, None], ids.roll(-1, 1))  # [B, T]
        keep = (steps < lengths[:, None] if positions == "all" else final) & (wanted != IGNORE)
        return F.cross_entropy(
            self._scores(self._states(ids)[keep]), wanted[keep], label_smoothing=self.config.label_smoothing
        )

    def logits(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores of every item after each history (of at least one item), [B, I]."""
        ids, lengths, _ = self._padded(ids, lengths)
        rows = torch.arange(len(ids), device=ids.device)
        return self._scores(self._states(ids)[rows, lengths - 1])

    @torch.no_grad()
    def recommend(self, ids: Tensor, lengths: Tensor | None = None, k: int = 10) -> tuple[Tensor, Tensor]:
        """The k best items that are not in the history, and their scores, [B, k]."""
        scores = self.logits(ids, lengths)
        ids, lengths, steps = self._padded(ids, lengths)
        seen = torch.where(steps < lengths[:, None], ids, ids[:, :1])  # the first item stands in for padding
        values, items = scores.scatter(1, seen.long(), -torch.inf).topk(k)
        return items, values
