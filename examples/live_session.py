"""Serve a session click by click: one recurrent step and one exact top-k per click, and a Markov model blended in.

python examples/live_session.py
"""

import torch

import seqrec_fast as sf
from seqrec_fast.data import evaluation_loader, leave_one_out, synthetic, train_loader
from seqrec_fast.models import Blend, Markov, SequenceRecommender
from seqrec_fast.training import evaluate, train_epoch


def main() -> None:
    torch.manual_seed(0)
    split = leave_one_out(synthetic(num_users=1000, num_items=500, mean_length=20))
    model = SequenceRecommender(split.num_items, embedding_dim=32, attention=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        train_epoch(model, train_loader(split, batch_size=64), optimizer)
    model.eval()

    lstm = model.encoder
    weights = (lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0)
    h = c = torch.zeros(1, 32)
    session = split.test.histories[0].tolist()
    with torch.no_grad():
        for item in session:  # as the clicks come in
            h, c = sf.lstm_step(model.embedding.weight[[item]], (h, c), *weights)
            user = model.association(h, None)
            best = sf.catalogue_topk(user, model.item_vectors, 5, bias=model.item_bias, exclude=torch.tensor([session]))
    print(f"after {len(session)} clicks:", best.indices[0].tolist())
    whole = model.recommend(torch.tensor([session]), k=5)
    print("the whole history at once:", whole.items[0].tolist())

    blend = Blend([model, Markov(split.num_items).fit(split.train)], weights=[0.5, 0.5], normalise="log_softmax")
    test = evaluation_loader(split, "test")
    print("alone:  ", evaluate(model, test))
    print("blended:", evaluate(blend, test))


if __name__ == "__main__":
    main()
