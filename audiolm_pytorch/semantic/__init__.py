"""Semantic tokenizers: base classes, published encoders, and BEST-RQ with k-means, which is trained on audio only."""

from audiolm_pytorch.semantic.base import FrameEncoder, SemanticTokenizer
from audiolm_pytorch.semantic.best_rq.model import BestRQ, BestRQEncoder
from audiolm_pytorch.semantic.best_rq.training import BestRQTask, SemanticTokenizerTrainer
from audiolm_pytorch.semantic.kmeans_trainer import ClusterUsage, KMeansFit, KMeansTrainer
from audiolm_pytorch.semantic.pretrained import FairseqVQWav2Vec, HubertWithKmeans, TransformersEncoder, open_encoder
from audiolm_pytorch.semantic.runs import Runs, deduplicate, expand
from audiolm_pytorch.semantic.tokenizer import KMeansTokenizer

__all__ = [
    "BestRQ",
    "BestRQEncoder",
    "BestRQTask",
    "ClusterUsage",
    "FairseqVQWav2Vec",
    "FrameEncoder",
    "HubertWithKmeans",
    "KMeansFit",
    "KMeansTokenizer",
    "KMeansTrainer",
    "Runs",
    "SemanticTokenizer",
    "SemanticTokenizerTrainer",
    "TransformersEncoder",
    "deduplicate",
    "expand",
    "open_encoder",
]
