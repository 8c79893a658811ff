"""The parts of the recommender that are not operators: causal CNN, attention functions, activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seqrec_fast.ops.catalogue_attention import catalogue_attention
from seqrec_fast.ops.catalogue_topk import catalogue_topk

from .config import ActivationName, AttentionName

ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class CausalCNN(nn.Module):
    """Residual blocks of a causal convolution whose dilation doubles: x ← x + dropout(relu(conv(norm(x)))).

    Step t sees steps t − (kernel_size − 1)(2^num_layers − 1) … t only (Yuan et al. 2019, "A simple convolutional
    generative network for next item recommendation", one convolution a block). O(B·T·hidden²·kernel_size·layers).

    Example:
        >>> CausalCNN(8, 16, num_layers=2, kernel_size=3, dropout=0.0)(torch.randn(4, 7, 8)).shape
        torch.Size([4, 7, 16])
    """

    def __init__(self, input_dim: int, hidden_dim: int, num_layers: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.input = nn.Linear(input_dim, hidden_dim)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(num_layers))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(hidden_dim, hidden_dim, kernel_size, dilation=2**layer) for layer in range(num_layers)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)  # [B, T, H]
        if x.shape[1] == 0:  # a convolution refuses what is shorter than its kernel
            return x
        for layer, (norm, convolution) in enumerate(zip(self.norms, self.convolutions, strict=True)):
            past = (self.kernel_size - 1) * 2**layer
            y = F.pad(norm(x).mT, (past, 0))  # [B, H, past + T]
            x = x + self.dropout(F.relu(convolution(y)).mT)
        return x


class ProductAttention(nn.Module):
    """Catalogue attention whose score is an inner product: ``dot``, ``scaled_dot`` or ``bilinear``.

    ``bilinear`` is h·W·vᵢ = (Wᵀh)·vᵢ, so it is the fused operator on a projected query. W starts as identity/√d_head:
    the softmax over the catalogue is then as soft as that of ``scaled_dot``.
    """

    def __init__(self, name: AttentionName, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_scale = 1 / math.sqrt(width // num_heads)
        self.scale = self.head_scale if name == "scaled_dot" else 1.0
        self.projection = nn.Linear(width, width, bias=False) if name == "bilinear" else None

    def reset_parameters(self) -> None:
        if self.projection is not None:
            nn.init.eye_(self.projection.weight)
            with torch.no_grad():
                self.projection.weight.mul_(self.head_scale)

    def query(self, state: Tensor) -> Tensor:
        return state if self.projection is None else self.projection(state)

    def forward(self, state: Tensor, items: Tensor) -> Tensor:
        """g = Σ aᵢ vᵢ for states [..., d] over items [I, d]: [..., d]."""
        return catalogue_attention(self.query(state), items, num_heads=self.num_heads, scale=self.scale)

    def largest_weights(self, state: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k items with the largest weight for states [B, d]: ids and weights [B, heads, k]."""
        query = self.query(state)
        _, lse = catalogue_attention(query, items, num_heads=self.num_heads, scale=self.scale, return_lse=True)
        lse = lse.view(len(state), self.num_heads)
        top = [
            catalogue_topk(q.contiguous(), v.contiguous(), k, scale=self.scale)
            for q, v in zip(query.chunk(self.num_heads, -1), items.chunk(self.num_heads, -1), strict=True)
        ]
        scores = torch.stack([head.values for head in top], 1)  # [B, heads, k]
        ids = torch.stack([head.indices for head in top], 1)
        return ids, torch.exp(scores - lse[..., None])


class AdditiveAttention(nn.Module):
    """Catalogue attention with the score w·tanh(W_h·h + W_v·vᵢ) (Bahdanau et al. 2015), in plain PyTorch.

    There is no product to fuse: every pair of a state and an item costs d tanh. The pairs go through in chunks that are
    recomputed in the backward, so memory is one chunk plus the scores [B, heads, I]; O(B·I·d) tanh.
    """

    ITEMS_AT_ONCE = 1024  # 128 states × 1024 items × 64 = 32 MiB in fp32

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.state = nn.Linear(width, width)
        self.item = nn.Linear(width, width, bias=False)
        self.score = nn.Parameter(torch.empty(num_heads, width // num_heads))

    def reset_parameters(self) -> None:
        for layer in (self.state, self.item):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.state.bias)
        nn.init.normal_(self.score, std=1 / math.sqrt(self.score.shape[1]))

    def _pair_scores(self, state: Tensor, items: Tensor) -> Tensor:
        pairs = torch.tanh(state[:, None] + items)  # [B, I', d]
        by_head: Tensor = pairs.unflatten(-1, self.score.shape)  # [B, I', heads, d / heads]
        return (by_head * self.score).sum(-1)  # [B, I', heads]

    def weights(self, state: Tensor, items: Tensor) -> Tensor:
        """aᵢ for states [B, d] over items [I, d]: [B, heads, I]."""
        projected = self.state(state)
        chunks = []
        for keys in self.item(items).split(self.ITEMS_AT_ONCE):
            if torch.is_grad_enabled():
                chunks.append(checkpoint(self._pair_scores, projected, keys, use_reentrant=False))
            else:
                chunks.append(self._pair_scores(projected, keys))
        scores = torch.cat(chunks, 1)  # [B, I, heads]
        # the normalisation at least in fp32, also under autocast
        return torch.softmax(scores, 1, dtype=torch.promote_types(scores.dtype, torch.float32)).mT

    def forward(self, state: Tensor, items: Tensor) -> Tensor:
        """g = Σ aᵢ vᵢ for states [B, d] over items [I, d]: [B, d]."""
        values = items.unflatten(-1, (self.num_heads, -1))  # [I, heads, d / heads]
        weights = self.weights(state, items).to(items.dtype)
        return torch.einsum("bhi,ihd->bhd", weights, values).flatten(1)

    def largest_weights(self, state: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k items with the largest weight for states [B, d]: ids and weights [B, heads, k]."""
        top = self.weights(state, items).topk(k)
        return top.indices, top.values


class Association(nn.Module):
    """p = σ(W·[h; g] + b), or σ(W·h + b) without a context (design of attention-based recommenders, e.g. Luong 2015).

    W starts as [identity, small]: at first p is σ of the state alone, and the context is learned as a correction to it.
    """

    CONTEXT_STD = 0.02

    def __init__(self, width: int, activation: ActivationName, *, with_context: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width if with_context else width, width)
        self.activation = activation

    def reset_parameters(self) -> None:
        width = self.linear.out_features
        nn.init.normal_(self.linear.weight, std=self.CONTEXT_STD)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.weight[:, :width].copy_(torch.eye(width))

    def forward(self, state: Tensor, context: Tensor | None) -> Tensor:
        both = state if context is None else torch.cat((state, context.to(state.dtype)), -1)  # [..., 2d]
        return ACTIVATIONS[self.activation](self.linear(both))
