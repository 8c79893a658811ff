"""LSTMAttentionNet against nn.LSTM and the full nn.MultiheadAttention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seqrec_fast.models import LSTMAttentionNet


class Written(nn.Module):
    """The model as one would write it, every row of the attention included."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_heads: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_dim, hidden_dim, batch_first=True)
        self.attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.fc = nn.Linear(hidden_dim, output_dim)

    def forward(self, x):
        states, _ = self.lstm(x)
        return self.fc(self.attention(states, states, states)[0][:, -1])


@pytest.fixture
def nets() -> tuple[LSTMAttentionNet, Written]:
    net, written = LSTMAttentionNet(5, 12, 3, 4).double(), Written(5, 12, 3, 4).double()
    written.load_state_dict(net.state_dict())
    return net, written


def test_values_and_gradients(nets):
    net, written = nets
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    target = torch.tensor([0, 2, 1])
    for model in nets:
        nn.functional.cross_entropy(model(x), target).backward()
    torch.testing.assert_close(net(x), written(x), rtol=0, atol=1e-12)
    for (name, ours), theirs in zip(net.named_parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_every_row_is_as_it_would_be_alone(nets):
    net, written = nets
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    lengths = torch.tensor([6, 1, 0, 4])
    x[torch.arange(6) >= lengths[:, None]] = torch.nan  # padding is never looked at
    x = x.nan_to_num(1e6)
    together = net(x, lengths)
    for row in (0, 1, 3):
        alone = written(x[row : row + 1, : lengths[row]])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-12)
    no_steps = net(x[:1, :0])
    torch.testing.assert_close(together[2:3], no_steps, rtol=0, atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match=r"num_heads must divide hidden_dim \(10\), got 4"):
        LSTMAttentionNet(5, 10, 3, 4)
    with pytest.raises(ValueError, match="output_dim must be at least 1, got 0"):
        LSTMAttentionNet(5, 8, 0, 4)
    with pytest.raises(ValueError, match=r"x must have shape \[B, T, input_dim = 5\], got \(2, 3, 4\)"):
        LSTMAttentionNet(5, 8, 3, 4)(torch.zeros(2, 3, 4))
