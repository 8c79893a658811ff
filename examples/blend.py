"""Blend a trained recommender with a first-order Markov model: the weight is chosen on the validation targets, and tested once.

seqrec-fast train interactions.txt --out run
python examples/blend.py run
"""

import sys
from pathlib import Path

from seqrec_fast.data import EvaluationSet, Split, evaluation_loader, leave_one_out, load
from seqrec_fast.models import Blend, Markov, SequenceRecommender
from seqrec_fast.training import evaluate

WEIGHTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the recommender; the Markov model gets the rest


def blend(model: SequenceRecommender, part: EvaluationSet, weight: float) -> Blend:
    """Mixed probabilities, with a Markov model that counted what lies before the part's targets."""
    markov = Markov(model.num_items).fit(part.histories)
    return Blend([model, markov], weights=[weight, 1 - weight], normalise="softmax")


def choose(model: SequenceRecommender, split: Split) -> float:
    """The weight with the best NDCG@10 on the validation targets."""
    found = {}
    for weight in WEIGHTS:
        quality = evaluate(blend(model, split.validation, weight), evaluation_loader(split, "validation"))
        found[weight] = quality["NDCG@10"]
        print(f"validation, weight {weight:.1f}: NDCG@10 {found[weight]:.4f}", flush=True)
    return max(found, key=found.__getitem__)


def main(folder: str) -> None:
    model = SequenceRecommender.load(Path(folder) / "model.safetensors").eval()
    split = leave_one_out(load(Path(folder) / "data.npz"))
    weight = choose(model, split)
    print("test, recommender alone:", evaluate(model, evaluation_loader(split, "test")))
    print(f"test, blend at {weight:.1f}:", evaluate(blend(model, split.test, weight), evaluation_loader(split, "test")))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/blend.py RUN_FOLDER")
    for name in ("model.safetensors", "data.npz"):
        if not (Path(sys.argv[1]) / name).is_file():
            raise SystemExit(f"{sys.argv[1]} is not the folder of a trained run: {name} is missing")
    main(sys.argv[1])
