"""BEST-RQ: a self-supervised encoder that is trained on audio only (arXiv:2202.01855), and its trainer."""

from audiolm_pytorch.semantic.best_rq.model import BestRQ, BestRQEncoder
from audiolm_pytorch.semantic.best_rq.training import BestRQTask, SemanticTokenizerTrainer

__all__ = ["BestRQ", "BestRQEncoder", "BestRQTask", "SemanticTokenizerTrainer"]
