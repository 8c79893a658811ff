"""A sequence classifier: LSTM, multi-head self-attention over its states, one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqrec_fast.nn import LSTM

from ._histories import at_last, check_integer


class LSTMAttentionNet(nn.Module):
    """LSTM → multi-head self-attention over the sequence → linear layer, for the last valid step.

    The attention is ``softmax(Q·Kᵀ/√d_head)·V`` of Vaswani et al. 2017 over the LSTM's states. Only the last valid step's
    row of it reaches the result, so only that row is computed: O(T) instead of O(T²). The parameters are named as those of
    ``nn.LSTM``, ``nn.MultiheadAttention`` and ``nn.Linear`` under ``lstm``, ``attention`` and ``fc``.

    Args:
        input_dim: width of the input.
        hidden_dim: width of the LSTM; divisible by ``num_heads``.
        output_dim: number of logits.
        num_heads: attention heads.

    Raises:
        ValueError: a size below 1, or heads that do not divide ``hidden_dim``.

    Example:
        >>> import torch
        >>> net = LSTMAttentionNet(input_dim=8, hidden_dim=16, output_dim=5, num_heads=4)
        >>> net(torch.randn(3, 7, 8), lengths=torch.tensor([7, 2, 5])).shape
        torch.Size([3, 5])
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_heads: int) -> None:
        super().__init__()
        sizes = {
            "input_dim": input_dim,
            "hidden_dim": hidden_dim,
            "output_dim": output_dim,
            "num_heads": num_heads,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if hidden_dim % num_heads:
            raise ValueError(f"num_heads must divide hidden_dim ({hidden_dim}), got {num_heads}")
        self.lstm = LSTM(input_dim, hidden_dim, batch_first=True)
        self.attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.fc = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, output_dim] for sequences ``x`` [B, T, input_dim] with ``lengths`` [B] (None: all of length T).

        What stands beyond a length changes nothing. A sequence of length 0 has the logits of a zero state.

        Raises:
            TypeError: ``lengths`` not int64 or int32.
            ValueError: a wrong shape; on the CPU a length outside 0…T.
        """
        if x.dim() != 3 or x.shape[-1] != self.lstm.input_size:
            raise ValueError(f"x must have shape [B, T, input_dim = {self.lstm.input_size}], got {tuple(x.shape)}")
        batch, steps = x.shape[:2]
        states = self.lstm(x, lengths=lengths)[0]  # [B, T, H]
        if lengths is None:
            lengths = torch.full((batch,), steps, dtype=torch.int64, device=x.device)
        check_integer("lengths", lengths)
        lengths = lengths.to(x.device, non_blocking=True)
        last = at_last(states, lengths)  # [B, H]
        if steps == 0:
            states, steps = states.new_zeros(batch, 1, states.shape[2]), 1
        # the first step of an empty sequence is left visible: its state is 0, and a softmax needs one entry
        padding = torch.arange(steps, device=x.device) >= lengths.clamp(min=1)[:, None]  # [B, T]
        attended, _ = self.attention(last[:, None], states, states, key_padding_mask=padding, need_weights=False)
        logits: Tensor = self.fc(attended[:, 0])
        return logits
