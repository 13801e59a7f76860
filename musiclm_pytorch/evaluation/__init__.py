"""Evaluation of models: retrieval, zero-shot tagging, linear probes, novelty, and reports of metrics."""

from musiclm_pytorch.evaluation.metrics.novelty import melody_similarity, nearest_similarity
from musiclm_pytorch.evaluation.report import MetricValue, write_report
from musiclm_pytorch.evaluation.retrieval import Retrieval

__all__ = ["MetricValue", "Retrieval", "melody_similarity", "nearest_similarity", "write_report"]
