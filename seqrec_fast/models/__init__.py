"""Models made of the operators, the floors they are measured against, and the stock model they are compared with."""

from ._checkpoint import load
from ._ranking import LogitModel, Recommendations
from .baselines import Markov, Popularity
from .blend import Blend
from .config import RecommenderConfig
from .lstm_attention import LSTMAttentionNet
from .sequence_recommender import Explanation, SequenceRecommender
from .stock import StockRecommender

__all__ = [
    "Blend",
    "Explanation",
    "LSTMAttentionNet",
    "LogitModel",
    "Markov",
    "Popularity",
    "Recommendations",
    "RecommenderConfig",
    "SequenceRecommender",
    "StockRecommender",
    "load",
]
