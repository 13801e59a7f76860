"""Semantic tokens: the protocol, and a tokenizer that learns from audio alone (BEST-RQ and k-means)."""

from audiolm_pytorch.semantic.best_rq import BestRQ, BestRQEncoder
from audiolm_pytorch.semantic.kmeans import ClusterUsage, KMeansFit, fit_kmeans
from audiolm_pytorch.semantic.protocol import FrameEncoder, SemanticTokenizer
from audiolm_pytorch.semantic.tokenizer import KMeansTokenizer
from audiolm_pytorch.semantic.training import BestRQTask, SemanticTokenizerTrainer

__all__ = [
    "BestRQ",
    "BestRQEncoder",
    "BestRQTask",
    "ClusterUsage",
    "FrameEncoder",
    "KMeansFit",
    "KMeansTokenizer",
    "SemanticTokenizer",
    "SemanticTokenizerTrainer",
    "fit_kmeans",
]
