"""One line changed: the layers of an existing model replaced, its checkpoint kept.

python examples/drop_in.py
"""

import torch
from torch import nn

import seqrec_fast as sf


class Tagger(nn.Module):
    """Any model with a stock LSTM and a full softmax over items."""

    def __init__(self, lstm_class: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        self.lstm = lstm_class(64, 64, batch_first=True)
        self.items = nn.Linear(64, 1000)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lstm(self.embedding(ids))[0]  # [B, T, 64]


def main() -> None:
    torch.manual_seed(0)
    stock, fused = Tagger(nn.LSTM), Tagger(sf.LSTM)
    fused.load_state_dict(stock.state_dict())  # same names, same shapes

    ids, target = torch.randint(1000, (8, 20)), torch.randint(1000, (8, 20))
    by_torch = nn.functional.cross_entropy(stock.items(stock.states(ids)).flatten(0, 1), target.flatten())
    # the same loss without the [8 * 20, 1000] array of logits
    by_us = sf.catalogue_cross_entropy(fused.states(ids), fused.items.weight, target, bias=fused.items.bias)
    by_torch.backward()
    by_us.backward()
    print(f"loss: {by_torch:.6f} (stock) and {by_us:.6f}")
    gap = max((a.grad - b.grad).abs().max() for a, b in zip(stock.parameters(), fused.parameters(), strict=True))
    print(f"largest difference of a gradient: {gap:.1e}")

    # serving: the ten best items, without those of the history, and without a [B, items] array
    best = sf.catalogue_topk(fused.states(ids)[:, -1], fused.items.weight, 10, bias=fused.items.bias, exclude=ids)
    print("recommended to the first user:", best.indices[0].tolist())


if __name__ == "__main__":
    main()
