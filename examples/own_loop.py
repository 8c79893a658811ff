"""Train and evaluate without Lightning: a loop of your own, two functions, one file of weights.

python examples/own_loop.py [weights.safetensors]
"""

import sys

import torch

from seqrec_fast.data import evaluation_loader, leave_one_out, synthetic, train_loader
from seqrec_fast.models import SequenceRecommender
from seqrec_fast.training import evaluate, train_epoch

EPOCHS = 3


def main(path: str | None = None) -> None:
    torch.manual_seed(0)
    split = leave_one_out(synthetic(num_users=1000, num_items=500, mean_length=20))
    print(split.summary())

    model = SequenceRecommender(split.num_items, embedding_dim=32, encoder="gru")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batches = train_loader(split, batch_size=64)
    for epoch in range(EPOCHS):
        loss = train_epoch(model, batches, optimizer, gradient_clip=5.0)
        quality = evaluate(model, evaluation_loader(split, "validation"))
        print(f"epoch {epoch + 1}: loss {loss:.3f}, validation NDCG@10 {quality['NDCG@10']:.4f}")

    print("test:", evaluate(model, evaluation_loader(split, "test")))
    print("test:", evaluate(model, evaluation_loader(split, "test", exclude_seen=False)))
    if path is not None:
        model.save(path)
        print(f"weights in {path}; SequenceRecommender.load reads them back exactly")


if __name__ == "__main__":
    main(*sys.argv[1:])
