"""``CatalogueAttention`` and ``CatalogueCrossEntropyLoss``: the catalogue operators with their options held by a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._logits import check_float
from ..ops.catalogue_attention import catalogue_attention, check_num_heads
from ..ops.catalogue_cross_entropy import catalogue_cross_entropy, check_options


class CatalogueAttention(nn.Module):
    """Softmax attention of query rows over a whole catalogue: :func:`seqrec_fast.catalogue_attention` as a module. No parameters.

    Args:
        num_heads: parts that d and d_v are split into.
        scale: of every score; ``forward`` takes one for each row instead.
        return_lse: also return log Σᵢ exp(s[r, i]).

    Raises:
        TypeError, ValueError: as the operator, for the options here already.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> attend = sf.CatalogueAttention(num_heads=2, scale=0.25)
        >>> attend(torch.randn(4, 16), torch.randn(1000, 16)).shape
        torch.Size([4, 16])
    """

    def __init__(self, num_heads: int = 1, *, scale: float = 1.0, return_lse: bool = False) -> None:
        super().__init__()
        self.num_heads, self.return_lse = check_num_heads(num_heads), return_lse
        self.scale = check_float("CatalogueAttention", "scale", scale)

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        bias: Tensor | None = None,
        exclude: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """context [..., d_v], or (context, lse).

        Args:
            query: [..., d].
            keys: [I, d].
            values: [I, d_v]; default: the keys.
            scale: in place of the module's.
            bias, exclude: as the operator's.
        """
        chosen = self.scale if scale is None else scale
        options: dict[str, Any] = {"num_heads": self.num_heads, "scale": chosen, "bias": bias, "exclude": exclude}
        context, lse = catalogue_attention(query, keys, values, return_lse=True, **options)
        return (context, lse) if self.return_lse else context

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, scale={self.scale}"


class CatalogueCrossEntropyLoss(nn.Module):
    """Cross-entropy over a whole catalogue: :func:`seqrec_fast.catalogue_cross_entropy` as a module. No parameters.

    ``torch.nn.CrossEntropyLoss()(query @ items.T, target)`` becomes ``CatalogueCrossEntropyLoss()(query, items, target)``.

    Args:
        ignore_index, label_smoothing, reduction: as torch's, but that a mean over no row is 0.
        scale: of every score; ``forward`` takes one for each row instead.
        smoothing_prior: [I], held as a buffer.
        return_lse, sparse_grad, skip_mass, return_skipped: as the operator's.

    Raises:
        TypeError, ValueError: as the operator, for the options here already.

    Example:
        >>> import torch, seqrec_fast as sf
        >>> loss = sf.CatalogueCrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.randn(4, 16), torch.randn(1000, 16), torch.tensor([3, 999, -100, 0])).shape
        torch.Size([])
    """

    smoothing_prior: Tensor | None

    def __init__(
        self,
        *,
        scale: float = 1.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        smoothing_prior: Tensor | None = None,
        return_lse: bool = False,
        sparse_grad: bool = False,
        skip_mass: float = 0.0,
        return_skipped: bool = False,
    ) -> None:
        super().__init__()
        options = check_options(reduction, label_smoothing, skip_mass, ignore_index)
        self.label_smoothing, self.skip_mass, self.ignore_index = options
        self.scale = check_float("CatalogueCrossEntropyLoss", "scale", scale)
        self.reduction, self.return_lse, self.return_skipped = reduction, return_lse, return_skipped
        self.sparse_grad = sparse_grad
        self.register_buffer("smoothing_prior", smoothing_prior)

    def forward(
        self,
        query: Tensor,
        items: Tensor,
        target: Tensor,
        *,
        scale: float | Tensor | None = None,
        bias: Tensor | None = None,
        exclude: Tensor | None = None,
        target_weights: Tensor | None = None,
        negatives: Tensor | None = None,
        negatives_log_q: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The loss, then lse and the skipped mass as asked for.

        Args:
            query: [..., d].
            items: [I, d].
            target: int64 [...], [..., P] or ``torch.sparse_csr`` [B, I].
            scale: in place of the module's.
            bias, exclude, target_weights, negatives, negatives_log_q: as the operator's.
        """
        options: dict[str, Any] = {
            "bias": bias, "exclude": exclude, "ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing,
            "reduction": self.reduction, "return_lse": self.return_lse, "target_weights": target_weights,
            "smoothing_prior": self.smoothing_prior, "negatives": negatives, "negatives_log_q": negatives_log_q,
            "sparse_grad": self.sparse_grad, "skip_mass": self.skip_mass, "return_skipped": self.return_skipped,
        }  # fmt: skip
        chosen = self.scale if scale is None else scale
        result: Tensor | tuple[Tensor, ...] = catalogue_cross_entropy(query, items, target, scale=chosen, **options)
        return result

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, scale={self.scale}"
